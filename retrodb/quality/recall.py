"""Recall of the index against exact search, by distance, and the cheapest nprobe that reaches the gate (invariant 8).

By distance and not by id, because some 8% of chunks have an exact duplicate elsewhere: finding either is right. The
exact search here is numpy's matrix product over the stored vectors; it shares the exclusion's ids and the distance of
a pair with `retrodb.neighbours`, and nothing with the index.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from retrodb.errors import RecallError
from retrodb.index import MISSING, Metric, merge
from retrodb.index.engine import ascending
from retrodb.neighbours import Exclusion, UidSource, pair_scores

RECALL_AT: Final = 10
_VECTOR_BLOCK: Final = 4_096
_QUERY_BLOCK: Final = 1_024
_SPARE: Final = 8
"""Re-scored beyond k, since float error of the matrix product may misorder those at the cut."""
_TOLERANCE: Final = 1e-5
"""Relative; both sides are scored pair by pair from the same vectors, so that equal pairs have equal distances."""

ExactTop = tuple[np.ndarray, np.ndarray]
"""Distances float32 [q, k], NaN where missing, and chunk ids int64 [q, k], -1 likewise."""


def exact_top(
    queries: np.ndarray, exclusion: Exclusion, chunk_ids: np.ndarray, vectors: np.ndarray, k: int, metric: Metric
) -> ExactTop:
    """The ``k`` nearest allowed vectors of one embedding shard, compared with every one of them.

    Memory is bounded by blocks (about 40 MB at 384 dimensions), whatever the shard's size.

    Args:
        queries: float32 [q, d], a seeded sample of query chunks.
        exclusion: of these q queries.
        chunk_ids: int64 [n], of the vectors that may be found: without validation chunks.
        vectors: float16 [n, d], in the same order; may be memory-mapped.
        k: neighbours wanted.
        metric: ``l2`` or ``ip``.
    """
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    parts = []
    for start in range(0, len(queries), _QUERY_BLOCK):
        rows = slice(start, start + _QUERY_BLOCK)
        best = _nothing(len(queries[rows]), k)
        for first in range(0, len(chunk_ids), _VECTOR_BLOCK):
            block = slice(first, first + _VECTOR_BLOCK)
            stored = np.asarray(vectors[block]).astype(np.float32)
            found = _block_top(queries[rows], exclusion.take(rows), chunk_ids[block], stored, k=k, metric=metric)
            best = merge_exact([best, found], k, metric)
        parts.append(best)
    if not parts:
        return _nothing(0, k)
    return np.concatenate([d for d, _ in parts]), np.concatenate([i for _, i in parts])


def _nothing(queries: int, k: int) -> ExactTop:
    return np.full((queries, k), np.nan, np.float32), np.full((queries, k), MISSING, np.int64)


def _block_top(
    queries: np.ndarray, exclusion: Exclusion, chunk_ids: np.ndarray, stored: np.ndarray, *, k: int, metric: Metric
) -> ExactTop:
    products = queries @ stored.T
    keys = -products if metric == "ip" else np.add.reduce(stored * stored, axis=1)[None, :] - 2 * products
    ids = np.broadcast_to(chunk_ids, keys.shape)
    keys[~exclusion.allowed(ids)] = np.inf
    width = min(k + _SPARE, len(chunk_ids))
    columns = np.argpartition(keys, width - 1, axis=1)[:, :width]
    allowed = np.isfinite(np.take_along_axis(keys, columns, axis=1))
    rows, places = np.nonzero(allowed)
    distances = np.full(columns.shape, np.nan, np.float32)
    distances[rows, places] = pair_scores(queries[rows], stored[columns[rows, places]], metric)
    return distances, np.where(allowed, chunk_ids[columns], MISSING)


def merge_exact(partials: Sequence[ExactTop], k: int, metric: Metric) -> ExactTop:
    """`exact_top` of several shards as that of all of them: by distance, ties by ascending id.

    Args:
        partials: of the same queries, in any order.
        k: kept for each query; what is missing is NaN and -1, last.
        metric: ``l2`` or ``ip``.
    """
    distances, ids = merge(partials, k, metric)
    distances[ids < 0] = np.nan
    return distances, ids


def distinct_top(top: ExactTop, uids: UidSource, k: int) -> ExactTop:
    """The first ``k`` of exact neighbours among which of equal blocks the first alone counts.

    Args:
        top: as `merge_exact` gives it, of more than k.
        uids: what tells equal blocks.
        k: kept for each query; what is missing is NaN and -1, last.
    """
    distances, ids = top
    kept_distances, kept_ids = _nothing(len(ids), k)
    for row in range(len(ids)):
        own = ids[row][ids[row] >= 0]
        _, firsts = np.unique(uids.uid_keys(own), return_index=True)
        firsts = np.sort(firsts)[:k]
        kept_ids[row, : len(firsts)], kept_distances[row, : len(firsts)] = own[firsts], distances[row, firsts]
    return kept_distances, kept_ids


def recall_at(found: np.ndarray, exact: np.ndarray, metric: Metric, at: int = RECALL_AT) -> float | None:
    """The share of the exact nearest neighbours that the index found, or found an equal of.

    For each query the exact list has m = min(at, what is allowed) distances; of the first m found ones those count
    that are no worse than the m-th exact one.

    Args:
        found: float32 [q, >= at], distances of the index' answers after re-scoring, best first, NaN where missing.
        exact: float32 [q, >= at], from `exact_top` and `merge_exact`.
        metric: ``l2`` or ``ip``.
        at: 10 for recall@10.

    Returns:
        From 0 to 1; None when no query has any allowed neighbour.
    """
    wanted = ascending(exact[:, :at], metric)
    available = (~np.isnan(wanted)).sum(axis=1)
    total = int(available.sum())
    if total == 0:
        return None
    rows = np.flatnonzero(available)
    worst = wanted[rows, available[rows] - 1]
    limit = worst + _TOLERANCE * np.maximum(np.abs(worst), _TOLERANCE)
    first = np.arange(min(at, found.shape[1])) < available[rows, None]
    hits = first & (ascending(found[rows, :at], metric) <= limit[:, None])
    return int(hits.sum()) / total


def nprobe_ladder(n_lists: int) -> list[int]:
    """The nprobe values to try: powers of two below ``n_lists``, then ``n_lists`` itself."""
    return [1 << power for power in range((n_lists - 1).bit_length())] + [n_lists]


def choose_nprobe(
    recalls: Mapping[int, float | None], gate: float, key: str, requested: bool = False, made_by: str = "build"
) -> int:
    """The cheapest nprobe whose measured recall reaches the gate; never one tuned by this machine's latency.

    Args:
        recalls: recall@10 after re-scoring by nprobe, some or all of `nprobe_ladder`; None: nothing to find.
        gate: ``--min-recall``.
        key: the index key, for the message.
        requested: whether it follows from ``--index-key``, which no memory changes.
        made_by: the command that searches.

    Raises:
        RecallError: none reaches it; says the best one and what would (`recall_remedy`).
    """
    for nprobe in sorted(recalls):
        recall = recalls[nprobe]
        if recall is None or recall >= gate:
            return nprobe
    best = max(sorted(recalls), key=lambda nprobe: recalls[nprobe] or 0.0)
    raise RecallError(
        f"recall@{RECALL_AT} of the index {key} is {recalls[best]:.4f} at best (nprobe {best}), below the gate of "
        f"{gate:.4f}. {recall_remedy(key, requested, made_by)}"
    )


def recall_remedy(key: str, requested: bool, made_by: str) -> str:
    """What to do about an index whose recall is below the gate, in words; the arguments are those of `choose_nprobe`.

    The index key and the gate are settings of ``retrodb build`` alone: whatever else makes a version keeps them.
    """
    lists = re.search(r"IVF\d+", key)  # without a rotation, which may cut dimensions, and with all lists to be probed
    exhaustive = f"{lists[0]},Flat" if lists and key != f"{lists[0]},Flat" else "Flat"
    if made_by != "build":
        return (
            f"`retrodb {made_by}` keeps the index and the gate that the database was built with, and the current "
            f"version is as it was: build another with `retrodb build --index-key {exhaustive!r}`, or with a lower "
            "--min-recall."
        )
    memory = "" if requested else "More --memory lets the index keep finer codes; "
    return f"{memory}--index-key {exhaustive!r} would reach it; or lower --min-recall."
