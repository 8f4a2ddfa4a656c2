"""The training sample and the one quantiser of all shards."""

import logging

import faiss
import numpy as np
import pytest
from autofaiss.indices import training
from hypothesis import given, settings
from hypothesis import strategies as st

from retrodb.errors import DamagedError, InputError
from retrodb.index import load_template, seeded_sample, train_template

D = 16


def vectors(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((40, D))
    return (centres[rng.integers(0, 40, n)] + 0.3 * rng.standard_normal((n, D))).astype(np.float16).astype(np.float32)


@settings(deadline=None)
@given(rows=st.lists(st.integers(0, 60), max_size=8), n=st.integers(0, 300), seed=st.integers(0, 2**31))
def test_a_sample_has_the_size_asked_for_and_no_row_twice(rows: list[int], n: int, seed: int) -> None:
    sample = seeded_sample(rows, n, seed)
    assert sum(map(len, sample)) == min(n, sum(rows))
    assert len(sample) == len(rows)
    for own, size in zip(sample, rows, strict=True):
        assert own.dtype == np.int64
        assert (np.diff(own) > 0).all()
        assert ((own >= 0) & (own < size)).all()
    again = seeded_sample(rows, n, seed)
    assert all(np.array_equal(a, b) for a, b in zip(sample, again, strict=True))


def test_a_sample_is_uniform_over_all_shards_not_the_first_vectors() -> None:
    rows = [100, 300, 600]
    counts = np.zeros(sum(rows))
    for seed in range(600):
        for own, base in zip(seeded_sample(rows, 100, seed), [0, 100, 400], strict=True):
            counts[base + own] += 1
    assert np.isclose(counts[:100].mean(), 60, atol=3)
    assert np.isclose(counts[400:].mean(), 60, atol=2)
    assert counts.min() > 25


def test_a_sample_of_billions_of_rows_costs_nothing() -> None:
    sample = seeded_sample([2 * 10**9, 10**9, 10**9, 3], 4_000, 1)
    assert sum(map(len, sample)) == 4_000
    assert abs(len(sample[0]) - 2_000) < 200


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("key", ["Flat", "IVF32,Flat", "IVF32,SQ8", "IVF32,RaBitQ", "IVF32_HNSW32,SQ8", "IVF32,PQ4x4"])
def test_training_twice_gives_the_same_bytes_for_any_number_of_threads(key: str, metric: str) -> None:
    sample = vectors(2_000)
    first = train_template(sample, key, metric, seed=3)
    assert train_template(sample, key, metric, seed=3, threads=2) == first
    index = load_template(first, D, metric)
    assert (index.is_trained, index.ntotal, index.d) == (True, 0, D)


def test_l2_is_trained_by_autofaiss_and_inner_product_by_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = training.create_and_train_new_index
    monkeypatch.setattr(
        training, "create_and_train_new_index", lambda *a, **kw: calls.append(a[1]) or original(*a, **kw)
    )
    train_template(vectors(2_000), "IVF32,Flat", "l2", seed=0)
    train_template(vectors(2_000), "IVF32,Flat", "ip", seed=0)
    assert calls == ["IVF32,Flat"]


def test_autofaiss_trains_on_the_whole_sample() -> None:
    sample = vectors(3_200)
    changed = sample.copy()
    changed[-40:] += 5
    assert train_template(sample, "IVF32,Flat", "l2", 0) != train_template(changed, "IVF32,Flat", "l2", 0)


def test_training_is_silent_and_leaves_logging_and_threads_alone(capfd: pytest.CaptureFixture[str]) -> None:
    handlers, threads = list(logging.getLogger().handlers), faiss.omp_get_max_threads()
    train_template(vectors(2_000), "IVF32,Flat", "l2", seed=0)
    assert list(logging.getLogger().handlers) == handlers
    assert faiss.omp_get_max_threads() == threads
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("key", ["IVF32,Flat", "IVF32,SQ8", "IVF32_HNSW32,RaBitQ"])
def test_a_corpus_of_one_repeated_vector_trains(key: str, metric: str) -> None:
    same = np.repeat(vectors(1), 2_000, axis=0)
    for sample in (same, np.zeros_like(same)):
        assert load_template(train_template(sample, key, metric, seed=0), D, metric).is_trained


def test_a_sample_that_cannot_train_is_refused() -> None:
    with pytest.raises(InputError, match="too few"):
        train_template(vectors(10), "IVF32,Flat", "l2", seed=0)
    broken = vectors(2_000)
    broken[7, 3] = np.nan
    with pytest.raises(InputError, match="NaN"):
        train_template(broken, "IVF32,Flat", "l2", seed=0)


def test_a_template_that_is_not_the_expected_one_is_refused() -> None:
    data = train_template(vectors(2_000), "IVF32,Flat", "l2", seed=0)
    for bad, d, metric in [(data[:100], D, "l2"), (b"", D, "l2"), (b"\x80\x04pickle", D, "l2"), (data, D + 1, "l2"),
                           (data, D, "ip")]:  # fmt: skip
        with pytest.raises(DamagedError):
            load_template(bad, d, metric)
