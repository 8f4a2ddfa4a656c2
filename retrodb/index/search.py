"""Searching index shards: one group at a time, merged by distance. What is found equals a search of one big index."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import faiss
import numpy as np

from retrodb.errors import DamagedError
from retrodb.formats import File, path_of
from retrodb.index.engine import Metric, ascending, faiss_metric, faiss_threads, ivf_of, untyped, worst
from retrodb.index.shards import largest_norm, load_index_shard
from retrodb.storage import Storage

MISSING: Final = -1
"""Fills the places of an id array where nothing was found. Never an id: mask it before any look-up."""

_LAST: Final = np.iinfo(np.int64).max


def search_group(
    index: faiss.Index, queries: np.ndarray, candidates: int, nprobe: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest vectors of one index shard, on one thread.

    A query's answer does not depend on its batch, but for the last bits of an exact index' distances.

    Args:
        index: from `load_index_shard`.
        queries: float32 [q, d].
        candidates: wanted for each query.
        nprobe: inverted lists to read; all of them when it is at least their number. Ignored by an exact index.

    Returns:
        Raw distances float32 [q, c] and chunk ids int64 [q, c], c = min(candidates, ntotal), nearest first. Where
        fewer were found: +inf (``ip``: -inf) and `MISSING`.

    Raises:
        DamagedError: a query holds NaN or infinity, which faiss would answer with nothing at all.
    """
    if not np.isfinite(queries).all():
        raise DamagedError("a query vector holds NaN or infinity: its embedding is damaged. Run the build again.")
    count = min(candidates, int(index.ntotal))
    metric: Metric = "l2" if index.metric_type == faiss.METRIC_L2 else "ip"
    if count == 0 or len(queries) == 0:
        return _nothing(len(queries), count, metric)
    with faiss_threads(1):
        distances, ids = _search(index, np.ascontiguousarray(queries, dtype=np.float32), count, nprobe)
    distances[ids < 0] = worst(metric)
    ids[ids < 0] = MISSING
    return distances, ids


def _nothing(queries: int, count: int, metric: Metric) -> tuple[np.ndarray, np.ndarray]:
    return np.full((queries, count), worst(metric), np.float32), np.full((queries, count), MISSING, np.int64)


def _search(index: faiss.Index, queries: np.ndarray, count: int, nprobe: int) -> tuple[np.ndarray, np.ndarray]:
    ivf = ivf_of(index)
    if ivf is None:
        return index.search(queries, count)
    turned = _turned(index, queries)
    nprobe = max(1, min(nprobe, int(ivf.nlist)))
    coarse: Any = faiss.downcast_index(ivf.quantizer)
    if not isinstance(coarse, faiss.IndexHNSW):
        return ivf.search(turned, count, params=untyped.SearchParametersIVF(nprobe=nprobe))
    if nprobe < ivf.nlist:
        effort = untyped.SearchParametersHNSW(efSearch=max(64, 2 * nprobe))
        return ivf.search(turned, count, params=untyped.SearchParametersIVF(nprobe=nprobe, quantizer_params=effort))
    # Every list is wanted, and HNSW need not find all: compare with the centroids it holds.
    near, lists = faiss.downcast_index(coarse.storage).search(turned, nprobe)
    ivf.nprobe = nprobe
    return ivf.search_preassigned(turned, count, lists, near)


def _turned(index: Any, queries: np.ndarray) -> np.ndarray:
    """Queries after the rotation (OPQ) of ``index``, float32 [q, d'].

    In float64, because faiss' float32 product differs in the last bit from batch to batch, and with it, once in a
    while, the lists that are read.
    """
    if not isinstance(index, faiss.IndexPreTransform):
        return queries
    chain: Any = index.chain
    for step in range(chain.size()):
        turn: Any = faiss.downcast_VectorTransform(chain.at(step))
        matrix = faiss.vector_to_array(turn.A).reshape(turn.d_out, turn.d_in).astype(np.float64)
        queries = (queries.astype(np.float64) @ matrix.T).astype(np.float32)
        if turn.have_bias:
            queries += faiss.vector_to_array(turn.b)
    return queries


def merge(
    partials: Sequence[tuple[np.ndarray, np.ndarray]], candidates: int, metric: Metric
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of several searches of the same queries, by distance, ties by ascending id.

    Args:
        partials: (distances float32 [q, c_i], ids int64 [q, c_i]) as from `search_group`, in any order.
        candidates: kept for each query.
        metric: ``l2`` (ascending) or ``ip`` (descending).

    Returns:
        Distances float32 and ids int64 [q, min(candidates, sum of c_i)]; what is missing comes last.
    """
    distances = np.concatenate([d for d, _ in partials], axis=1)
    ids = np.concatenate([i for _, i in partials], axis=1)
    missing = (ids < 0) | np.isnan(distances)
    keys = np.where(missing, np.float32(np.inf), ascending(distances, metric))
    order = np.lexsort((np.where(missing, _LAST, ids), keys), axis=1)[:, :candidates]
    ids = np.where(missing, MISSING, ids)
    distances = np.where(missing, worst(metric), distances)
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(ids, order, axis=1)


@dataclass(frozen=True)
class IndexFile:
    """One recorded index shard: the file as `Storage` reads it and the vectors it must hold."""

    path: File
    vectors: int


def open_index_file(storage: Storage, file: IndexFile, dimension: int, metric: Metric) -> faiss.Index:
    """A recorded index shard, ready to be searched, as `load_index_shard` opens it.

    Raises:
        DamagedError: it is missing or is not the one recorded.
    """
    try:
        with storage.local_copy(file.path) as path:
            return load_index_shard(path, dimension, metric, file.vectors)
    except FileNotFoundError as error:
        where = storage.describe(file.path)
        raise DamagedError(f"{where} is missing. Run the build again to repair it.") from error


@dataclass
class GroupedIndex:
    """All index shards of a database as one `CandidateSource`, held in memory no more than ``cache_bytes`` at a time.

    Attributes:
        storage: the database.
        files: its index shards.
        dimension: d.
        metric: ``l2`` or ``ip``.
        nprobe: inverted lists read for each query, chosen by measured recall.
        n_lists: inverted lists of the template, the largest useful nprobe; 1 for an exact index.
        raw_is_exact: whether raw distances are those of the stored vectors (``Flat`` codes), not of a code.
        largest_norm: of all its vectors; None where that is not known.
        cache_bytes: bound on exact shards kept for the next search; at least one is kept.
    """

    storage: Storage
    files: Sequence[IndexFile]
    dimension: int
    metric: Metric
    nprobe: int = 1
    n_lists: int = 1
    raw_is_exact: bool = True
    cache_bytes: int = 48 << 20
    largest_norm: float | None = None
    _open: "OrderedDict[str, faiss.Index]" = field(default_factory=OrderedDict, init=False, repr=False)

    @property
    def ntotal(self) -> int:
        """Vectors in all shards."""
        return sum(file.vectors for file in self.files)

    def search(self, queries: np.ndarray, candidates: int, nprobe: int) -> tuple[np.ndarray, np.ndarray]:
        """As `search_group`, over all shards; each is visited once.

        Raises:
            DamagedError: a shard is missing or is not the one recorded.
        """
        found = _nothing(len(queries), 0, self.metric)
        for file in self.files:
            partial = search_group(self._index(file), queries, candidates, nprobe)
            found = merge([found, partial], candidates, self.metric)
        return found

    def _index(self, file: IndexFile) -> faiss.Index:
        name = path_of(file.path)
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        self._evict(file.vectors)
        index = open_index_file(self.storage, file, self.dimension, self.metric)
        self._open[name] = index
        return index

    def _evict(self, vectors: int) -> None:
        """Make room for ``vectors`` before they are read, so that the bound is not passed meanwhile."""
        room = self.cache_bytes // (4 * self.dimension + 8) - vectors
        while self._open and sum(int(index.ntotal) for index in self._open.values()) > room:
            self._open.popitem(last=False)

    def __reduce__(self) -> tuple[object, ...]:
        arguments = (self.storage, self.files, self.dimension, self.metric, self.nprobe, self.n_lists)
        return GroupedIndex, (*arguments, self.raw_is_exact, self.cache_bytes, self.largest_norm)


class HeldIndex:
    """Some vectors as an exact `CandidateSource` in memory.

    Attributes:
        ntotal: how many.
        largest_norm: of them.
    """

    nprobe: Final = 1
    n_lists: Final = 1
    raw_is_exact: Final = True

    def __init__(self, parts: Iterable[tuple[np.ndarray, np.ndarray]], dimension: int, metric: Metric) -> None:
        """Of ``parts``: chunk ids int64 [n] and vectors float16 [n, d]."""
        self._index = faiss.IndexIDMap(untyped.IndexFlat(dimension, faiss_metric(metric)))
        self.largest_norm = 0.0
        for chunk_ids, vectors in parts:
            self.largest_norm = max(self.largest_norm, largest_norm(vectors))
            if len(chunk_ids):
                self._index.add_with_ids(np.ascontiguousarray(vectors, dtype=np.float32), chunk_ids)
        self.ntotal = int(self._index.ntotal)

    def search(self, queries: np.ndarray, candidates: int, nprobe: int) -> tuple[np.ndarray, np.ndarray]:
        """As `search_group`."""
        return search_group(self._index, queries, candidates, nprobe)
