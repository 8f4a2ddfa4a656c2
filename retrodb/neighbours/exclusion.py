"""What may not be a neighbour of what: by id, never by rank or by file name (invariant 1)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal, Protocol

import numpy as np

from retrodb.errors import DamagedError

Exclude = Literal["document", "cluster", "none"]

NO_CLUSTER: Final = np.iinfo(np.int64).min
"""Stands for the null of a document that is a cluster of one."""

ExcludedPairs = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""``hook(query rows int64 [p], candidate ids int64 [p]) -> bool [p]``, True where the pair is excluded: near-duplicate
clusters, deleted documents. Rows number the queries of the `Exclusion` as it was made."""


class ClusterSource(Protocol):
    """Near-duplicate clusters by chunk id."""

    def cluster_ids(self, ids: np.ndarray) -> np.ndarray:
        """int64 [n] for int64 [n] valid chunk ids; `NO_CLUSTER` where the document is a cluster of one."""


@dataclass(frozen=True)
class SameCluster:
    """The hook of ``exclude cluster``: pairs whose documents are near-duplicates.

    Attributes:
        clusters: int64 [q], of the queries; `NO_CLUSTER` where there is none.
        source: those of the candidates.
    """

    clusters: np.ndarray
    source: ClusterSource

    def __call__(self, rows: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        own = self.clusters[rows]
        same = own != NO_CLUSTER  # most documents are in none: nothing is looked up for them
        same[same] = self.source.cluster_ids(candidates[same]) == own[same]
        return same


class UidSource(Protocol):
    """What tells equal blocks, by chunk id."""

    def uid_keys(self, ids: np.ndarray) -> np.ndarray:
        """int64 [n] for int64 [n] valid chunk ids: the same for blocks of the same title and body."""


@dataclass(frozen=True)
class SameBlock:
    """The hook of blocks: an equal of the query's own block is that block, wherever it stands.

    Attributes:
        uids: int64 [q], of the queries, as `UidSource` tells them.
        known: bool [q], where a query has an own block.
        source: those of the candidates.
    """

    uids: np.ndarray
    known: np.ndarray
    source: UidSource

    def __call__(self, rows: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        same = self.known[rows]
        same[same] = self.source.uid_keys(candidates[same]) == self.uids[rows[same]]
        return same


@dataclass(frozen=True)
class AnyOf:
    """What one of several hooks excludes."""

    hooks: tuple[ExcludedPairs, ...]

    def __call__(self, rows: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        excluded = np.zeros(len(rows), dtype=bool)
        for hook in self.hooks:
            left = ~excluded
            excluded[left] = hook(rows[left], candidates[left])
        return excluded


@dataclass(frozen=True)
class Exclusion:
    """For each query the ids it may not have: ``first <= id < last``, and what ``hook`` says.

    An interval is enough, for a document never spans chunk shards, its chunks have consecutive ids, and a compaction
    takes ids away but never moves or reuses one.

    Attributes:
        first: int64 [q].
        last: int64 [q], one past the end; ``first`` where nothing is excluded.
        rows: int64 [q], the query's row as the hook knows it.
        hook: further excluded pairs.
    """

    first: np.ndarray
    last: np.ndarray
    rows: np.ndarray
    hook: ExcludedPairs | None = None

    @staticmethod
    def of_chunks(
        chunk_ids: np.ndarray, document_ids: np.ndarray, exclude: Exclude, hook: ExcludedPairs | None = None
    ) -> "Exclusion":
        """For the chunks of one chunk shard as queries of their own database.

        Args:
            chunk_ids: int64 [q], ascending: **all** chunks of the shard, or at least of each of its documents.
            document_ids: int64 [q].
            exclude: ``document``: every chunk of the query's document; ``none``: the query alone; ``cluster``: as
                ``document``, and what ``hook`` says.
            hook: further excluded pairs.

        Raises:
            DamagedError: the chunks of a document are not consecutive.
        """
        rows = np.arange(len(chunk_ids), dtype=np.int64)
        if exclude == "none":
            return Exclusion(chunk_ids, chunk_ids + 1, rows, hook)
        first, last = document_ranges(chunk_ids, document_ids)
        return Exclusion(first, last, rows, hook)

    @staticmethod
    def of_nothing(queries: int, hook: ExcludedPairs | None = None) -> "Exclusion":
        """For queries that are no chunks of the database: another corpus, a text someone typed."""
        nowhere = np.zeros(queries, dtype=np.int64)
        return Exclusion(nowhere, nowhere, np.arange(queries, dtype=np.int64), hook)

    def __len__(self) -> int:
        return len(self.first)

    def also(self, hook: ExcludedPairs) -> "Exclusion":
        """With what another hook excludes."""
        return replace(self, hook=hook if self.hook is None else AnyOf((self.hook, hook)))

    def take(self, queries: np.ndarray | slice) -> "Exclusion":
        """The exclusion of some of the queries."""
        return replace(self, first=self.first[queries], last=self.last[queries], rows=self.rows[queries])

    def allowed(self, candidates: np.ndarray) -> np.ndarray:
        """bool [q, c]: which candidate ids, int64 [q, c], may be neighbours. Negative ids never are."""
        inside = (candidates >= self.first[:, None]) & (candidates < self.last[:, None])
        allowed = (candidates >= 0) & ~inside
        if self.hook is not None:
            queries, columns = np.nonzero(allowed)
            allowed[queries, columns] = ~self.hook(self.rows[queries], candidates[queries, columns])
        return allowed


def document_ranges(chunk_ids: np.ndarray, document_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and one past the last chunk id of each chunk's document, both int64 [n].

    Args:
        chunk_ids: int64 [n], strictly ascending.
        document_ids: int64 [n].

    Raises:
        DamagedError: ids do not ascend, or the chunks of a document are not consecutive.
    """
    if len(chunk_ids) == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(document_ids)) + 1])
    if (np.diff(chunk_ids) <= 0).any() or len(np.unique(document_ids[starts])) != len(starts):
        raise DamagedError(
            f"the chunk shard that starts with chunk {int(chunk_ids[0])} does not hold its documents one after another "
            "with ascending chunk ids. Verify the database."
        )
    ends = np.concatenate([starts[1:], [len(chunk_ids)]])
    lengths = ends - starts
    return np.repeat(chunk_ids[starts], lengths), np.repeat(chunk_ids[ends - 1] + 1, lengths)
