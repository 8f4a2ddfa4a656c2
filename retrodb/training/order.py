"""The order in which rows are streamed, as pure functions of the shards' sizes, the seed and the epoch.

Rows form *blocks* (the rows of one row group that are of the wanted split), blocks form *pools*, and the pools one
after the other are the stream: a sequence of ``rows`` positions that every rank computes alike. A consumer (rank x
loader worker) takes one contiguous range of positions, so that ranges tile the stream whatever the sizes, no two
consumers decode the same row group but at their border, and any position can be resumed at.

Shuffled: shards in random order, 16 at a time; the row groups of these in random order; the rows of a pool of such row
groups in random order. Unshuffled: everything as stored, one block a pool. The random order is a hash of (seed, epoch,
number), so that it is the same on every machine and with every version of numpy.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

SHUFFLE_SHARDS: Final = 16
"""Shards whose row groups are mixed, and that a shuffled stream holds open at a time."""


@dataclass(frozen=True)
class Blocks:
    """All blocks in the order of the stream; ``[B]`` each.

    Attributes:
        shard: which of the shards.
        first: first row in the shard.
        rows: number of rows, at least 1.
    """

    shard: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pool:
    """What is read together: ``rows`` of the concatenated blocks ``low .. high``, in the order to hand them out."""

    low: int
    high: int
    rows: npt.NDArray[np.int64]


def blocks_of(first: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], group_rows: int) -> Blocks:
    """The blocks of row ranges, one range a shard, cut at multiples of ``group_rows``; in stored order."""
    group_low = first // group_rows
    counts = np.where(rows > 0, -(-(first + rows) // group_rows) - group_low, 0)
    shard = np.repeat(np.arange(len(rows), dtype=np.int64), counts)
    number = np.arange(len(shard), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    start = (group_low[shard] + number) * group_rows
    low = np.maximum(start, first[shard])
    high = np.minimum(start + group_rows, first[shard] + rows[shard])
    return Blocks(shard, low, high - low)


def shuffled(blocks: Blocks, n_shards: int, seed: int, epoch: int) -> Blocks:
    """The blocks in the random order of an epoch."""
    place = np.empty(n_shards, dtype=np.int64)
    place[permutation(n_shards, seed, epoch, 0)] = np.arange(n_shards)
    window = place[blocks.shard] // SHUFFLE_SHARDS
    random = np.empty(len(window), dtype=np.int64)
    random[permutation(len(window), seed, epoch, 1)] = np.arange(len(window))
    order = np.lexsort((random, window))
    return Blocks(blocks.shard[order], blocks.first[order], blocks.rows[order])


def pools(blocks: Blocks, start: int, stop: int, pool_blocks: int, shuffle: tuple[int, int] | None) -> Iterator[Pool]:
    """What to read for the positions ``start .. stop`` of the stream.

    Args:
        blocks: all blocks, in the order of the stream.
        start: first position.
        stop: one past the last position.
        pool_blocks: blocks in a pool.
        shuffle: (seed, epoch), or None for the stored order.
    """
    ends = np.cumsum(blocks.rows)
    if start >= stop:
        return
    first = int(np.searchsorted(ends, start, side="right")) // pool_blocks * pool_blocks
    last = int(np.searchsorted(ends, stop, side="left"))
    for low in range(first, last + 1, pool_blocks):
        high = min(low + pool_blocks, len(ends))
        begin, end = int(ends[low] - blocks.rows[low]), int(ends[high - 1])
        window = slice(max(0, start - begin), stop - begin)
        if shuffle is None:
            yield Pool(low, high, np.arange(end - begin, dtype=np.int64)[window])
        else:
            yield Pool(low, high, permutation(end - begin, *shuffle, 2 + low)[window])


def shards_of(blocks: Blocks, start: int, stop: int) -> list[int]:
    """The shards that the positions ``start .. stop`` of the stream lie in, in the order of their first block."""
    ends = np.cumsum(blocks.rows)
    some = blocks.shard[(ends > start) & (ends - blocks.rows < stop)]
    places = np.unique(some, return_index=True)[1]
    return [int(shard) for shard in some[np.sort(places)]]


def share(total: int, consumers: int, consumer: int) -> tuple[int, int]:
    """The range of ``total`` positions that is a consumer's: sizes differ by at most one, the larger ones first."""
    base, more = divmod(total, consumers)
    start = consumer * base + min(consumer, more)
    return start, start + base + (consumer < more)


def permutation(size: int, seed: int, epoch: int, stream: int) -> npt.NDArray[np.int64]:
    """A permutation of ``0 .. size``: argsort of splitmix64 (Steele et al. 2014) of (seed, epoch, stream, number)."""
    key = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in (seed, epoch, stream):
            key = _mixed(np.array([part & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64) + key)[0]
        hashes = _mixed(np.arange(size, dtype=np.uint64) + key)
    return np.argsort(hashes, kind="stable")


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = values * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
