"""Vectors that join a database: whom they may come near, and who is nearest then, against brute force over all."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrodb.errors import DamagedError
from retrodb.index import HeldIndex, Metric, search_group
from retrodb.neighbours import Neighbours, pair_scores
from retrodb.neighbours.joining import nearest_of, within_reach

FIRST_NEW = 1 << 32


def brute_force(queries: np.ndarray, ids: np.ndarray, vectors: np.ndarray, k: int, metric: Metric) -> Neighbours:
    """The k nearest of all, ties by ascending id; a document a chunk, and nothing excluded."""
    found = Neighbours.none(np.arange(len(queries)), k)
    for row, query in enumerate(queries.astype(np.float32)):
        scores = pair_scores(np.repeat(query[None], len(ids), 0), vectors.astype(np.float32), metric)
        best = np.lexsort((ids, -scores if metric == "ip" else scores))[:k]
        found.neighbour_ids[row, : len(best)] = found.neighbour_document_ids[row, : len(best)] = ids[best]
        found.distances[row, : len(best)] = scores[best]
        found.n_valid[row] = len(best)
    return found


def some_vectors(rows: int, dimension: int, spread: int, seed: int) -> np.ndarray:
    """Of small fractions, so that many distances are equal; half of them far from the origin, so that float error
    shows where they are got from products, as they are of more than 20 queries at once."""
    drawn = np.random.default_rng(seed).integers(-4, 5, size=(rows, dimension)) / 8
    drawn[:, dimension // 2 :] = np.round(4 * drawn[:, dimension // 2 :]) / 2 + spread
    return drawn.astype(np.float16)


@settings(deadline=None)
@given(
    st.sampled_from(["l2", "ip"]),
    st.integers(1, 60),
    st.integers(0, 30),
    st.integers(0, 30),
    st.integers(1, 6),
    st.sampled_from([0, 3, 600]),
    st.integers(0, 2**32 - 1),
)
def test_who_is_not_within_reach_keeps_neighbours_that_are_those_of_all_C2(metric, queries, old, new, k, spread, seed):
    asking = some_vectors(queries, 8, spread, seed)
    ids = np.concatenate([np.arange(old), FIRST_NEW + np.arange(new)]).astype(np.int64)
    vectors = some_vectors(old + new, 8, spread, seed + 1)
    before = brute_force(asking, ids[:old], vectors[:old], k, metric)
    joining = HeldIndex([(ids[old:], vectors[old:])], 8, metric)

    rows = within_reach(before, asking, joining, metric)
    found = brute_force(asking[rows], ids[old:], vectors[old:], k, metric)
    after = before.put(rows, nearest_of(before.take(rows), found, metric))

    expected = brute_force(asking, ids, vectors, k, metric)
    for name, column in vars(expected).items():
        np.testing.assert_array_equal(getattr(after, name), column, err_msg=name)


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_float_error_of_the_nearest_leaves_nobody_out_who_has_it_among_the_best_C2(metric):
    """What joins is as near as the last neighbour, or nearer by the least there is, for hundreds of queries."""
    asking, vectors = some_vectors(400, 8, 600, 1), some_vectors(400, 8, 600, 2)
    before = brute_force(asking, np.arange(200), vectors[:200], 3, metric)
    new = FIRST_NEW + np.arange(200)
    rows = within_reach(before, asking, HeldIndex([(new, vectors[200:])], 8, metric), metric)
    after = brute_force(asking, np.concatenate([np.arange(200), new]), vectors, 3, metric)
    assert np.isin(np.flatnonzero((after.neighbour_ids >= FIRST_NEW).any(axis=1)), rows).all()


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_who_has_all_its_neighbours_nearer_than_what_joins_is_not_asked_further_C2(metric):
    asking = np.eye(8, dtype=np.float16)
    old = np.repeat(asking, 3, axis=0)
    before = brute_force(asking, np.arange(24), old, 3, metric)
    joining = HeldIndex([(np.array([FIRST_NEW]), (asking[:1] * np.float16(1.5)))], 8, metric)
    assert within_reach(before, asking, joining, metric).tolist() == ([] if metric == "l2" else [0])
    assert not len(within_reach(before, asking, HeldIndex([], 8, metric), metric)), "nothing joins"
    short = brute_force(asking, np.arange(2), old[:2], 3, metric)
    assert within_reach(short, asking, joining, metric).tolist() == list(range(8)), "any vector fills a place"


@dataclass
class Coded:
    """Vectors whose raw distances are not theirs, or whose norms are not known."""

    raw_is_exact: bool
    largest_norm: float | None
    ntotal: int = 1
    nprobe: int = 1
    n_lists: int = 1

    def search(self, queries: np.ndarray, candidates: int, nprobe: int) -> tuple[np.ndarray, np.ndarray]:
        raise AssertionError("what it says bounds nothing")


@pytest.mark.parametrize(("metric", "joining"), [("l2", Coded(False, 1.0)), ("ip", Coded(True, None))])
def test_by_raw_distances_that_bound_nothing_nobody_is_left_out(metric, joining):
    asking = np.eye(8, dtype=np.float16)
    before = brute_force(asking, np.arange(8), asking, 1, metric)
    assert within_reach(before, asking, joining, metric).tolist() == list(range(8))


def test_held_vectors_are_found_as_an_index_shard_finds_them():
    ids, vectors = FIRST_NEW + np.arange(5), some_vectors(5, 8, 0, 1)
    held = HeldIndex([(ids[:2], vectors[:2]), (ids[2:], vectors[2:])], 8, "l2")
    assert (held.ntotal, held.raw_is_exact, held.n_lists) == (5, True, 1)
    assert held.largest_norm == pytest.approx(np.linalg.norm(vectors.astype(np.float32), axis=1).max())
    raw, found = held.search(vectors.astype(np.float32), 9, 1)
    assert found.shape == (5, 5)
    assert (raw[:, 0] == 0).all()
    with pytest.raises(DamagedError, match="holds NaN"):
        search_group(held._index, np.full((1, 8), np.nan, np.float32), 1)
