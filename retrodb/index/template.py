"""The template: the one trained, empty quantiser that every index shard starts from.

Shards that were trained apart lose 3-4 points of recall when merged; shards of one template equal one big index.
"""

import io
import logging
from collections.abc import Iterator, Sequence
from typing import Final

import faiss
import numpy as np

from retrodb.errors import InputError
from retrodb.index.engine import (
    EXACT_KEY,
    Metric,
    check_index,
    deserialize,
    empty_index,
    faiss_threads,
    n_lists,
    serialize,
)
from retrodb.index.guard import refuse_foreign, vectors_within
from retrodb.index.keys import BEST_POINTS_PER_LIST
from retrodb.sizes import count_of

_AMPLE_MEMORY: Final = "1000000G"
"""autofaiss cuts its training set to the memory it is told of; ours has been cut by `choose_key` already."""


def seeded_sample(rows_per_shard: Sequence[int], n: int, seed: int) -> list[np.ndarray]:
    """``n`` rows drawn uniformly without replacement from all shards together.

    Never materialises all ids: a multivariate hypergeometric draw says how many rows each shard gives, then each
    shard draws its own from a generator of its own.

    Args:
        rows_per_shard: rows of each shard.
        n: rows wanted; all rows if there are fewer.
        seed: same seed, same rows.

    Returns:
        For each shard an int64 array of ascending row numbers, [n_shard]; together min(n, rows) long.
    """
    rows = np.asarray(rows_per_shard, dtype=np.int64)
    total = int(rows.sum())
    n = min(n, total)
    generators = [np.random.default_rng([seed, shard]) for shard in range(len(rows))]
    counts = _allocate(rows, n, np.random.default_rng([seed, len(rows), n]))
    return [
        np.sort(generator.choice(int(size), int(count), replace=False, shuffle=False)).astype(np.int64)
        for generator, size, count in zip(generators, rows, counts, strict=True)
    ]


def _allocate(rows: np.ndarray, n: int, generator: np.random.Generator) -> np.ndarray:
    """How many of ``n`` each shard gives; numpy's own multivariate draw stops at 10**9 rows, so one shard at a time."""
    counts = np.zeros(len(rows), dtype=np.int64)
    left = int(rows.sum())
    for shard, size in enumerate(rows.tolist()):
        left -= size
        counts[shard] = _hypergeometric(generator, size, left, n)
        n -= int(counts[shard])
    return counts


def _hypergeometric(generator: np.random.Generator, good: int, bad: int, draws: int) -> int:
    if draws == 0 or good == 0:
        return 0
    if bad == 0:
        return min(draws, good)
    if good + bad < 10**9:
        return int(generator.hypergeometric(good, bad, draws))
    # Past numpy's limit the urn is so large that the draws are as good as independent.
    return int(np.clip(generator.binomial(draws, good / (good + bad)), max(0, draws - bad), min(good, draws)))


class _ArrayReader:
    """What autofaiss' trainer needs of an ``EmbeddingReader``, over an array in memory.

    The real one reads files, from threads that hang when its generator is left early.
    """

    def __init__(self, vectors: np.ndarray) -> None:
        self._vectors = vectors
        self.count, self.dimension = vectors.shape

    def __call__(self, batch_size: int, start: int, end: int) -> Iterator[tuple[np.ndarray, None]]:
        for first in range(start, end, batch_size):
            yield self._vectors[first : min(first + batch_size, end)], None


def train_template(sample: np.ndarray, key: str, metric: Metric, seed: int, threads: int = 1) -> bytes:
    """The trained, empty index of ``key``, as the bytes of a faiss file.

    With ``l2`` autofaiss trains it: the function its own distributed build trains with
    (``autofaiss.indices.training``). ``build_index`` would also add the sample, tune nprobe by this machine's
    latency and reconfigure logging. With ``ip`` faiss does, since autofaiss' OPQ fails there on faiss >= 1.14.2, and
    likewise for what autofaiss cannot train: codebooks that need more vectors than it would read for so few lists, and
    HNSW over lists without product codes.
    Same arguments, same bytes, for any ``threads``.

    Args:
        sample: float32 [n, d], the rows of `seeded_sample`; for ``Flat`` only d matters, n may be 0.
        key: from `choose_key`.
        metric: ``l2`` or ``ip``.
        seed: orders the sample, so that a trainer that reads only its first part reads a uniform one.
        threads: of faiss.

    Raises:
        InputError: the sample is too small for the key, or holds NaN or infinity.
    """
    if key == EXACT_KEY:
        return serialize(empty_index(key, sample.shape[1], metric))
    if not np.isfinite(sample).all():
        raise InputError("the training sample holds NaN or infinity: the encoder made vectors that cannot be indexed.")
    shuffled = np.ascontiguousarray(sample[np.random.default_rng(seed).permutation(len(sample))], dtype=np.float32)
    lists = n_lists(empty_index(key, sample.shape[1], metric))
    if len(sample) < lists:
        raise InputError(
            f"{count_of(len(sample), 'training vector is', 'training vectors are')} too few for "
            f"{count_of(lists, 'list')} ({key}); use choose_key."
        )
    with faiss_threads(threads):
        whole = len(sample) <= BEST_POINTS_PER_LIST * lists
        index = _train_l2(shuffled, key) if metric == "l2" and whole else _train_directly(shuffled, key, metric)
    check_index(index, sample.shape[1], metric, 0, f"the trained index {key}")
    return serialize(index)


def _train_l2(sample: np.ndarray, key: str) -> faiss.Index:
    """Train with autofaiss, quietly."""
    from autofaiss.external.metadata import IndexMetadata  # noqa: PLC0415 - half a second to import
    from autofaiss.indices.training import create_and_train_new_index  # noqa: PLC0415

    logger = logging.getLogger("autofaiss")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        count, dimension = sample.shape
        metadata = IndexMetadata(key, count, dimension)
        if metadata.compute_memory_necessary_for_training(count) <= 0:  # it would divide by this: IVF_HNSW without PQ
            return _train_directly(sample, key, "l2")
        return create_and_train_new_index(_ArrayReader(sample), key, metadata, "l2", _AMPLE_MEMORY)
    finally:
        logger.setLevel(level)


def _train_directly(sample: np.ndarray, key: str, metric: Metric) -> faiss.Index:
    index = empty_index(key, sample.shape[1], metric)
    index.train(sample)
    return index


def load_template(data: bytes, dimension: int, metric: Metric, where: str = "the index template") -> faiss.Index:
    """The index of `train_template`'s bytes.

    Raises:
        DamagedError: the bytes are not an index, or not an empty one of this dimension and metric.
    """
    with vectors_within(len(data)):
        refuse_foreign(io.BytesIO(data), where)
        index = deserialize(data, where)
    check_index(index, dimension, metric, 0, where)
    return index
