"""From candidates to neighbours: exclude by id, re-score from the stored vectors, order, keep k or count honestly.

Two forms share `select` and what is asked again (`retrodb.neighbours.asking`). `find_neighbours` has an index at hand.
A shuffle over groups of index shards (`retrodb.neighbours.rounds`) searches each group apart, merges, selects, and
repeats for the queries that are not ``satisfied``.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from retrodb.index import MISSING, Metric
from retrodb.index.engine import ascending
from retrodb.neighbours.asking import asked_again, exhausted, first_asks, rows_at_once
from retrodb.neighbours.exclusion import Exclusion, UidSource
from retrodb.neighbours.sources import CandidateSource, DocumentSource, VectorSource
from retrodb.neighbours.table import Neighbours

BUDGET_BYTES: Final = 64 << 20
"""Working memory of a call, besides its result and what the sources keep."""

_PAIRS_AT_ONCE: Final = 2_048
_ROUNDING: Final = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Selection:
    """The best allowed candidates of each query.

    Attributes:
        ids: int64 [q, k], -1 where missing.
        distances: float32 [q, k], NaN where missing.
        n_valid: int16 [q].
        satisfied: bool [q]. False: more candidates could change the answer, and none is given.
    """

    ids: np.ndarray
    distances: np.ndarray
    n_valid: np.ndarray
    satisfied: np.ndarray


def pair_scores(queries: np.ndarray, vectors: np.ndarray, metric: Metric) -> np.ndarray:
    """The stored distance of each pair of rows: squared L2 or inner product, computed in float32.

    A pair's score depends on the pair alone, to the bit: differences (products) are summed along the row, in numpy's
    pairwise order. Equal vectors have exactly 0.

    Args:
        queries: float32 [n, d].
        vectors: float32 [n, d].
        metric: ``l2`` or ``ip``.

    Returns:
        float32 [n].
    """
    terms = np.subtract(vectors, queries) if metric == "l2" else np.multiply(vectors, queries)
    if metric == "l2":
        np.multiply(terms, terms, out=terms)
    return np.add.reduce(np.ascontiguousarray(terms), axis=1, dtype=np.float32)


def rescore(
    queries: np.ndarray,
    rows: np.ndarray,
    ids: np.ndarray,
    vectors: VectorSource,
    *,
    metric: Metric,
    budget_bytes: int = BUDGET_BYTES,
) -> np.ndarray:
    """`pair_scores` of query ``rows[i]`` with the stored vector of chunk ``ids[i]``.

    Args:
        queries: float32 [q, d].
        rows: int64 [p], rows of ``queries``.
        ids: int64 [p] chunk ids, none negative.
        vectors: where the stored vectors are; each is fetched once for many pairs.
        metric: ``l2`` or ``ip``.
        budget_bytes: bound on the vectors held at a time.

    Returns:
        float32 [p].
    """
    scores = np.empty(len(ids), dtype=np.float32)
    step = max(1, budget_bytes // (6 * queries.shape[1]))
    order = np.argsort(ids, kind="stable")  # so that a vector is fetched, and turned into float32, about once
    for start in range(0, len(ids), step):
        pairs = order[start : start + step]
        unique, inverse = np.unique(ids[pairs], return_inverse=True)
        stored = vectors.rows(unique).astype(np.float32)
        for first in range(0, len(pairs), _PAIRS_AT_ONCE):
            own = pairs[first : first + _PAIRS_AT_ONCE]
            scores[own] = pair_scores(queries[rows[own]], stored[inverse[first : first + _PAIRS_AT_ONCE]], metric)
    return scores


def select(
    queries: np.ndarray,
    exclusion: Exclusion,
    raw: np.ndarray,
    ids: np.ndarray,
    exhausted: np.ndarray,
    *,
    vectors: VectorSource,
    k: int,
    metric: Metric,
    raw_is_exact: bool = True,
    largest_norm: float | None = None,
    uids: UidSource | None = None,
    budget_bytes: int = BUDGET_BYTES,
) -> Selection:
    """The ``k`` best allowed candidates by exact distance, ties by ascending id, also at the cut.

    With ``uids``, of equal blocks the best one alone: each counts once.

    A query is satisfied when k candidates are allowed and the last one fetched is worse than the k-th allowed by more
    than float error, so that nothing equally near was left out; or when there is no more to fetch. For an exact index
    the answer then is that of brute force, with hundreds of duplicates too.

    Args:
        queries: float32 [q, d].
        exclusion: of these q queries.
        raw: float32 [q, c], raw distances, nearest first.
        ids: int64 [q, c], candidates; -1 where there are fewer.
        exhausted: bool [q], whether the index has no more for the query.
        vectors: the stored vectors.
        k: neighbours wanted.
        metric: ``l2`` or ``ip``.
        raw_is_exact: raw distances are true up to float error, so that only those near enough need re-scoring.
        largest_norm: of all vectors of the index, where that is known.
        uids: what tells equal blocks; None where each chunk counts.
        budget_bytes: working memory.
    """
    allowed = exclusion.allowed(ids)
    keys = np.where(ids >= 0, ascending(raw, metric), np.float32(np.inf))
    groups = None if uids is None else _groups(ids, allowed, uids)
    kth = _kth_allowed(keys, allowed if groups is None else allowed & _firsts(groups, allowed), k)
    largest: np.ndarray | float = 0.0
    if metric == "ip":
        largest = 4 * _largest_norms(ids, allowed, vectors) if largest_norm is None else largest_norm
    limit = raw_limit(queries, kth, metric, largest)
    last = keys[:, -1] if keys.shape[1] else np.full(len(keys), np.inf, np.float32)
    satisfied = exhausted | (np.isfinite(kth) & (last > limit))
    wanted = allowed & satisfied[:, None]
    if raw_is_exact:
        wanted &= keys <= limit[:, None]
    rows, columns = np.nonzero(wanted)
    scores = np.full(keys.shape, np.inf, dtype=np.float32)
    found = rescore(queries, rows, ids[rows, columns], vectors, metric=metric, budget_bytes=budget_bytes)
    scores[rows, columns] = ascending(found, metric)
    ids = np.where(wanted, ids, MISSING)
    if groups is not None:
        order = np.lexsort((ids, scores), axis=1)
        kept = np.zeros(ids.shape, dtype=bool)
        firsts = _firsts(np.take_along_axis(groups, order, axis=1), np.take_along_axis(wanted, order, axis=1))
        np.put_along_axis(kept, order, firsts, axis=1)
        scores[~kept], ids = np.inf, np.where(kept, ids, MISSING)
    return _best(scores, ids, k, metric, satisfied)


def distinct(ids: np.ndarray, uids: UidSource) -> np.ndarray:
    """bool [q, c]: of each row of candidates, best first, the first of equal blocks. Negative ids are none."""
    there = ids >= 0
    return _firsts(_groups(ids, there, uids), there)


def _groups(ids: np.ndarray, allowed: np.ndarray, uids: UidSource) -> np.ndarray:
    """int64 [q, c]: what tells equal blocks among the allowed candidates."""
    groups = np.zeros(ids.shape, dtype=np.int64)
    unique, inverse = np.unique(ids[allowed], return_inverse=True)
    groups[allowed] = uids.uid_keys(unique)[inverse]
    return groups


def _firsts(groups: np.ndarray, among: np.ndarray) -> np.ndarray:
    """bool [q, c]: of each row, the first of each group among some candidates."""
    rows, columns = np.nonzero(among)
    own = groups[rows, columns]
    order = np.lexsort((columns, own, rows))
    new = np.ones(len(order), dtype=bool)
    new[1:] = (np.diff(rows[order]) != 0) | (np.diff(own[order]) != 0)
    firsts = np.zeros(groups.shape, dtype=bool)
    firsts[rows[order[new]], columns[order[new]]] = True
    return firsts


def _kth_allowed(keys: np.ndarray, allowed: np.ndarray, k: int) -> np.ndarray:
    """The raw key of each query's k-th allowed candidate, float32 [q]; +inf where there are fewer."""
    if keys.shape[1] < k:
        return np.full(len(keys), np.inf, np.float32)
    reached = np.cumsum(allowed, axis=1, dtype=np.int32) >= k
    position = reached.argmax(axis=1)
    return np.where(reached[:, -1], keys[np.arange(len(keys)), position], np.float32(np.inf)).astype(np.float32)


def raw_limit(queries: np.ndarray, kth: np.ndarray, metric: Metric, norms: np.ndarray | float) -> np.ndarray:
    """Up to where a raw distance may be that of a vector as near as the k-th: the error bound of a dot product, twice.

    faiss computes ``l2`` as ||q||^2 + ||c||^2 - 2qc, whose error grows with the norms, not with the distance. Inner
    products it computes as such: their error grows with both norms.

    Args:
        queries: float32 [q, d].
        kth: float32 [q], the k-th best, turned so that smaller is nearer (`ascending`); +inf where there is none.
        metric: ``l2`` or ``ip``.
        norms: a bound on ||c||, float32 [q] or one for all, for ``ip``; for ``l2`` the k-th distance gives one.

    Returns:
        float32 [q], turned alike.
    """
    squared = np.add.reduce(queries * queries, axis=1)
    if metric == "l2":
        distance = np.maximum(np.where(np.isfinite(kth), kth, 0), 0)
        scale = squared + (np.sqrt(squared) + np.sqrt(distance)) ** 2
    else:
        scale = np.sqrt(squared) * np.asarray(norms, dtype=np.float32)
    return (kth + (queries.shape[1] + 8) * _ROUNDING * scale).astype(np.float32)


def _largest_norms(ids: np.ndarray, allowed: np.ndarray, vectors: VectorSource) -> np.ndarray:
    """The largest norm among each query's allowed candidates, float32 [q]; 0 where there is none."""
    norms = np.zeros(ids.shape, dtype=np.float32)
    rows, columns = np.nonzero(allowed)
    unique, inverse = np.unique(ids[rows, columns], return_inverse=True)
    found = np.empty(len(unique), dtype=np.float32)
    for start in range(0, len(unique), 8 * _PAIRS_AT_ONCE):
        part = slice(start, start + 8 * _PAIRS_AT_ONCE)
        stored = vectors.rows(unique[part]).astype(np.float32)
        found[part] = np.sqrt(np.add.reduce(stored * stored, axis=1))
    norms[rows, columns] = found[inverse]
    return norms.max(axis=1, initial=0)


def _best(scores: np.ndarray, ids: np.ndarray, k: int, metric: Metric, satisfied: np.ndarray) -> Selection:
    """The k best by (score, id); ``scores`` ascending, +inf where ``ids`` is -1."""
    order = np.lexsort((np.where(ids < 0, np.iinfo(np.int64).max, ids), scores), axis=1)[:, :k]
    kept_ids = np.full((len(ids), k), MISSING, dtype=np.int64)
    distances = np.full((len(ids), k), np.nan, dtype=np.float32)
    width = order.shape[1]
    kept_ids[:, :width] = np.take_along_axis(ids, order, axis=1)
    distances[:, :width] = ascending(np.take_along_axis(scores, order, axis=1), metric)
    distances[kept_ids < 0] = np.nan
    return Selection(kept_ids, distances, (kept_ids >= 0).sum(axis=1).astype(np.int16), satisfied)


def find_neighbours(
    query_ids: np.ndarray,
    queries: np.ndarray,
    exclusion: Exclusion,
    source: CandidateSource,
    vectors: VectorSource,
    documents: DocumentSource,
    k: int,
    metric: Metric,
    candidates: int | None = None,
    uids: UidSource | None = None,
    budget_bytes: int = BUDGET_BYTES,
) -> Neighbours:
    """The ``k`` nearest allowed chunks of each query, fewer only where the index has no more (invariants 1 and 2).

    Queries that are not satisfied are asked again with twice the candidates, and when their lists are exhausted, with
    more lists, up to all. What a query is asked depends on the query alone, so its answer does not depend on what else
    is in the batch.

    Args:
        query_ids: int64 [n], written to the result.
        queries: float16 or float32 [n, d].
        exclusion: of these n queries.
        source: the index.
        vectors: the stored vectors.
        documents: the document of each chunk.
        k: neighbours wanted.
        metric: ``l2`` or ``ip``.
        candidates: asked for first; None for `initial_candidates`.
        uids: what tells equal blocks, of which the best alone is kept; None where each chunk counts.
        budget_bytes: working memory.

    Raises:
        DamagedError: a query holds NaN, or an index names chunks that do not exist.
    """
    result = Neighbours.none(query_ids, k)
    asks = first_asks(exclusion, k, source, candidates)
    while asks:
        ask = asks.pop()
        for part in ask.cut(rows_at_once(ask.candidates, queries.shape[1], budget_bytes)):
            own = np.ascontiguousarray(queries[part.rows], dtype=np.float32)
            raw, ids = source.search(own, part.candidates, part.nprobe)
            found = select(
                own,
                exclusion.take(part.rows),
                raw,
                ids,
                exhausted(ids, part, source),
                vectors=vectors,
                k=k,
                metric=metric,
                raw_is_exact=source.raw_is_exact,
                largest_norm=source.largest_norm,
                uids=uids,
                budget_bytes=budget_bytes,
            )
            done, again = asked_again(part, found.satisfied, found.n_valid, k, source)
            _keep(result, part.rows, found, done)
            asks += again
    _add_documents(result, documents, max(1, budget_bytes // (k * 48)))
    return result


def _keep(result: Neighbours, rows: np.ndarray, found: Selection, done: np.ndarray) -> None:
    result.neighbour_ids[rows[done]] = found.ids[done]
    result.distances[rows[done]] = found.distances[done]
    result.n_valid[rows[done]] = found.n_valid[done]


def _add_documents(result: Neighbours, documents: DocumentSource, block: int) -> None:
    for start in range(0, len(result.chunk_ids), block):
        ids = result.neighbour_ids[start : start + block]
        valid = ids >= 0
        result.neighbour_document_ids[start : start + block][valid] = documents.document_ids(ids[valid])
