"""Index shards: the template plus the vectors of one group of consecutive chunk shards, under their chunk ids."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import faiss
import numpy as np

from retrodb.errors import DamagedError
from retrodb.formats import Committed, HashingWriter
from retrodb.index.engine import Metric, check_index, faiss_threads, first_line, ivf_of, untyped
from retrodb.index.guard import refuse_foreign, vectors_within
from retrodb.index.template import load_template
from retrodb.sizes import count_of
from retrodb.storage import Storage

GROUP_VECTORS: Final = 262_144
"""A group is full at this many vectors ..."""
GROUP_BYTES: Final = 64 << 20
"""... or at this many bytes, whichever comes first: a worker holds one group at a time ..."""
EXACT_GROUP_BYTES: Final = 8 << 20
"""... (less where it is exact, because that one is held in memory as float32) ..."""
TEMPLATE_SHARE: Final = 8
"""... but not before it is this many times its template, which every shard carries."""

_ADD_ROWS: Final = 8_192
_MMAP: Final = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE


def bytes_per_vector(template: bytes, dimension: int, metric: Metric) -> int:
    """Bytes that one vector and its id take in an index shard."""
    index = load_template(template, dimension, metric)
    ivf = ivf_of(index)
    return 8 + (int(ivf.code_size) if ivf is not None else 2 * dimension)


def group_shards(
    rows_per_shard: Sequence[int], template_bytes: int, vector_bytes: int, exact: bool = False
) -> list[list[int]]:
    """Which consecutive chunk shards share an index shard; a function of these sizes alone.

    Args:
        rows_per_shard: vectors of each chunk shard that go into the index.
        template_bytes: size of the trained template.
        vector_bytes: from `bytes_per_vector`.
        exact: whether the index is exact.

    Returns:
        Groups of positions in ``rows_per_shard``, ascending, every position once. Empty for no shards.
    """
    full = EXACT_GROUP_BYTES if exact else min(GROUP_BYTES, GROUP_VECTORS * vector_bytes)
    full = max(full, TEMPLATE_SHARE * template_bytes)
    groups: list[list[int]] = []
    held = 0
    for position, rows in enumerate(rows_per_shard):
        size = rows * vector_bytes
        if not groups or (held + size > full and held >= full // 2):
            groups.append([])
            held = 0
        groups[-1].append(position)
        held += size
    return groups


def build_index_shard(
    template: bytes, parts: Iterable[tuple[np.ndarray, np.ndarray]], dimension: int, metric: Metric
) -> faiss.Index:
    """The template with the vectors of ``parts`` added under their chunk ids, on one thread.

    Only what is given can ever be found: leave out validation chunks here, and they are nobody's neighbour.

    Args:
        template: bytes from `train_template`.
        parts: (chunk ids int64 [n], vectors float16 [n, d]), one chunk shard after another; taken in this order.
        dimension: d.
        metric: ``l2`` or ``ip``.

    Raises:
        DamagedError: a part's shapes disagree, or a vector holds NaN or infinity.
    """
    index = load_template(template, dimension, metric)
    with faiss_threads(1):
        for chunk_ids, vectors in parts:
            _check_part(chunk_ids, vectors, dimension)
            for start in range(0, len(chunk_ids), _ADD_ROWS):
                rows = slice(start, start + _ADD_ROWS)
                block = np.ascontiguousarray(vectors[rows], dtype=np.float32)
                if not np.isfinite(block).all():
                    bad = chunk_ids[rows][~np.isfinite(block).all(axis=1)][0]
                    raise DamagedError(f"the vector of chunk {bad} holds NaN or infinity. Run the build again.")
                index.add_with_ids(block, np.ascontiguousarray(chunk_ids[rows], dtype=np.int64))
    return index


def largest_norm(vectors: np.ndarray) -> float:
    """The largest Euclidean norm of float16 [n, d] vectors, which may be memory-mapped; 0 for none."""
    largest = 0.0
    for start in range(0, len(vectors), _ADD_ROWS):
        block = np.asarray(vectors[start : start + _ADD_ROWS], dtype=np.float32)
        largest = max(largest, float(np.einsum("nd,nd->n", block, block).max()))
    return float(np.sqrt(largest))


def _check_part(chunk_ids: np.ndarray, vectors: np.ndarray, dimension: int) -> None:
    if vectors.ndim != 2 or vectors.shape != (len(chunk_ids), dimension):
        raise DamagedError(
            f"an embedding shard has shape {vectors.shape} for {count_of(len(chunk_ids), 'chunk')} of {dimension} "
            "dimensions. Run the build again to repair it."
        )
    if len(chunk_ids) and int(np.min(chunk_ids)) < 0:
        raise DamagedError(f"a chunk shard holds the negative chunk id {int(np.min(chunk_ids))}.")


def commit_index_shard(storage: Storage, relative: str, index: faiss.Index) -> Committed:
    """Write ``index`` whole under ``relative``, without a second copy of it in memory."""

    def write(writer: HashingWriter) -> None:
        faiss.write_index(index, untyped.PyCallbackIOWriter(writer.write))

    return storage.commit(relative, write)


def load_index_shard(path: Path | str, dimension: int, metric: Metric, ntotal: int) -> faiss.Index:
    """An index shard, ready to be searched; inverted lists stay on disk, memory-mapped.

    An exact shard is held as float32, twice its file: faiss compares blocks of queries with that four to five times
    as fast as with float16 codes, and gets the same distances.

    Args:
        path: a local file; it may be unlinked afterwards, where the system lets open files be.
        dimension: expected d.
        metric: expected metric.
        ntotal: expected number of vectors.

    Raises:
        DamagedError: it is missing, cannot be read, or is not the index expected.
    """
    try:
        with faiss_threads(1), vectors_within(os.path.getsize(path)):
            with open(path, "rb") as file:
                refuse_foreign(file, str(path))
            index = faiss.read_index(str(path), _MMAP)
    except (RuntimeError, MemoryError, OSError) as error:
        raise DamagedError(f"cannot read {path}: {first_line(error)}. Run the build again to repair it.") from error
    check_index(index, dimension, metric, ntotal, str(path))
    return index if ivf_of(index) is not None else _as_float32(index, str(path))


def _as_float32(index: faiss.Index, where: str) -> faiss.Index:
    """The same vectors and ids in an ``IndexFlat``."""
    index = faiss.downcast_index(index)
    if not isinstance(index, faiss.IndexIDMap):
        raise DamagedError(f"{where} is neither an IVF nor an exact index of retrodb. Run the build again.")
    inner: Any = faiss.downcast_index(index.index)
    rows, dimension = int(index.ntotal), int(index.d)
    if int(inner.codes.size()) != 2 * rows * dimension or int(index.id_map.size()) != rows:
        raise DamagedError(f"{where} holds fewer vectors than it says. Run the build again to repair it.")
    flat = untyped.IndexFlat(dimension, index.metric_type)
    mapped = faiss.IndexIDMap(flat)
    if rows:  # straight from one buffer to the other: `add` would grow its own by copying
        flat.codes.resize(4 * rows * dimension)
        flat.ntotal = rows
        stored = faiss.rev_swig_ptr(inner.codes.data(), 2 * rows * dimension).view(np.float16)
        faiss.rev_swig_ptr(flat.get_xb(), rows * dimension)[...] = stored
    faiss.copy_array_to_vector(faiss.vector_to_array(index.id_map), mapped.id_map)
    mapped.ntotal = rows
    return mapped
