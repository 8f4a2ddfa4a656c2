"""What every use of faiss here has in common: threads, metrics, and bytes in and out that are checked before use."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal

import faiss
import numpy as np

from retrodb.errors import DamagedError, InputError

untyped: Any = faiss
"""faiss without its type stubs, for what they lack or have wrong."""

Metric = Literal["l2", "ip"]
"""``l2``: squared L2, smaller is nearer. ``ip``: inner product, larger is nearer."""

FAISS_METRICS: Final[dict[str, int]] = {"l2": faiss.METRIC_L2, "ip": faiss.METRIC_INNER_PRODUCT}

_SETTINGS: Final = {
    # An IVFPQ index would otherwise compute up to 2 GB of tables each time it is read.
    "precomputed_table_max_bytes": 0,
    # Queries from which distances are one matrix product. faiss 1.15 raised it from 20 to 128,000 / d, and compares a
    # few hundred queries of 384 dimensions eight to fourteen times slower (measured: 680 against 9,300 queries/s).
    "distance_compute_blas_threshold": 20,
}
"""What faiss does differently here, wherever it computes."""

EXACT_KEY: Final = "Flat"
_EXACT_FACTORY: Final = "IDMap,SQfp16"
"""How an exact index lies on disk: half the bytes of faiss' Flat, and lossless, for the stored vectors are float16."""


@contextlib.contextmanager
def faiss_threads(threads: int) -> Iterator[None]:
    """Run faiss with ``threads`` OpenMP threads and the settings of `_SETTINGS`.

    A worker uses one thread: processes are the parallelism here.
    """
    before = faiss.omp_get_max_threads()
    settings = {name: getattr(untyped.cvar, name) for name in _SETTINGS}
    faiss.omp_set_num_threads(threads)
    _set(_SETTINGS)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
        _set(settings)


def _set(settings: Mapping[str, int]) -> None:
    for name, value in settings.items():
        setattr(untyped.cvar, name, value)


def faiss_metric(metric: str) -> int:
    """faiss' number for ``metric``. Raises InputError for any other than ``l2`` and ``ip``."""
    if metric not in FAISS_METRICS:
        raise InputError(f"unknown metric {metric!r}: use l2 or ip.")
    return FAISS_METRICS[metric]


def worst(metric: Metric) -> np.float32:
    """The score that is worse than any real one: +inf for ``l2``, -inf for ``ip``."""
    return np.float32(np.inf if metric == "l2" else -np.inf)


def ascending(scores: np.ndarray, metric: Metric) -> np.ndarray:
    """``scores`` turned so that smaller is nearer, same shape and dtype."""
    return scores if metric == "l2" else -scores


def empty_index(key: str, dimension: int, metric: Metric) -> faiss.Index:
    """A new, untrained index for ``key``.

    Raises:
        InputError: faiss cannot make it for this dimension and metric.
    """
    try:
        return faiss.index_factory(dimension, _EXACT_FACTORY if key == EXACT_KEY else key, faiss_metric(metric))
    except (RuntimeError, MemoryError) as error:
        raise InputError(
            f"the index key {key!r} is not possible for vectors of {dimension} dimensions: {first_line(error)}. "
            "Choose another with --index-key, or leave it out."
        ) from error


def ivf_of(index: faiss.Index) -> Any:
    """The inverted-file part of ``index`` (behind any pre-transform), or None for an exact index."""
    return faiss.try_extract_index_ivf(index)


def has_exact_codes(key: str) -> bool:
    """Whether the raw distances of an index of ``key`` are those of the stored vectors, not of a code."""
    return key == EXACT_KEY or (key.startswith("IVF") and key.endswith(",Flat"))


def n_lists(index: faiss.Index) -> int:
    """Inverted lists of ``index``; 1 for an exact index, which has no choice of what to read."""
    ivf = ivf_of(index)
    return 1 if ivf is None else int(ivf.nlist)


def serialize(index: faiss.Index) -> bytes:
    """``index`` as the bytes of a faiss file."""
    return bytes(faiss.serialize_index(index).tobytes())


def deserialize(data: bytes, where: str) -> faiss.Index:
    """The index that `serialize` wrote.

    Raises:
        DamagedError: the bytes are not an index.
    """
    try:
        with faiss_threads(1):
            return faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8), faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
    except (RuntimeError, MemoryError, AssertionError) as error:
        raise DamagedError(f"{where} is not a faiss index: {first_line(error)}. Run the build again.") from error


def check_index(index: faiss.Index, dimension: int, metric: Metric, ntotal: int, where: str) -> None:
    """Refuse an index that is not the one expected.

    Raises:
        DamagedError: untrained, or of another dimension, metric or number of vectors.
    """
    found = (bool(index.is_trained), int(index.d), int(index.metric_type), int(index.ntotal))
    expected = (True, dimension, faiss_metric(metric), ntotal)
    if found != expected:
        raise DamagedError(
            f"{where} is not the index that was recorded: (trained, dimension, metric, vectors) is {found}, "
            f"expected {expected}. Run the build again to repair it."
        )


def first_line(error: BaseException) -> str:
    """The part of a faiss exception that a person can use: without its C++ function and file."""
    text = str(error).strip().splitlines()
    return (text[-1] if text else type(error).__name__).split("failed: ")[-1].strip().rstrip(".")
