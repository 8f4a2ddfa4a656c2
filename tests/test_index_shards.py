"""Index shards, apart and together."""

import pickle
from itertools import pairwise
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrodb.errors import DamagedError
from retrodb.index import (
    MISSING,
    GroupedIndex,
    IndexFile,
    build_index_shard,
    bytes_per_vector,
    commit_index_shard,
    group_shards,
    load_index_shard,
    merge,
    search_group,
    train_template,
)
from retrodb.index.engine import faiss_threads
from retrodb.storage import Storage

D = 16
KEYS = ["Flat", "IVF16,Flat", "IVF16,SQ8", "IVF16,RaBitQ", "IVF16_HNSW32,Flat", "OPQ4_16,IVF16_HNSW32,PQ4x4"]


def part(shard: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, shard])
    return (shard << 32) + np.arange(n, dtype=np.int64), rng.standard_normal((n, D)).astype(np.float16)


PARTS = [part(0, 300), part(1, 0), part(2, 500), part(3, 1)]
SAMPLE = np.concatenate([vectors for _, vectors in PARTS]).astype(np.float32)


@pytest.fixture(scope="module")
def templates() -> dict[tuple[str, str], bytes]:
    return {(key, metric): train_template(SAMPLE, key, metric, 0) for key in KEYS for metric in ("l2", "ip")}


def stored(folder: Path, template: bytes, groups: list[list[int]], metric: str, **options: object) -> GroupedIndex:
    storage = Storage(str(folder))
    files = []
    for number, group in enumerate(groups):
        path = f"index/{number:05d}.faiss"
        index = build_index_shard(template, [PARTS[i] for i in group], D, metric)
        commit_index_shard(storage, path, index)
        files.append(IndexFile(path, index.ntotal))
    return GroupedIndex(storage, files, D, metric, **options)


@settings(deadline=None)
@given(
    rows=st.lists(st.integers(0, 50_000), max_size=30),
    template=st.integers(0, 10**7),
    vector=st.integers(1, 5_000),
    exact=st.booleans(),
)
def test_groups_hold_every_shard_once_in_order_and_carry_their_template(
    rows: list[int], template: int, vector: int, exact: bool
) -> None:
    groups = group_shards(rows, template, vector, exact)
    assert [position for group in groups for position in group] == list(range(len(rows)))
    assert all(groups)
    sizes = [sum(rows[i] for i in group) * vector for group in groups]
    for size, following in pairwise(sizes):
        assert size + rows[groups[sizes.index(size)][-1]] * vector + following >= 4 * template


def test_a_group_is_bounded_so_that_a_worker_is() -> None:
    groups = group_shards([10_000] * 40, 1_000, 776, exact=True)
    assert max(map(len, groups)) * 10_000 * 776 <= 8 << 20
    groups = group_shards([10_000] * 400, 1_000_000, 72)
    assert 20 * 10_000 <= 10_000 * max(map(len, groups)) <= 262_144


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("key", KEYS)
def test_shards_searched_apart_and_merged_equal_one_whole_index(
    key: str, metric: str, templates: dict[tuple[str, str], bytes], tmp_path: Path
) -> None:
    template = templates[key, metric]
    queries = SAMPLE[::7]
    whole = build_index_shard(template, PARTS, D, metric)
    for nprobe in (1, 4, 16):
        one = search_group(whole, queries, 40, nprobe)
        for name, groups in (("a", [[0], [1], [2], [3]]), ("b", [[0, 1], [2, 3]])):
            source = stored(tmp_path / name, template, groups, metric)
            distances, ids = source.search(queries, 40, nprobe)
            assert source.ntotal == 801
            expected = merge([one], 40, metric)
            if key == "Flat":
                assert np.allclose(distances, expected[0], atol=1e-3)
            else:
                assert np.array_equal(distances, expected[0])
                assert np.array_equal(ids, expected[1])


def test_a_few_queries_are_compared_by_a_matrix_product_and_faiss_is_left_as_it_was() -> None:
    """faiss 1.15 does so from 128,000 / d queries on: a shard's few hundred then take ten times as long."""
    before = faiss.cvar.distance_compute_blas_threshold
    with faiss_threads(1):
        assert faiss.cvar.distance_compute_blas_threshold == 20
        assert faiss.cvar.precomputed_table_max_bytes == 0
    assert faiss.cvar.distance_compute_blas_threshold == before


@pytest.mark.parametrize("key", KEYS)
def test_the_order_in_which_vectors_were_added_does_not_change_what_is_found(
    key: str, templates: dict[tuple[str, str], bytes]
) -> None:
    template = templates[key, "l2"]
    queries = SAMPLE[::11]
    there = build_index_shard(template, PARTS, D, "l2")
    back = build_index_shard(template, [(ids[::-1], vectors[::-1]) for ids, vectors in reversed(PARTS)], D, "l2")
    found = [merge([search_group(index, queries, 801, 16)], 801, "l2") for index in (there, back)]
    assert np.array_equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("key", KEYS)
def test_the_same_vectors_give_the_same_file_and_a_query_the_same_answer_in_any_batch(
    key: str, templates: dict[tuple[str, str], bytes], tmp_path: Path
) -> None:
    sources = [stored(tmp_path / name, templates[key, "l2"], [[0, 1, 2, 3]], "l2") for name in "ab"]
    files = [source.storage.read_bytes("index/00000.faiss") for source in sources]
    assert files[0] == files[1]
    distances, ids = sources[0].search(SAMPLE[:50], 20, 4)
    for start in (0, 1, 7, 49):
        alone = sources[1].search(SAMPLE[start : start + 1], 20, 4)
        if key == "Flat":  # another kernel compares a few queries than many: equal up to float error, and re-scored
            np.testing.assert_allclose(alone[0][0], distances[start], rtol=1e-5, atol=1e-4)
        else:
            assert np.array_equal(alone[0][0], distances[start])
        assert np.array_equal(alone[1][0], ids[start])


@pytest.mark.parametrize("key", KEYS)
def test_with_every_list_read_every_vector_is_found(key: str, templates: dict[tuple[str, str], bytes]) -> None:
    index = build_index_shard(templates[key, "l2"], PARTS, D, "l2")
    _, ids = search_group(index, SAMPLE[:3], 10_000, 16)
    expected = np.sort(np.concatenate([ids for ids, _ in PARTS]))
    assert ids.shape == (3, 801)
    assert all(np.array_equal(np.sort(row), expected) for row in ids)


@pytest.mark.parametrize("key", KEYS)
def test_what_is_missing_comes_last_and_is_never_an_id(key: str, templates: dict[tuple[str, str], bytes]) -> None:
    index = build_index_shard(templates[key, "ip"], PARTS, D, "ip")
    distances, ids = search_group(index, SAMPLE[:20], 801, 1)
    merged, merged_ids = merge([(distances, ids), (distances[:, :0], ids[:, :0])], 801, "ip")
    for found, found_ids in ((distances, ids), (merged, merged_ids)):
        assert np.array_equal(found_ids == MISSING, np.isneginf(found))
        assert (np.diff((found_ids == MISSING).astype(int), axis=1) >= 0).all()
    if key != "Flat":
        assert (ids == MISSING).any()


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("n", [0, 1, 2])
def test_tiny_and_empty_shards_work(key: str, n: int, templates: dict[tuple[str, str], bytes], tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    index = build_index_shard(templates[key, "l2"], [part(5, n)], D, "l2")
    commit_index_shard(storage, "index/00000.faiss", index)
    loaded = load_index_shard(tmp_path / "index/00000.faiss", D, "l2", n)
    distances, ids = search_group(loaded, SAMPLE[:2], 10, 16)
    assert distances.shape == ids.shape == (2, n)
    assert set(ids.ravel().tolist()) <= set(range(5 << 32, (5 << 32) + n))
    assert GroupedIndex(storage, [], D, "l2").search(SAMPLE[:2], 10, 1)[1].shape == (2, 0)


def test_exact_shards_give_the_distances_of_the_stored_vectors(
    templates: dict[tuple[str, str], bytes], tmp_path: Path
) -> None:
    source = stored(tmp_path, templates["Flat", "l2"], [[0, 1, 2, 3]], "l2")
    loaded = load_index_shard(tmp_path / "index/00000.faiss", D, "l2", 801)
    assert bytes_per_vector(templates["Flat", "l2"], D, "l2") == 2 * D + 8
    distances, ids = search_group(loaded, SAMPLE[:5], 3)
    stored_ids = np.concatenate([ids for ids, _ in PARTS])
    for row in range(5):
        expected = ((SAMPLE - SAMPLE[row]) ** 2).sum(axis=1)
        order = np.argsort(expected)[:3]
        assert np.array_equal(ids[row], stored_ids[order])
        assert np.allclose(distances[row], expected[order], atol=1e-4)
    assert source.search(SAMPLE[:5], 3, 1)[1].tolist() == ids.tolist()


@pytest.mark.parametrize("key", ["Flat", "IVF16,SQ8"])
def test_a_damaged_or_foreign_shard_is_refused_by_name(
    key: str, templates: dict[tuple[str, str], bytes], tmp_path: Path
) -> None:
    stored(tmp_path, templates[key, "l2"], [[0]], "l2")
    path = tmp_path / "index/00000.faiss"
    data = path.read_bytes()
    for d, metric, n in [(D, "ip", 300), (D + 1, "l2", 300), (D, "l2", 301)]:
        with pytest.raises(DamagedError, match=r"00000\.faiss"):
            load_index_shard(path, d, metric, n)
    for bad in (b"", data[:40], data[: len(data) // 2], b"\x80\x04\x95" + data):
        path.write_bytes(bad)
        with pytest.raises(DamagedError, match=r"00000\.faiss"):
            load_index_shard(path, D, "l2", 300)
    path.unlink()
    with pytest.raises(DamagedError, match=r"00000\.faiss"):
        GroupedIndex(Storage(str(tmp_path)), [IndexFile("index/00000.faiss", 300)], D, "l2").search(SAMPLE[:1], 1, 1)


def test_vectors_that_cannot_be_compared_never_get_in(templates: dict[tuple[str, str], bytes]) -> None:
    ids, vectors = part(0, 5)
    vectors[3, 2] = np.nan
    with pytest.raises(DamagedError, match="chunk 3 "):
        build_index_shard(templates["Flat", "l2"], [(ids, vectors)], D, "l2")
    for bad in [(ids, vectors[:4]), (ids, vectors[:, :3]), (np.array([-1]), vectors[:1])]:
        with pytest.raises(DamagedError):
            build_index_shard(templates["Flat", "l2"], [bad], D, "l2")
    index = build_index_shard(templates["Flat", "l2"], [part(0, 5)], D, "l2")
    with pytest.raises(DamagedError, match="NaN"):
        search_group(index, vectors.astype(np.float32), 2)


def test_a_grouped_index_holds_a_bounded_number_of_shards_and_travels_without_them(
    templates: dict[tuple[str, str], bytes], tmp_path: Path
) -> None:
    source = stored(tmp_path, templates["Flat", "l2"], [[0], [2], [3]], "l2", cache_bytes=1)
    expected = source.search(SAMPLE[:4], 30, 1)
    assert len(source._open) == 1
    sent = pickle.loads(pickle.dumps(source))
    assert (sent, len(sent._open)) == (GroupedIndex(*source.__reduce__()[1]), 0)
    assert np.array_equal(sent.search(SAMPLE[:4], 30, 1)[1], expected[1])


@settings(deadline=None)
@given(data=st.data(), metric=st.sampled_from(["l2", "ip"]))
def test_merging_equals_sorting_all_by_distance_then_id(data: st.DataObject, metric: str) -> None:
    sizes = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    candidates = data.draw(st.integers(1, 12))
    ids = data.draw(st.permutations(range(sum(sizes))))
    scores = data.draw(st.lists(st.integers(-3, 3), min_size=len(ids), max_size=len(ids)))
    gone = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    pairs = [(-1, float("inf")) if out else (i, float(s)) for i, s, out in zip(ids, scores, gone, strict=True)]
    partials, start = [], 0
    for size in sizes:
        own = pairs[start : start + size]
        start += size
        partials.append((np.array([[s for _, s in own]], np.float32), np.array([[i for i, _ in own]], np.int64)))
    sign = 1 if metric == "l2" else -1
    expected = sorted((sign * s, i) for i, s in pairs if i >= 0)[:candidates]
    distances, found = merge(partials, candidates, metric)
    n = len(expected)
    assert found[0, :n].tolist() == [i for _, i in expected]
    assert (sign * distances[0, :n]).tolist() == [s for s, _ in expected]
    assert (found[0, n:] == MISSING).all()


def test_every_list_is_read_though_an_hnsw_quantiser_reaches_only_some() -> None:
    # Equal centroids: HNSW finds 89 of the 128 lists.
    sample = np.repeat(part(0, 4)[1], 1_300, axis=0)
    template = train_template(sample.astype(np.float32), "IVF128_HNSW32,Flat", "l2", 0)
    index = build_index_shard(template, [(np.arange(5_200), sample)], D, "l2")
    _, ids = search_group(index, sample[:3].astype(np.float32), 5_200, 128)
    assert (ids != MISSING).all()
