"""Which index a database gets."""

import faiss
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrodb.errors import InputError
from retrodb.index import EXACT_BELOW, choose_key
from retrodb.index.keys import POINTS_PER_LIST

GIGABYTE = 10**9


@pytest.mark.parametrize("n", [0, 1, 2, 999, 1_000, 10_000, EXACT_BELOW])
def test_small_databases_are_searched_exactly_and_the_reason_names_the_figure(n: int) -> None:
    choice = choose_key(n, 384, GIGABYTE)
    assert (choice.key, choice.exact, choice.training_vectors, choice.n_lists) == ("Flat", True, 0, 1)
    assert "65,536" in choice.reason


def test_one_vector_more_takes_autofaiss_choice() -> None:
    choice = choose_key(EXACT_BELOW + 1, 384, GIGABYTE)
    assert choice.key == "IVF1024,Flat"
    assert not choice.exact
    assert "autofaiss" in choice.reason
    assert choice.training_vectors == EXACT_BELOW + 1, "no more than there are"


@settings(deadline=None)
@given(
    n=st.integers(0, 36).flatmap(lambda power: st.integers(1, 1 + min(10**10, 2**power))),
    dimension=st.sampled_from([1, 2, 3, 8, 17, 96, 384, 768, 1024]),
    memory=st.sampled_from([1, 10**6, 10**8, GIGABYTE, 16 * GIGABYTE, 10**12]),
    metric=st.sampled_from(["l2", "ip"]),
)
def test_every_size_gets_a_key_that_faiss_can_make_and_that_can_be_trained(
    n: int, dimension: int, memory: int, metric: str
) -> None:
    choice = choose_key(n, dimension, memory, metric)
    assert choice.reason
    if choice.exact:
        assert n <= EXACT_BELOW
        return
    index = faiss.index_factory(dimension, choice.key.replace(f"IVF{choice.n_lists}", "IVF1"))
    assert faiss.try_extract_index_ivf(index) is not None, "ids of our own, and merging"
    assert choice.n_lists * POINTS_PER_LIST <= choice.training_vectors <= n or choice.n_lists == 1
    assert choice.estimated_bytes <= memory or "no index" in choice.reason or "autofaiss" in choice.reason


def test_what_does_not_fit_gets_smaller_codes_and_says_why() -> None:
    choice = choose_key(10**8, 384, 10**8)
    assert choice.key.endswith("RaBitQ")
    assert "fits" in choice.reason
    assert choice.alternatives


def test_a_rotation_that_would_train_for_hours_is_passed_over() -> None:
    choice = choose_key(100_000, 384, 10**8)
    assert choice.key.endswith("SQ8")
    assert any("OPQ" in refused and "core-seconds" in refused for refused in choice.alternatives)


def test_the_choice_depends_on_its_arguments_alone() -> None:
    assert choose_key(10**6, 384, GIGABYTE) == choose_key(10**6, 384, GIGABYTE)


@pytest.mark.parametrize("key", ["IVF16,Flat", "OPQ8_32,IVF16,PQ8x8", "IVF16,SQ8", "IVF16,RaBitQ", "Flat", "IVF16,PQ8"])
def test_a_key_the_user_gives_is_taken(key: str) -> None:
    choice = choose_key(20_000, 32, GIGABYTE, requested=key)
    assert choice.key == key
    assert "--index-key" in choice.reason


@pytest.mark.parametrize(
    "key",
    ["", "flat", "HNSW32", "IVF16", "IVF16,PQ5", "IVF0,Flat", "IVF99999999,Flat", "IVF16,PQ16x4fs", "PQ8",
     "IVF16,PQ8x8,RFlat", "LSH", "OPQ5,IVF16,Flat", "IVF16,PQ8x30", "../../etc/passwd"],
)  # fmt: skip
def test_a_key_that_cannot_work_is_refused_before_any_work(key: str) -> None:
    with pytest.raises(InputError, match="index key"):
        choose_key(10**6, 32, GIGABYTE, requested=key)


@pytest.mark.parametrize("n", [0, 1, 10, 38, 39, 500, 5_000])
def test_a_users_key_never_fails_for_lack_of_training_vectors(n: int) -> None:
    choice = choose_key(n, 32, GIGABYTE, requested="IVF4096,Flat")
    assert choice.key == (f"IVF{n // 39},Flat" if n >= 39 else "Flat")
    assert "IVF4096,Flat" in choice.reason


@pytest.mark.parametrize(("dimension", "memory", "metric"), [(0, 1, "l2"), (4, 0, "l2"), (4, 1, "cosine")])
def test_impossible_settings_are_refused(dimension: int, memory: int, metric: str) -> None:
    with pytest.raises(InputError):
        choose_key(10, dimension, memory, metric)
