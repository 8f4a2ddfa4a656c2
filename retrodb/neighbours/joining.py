"""What becomes of neighbours that are there when vectors join those they were found among."""

import numpy as np

from retrodb.index import MISSING, Metric
from retrodb.index.engine import ascending
from retrodb.neighbours.asking import rows_at_once
from retrodb.neighbours.exclusion import UidSource
from retrodb.neighbours.select import BUDGET_BYTES, distinct, raw_limit
from retrodb.neighbours.sources import CandidateSource
from retrodb.neighbours.table import Neighbours


def within_reach(before: Neighbours, vectors: np.ndarray, joining: CandidateSource, metric: Metric) -> np.ndarray:
    """Which queries a vector that joins could be a neighbour of.

    One that has its k neighbours is asked for the nearest vector alone, and left out where that is farther than its
    last neighbour by more than float error: nothing else that joins is nearer.

    Args:
        before: the neighbours of n queries.
        vectors: float16 [n, d], theirs.
        joining: the vectors that join. Where its raw distances are those of codes, nobody is left out; nor with
            ``ip``, where it does not know its largest norm.
        metric: ``l2`` or ``ip``.

    Returns:
        int64 [m], rows, ascending.
    """
    if not joining.ntotal:
        return np.empty(0, dtype=np.int64)
    bounded = metric == "l2" or joining.largest_norm is not None
    if not (joining.raw_is_exact and bounded):
        return np.arange(len(before.chunk_ids))
    near = before.n_valid < before.k
    last = ascending(before.distances[:, -1], metric)
    full = np.flatnonzero(~near)
    at_once = rows_at_once(1, vectors.shape[1], BUDGET_BYTES)
    for start in range(0, len(full), at_once):
        rows = full[start : start + at_once]
        queries = np.asarray(vectors[rows], dtype=np.float32)
        raw, _ = joining.search(queries, 1, joining.nprobe)
        limit = raw_limit(queries, last[rows], metric, joining.largest_norm or 0.0)
        near[rows] = ascending(raw[:, 0], metric) <= limit
    return np.flatnonzero(near)


def nearest_of(
    before: Neighbours,
    found: Neighbours,
    metric: str,
    uids: UidSource | None = None,
    gone: np.ndarray | None = None,
) -> Neighbours:
    """The k best of two sets of neighbours of the same queries that have none in common; ties by ascending id.

    With ``uids``, of equal blocks the best one alone. Each set has the k best distinct ones of its own part of the
    chunks, so that the k best of both are those of all.

    ``gone``, bool [n, k], are neighbours of ``before`` that were deleted since. They keep their places, so that what
    is not as near as the last one does not come in; but they stand for no equal, and behind what is as near as they.
    """
    gone = np.zeros(before.neighbour_ids.shape, dtype=bool) if gone is None else gone
    gone = np.concatenate([gone, np.zeros(found.neighbour_ids.shape, dtype=bool)], axis=1)
    ids = np.concatenate([before.neighbour_ids, found.neighbour_ids], axis=1)
    documents = np.concatenate([before.neighbour_document_ids, found.neighbour_document_ids], axis=1)
    distances = np.concatenate([before.distances, found.distances], axis=1)
    keys = np.where(ids >= 0, -distances if metric == "ip" else distances, np.inf)
    order = np.lexsort((np.where(ids >= 0, ids, np.iinfo(np.int64).max), gone, keys), axis=1)
    if uids is not None:
        kept = np.take_along_axis(gone, order, axis=1)
        kept |= distinct(np.take_along_axis(np.where(gone, MISSING, ids), order, axis=1), uids)
        copies = ~np.take_along_axis(kept, np.argsort(order, axis=1), axis=1)
        ids, documents = np.where(copies, MISSING, ids), np.where(copies, MISSING, documents)
        distances = np.where(copies, np.float32(np.nan), distances)
        order = np.take_along_axis(order, np.argsort(~kept, axis=1, kind="stable"), axis=1)
    order = order[:, : before.k]

    def taken(values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, order, axis=1)

    nearest = taken(ids)
    n_valid = (nearest >= 0).sum(axis=1).astype(np.int16)
    return Neighbours(before.chunk_ids, nearest, taken(documents), taken(distances), n_valid)
