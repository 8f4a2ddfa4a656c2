"""Re-ranking by surface overlap: of the K nearest candidates of each query the k whose tokens have most in common.

Doostmohammadi et al. 2023, "Surface-Based Retrieval Reduces Perplexity of Retrieval-Augmented Language Models": what a
RETRO gains from a neighbour follows the tokens that it shares with the chunk more than the distance of their vectors.
The dense search gives the K nearest allowed candidates; `surface_scores` compares the query chunk's tokens with those
of each candidate N (as the search does; the continuation F comes along and is not compared); the k best are kept.
Ties go to the nearer one, then to the lower id.

overlap
    The tokens in common, each as often as both have it: ``sum over t of min(qf(t), tf(t))``.
bm25
    ``sum over t of qf(t) * idf(t) * tf(t) * (k1 + 1) / (tf(t) + k1 * (1 - b + b * |D| / avgdl))`` with k1 = 1.5 and
    b = 0.75 (Robertson & Zaragoza 2009, section 3.5 gives 1.2 to 2 and 0.5 to 0.8), and
    ``idf(t) = ln(1 + (n - df + 0.5) / (df + 0.5))``, Lucene's, which is never negative (Kamphuis et al. 2020).

The collection that ``n``, ``df`` and ``avgdl`` are counted in is the query's own candidates, as where BM25 re-ranks a
list: it takes no pass over the corpus, and a query's answer depends on nothing but its candidates, whatever the shards,
the runner, or what else is in the database. A token that all candidates share tells them apart by its frequency alone.

Each term is rounded to a multiple of 2^-20 before the sum, which is then exact in any order: equal scores are equal.
"""

import functools
import math
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import numpy as np

from retrodb.neighbours.table import Neighbours

Method = Literal["overlap", "bm25"]

K1: Final = 1.5
B: Final = 0.75

BUDGET_BYTES: Final = 128 << 20
"""Tokens of candidates that are held at a time."""

_STEPS: Final = float(1 << 20)
_COUNTED_BYTES: Final = 8 << 20
"""What is counted of some queries at a time, in bytes: about what a core's cache holds."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of chunks: uint16 or uint32 [n, m], and how many of each are valid, int16 [n]."""

    tokens: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def valid(self) -> np.ndarray:
        """bool [n, m]."""
        found: np.ndarray = np.arange(self.tokens.shape[1]) < self.lengths[:, None]
        return found


class TokenSource(Protocol):
    """Stored tokens by chunk id."""

    @property
    def chunk_tokens(self) -> int:
        """m."""

    def take(self, ids: np.ndarray) -> Tokens:
        """Of int64 [n] valid chunk ids."""


@dataclass(frozen=True)
class Reranking:
    """How candidates are re-ranked: by what, and how many are kept."""

    method: Method
    kept: int


def rerank(found: Neighbours, how: Reranking, tokens: TokenSource, *, budget_bytes: int = BUDGET_BYTES) -> Neighbours:
    """The ``how.kept`` best of each query's candidates by what their tokens have in common with the query's.

    Rows stay in the order of their distances; ``ranks`` says which is the best by overlap, the next, and so on.

    Args:
        found: the K nearest allowed candidates of chunks of the database, K >= ``how.kept``; missing ones last.
        how: by what, and how many are kept.
        tokens: of the queries and of the candidates.
        budget_bytes: bound on the candidates' tokens held at a time.

    Raises:
        DamagedError: a chunk does not exist.
    """
    step = max(1, budget_bytes // (tokens.chunk_tokens * 4 * max(1, found.k)))
    blocks = [slice(start, start + step) for start in range(0, len(found.chunk_ids), step)] or [slice(0)]
    parts = [_reranked(found.take(block), how, tokens) for block in blocks]
    return Neighbours(*(np.concatenate(columns) for columns in zip(*(vars(p).values() for p in parts), strict=True)))


def surface_scores(queries: Tokens, documents: Tokens, places: np.ndarray, method: Method) -> np.ndarray:
    """How much the tokens of each query have in common with those of its candidates.

    Args:
        queries: of q chunks.
        documents: of all candidates.
        places: int64 [q, K], which of ``documents`` are the candidates of each query; -1 where there are fewer.
        method: ``overlap`` or ``bm25``.

    Returns:
        float64 [q, K], higher is more; -inf where there is no candidate.
    """
    scores = np.full(places.shape, -np.inf)
    if not len(documents):
        return scores
    vocabulary = int(max(queries.tokens.max(), documents.tokens.max())) + 1
    a_query = 2 * (vocabulary + 1) + 24 * places.shape[1] * (queries.tokens.shape[1] + 1)
    step = max(1, _COUNTED_BYTES // a_query)
    slots = np.zeros((min(step, len(queries)), vocabulary + 1), dtype=np.uint16)
    for start in range(0, len(queries), step):
        block = slice(start, start + step)
        own, wanted = Tokens(queries.tokens[block], queries.lengths[block]), places[block]
        present = wanted >= 0
        lengths = np.where(present, documents.lengths[wanted], 0)
        shared = _counted(own, documents.tokens, wanted, lengths, slots[: len(own)])
        found = shared.overlap() if method == "overlap" else shared.bm25(lengths, present)
        scores[block][present] = found[present]
    return scores


@dataclass(frozen=True)
class _Shared:
    """Tokens that queries share with their candidates; a token is told by its *slot*, one of its places in the query.

    Attributes:
        shape: q and K.
        own: int64 [q, m + 1], how often the token of a slot (from 1) stands in the query.
        pairs: int64 [p], ``query * K + candidate``, ascending.
        cells: int64 [p], ``query * (m + 1) + slot``; a pair of these comes once.
        often: int64 [p], how often the candidate holds the token.
    """

    shape: tuple[int, int]
    own: np.ndarray
    pairs: np.ndarray
    cells: np.ndarray
    often: np.ndarray

    def overlap(self) -> np.ndarray:
        """float64 [q, K]."""
        return self._summed(np.minimum(self.often, self.own.reshape(-1)[self.cells]))

    def bm25(self, lengths: np.ndarray, present: np.ndarray) -> np.ndarray:
        """float64 [q, K] of candidates with so many tokens, int64 [q, K], where they are there, bool [q, K]."""
        n = present.sum(axis=1)
        mean = lengths.sum(axis=1) / np.maximum(n, 1)
        containing = np.bincount(self.cells, minlength=self.own.size).reshape(self.own.shape)
        idf = np.empty(self.own.shape)
        for number in np.unique(n):  # K, but for queries with fewer candidates
            some = n == number
            idf[some] = _idf(int(number))[containing[some]]
        norms = K1 * (1 - B + B * lengths / np.maximum(mean, 1)[:, None])
        weights = (self.own * idf).reshape(-1)[self.cells]
        terms = weights * (self.often * (K1 + 1)) / (self.often + norms.reshape(-1)[self.pairs])
        return self._summed(np.rint(terms * _STEPS)) / _STEPS

    def _summed(self, terms: np.ndarray) -> np.ndarray:
        count, width = self.shape
        return np.bincount(self.pairs, weights=terms, minlength=count * width).reshape(count, width)


def _counted(
    queries: Tokens, documents: np.ndarray, places: np.ndarray, lengths: np.ndarray, slots: np.ndarray
) -> _Shared:
    """Count the tokens of queries in their candidates.

    Args:
        queries: of q chunks.
        documents: [u, m], tokens of all candidates.
        places: int64 [q, K], the candidates.
        lengths: int64 [q, K], their valid tokens.
        slots: uint16 [q, V + 1], zeros, V above every token; zeros again when this returns. By it a token is found in
            a query at the cost of one look-up.
    """
    count, width = queries.tokens.shape
    rows, columns = np.nonzero(queries.valid)
    tokens = queries.tokens[rows, columns]
    slots[rows, tokens] = columns + 1  # of a token that repeats, one of its places
    cells = width + 1
    own = np.bincount(rows * cells + slots[rows, tokens], minlength=count * cells).reshape(count, cells)
    first = (np.arange(count) * slots.shape[1])[:, None, None]
    valid = np.arange(width) < lengths[:, :, None]
    looked_up = np.where(valid, documents[places] + first, first + slots.shape[1] - 1)  # the last is no token's
    found = np.take(slots, looked_up).reshape(-1)
    slots[rows, tokens] = 0
    hits = np.flatnonzero(found != 0)
    counted = np.bincount(hits // width * cells + found[hits])
    held = np.flatnonzero(counted != 0)
    pairs = held // cells
    return _Shared(
        (count, places.shape[1]), own, pairs, pairs // places.shape[1] * cells + held - pairs * cells, counted[held]
    )


@functools.lru_cache(maxsize=256)
def _idf(n: int) -> np.ndarray:
    """float64 [n + 1]: of a token by how many of ``n`` candidates hold it. By libm: numpy's own logarithm differs in
    the last bit from one processor to another."""
    return np.array([math.log(1 + (n - df + 0.5) / (df + 0.5)) for df in range(n + 1)])


def _reranked(found: Neighbours, how: Reranking, tokens: TokenSource) -> Neighbours:
    ids = found.neighbour_ids
    valid = ids >= 0
    unique, inverse = np.unique(ids[valid], return_inverse=True)
    places = np.full(ids.shape, -1, dtype=np.int64)
    places[valid] = inverse
    scores = surface_scores(tokens.take(found.chunk_ids), tokens.take(unique), places, how.method)
    best = np.argsort(-scores, axis=1, kind="stable")[:, : how.kept]  # columns ascend by distance, then by id
    ranks = np.argsort(best, axis=1, kind="stable")
    columns = np.take_along_axis(best, ranks, axis=1)

    def kept(values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, columns, axis=1)

    n_valid = np.minimum(found.n_valid, how.kept).astype(np.int16)
    ranks = np.where(kept(ids) >= 0, ranks, -1).astype(np.int16)
    return Neighbours(
        found.chunk_ids, kept(ids), kept(found.neighbour_document_ids), kept(found.distances), n_valid, ranks
    )
