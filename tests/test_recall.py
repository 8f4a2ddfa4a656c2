"""Recall by distance, and the nprobe that reaches the gate."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrodb.errors import RecallError
from retrodb.neighbours import Exclusion
from retrodb.quality.recall import choose_nprobe, exact_top, merge_exact, nprobe_ladder, recall_at

NAN = np.nan


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 25), min_size=1, max_size=3),
    k=st.integers(1, 8),
    metric=st.sampled_from(["l2", "ip"]),
    seed=st.integers(0, 10**6),
    distinct=st.integers(1, 40),
)
def test_exact_search_by_shard_equals_brute_force(
    sizes: list[int], k: int, metric: str, seed: int, distinct: int
) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.integers(-4, 5, (distinct, 4)) / 4).astype(np.float16)
    queries = values[rng.integers(0, distinct, 5)].astype(np.float32)
    first = rng.integers(0, 10, 5) + (rng.integers(0, 2, 5) << 32)
    exclusion = Exclusion(first, first + rng.integers(0, 6, 5), np.arange(5))
    ids = [(shard << 32) + np.arange(n, dtype=np.int64) for shard, n in enumerate(sizes)]
    vectors = [values[rng.integers(0, distinct, n)].reshape(n, 4) for n in sizes]
    tops = [exact_top(queries, exclusion, i, v, k, metric) for i, v in zip(ids, vectors, strict=True)]
    distances, found = merge_exact(tops[::-1], k, metric)
    for row in range(5):
        pairs = []
        for chunk, vector in zip(np.concatenate(ids).tolist(), np.concatenate(vectors), strict=True):
            if not exclusion.first[row] <= chunk < exclusion.last[row]:
                c = vector.astype(np.float64)
                pairs.append((((queries[row] - c) ** 2).sum() if metric == "l2" else -(queries[row] @ c), chunk))
        expected = sorted(pairs)[:k]
        sign = 1 if metric == "l2" else -1
        assert np.allclose(sign * distances[row, : len(expected)], [d for d, _ in expected])
        assert np.isnan(distances[row, len(expected) :]).all()
        assert (found[row] == -1).sum() == k - len(expected)
        assert not np.isin(found[row], np.arange(exclusion.first[row], exclusion.last[row])).any()


def test_exact_search_reads_blocks_and_agrees_over_their_borders() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((9_000, 8)).astype(np.float16)
    ids = np.arange(9_000, dtype=np.int64)
    queries = vectors[rng.integers(0, 9_000, 1_100)].astype(np.float32)
    distances, found = exact_top(queries, Exclusion.of_nothing(1_100), ids, vectors, 3, "l2")
    assert (distances[:, 0] == 0).all()
    for row in (0, 1_023, 1_024, 1_099):
        expected = np.sort(((vectors.astype(np.float32) - queries[row]) ** 2).sum(axis=1))[:3]
        assert np.allclose(distances[row], expected, atol=1e-5)
    assert found.shape == (1_100, 3)
    assert exact_top(queries[:0], Exclusion.of_nothing(0), ids, vectors, 3, "l2")[0].shape == (0, 3)


def distances(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


def test_recall_counts_equals_of_the_exact_neighbours() -> None:
    exact = distances([0.1, 0.2, 0.2], [0.5, 0.6, 0.7])
    assert recall_at(exact, exact, "l2", at=3) == 1.0
    # The second query misses 0.6 and finds 0.9 instead.
    assert recall_at(distances([0.1, 0.2, 0.2], [0.5, 0.7, 0.9]), exact, "l2", at=3) == pytest.approx(5 / 6)
    assert recall_at(distances([0.2, 0.3, NAN], [NAN, NAN, NAN]), exact, "l2", at=3) == pytest.approx(1 / 6)
    assert recall_at(distances([0.2, 0.3]), distances([0.1, 0.2]), "l2", at=1) == 0.0


def test_recall_with_inner_product_takes_larger_as_nearer() -> None:
    exact = distances([0.9, 0.8])
    assert recall_at(distances([0.9, 0.8]), exact, "ip", at=2) == 1.0
    assert recall_at(distances([0.9, 0.7]), exact, "ip", at=2) == 0.5
    assert recall_at(distances([-0.9, -0.95]), distances([-0.9, -0.91]), "ip", at=2) == 0.5


def test_recall_asks_for_no_more_than_there_is() -> None:
    assert recall_at(distances([0.1, NAN], [NAN, NAN]), distances([0.1, NAN], [NAN, NAN]), "l2") == 1.0
    assert recall_at(distances([0.5, 0.6]), distances([0.1, NAN]), "l2") == 0.0


def test_recall_is_unknown_where_nobody_may_have_a_neighbour() -> None:
    assert recall_at(distances([NAN, NAN]), distances([NAN, NAN]), "l2") is None
    assert recall_at(np.empty((0, 20), np.float32), np.empty((0, 10), np.float32), "l2") is None


def test_recall_counts_only_the_first_ten_found() -> None:
    exact = np.arange(10, dtype=np.float32)[None] / 10
    found = np.concatenate([exact + 1, exact], axis=1)
    assert recall_at(found, exact, "l2") == 0.0


@pytest.mark.parametrize(("n", "ladder"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (16, [1, 2, 4, 8, 16])])
def test_nprobe_is_tried_in_powers_of_two_up_to_all_lists(n: int, ladder: list[int]) -> None:
    assert nprobe_ladder(n) == ladder


def test_the_cheapest_nprobe_that_reaches_the_gate_is_chosen() -> None:
    assert choose_nprobe({8: 0.99, 1: 0.8, 4: 0.96, 2: 0.9}, 0.95, "IVF16,Flat") == 4
    assert choose_nprobe({1: None}, 0.95, "Flat") == 1


def test_a_gate_that_is_not_reached_says_what_was_and_what_would() -> None:
    with pytest.raises(RecallError) as caught:
        choose_nprobe({1: 0.4, 2: 0.71, 4: 0.7}, 0.95, "OPQ8_64,IVF4,PQ8x8")
    assert caught.value.exit_code == 5
    for part in ("0.7100", "nprobe 2", "0.9500", "--memory", "--index-key", "IVF4,Flat", "--min-recall"):
        assert part in str(caught.value)


def test_what_is_said_to_reach_the_gate_does():
    """No memory changes a key that was asked for; a rotation cuts dimensions, and HNSW does not find all lists."""
    with pytest.raises(RecallError, match="'IVF4,Flat'") as caught:
        choose_nprobe({4: 0.7}, 0.95, "OPQ8_16,IVF4_HNSW8,PQ8x8", requested=True)
    assert "--memory" not in str(caught.value)
    for key, reaches in (
        ("OPQ8_16,IVF4,Flat", "'IVF4,Flat'"),
        ("IVF4_HNSW8,Flat", "'IVF4,Flat'"),
        ("IVF4,Flat", "'Flat'"),
    ):
        with pytest.raises(RecallError, match=f"--memory .*--index-key {reaches} would"):
            choose_nprobe({4: 0.7}, 0.95, key)
