"""A search as rounds of a shuffle: index shards are searched apart, each for many queries, and merged by query.

    Unfinished      what a query shard still has to ask, and what it has found; lies in a file between two rounds
    Candidates      what was found for some queries in one index shard, or, `merged`, in several
    Chunks          what is known of candidates by their own shards: vectors, documents, clusters
    settled(...)    candidates -> the neighbours that are certain, and what to ask again, as an `Unfinished` part

A query passes through the same asks as in `retrodb.neighbours.find_neighbours`, so the result is the same to the bit.
What crosses a runner is arrays (``to_bytes``), never single candidates, and nothing is pickled.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Final, Self

import numpy as np

from retrodb.errors import DamagedError
from retrodb.index import MISSING, Metric, merge
from retrodb.neighbours.asking import Ask, Searched, asked_again, exhausted
from retrodb.neighbours.exclusion import (
    NO_CLUSTER,
    ClusterSource,
    ExcludedPairs,
    Exclusion,
    SameBlock,
    SameCluster,
    UidSource,
)
from retrodb.neighbours.select import select
from retrodb.neighbours.sources import DocumentSource, VectorSource, by_shard
from retrodb.neighbours.table import Neighbours

PIECE_BYTES: Final = 256 << 10
"""One `Candidates`: small, for a runner that combines before a shuffle holds up to 1,000 of them (Beam 2.77)."""

_BYTES_PER_CANDIDATE: Final = 4 + 8


@dataclass(frozen=True)
class _Arrays:
    """A record of arrays that can cross a runner or wait in a file."""

    def to_bytes(self) -> bytes:
        """Their types and shapes as one line of JSON, then the arrays, little-endian, one after the other."""
        arrays = [np.ascontiguousarray(getattr(self, field.name)) for field in fields(self)]
        little = [array.astype(array.dtype.newbyteorder("<"), copy=False) for array in arrays]
        header = json.dumps([type(self).__name__, [(array.dtype.str, array.shape) for array in little]])
        return b"".join([header.encode(), b"\n", *(array.reshape(-1).view(np.uint8).data for array in little)])

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The record, whose arrays share the memory of ``data`` and are read-only.

        Raises:
            DamagedError: the bytes are not such a record.
        """
        try:
            at = data.index(b"\n") + 1
            name, columns = json.loads(data[:at])
            if name != cls.__name__:
                raise ValueError(f"they are {name}")
            arrays = []
            for kind, shape in columns:
                dtype = np.dtype(str(kind))
                array = np.frombuffer(data, dtype, math.prod(shape), at).reshape(shape)
                at += array.nbytes
                arrays.append(array)
            if at != len(data) or len(arrays) != len(fields(cls)):
                raise ValueError(f"{at} bytes were sent")
            return cls(*arrays)
        except (ValueError, TypeError) as error:
            raise DamagedError(f"{len(data)} bytes are no {cls.__name__} of a search: {error}.") from error


@dataclass(frozen=True)
class Queries(_Arrays):
    """What has to be known of queries to choose among their candidates.

    Attributes:
        vectors: float16 [q, d].
        first, last: int64 [q], the chunk ids that are excluded: ``first <= id < last``.
        clusters: int64 [q], whose chunks are excluded as well; `NO_CLUSTER` for none.
        uids: int64 [q], of blocks, whose equals are excluded as well; of chunks 0.
    """

    vectors: np.ndarray
    first: np.ndarray
    last: np.ndarray
    clusters: np.ndarray
    uids: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    def take(self, rows: np.ndarray | slice) -> "Queries":
        """Of some of the queries."""
        columns = (self.first[rows], self.last[rows], self.clusters[rows], self.uids[rows])
        return Queries(np.asarray(self.vectors[rows]), *columns)

    @property
    def exclusion(self) -> Exclusion:
        """By id; without clusters, which only the candidates' own shards know."""
        return Exclusion(self.first, self.last, np.arange(len(self), dtype=np.int64))

    def without(self, deleted: ExcludedPairs | None) -> Exclusion:
        """By id, and what is ``deleted``: none of it needs to be looked up."""
        return self.exclusion if deleted is None else self.exclusion.also(deleted)


@dataclass(frozen=True)
class Candidates(_Arrays):
    """What was found for the queries of one piece of an `Ask`.

    Attributes:
        rows: int64 [q], rows of the query shard.
        asked: int64 [2], candidates and nprobe of the `Ask`.
        raw: float32 [q, c], raw distances, nearest first.
        ids: int64 [q, c], chunk ids; -1 where there are fewer.
        queries: `Queries` of these rows as bytes, uint8; empty but in what one of the index shards gives.
    """

    rows: np.ndarray
    asked: np.ndarray
    raw: np.ndarray
    ids: np.ndarray
    queries: np.ndarray

    @property
    def ask(self) -> Ask:
        """What these queries were asked."""
        return Ask(self.rows, int(self.asked[0]), int(self.asked[1]))


def candidates_of(ask: Ask, found: tuple[np.ndarray, np.ndarray], queries: Queries | None) -> Candidates:
    """A search's answer (raw distances and ids) to an ask."""
    data = queries.to_bytes() if queries is not None else b""
    return Candidates(
        ask.rows, np.array([ask.candidates, ask.nprobe], dtype=np.int64), *found, np.frombuffer(data, dtype=np.uint8)
    )


def merged(parts: Sequence[Candidates], metric: Metric) -> Candidates:
    """What several index shards gave for the same piece, as one big index gives it. In any order, nested anyhow.

    Raises:
        DamagedError: the parts are not of one ask.
    """
    first = parts[0]
    if any(not (np.array_equal(p.rows, first.rows) and np.array_equal(p.asked, first.asked)) for p in parts[1:]):
        raise DamagedError("candidates of different queries came together in a search. Run the build again.")
    raw, ids = merge([(part.raw, part.ids) for part in parts], int(first.asked[0]), metric)
    return replace(first, raw=raw, ids=ids, queries=max((part.queries for part in parts), key=len))


def piece_rows(candidates: int, dimension: int) -> int:
    """Queries in one `Candidates`, at least one."""
    return max(1, PIECE_BYTES // (candidates * _BYTES_PER_CANDIDATE + 2 * dimension + 32))


def ask_bytes(ask: Ask, dimension: int, fetched: bool) -> int:
    """What a shuffle carries for ``ask`` once merged, about; ``fetched``: with the candidates' vectors."""
    return len(ask) * (ask.candidates * (_BYTES_PER_CANDIDATE + fetched * (2 * dimension + 24)) + 2 * dimension + 32)


# -- between two rounds ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unfinished(_Arrays):
    """Queries with the neighbours that are certain, and what those without are asked next.

    Attributes:
        rows: int64 [n], rows of the query shard, one of each.
        neighbour_ids, neighbour_document_ids, distances, n_valid: as in `Neighbours`, [n, k] and [n].
        candidates: int64 [n], asked next; 0 where the query is done.
        nprobe: int64 [n], likewise.
    """

    rows: np.ndarray
    neighbour_ids: np.ndarray
    neighbour_document_ids: np.ndarray
    distances: np.ndarray
    n_valid: np.ndarray
    candidates: np.ndarray
    nprobe: np.ndarray

    @staticmethod
    def start(queries: int, k: int, asks: Iterable[Ask]) -> "Unfinished":
        """A query shard of which nothing is known yet."""
        rows = np.arange(queries, dtype=np.int64)
        return Unfinished.of(rows, Neighbours.none(rows, k), asks)

    @staticmethod
    def of(rows: np.ndarray, found: Neighbours, asks: Iterable[Ask]) -> "Unfinished":
        """Neighbours of ascending ``rows``, and what some of the rows are asked."""
        candidates, nprobe = np.zeros((2, len(rows)), dtype=np.int64)
        for ask in asks:
            places = np.searchsorted(rows, ask.rows)
            candidates[places], nprobe[places] = ask.candidates, ask.nprobe
        return Unfinished(
            rows,
            found.neighbour_ids,
            found.neighbour_document_ids,
            found.distances,
            found.n_valid,
            candidates,
            nprobe,
        )

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to ask."""
        return not self.candidates.any()

    def asks(self) -> Iterator[Ask]:
        """All that is to be asked, cheapest first."""
        some = np.flatnonzero(self.candidates)
        for candidates, nprobe in np.unique(np.stack([self.candidates[some], self.nprobe[some]], axis=1), axis=0):
            same = some[(self.candidates[some] == candidates) & (self.nprobe[some] == nprobe)]
            yield Ask(self.rows[same], int(candidates), int(nprobe))

    def share(self, budget_bytes: int, dimension: int, fetched: bool) -> list[Ask]:
        """What is asked in the next round: as much as `ask_bytes` allows, at least one query."""
        share: list[Ask] = []
        for ask in self.asks():
            one = ask_bytes(ask.of(ask.rows[:1]), dimension, fetched)
            rows = ask.rows[: max(budget_bytes // one, 0 if share else 1)]
            if len(rows):
                share.append(ask.of(rows))
            budget_bytes -= one * len(rows)
            if len(rows) < len(ask):
                break
        return share

    def updated(self, parts: Iterable["Unfinished"]) -> "Unfinished":
        """With what a round gave for some of the rows."""
        columns = {field.name: getattr(self, field.name).copy() for field in fields(self)}
        for part in parts:
            for name, column in columns.items():
                column[part.rows] = getattr(part, name)
        return Unfinished(**columns)

    def neighbours(self, chunk_ids: np.ndarray) -> Neighbours:
        """The finished result of the query shard with these chunk ids, int64 [n]."""
        assert self.is_done
        return Neighbours(chunk_ids, self.neighbour_ids, self.neighbour_document_ids, self.distances, self.n_valid)


# -- choosing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunks(_Arrays):
    """Chunks of the database as `VectorSource`, `DocumentSource` and `ClusterSource`.

    Attributes:
        ids: int64 [n], ascending.
        vectors: float16 [n, d].
        documents: int64 [n].
        clusters: int64 [n], `NO_CLUSTER` for none, or where nobody asks.
        uids: int64 [n], of blocks; of chunks 0.
    """

    ids: np.ndarray
    vectors: np.ndarray
    documents: np.ndarray
    clusters: np.ndarray
    uids: np.ndarray

    @staticmethod
    def joined(parts: Sequence["Chunks"], dimension: int) -> "Chunks":
        """Of several shards, in any order."""
        nothing = np.empty(0, np.int64)
        parts = [*parts, Chunks(nothing, np.empty((0, dimension), np.float16), nothing, nothing, nothing)]
        order = np.argsort(np.concatenate([part.ids for part in parts]), kind="stable")
        return Chunks(*(np.concatenate([getattr(p, f.name) for p in parts])[order] for f in fields(Chunks)))

    def take(self, ids: np.ndarray) -> "Chunks":
        """Some of them, by ascending ids.

        Raises:
            DamagedError: one of them is not here.
        """
        places = self._places(ids)
        columns = (self.documents[places], self.clusters[places], self.uids[places])
        return Chunks(ids, np.asarray(self.vectors[places]), *columns)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        return self.vectors[self._places(ids)]

    def document_ids(self, ids: np.ndarray) -> np.ndarray:
        return self.documents[self._places(ids)]

    def cluster_ids(self, ids: np.ndarray) -> np.ndarray:
        return self.clusters[self._places(ids)]

    def uid_keys(self, ids: np.ndarray) -> np.ndarray:
        return self.uids[self._places(ids)]

    def _places(self, ids: np.ndarray) -> np.ndarray:
        places = np.searchsorted(self.ids, ids)
        known = places < len(self.ids)
        known[known] = self.ids[places[known]] == ids[known]
        if not known.all():
            raise DamagedError(
                f"chunk {int(ids[~known][0])} was found by a search, but is not in its shard. Verify the database."
            )
        return places


def wanted_chunks(found: Candidates, deleted: ExcludedPairs | None = None) -> dict[int, np.ndarray]:
    """By chunk shard: the ids, int64 ascending, of the candidates that are neither excluded by id nor ``deleted``."""
    queries = Queries.from_bytes(found.queries.tobytes())
    ids = np.unique(found.ids[queries.without(deleted).allowed(found.ids)])
    parts: dict[int, np.ndarray] = {}

    def take(shard: int, own: np.ndarray) -> np.ndarray:
        parts[shard] = own
        return own

    by_shard(ids, take, ids)
    return parts


def settled(
    found: Candidates,
    index: Searched,
    vectors: VectorSource,
    documents: DocumentSource,
    clusters: ClusterSource,
    k: int,
    metric: Metric,
    uids: UidSource | None = None,
    deleted: ExcludedPairs | None = None,
) -> Unfinished:
    """Choose among merged candidates.

    Args:
        found: from all index shards.
        index: what was searched.
        vectors, documents, clusters: of the candidates; the last only where a query has a cluster.
        k: neighbours wanted.
        metric: ``l2`` or ``ip``.
        uids: of the candidates, where they are blocks.
        deleted: which candidates are; nothing is looked up of them.
    """
    queries = Queries.from_bytes(found.queries.tobytes())
    own = queries.vectors.astype(np.float32)
    exclusion = queries.without(deleted)
    if (queries.clusters != NO_CLUSTER).any():
        exclusion = exclusion.also(SameCluster(queries.clusters, clusters))
    if uids is not None:
        exclusion = exclusion.also(SameBlock(queries.uids, np.ones(len(queries), dtype=bool), uids))
    chosen = select(
        own,
        exclusion,
        found.raw,
        found.ids,
        exhausted(found.ids, found.ask, index),
        vectors=vectors,
        k=k,
        metric=metric,
        raw_is_exact=index.raw_is_exact,
        largest_norm=index.largest_norm,
        uids=uids,
    )
    done, again = asked_again(found.ask, chosen.satisfied, chosen.n_valid, k, index)
    result = Neighbours.none(found.rows, k)
    result.neighbour_ids[done] = chosen.ids[done]
    result.distances[done] = chosen.distances[done]
    result.n_valid[done] = chosen.n_valid[done]
    valid = result.neighbour_ids != MISSING
    result.neighbour_document_ids[valid] = documents.document_ids(result.neighbour_ids[valid])
    return Unfinished.of(found.rows, result, again)
