"""Where neighbours come from: candidates from an index, vectors and document ids from stored shards."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrodb.chunking.duplicates import uid_keys, uid_matrix
from retrodb.errors import DamagedError
from retrodb.formats import File
from retrodb.neighbours.asking import Searched
from retrodb.neighbours.exclusion import NO_CLUSTER
from retrodb.neighbours.rerank import Tokens
from retrodb.recent import Recent
from retrodb.schemas import ID_SHIFT
from retrodb.sizes import count_of
from retrodb.storage import Storage

VECTOR_CACHE_BYTES: Final = 64 << 20
"""Embedding shards that a process keeps open, in bytes."""

_ROW_MASK: Final = (1 << ID_SHIFT) - 1


class CandidateSource(Searched, Protocol):
    """An index, or several behind one face: `retrodb.index.GroupedIndex`."""

    def search(self, queries: np.ndarray, candidates: int, nprobe: int) -> tuple[np.ndarray, np.ndarray]:
        """Raw distances float32 and chunk ids int64, both [q, c], nearest first; id -1 where there are fewer."""


class VectorSource(Protocol):
    """Stored vectors by chunk id."""

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """float16 [n, d] for int64 [n] valid chunk ids."""


class DocumentSource(Protocol):
    """Documents by chunk id."""

    def document_ids(self, ids: np.ndarray) -> np.ndarray:
        """int64 [n] for int64 [n] valid chunk ids."""


def by_shard(ids: np.ndarray, take: Callable[[int, np.ndarray], np.ndarray], empty: np.ndarray) -> np.ndarray:
    """What ``take(shard, its ids)`` gives for all ``ids``, in their order; each shard is asked once.

    Args:
        ids: int64 [n], none negative.
        take: returns an array of one row for each id it is given, all of one shard.
        empty: returned for n = 0.

    Raises:
        DamagedError: an id is negative; a missing neighbour must be masked before it is looked up.
    """
    if len(ids) == 0:
        return empty
    if int(ids.min()) < 0:
        raise DamagedError(f"{int(ids.min())} is not a chunk id; it must not be looked up.")
    shards = ids >> ID_SHIFT
    first = int(shards[0])
    if (shards == first).all():
        return take(first, ids)
    order = np.argsort(shards, kind="stable")
    bounds = np.flatnonzero(np.diff(shards[order])) + 1
    result: np.ndarray | None = None
    for part in np.split(order, bounds):
        rows = take(int(shards[part[0]]), ids[part])
        if result is None:
            result = np.empty((len(ids), *rows.shape[1:]), dtype=rows.dtype)
        result[part] = rows
    assert result is not None
    return result


@dataclass
class StoredDocuments:
    """`DocumentSource` over ``chunks`` shards, keeping the id columns of the last ones used.

    Attributes:
        storage: the database.
        paths: each chunk shard by its number, as `Storage` reads it.
        cache_bytes: bound on the columns kept; at least one shard is.
    """

    storage: Storage
    paths: Mapping[int, File]
    cache_bytes: int = 32 << 20

    def __post_init__(self) -> None:
        self._recent = Recent(self._read, _nbytes, self.cache_bytes)

    def document_ids(self, ids: np.ndarray) -> np.ndarray:
        """The document of each chunk, int64 [n].

        Raises:
            DamagedError: a chunk's shard or row does not exist.
        """
        return by_shard(
            ids, lambda shard, own: self._recent.get(shard)[1][self.locate(shard, own)], np.empty(0, np.int64)
        )

    def has(self, ids: np.ndarray) -> np.ndarray:
        """bool [n]: which of int64 [n] ids are of chunks that there are; not negative ones."""

        def of(shard: int, own: np.ndarray) -> np.ndarray:
            return self._rows(shard, own)[1] if shard in self.paths else np.zeros(len(own), dtype=bool)

        return by_shard(ids, of, np.empty(0, dtype=bool))

    def locate(self, shard: int, ids: np.ndarray) -> np.ndarray:
        """The rows of chunks ``ids``, all of ``shard``, in its files: not ``id & 0xffffffff`` once it was compacted.

        Raises:
            DamagedError: one of them does not exist.
        """
        rows, inside = self._rows(shard, ids)
        if not inside.all():
            where = self.storage.describe(self.paths[shard])
            raise DamagedError(f"chunk {int(ids[~inside][0])} does not exist in {where}. Verify the database.")
        return rows

    def _rows(self, shard: int, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows of chunks, and whether they are there."""
        chunk_ids, document_ids = self._recent.get(shard)
        rows = ids & _ROW_MASK if chunk_ids is None else np.searchsorted(chunk_ids, ids)
        inside = rows < len(document_ids)
        if chunk_ids is not None:
            inside[inside] = chunk_ids[rows[inside]] == ids[inside]
        return rows, inside

    def _read(self, shard: int) -> tuple[np.ndarray | None, np.ndarray]:
        """Chunk ids (None where they are dense) and document ids of a shard."""
        path = _recorded(self.paths, shard, "chunk")
        table = self.storage.read_table(path, columns=["chunk_id", "document_id"])
        chunk_ids = table["chunk_id"].to_numpy()
        dense = np.array_equal(chunk_ids, (shard << ID_SHIFT) + np.arange(len(chunk_ids), dtype=np.int64))
        return None if dense else chunk_ids, table["document_id"].to_numpy()

    def __reduce__(self) -> tuple[object, ...]:
        return StoredDocuments, (self.storage, self.paths, self.cache_bytes)


@dataclass
class StoredClusters:
    """`retrodb.neighbours.ClusterSource` over ``documents`` shards, keeping the columns of the last ones used.

    Attributes:
        documents: the document of each chunk.
        paths: each document shard by its number, likewise.
        cache_bytes: bound on the columns kept; at least one shard is.
    """

    documents: StoredDocuments
    paths: Mapping[int, File]
    cache_bytes: int = 32 << 20

    def __post_init__(self) -> None:
        self._recent = Recent(self._read, _nbytes, self.cache_bytes)

    def cluster_ids(self, ids: np.ndarray) -> np.ndarray:
        """The near-duplicate cluster of each chunk's document, int64 [n]; `NO_CLUSTER` for a cluster of one.

        Raises:
            DamagedError: a chunk or its document does not exist.
        """
        return by_shard(self.documents.document_ids(ids), self._take, np.empty(0, np.int64))

    def of_documents(self, document_ids: np.ndarray) -> np.ndarray:
        """The cluster of each document, int64 [n], likewise.

        Raises:
            DamagedError: a document does not exist.
        """
        return by_shard(document_ids, self._take, np.empty(0, np.int64))

    def of_named(self, document_ids: np.ndarray) -> np.ndarray:
        """As `of_documents`, of documents that somebody named: `NO_CLUSTER` also where there is no such document."""

        def take(shard: int, own: np.ndarray) -> np.ndarray:
            if shard not in self.paths:
                return np.full(len(own), NO_CLUSTER)
            clusters, there = self._find(shard, own)
            return np.where(there, clusters, NO_CLUSTER)

        return by_shard(document_ids, take, np.empty(0, np.int64))

    def _take(self, shard: int, document_ids: np.ndarray) -> np.ndarray:
        clusters, there = self._find(shard, document_ids)
        if not there.all():
            where = self.documents.storage.describe(self.paths[shard])
            raise DamagedError(f"{where} lacks a document that its chunks name. Verify the database.")
        return clusters

    def _find(self, shard: int, document_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The clusters of documents, and whether they are there: where not, the cluster is any."""
        known, clusters = self._recent.get(shard)
        if not len(known):
            return np.full(len(document_ids), NO_CLUSTER), np.zeros(len(document_ids), dtype=bool)
        rows = np.minimum(np.searchsorted(known, document_ids), len(known) - 1)
        return clusters[rows], known[rows] == document_ids

    def _read(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Document ids, ascending, and their clusters."""
        path = _recorded(self.paths, shard, "document")
        table = self.documents.storage.read_table(path, columns=["document_id", "cluster_id"])
        return table["document_id"].to_numpy(), clusters_of(table)

    def __reduce__(self) -> tuple[object, ...]:
        return StoredClusters, (self.documents, self.paths, self.cache_bytes)


@dataclass
class StoredUids:
    """`retrodb.neighbours.UidSource` over shards of blocks, keeping the columns of the last ones used.

    Attributes:
        documents: the same shards; knows the rows of ids.
        cache_bytes: bound on the columns kept; at least one shard's is.
    """

    documents: StoredDocuments
    cache_bytes: int = 32 << 20

    def __post_init__(self) -> None:
        self._recent = Recent(self._read, lambda keys: keys.nbytes, self.cache_bytes)

    def uid_keys(self, ids: np.ndarray) -> np.ndarray:
        """int64 [n]: the first half of each block's uid.

        Raises:
            DamagedError: a block does not exist.
        """
        return by_shard(ids, self._take, np.empty(0, np.int64))

    def _take(self, shard: int, ids: np.ndarray) -> np.ndarray:
        return self._recent.get(shard)[self.documents.locate(shard, ids)]

    def _read(self, shard: int) -> np.ndarray:
        path = _recorded(self.documents.paths, shard, "chunk")
        return uid_keys(uid_matrix(self.documents.storage.read_table(path, columns=["uid"])))

    def __reduce__(self) -> tuple[object, ...]:
        return StoredUids, (self.documents, self.cache_bytes)


@dataclass
class StoredTokens:
    """`retrodb.neighbours.TokenSource` over ``chunks`` shards, keeping the tokens of the last ones used.

    Attributes:
        documents: the same shards; knows the rows of ids.
        cache_bytes: bound on the tokens kept; at least one shard's are.
    """

    documents: StoredDocuments
    cache_bytes: int = 128 << 20

    def __post_init__(self) -> None:
        self._recent = Recent(self._read, _nbytes, self.cache_bytes)

    @property
    def chunk_tokens(self) -> int:
        """m.

        Raises:
            DamagedError: a shard is not of chunks.
        """
        return int(self._recent.get(next(iter(self.documents.paths)))[0].shape[1])

    def take(self, ids: np.ndarray) -> Tokens:
        """The tokens of chunks int64 [n].

        Raises:
            DamagedError: a chunk does not exist.
        """
        nothing = np.empty((0, 1), np.uint16), np.empty(0, np.int16)
        return Tokens(*(by_shard(ids, functools.partial(self._take, column), nothing[column]) for column in (0, 1)))

    def _take(self, column: int, shard: int, ids: np.ndarray) -> np.ndarray:
        return self._recent.get(shard)[column][self.documents.locate(shard, ids)]

    def _read(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and valid numbers of a shard."""
        path = _recorded(self.documents.paths, shard, "chunk")
        table = self.documents.storage.read_table(path, columns=["tokens", "n_tokens"])
        tokens = pa.concat_arrays(table["tokens"].chunks or [pa.array([], table["tokens"].type)])
        width = table["tokens"].type.list_size
        return tokens.flatten().to_numpy().reshape(-1, width), table["n_tokens"].to_numpy()

    def __reduce__(self) -> tuple[object, ...]:
        return StoredTokens, (self.documents, self.cache_bytes)


def clusters_of(documents: pa.Table) -> np.ndarray:
    """The ``cluster_id`` of a documents table, int64 [n], `NO_CLUSTER` where null."""
    return pc.fill_null(documents["cluster_id"], pa.scalar(NO_CLUSTER, pa.int64())).to_numpy()


def _recorded(paths: Mapping[int, File], shard: int, kind: str) -> File:
    path = paths.get(shard)
    if path is None:
        raise DamagedError(f"no {kind} shard {shard} is recorded, but a chunk of it was named. Verify the database.")
    return path


def _nbytes(columns: tuple[np.ndarray | None, ...]) -> int:
    return sum(column.nbytes for column in columns if column is not None)


@dataclass
class StoredVectors:
    """`VectorSource` over ``embeddings`` shards: memory-mapped.

    Attributes:
        storage: the database.
        paths: each embedding shard by its number, likewise.
        locate: rows of chunk ids in a shard, `StoredDocuments.locate`; None takes every shard as dense, which holds
            until a compaction.
        cache_bytes: bound on the shards kept open; at least one is.
    """

    storage: Storage
    paths: Mapping[int, File]
    locate: Callable[[int, np.ndarray], np.ndarray] | None = None
    cache_bytes: int = VECTOR_CACHE_BYTES

    def __post_init__(self) -> None:
        self._recent = Recent(self._read, lambda array: array.nbytes, self.cache_bytes)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """The stored vectors of chunks, float16 [n, d]. Each shard is touched once.

        Raises:
            DamagedError: a chunk's shard or row does not exist, or the shard is not a float16 matrix.
        """
        return by_shard(ids, self._take, np.empty((0, 0), np.float16))

    def _take(self, shard: int, ids: np.ndarray) -> np.ndarray:
        array = self._recent.get(shard)
        rows = ids & _ROW_MASK if self.locate is None else self.locate(shard, ids)
        if int(rows.max()) >= len(array):
            raise DamagedError(
                f"{self.storage.describe(self.paths[shard])} has {count_of(len(array), 'vector')}, "
                f"but chunk {int(ids[rows.argmax()])} was named. Verify the database."
            )
        return np.asarray(array[rows])

    def _read(self, shard: int) -> np.ndarray:
        path = _recorded(self.paths, shard, "embedding")
        array = self.storage.read_array(path)
        if array.ndim != 2 or array.dtype != np.float16:
            raise DamagedError(f"{self.storage.describe(path)} is {array.dtype} {array.shape}, not a float16 matrix.")
        return array

    def __reduce__(self) -> tuple[object, ...]:
        return StoredVectors, (self.storage, self.paths, self.locate, self.cache_bytes)
