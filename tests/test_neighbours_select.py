"""Exclusion, over-fetch, exact re-score, order: against brute force."""

from dataclasses import dataclass

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrodb.errors import DamagedError
from retrodb.index import merge, search_group
from retrodb.neighbours import (
    Exclusion,
    Neighbours,
    document_ranges,
    find_neighbours,
    pair_scores,
    rescore,
    select,
)

D = 4


@dataclass
class Database:
    """Chunks in memory: a source of vectors, documents and candidates. Shards are told by the ids."""

    chunk_ids: np.ndarray
    documents: np.ndarray
    vectors: np.ndarray
    metric: str = "l2"
    raw_is_exact: bool = True
    nprobe: int = 1
    n_lists: int = 1
    largest_norm: float | None = None

    def __post_init__(self) -> None:
        self.asked: list[tuple[int, int, int]] = []
        kind = faiss.METRIC_L2 if self.metric == "l2" else faiss.METRIC_INNER_PRODUCT
        self.index = faiss.IndexIDMap(faiss.IndexFlat(self.vectors.shape[1], kind))
        if len(self.chunk_ids):
            # Backwards: faiss keeps the first of equals, and ours must be the lowest id whatever it keeps.
            self.index.add_with_ids(self.vectors[::-1].astype(np.float32), self.chunk_ids[::-1])

    @property
    def ntotal(self) -> int:
        return self.index.ntotal

    def search(self, queries: np.ndarray, candidates: int, nprobe: int) -> tuple[np.ndarray, np.ndarray]:
        self.asked.append((len(queries), candidates, nprobe))
        return search_group(self.index, queries, candidates, nprobe)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        assert (ids >= 0).all(), "a missing neighbour was looked up"
        return self.vectors[np.searchsorted(self.chunk_ids, ids)]

    def document_ids(self, ids: np.ndarray) -> np.ndarray:
        assert (ids >= 0).all(), "a missing neighbour was looked up"
        return self.documents[np.searchsorted(self.chunk_ids, ids)]

    def exclusion(self, exclude: str = "document") -> Exclusion:
        ranges = [
            Exclusion.of_chunks(self.chunk_ids[own], self.documents[own], exclude)
            for own in (self.chunk_ids >> 32 == shard for shard in np.unique(self.chunk_ids >> 32))
        ] or [Exclusion.of_nothing(0)]
        first, last = (np.concatenate([getattr(r, name) for r in ranges]) for name in ("first", "last"))
        return Exclusion(first, last, np.arange(len(first)))

    def find(self, k: int, exclude: str = "document", **options: object) -> Neighbours:
        return find_neighbours(
            self.chunk_ids, self.vectors, self.exclusion(exclude), self, self, self, k, self.metric, **options
        )


def database(lengths: list[list[int]], vectors: np.ndarray, metric: str = "l2", **options: object) -> Database:
    """Shards of documents of the given numbers of chunks."""
    ids, documents = [], []
    for shard, own in enumerate(lengths):
        ids.append((shard << 32) + np.arange(sum(own), dtype=np.int64))
        documents.append((shard << 32) + np.repeat(np.arange(len(own), dtype=np.int64), own))
    n = sum(map(sum, lengths))
    none = [np.empty(0, np.int64)]
    return Database(np.concatenate(ids or none), np.concatenate(documents or none), vectors[:n], metric, **options)


def brute_force(base: Database, query: int, k: int, exclude: str) -> list[tuple[float, int]]:
    """(distance, id) by plain Python, float64."""
    pairs = []
    q = base.vectors[query].astype(np.float64)
    for i, (chunk, document) in enumerate(zip(base.chunk_ids.tolist(), base.documents.tolist(), strict=True)):
        if i == query or (exclude == "document" and document == base.documents[query]):
            continue
        c = base.vectors[i].astype(np.float64)
        pairs.append((float(((q - c) ** 2).sum()), chunk) if base.metric == "l2" else (-float(q @ c), chunk))
    return sorted(pairs)[:k]


def check(base: Database, found: Neighbours, k: int, exclude: str) -> None:
    for query in range(len(base.chunk_ids)):
        expected = brute_force(base, query, k, exclude)
        n = len(expected)
        assert found.n_valid[query] == n
        assert found.neighbour_ids[query, :n].tolist() == [i for _, i in expected]
        sign = 1 if base.metric == "l2" else -1
        assert np.allclose(sign * found.distances[query, :n], [d for d, _ in expected], atol=1e-5)
        assert (found.neighbour_ids[query, n:] == -1).all()
        assert (found.neighbour_document_ids[query, n:] == -1).all()
        assert np.isnan(found.distances[query, n:]).all()
        assert (
            found.neighbour_document_ids[query, :n].tolist()
            == base.document_ids(np.array([i for _, i in expected], np.int64)).tolist()
        )


corpora = st.lists(st.lists(st.integers(1, 6), max_size=5), max_size=3)


@settings(max_examples=150, deadline=None)
@given(
    lengths=corpora,
    seed=st.integers(0, 10**6),
    k=st.integers(1, 12),
    metric=st.sampled_from(["l2", "ip"]),
    exclude=st.sampled_from(["document", "none"]),
    distinct=st.integers(1, 30),
    candidates=st.integers(1, 40),
    budget=st.sampled_from([1, 4_000, 64 << 20]),
)
def test_neighbours_equal_brute_force_in_distance_and_id_order(
    *,
    lengths: list[list[int]],
    seed: int,
    k: int,
    metric: str,
    exclude: str,
    distinct: int,
    candidates: int,
    budget: int,
) -> None:
    rng = np.random.default_rng(seed)
    n = sum(map(sum, lengths))
    # Quarters of small integers: exact in float32, so that float64 brute force has the very same ties.
    values = rng.integers(-4, 5, (distinct, D)) / 4
    base = database(lengths, values[rng.integers(0, distinct, n)].astype(np.float16).reshape(n, D), metric)
    check(base, base.find(k, exclude, candidates=candidates, budget_bytes=budget), k, exclude)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("lengths", [[], [[]], [[1]], [[2]], [[1, 1]], [[7]], [[1], [1]]])
def test_tiny_corpora_have_an_honest_count(lengths: list[list[int]], metric: str) -> None:
    base = database(lengths, np.ones((7, D), np.float16), metric)
    found = base.find(20)
    check(base, found, 20, "document")
    assert found.neighbour_ids.shape == (len(base.chunk_ids), 20)


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_hundreds_of_exact_duplicates_are_ordered_by_id_and_cut_there(metric: str) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((800, 8)).astype(np.float16)
    vectors /= np.linalg.norm(vectors.astype(np.float32), axis=1, keepdims=True).astype(np.float16)
    vectors[rng.permutation(800)[:500]] = vectors[3]
    base = database([[2] * 200, [1] * 400], vectors, metric)
    found = base.find(20, candidates=2)
    same = np.flatnonzero((vectors == vectors[3]).all(axis=1))
    for query in same[[0, 1, 250, 499]]:
        others = same[base.documents[same] != base.documents[query]]
        assert found.neighbour_ids[query].tolist() == base.chunk_ids[others[:20]].tolist()
        if metric == "l2":
            assert (found.distances[query] == 0).all()
    exact = ((vectors.astype(np.float32)[:, None] - vectors.astype(np.float32)[None]) ** 2).sum(axis=2)
    if metric == "l2":
        for query in range(0, 800, 37):
            allowed = base.documents != base.documents[query]
            best = np.lexsort((base.chunk_ids[allowed], exact[query][allowed]))[:20]
            assert np.allclose(found.distances[query], exact[query][allowed][best], atol=1e-6)


class Noisy(Database):
    """Raw distances misordered by as much as float32 may."""

    def search(self, queries: np.ndarray, candidates: int, nprobe: int) -> tuple[np.ndarray, np.ndarray]:
        raw, ids = search_group(self.index, queries, self.ntotal)
        noise = np.random.default_rng(11).uniform(-3e-7, 3e-7, raw.shape) * (queries**2).sum(axis=1)[:, None]
        return merge([((raw + noise).astype(np.float32), ids)], candidates, self.metric)


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_float_error_of_the_index_never_changes_who_is_kept_among_equals(metric: str) -> None:
    rng = np.random.default_rng(12)
    values = (rng.integers(-1, 2, (150, D))).astype(np.float16)
    values[(values == 0).all(axis=1)] = 1
    base = database([[1] * 150], values, metric)
    noisy = Noisy(base.chunk_ids, base.documents, base.vectors, metric)
    for candidates in (5, 40, 150):
        check(base, noisy.find(5, candidates=candidates), 5, "document")


def test_a_document_of_300_near_identical_chunks_does_not_starve_its_queries() -> None:
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((400, 8)).astype(np.float16)
    vectors[50:350] = vectors[50] + (rng.standard_normal((300, 8)) * 1e-3).astype(np.float16)
    base = database([[5] * 10, [300, 25, 25]], vectors)
    found = base.find(10)
    assert (found.n_valid == 10).all()
    check(base, found, 10, "document")


def test_the_over_fetch_grows_only_for_the_queries_that_need_it() -> None:
    vectors = np.random.default_rng(2).standard_normal((2_000, 8)).astype(np.float16)
    vectors[:200] = vectors[0]
    base = database([[200] + [1] * 1_800], vectors)
    base.find(5)
    queries = {candidates: sum(q for q, c, _ in base.asked if c == candidates) for _, candidates, _ in base.asked}
    assert queries[37] == 1_800
    assert all(count <= 210 for candidates, count in queries.items() if candidates > 37)
    assert max(queries) <= 592


def test_a_query_is_answered_alike_in_any_batch_and_budget() -> None:
    vectors = np.random.default_rng(3).standard_normal((300, 8)).astype(np.float16)
    base = database([[3] * 100], vectors)
    whole = base.find(7)
    small = base.find(7, budget_bytes=1)
    assert np.array_equal(whole.neighbour_ids, small.neighbour_ids)
    assert np.array_equal(whole.distances, small.distances)
    rows = np.array([17, 203])
    some = find_neighbours(
        base.chunk_ids[rows], vectors[rows], base.exclusion().take(rows), base, base, base, 7, "l2", candidates=1
    )
    assert np.array_equal(some.distances, whole.distances[rows])
    assert np.array_equal(some.neighbour_ids, whole.neighbour_ids[rows])


def test_a_pairs_distance_depends_on_the_pair_alone_and_is_zero_for_equal_vectors() -> None:
    rng = np.random.default_rng(4)
    q, c = (rng.standard_normal((64, 384)).astype(np.float16).astype(np.float32) for _ in range(2))
    for metric in ("l2", "ip"):
        whole = pair_scores(q, c, metric)
        assert whole.dtype == np.float32
        for rows in (slice(5, 6), slice(3, 10), slice(None, None, 3)):
            assert np.array_equal(pair_scores(q[rows], c[rows], metric), whole[rows])
    assert (pair_scores(q, q, "l2") == 0).all()
    assert np.allclose(pair_scores(q, c, "l2"), ((q - c) ** 2).sum(axis=1), rtol=1e-5)


def test_rescoring_does_not_depend_on_the_budget() -> None:
    rng = np.random.default_rng(5)
    base = database([[1] * 50], rng.standard_normal((50, 8)).astype(np.float16))
    q = base.vectors.astype(np.float32)
    rows, ids = rng.integers(0, 50, 5_000), rng.integers(0, 50, 5_000)
    assert np.array_equal(
        rescore(q, rows, ids, base, metric="l2"), rescore(q, rows, ids, base, metric="l2", budget_bytes=1_000)
    )


class Lists:
    """An inverted-file index in which a query sees only ``nprobe`` tenths of the vectors."""

    raw_is_exact = False
    n_lists = 10
    largest_norm = None

    def __init__(self, base: Database, nprobe: int) -> None:
        self.base, self.nprobe, self.asked = base, nprobe, []

    @property
    def ntotal(self) -> int:
        return self.base.ntotal

    def search(self, queries: np.ndarray, candidates: int, nprobe: int) -> tuple[np.ndarray, np.ndarray]:
        self.asked.append((len(queries), nprobe))
        distances, ids = search_group(self.base.index, queries, self.ntotal)
        hidden = (ids & 0xFFFF) % 10 >= nprobe
        return merge([(np.where(hidden, np.inf, distances).astype(np.float32), np.where(hidden, -1, ids))],
                     candidates, "l2")  # fmt: skip


def test_more_lists_are_read_for_a_query_that_has_too_few_neighbours_in_its_own() -> None:
    base = database([[1] * 30], np.random.default_rng(6).standard_normal((30, 8)).astype(np.float16))
    source = Lists(base, nprobe=1)
    found = find_neighbours(base.chunk_ids, base.vectors, base.exclusion(), source, base, base, 20, "l2")
    assert (found.n_valid == 20).all()
    assert {nprobe for _, nprobe in source.asked} == {1, 4, 10}
    source = Lists(base, nprobe=1)
    found = find_neighbours(base.chunk_ids, base.vectors, base.exclusion(), source, base, base, 2, "l2")
    assert (found.n_valid == 2).all()
    alone = find_neighbours(
        base.chunk_ids[3:4], base.vectors[3:4], base.exclusion().take(slice(3, 4)), Lists(base, 1), base, base, 2, "l2"
    )
    assert np.array_equal(alone.neighbour_ids, found.neighbour_ids[3:4])


def test_a_shuffle_over_groups_with_second_rounds_equals_one_index() -> None:
    rng = np.random.default_rng(7)
    vectors = rng.standard_normal((240, 8)).astype(np.float16)
    vectors[100:160] = vectors[100]
    base = database([[40] * 3, [60, 60]], vectors)
    expected = base.find(10)
    groups = []
    for shard in (0, 1):
        own = base.chunk_ids >> 32 == shard
        groups.append(Database(base.chunk_ids[own], base.documents[own], vectors[own]))
    queries = vectors.astype(np.float32)
    pending, candidates = np.arange(240), 4
    ids = np.full((240, 10), -1)
    rounds = 0
    while len(pending):
        partials = [group.search(queries[pending], candidates, 1) for group in reversed(groups)]
        raw, candidate_ids = merge(partials, candidates, "l2")
        exhausted = np.full(len(pending), candidates >= base.ntotal)
        found = select(queries[pending], base.exclusion().take(pending), raw, candidate_ids, exhausted,
                       vectors=base, k=10, metric="l2")  # fmt: skip
        assert (found.ids[~found.satisfied] == -1).all()
        ids[pending[found.satisfied]] = found.ids[found.satisfied]
        pending, candidates, rounds = pending[~found.satisfied], candidates * 2, rounds + 1
    assert rounds > 2
    assert np.array_equal(ids, expected.neighbour_ids)


def test_a_hook_excludes_clusters_and_sees_no_missing_ids() -> None:
    base = database([[1] * 12, [2] * 4], np.random.default_rng(8).standard_normal((20, 8)).astype(np.float16))
    clusters = np.arange(20) % 3

    def same_cluster(rows: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        assert (candidates >= 0).all()
        return clusters[rows] == clusters[np.searchsorted(base.chunk_ids, candidates)]

    plain = base.exclusion()
    exclusion = Exclusion(plain.first, plain.last, plain.rows, same_cluster)
    found = find_neighbours(base.chunk_ids, base.vectors, exclusion, base, base, base, 20, "l2", candidates=3)
    for query in range(20):
        own = found.neighbour_ids[query, : found.n_valid[query]]
        rows = np.searchsorted(base.chunk_ids, own)
        allowed = (clusters != clusters[query]) & (base.documents != base.documents[query])
        assert sorted(rows.tolist()) == np.flatnonzero(allowed).tolist()
    rows = np.array([19, 2])
    again = find_neighbours(base.chunk_ids[rows], base.vectors[rows], exclusion.take(rows), base, base, base, 20, "l2")
    assert np.array_equal(again.neighbour_ids, found.neighbour_ids[rows])


def test_queries_of_another_corpus_exclude_nothing() -> None:
    base = database([[3, 3]], np.random.default_rng(9).standard_normal((6, 8)).astype(np.float16))
    queries = np.random.default_rng(10).standard_normal((4, 8)).astype(np.float16)
    found = find_neighbours(np.arange(4), queries, Exclusion.of_nothing(4), base, base, base, 6, "l2")
    assert (found.n_valid == 6).all()


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 5), max_size=12), data=st.data())
def test_document_ranges_hold_a_document_and_no_more_also_after_a_compaction(lengths: list[int], data: object) -> None:
    documents = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))), dtype=bool)
    kept = keep[documents]
    ids = (4 << 32) + np.flatnonzero(kept)
    first, last = document_ranges(ids, documents[kept])
    for i, document in enumerate(documents[kept]):
        inside = (ids >= first[i]) & (ids < last[i])
        assert np.array_equal(inside, documents[kept] == document)


def test_documents_that_are_not_consecutive_are_refused() -> None:
    with pytest.raises(DamagedError, match="one after another"):
        document_ranges(np.arange(3), np.array([1, 2, 1]))
    with pytest.raises(DamagedError, match="ascending"):
        document_ranges(np.array([1, 0]), np.array([1, 1]))


def test_ids_beyond_32_bits_of_row_are_told_apart_by_shard() -> None:
    base = database([[3], [3]], np.ones((6, 4), np.float16))
    found = base.find(5)
    assert found.neighbour_ids[0].tolist() == [1 << 32, (1 << 32) + 1, (1 << 32) + 2, -1, -1]
