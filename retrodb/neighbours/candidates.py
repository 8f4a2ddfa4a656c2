"""What a REALM trainer asks a database of blocks: for each query the null document, and the best blocks it may have.

Slot 0 is the null document, always, and counts in k; the others are the best allowed blocks by the database's metric,
best first, scored exactly from the stored vectors. What a query may not have is told by what it comes from (`Origin`).
The search goes deeper until all slots are filled or the index is exhausted; what was excluded never comes back, equal
blocks count once, and a query is kept however many it finds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from retrodb.errors import InputError
from retrodb.index import MISSING
from retrodb.neighbours.exclusion import NO_CLUSTER, Exclusion, SameBlock, UidSource
from retrodb.neighbours.sources import DocumentSource, StoredClusters, StoredDocuments
from retrodb.sizes import count_of

Exclude = Literal["self", "document", "neardup"]
EXCLUDES: Final[tuple[Exclude, ...]] = ("self", "document", "neardup")

NOT_FROM_HERE: Final = -1
"""The chunk or document id of a query that comes from no block, or no document, of the database."""


@dataclass(frozen=True)
class CandidateBatch:
    """The candidates of q queries in k slots; slot 0 is the null document.

    Attributes:
        ids: int64 [q, k], chunk ids; `retrodb.schemas.NULL_ID` in slot 0, -1 where there are fewer.
        document_ids: int64 [q, k]; -1 in slot 0 and where there are fewer.
        scores: float32 [q, k], inner products (descending from slot 1 on) or squared L2 distances (ascending) of the
            query with the stored vectors, the null document's too; NaN where there are fewer.
        n_valid: int16 [q], blocks found: k - 1 at most. The null document is not counted.
        vectors: float16 [q, k, d], the stored vectors, slot 0 the null document's; 0 where there are fewer. None unless
            asked for.
        tokens: uint16 or uint32 [q, k, budget], bodies without special tokens, padded with 0; slot 0 is empty. None
            unless asked for, as the following.
        n_tokens: int16 [q, k], valid ones.
        title_tokens: [q, k, t] likewise, t the longest title here.
        n_title_tokens: int16 [q, k].
    """

    ids: np.ndarray
    document_ids: np.ndarray
    scores: np.ndarray
    n_valid: np.ndarray
    vectors: np.ndarray | None = None
    tokens: np.ndarray | None = None
    n_tokens: np.ndarray | None = None
    title_tokens: np.ndarray | None = None
    n_title_tokens: np.ndarray | None = None

    @property
    def present(self) -> np.ndarray:
        """bool [q, k]: slots that hold a candidate, the null document's among them."""
        present: np.ndarray = self.ids != MISSING
        return present


@dataclass(frozen=True)
class Origin:
    """What queries come from, so that they do not find it.

    Attributes:
        chunk_ids: int64 [q], the query's own block; `NOT_FROM_HERE` for none.
        pairs: int64 [p, 2], (query, document id): documents it comes from; several where a key repeats.
        named: bool [q], whether its block was told, be it one that is no longer there.
    """

    chunk_ids: np.ndarray
    pairs: np.ndarray
    named: np.ndarray

    @staticmethod
    def of(
        queries: int,
        chunk_ids: np.ndarray | Sequence[int] | None,
        document_ids: np.ndarray | Sequence[int] | None,
        of_keys: np.ndarray,
        documents: StoredDocuments,
    ) -> "Origin":
        """Of q queries, by any of: their blocks, their documents, and (query, document id) pairs int64 [p, 2].

        A block or document that is not there stands for none: one who follows a database has ids of the version before,
        which a swap or a compaction took away.

        Raises:
            InputError: there are not as many as queries, or one is no id.
        """
        blocks = _ids("own_chunks", queries, chunk_ids)
        own = _ids("own_documents", queries, document_ids)
        pairs = [of_keys]
        named = blocks != NOT_FROM_HERE
        blocks[named] = np.where(documents.has(blocks[named]), blocks[named], NOT_FROM_HERE)
        rows = np.flatnonzero(blocks != NOT_FROM_HERE)
        pairs.append(np.stack([rows, documents.document_ids(blocks[rows])], axis=1))
        rows = np.flatnonzero(own != NOT_FROM_HERE)
        pairs.append(np.stack([rows, own[rows]], axis=1))
        return Origin(blocks, np.unique(np.concatenate(pairs), axis=0), named)

    def exclusion(
        self, exclude: Exclude, documents: DocumentSource, clusters: StoredClusters, uids: UidSource
    ) -> Exclusion:
        """What these queries may not have.

        Raises:
            InputError: ``self`` for queries of which only the document is known.
        """
        known = self.chunk_ids != NOT_FROM_HERE
        nothing = Exclusion.of_nothing(len(self.chunk_ids))
        found = replace(nothing, first=np.where(known, self.chunk_ids, 0), last=np.where(known, self.chunk_ids + 1, 0))
        if known.any():
            own = np.zeros(len(known), dtype=np.int64)
            own[known] = uids.uid_keys(self.chunk_ids[known])
            found = found.also(SameBlock(own, known, uids))
        if exclude == "self":
            if not self.named[self.pairs[:, 0]].all():
                raise InputError(
                    "exclude='self' needs the query's own block (own_chunks); of a query that was cut otherwise "
                    "only the document is known: give exclude='document' or 'neardup'."
                )
            return found
        if len(self.pairs):
            found = found.also(_OneOf(self.pairs, documents.document_ids))
        if exclude == "neardup":
            of_pairs = clusters.of_named(self.pairs[:, 1])
            near = np.stack([self.pairs[:, 0], of_pairs], axis=1)[of_pairs != NO_CLUSTER]
            found = found.also(_OneOf(near, clusters.cluster_ids)) if len(near) else found
        return found


@dataclass(frozen=True)
class _OneOf:
    """A hook: pairs whose candidate has one of the query's own values, as ``value_of`` tells them.

    Attributes:
        pairs: int64 [p, 2], (query, value), p > 0.
        value_of: int64 [n] chunk ids -> int64 [n] values.
    """

    pairs: np.ndarray
    value_of: Callable[[np.ndarray], np.ndarray]

    def __call__(self, rows: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        unique, inverse = np.unique(candidates, return_inverse=True)
        found = self.value_of(unique)[inverse]
        values = np.unique(self.pairs[:, 1])
        places = np.minimum(np.searchsorted(values, found), len(values) - 1)
        own = self.pairs[:, 0] * len(values) + np.searchsorted(values, self.pairs[:, 1])
        excluded: np.ndarray = (values[places] == found) & np.isin(rows * len(values) + places, own)
        return excluded


def _ids(name: str, queries: int, given: np.ndarray | Sequence[int] | None) -> np.ndarray:
    if given is None:
        return np.full(queries, NOT_FROM_HERE, dtype=np.int64)
    ids = np.array(given)
    if ids.dtype.kind not in "iu" and ids.size:
        raise InputError(f"{name} holds {ids.ravel()[0]!r}, which is no id: give whole numbers, -1 for none.")
    ids = ids.astype(np.int64)
    if ids.shape != (queries,):
        raise InputError(
            f"{name} has shape {ids.shape} for {count_of(queries, 'query', 'queries')}: give one each, -1 for none."
        )
    if (wrong := ids < NOT_FROM_HERE).any():
        raise InputError(f"{name} holds {int(ids[wrong][0])}, which is no id: give -1 for none.")
    return ids
