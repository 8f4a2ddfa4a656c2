"""Near-duplicates: 13-grams of words, exact Jaccard at 0.8, and the sketch that finds who to compare."""

import gzip
import itertools
import json
from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import corpus

from retrodb import schemas
from retrodb.corpus import near_duplicates
from retrodb.corpus import shingles as shingling
from retrodb.corpus.near_duplicates import (
    THRESHOLD,
    candidate_pairs,
    clusters,
    removals,
    unique_pairs,
    without_removed,
)
from retrodb.corpus.shingles import NGRAM, batches, jaccard, shingles
from retrodb.corpus.sketches import BANDS, Sketches, sketch

WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f", "g", "h"]), max_size=40)


def column(texts: list[str]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(texts, pa.large_string())])


def sets_of(texts: list[str]) -> list[np.ndarray]:
    values, offsets = shingles(pa.array(texts, pa.large_string()))
    return [np.unique(part) for part in np.split(values, offsets[1:-1])]


def naive_sets(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[at : at + NGRAM]) for at in range(max(1, len(words) - NGRAM + 1))}


# -- shingles --------------------------------------------------------------------------------------------------------


@given(st.lists(WORDS, min_size=1, max_size=6))
@settings(deadline=None)
def test_documents_are_sets_of_13_grams_of_words(documents):
    found = sets_of([" ".join(words) for words in documents])
    expected = [naive_sets(words) for words in documents]
    assert [len(some) for some in found] == [len(some) for some in expected]
    for (a, x), (b, y) in itertools.combinations(zip(found, expected, strict=True), 2):
        if x != {()} and y != {()}:
            assert jaccard(a, b) == len(x & y) / len(x | y)


def test_case_punctuation_and_spaces_do_not_matter():
    one, other, third = sets_of(["The cat, sat; on (the) MAT.", "the cat sat on the mat", "the cat sat on the hat"])
    assert jaccard(one, other) == 1
    assert jaccard(one, third) == 0, "fewer than 13 words are one shingle"


def test_other_alphabets_have_words_and_scripts_without_spaces_have_letters():
    russian = "Привет МИР как дела у всех нас сегодня утром в этом большом городе весной"
    chinese = "中文没有空格所以每个字都是一个词语这样才能比较"
    found = sets_of([russian, russian.lower().replace(" ", ", "), chinese, chinese[1:]])
    assert jaccard(found[0], found[1]) == 1
    assert len(found[2]) == len(chinese) - NGRAM + 1
    assert jaccard(found[2], found[3]) == (len(found[2]) - 1) / len(found[2])


def test_a_text_without_any_word_is_like_itself_alone():
    found = sets_of(["!!!", "???", "!!!"])
    assert [len(some) for some in found] == [1, 1, 1]
    assert jaccard(found[0], found[2]) == 1
    assert jaccard(found[0], found[1]) == 0


def test_no_document_and_one_are_no_special_cases():
    assert sketch(column([])).bands.shape == (BANDS, 0)
    assert sketch(column(["one"])).signatures.shape == (1,)


@given(st.lists(WORDS, max_size=12), st.integers(1, 60))
@settings(deadline=None, max_examples=40)
def test_a_sketch_does_not_depend_on_how_the_texts_are_batched(documents, batch_bytes):
    texts = column([" ".join(words) for words in documents])
    whole = sketch(texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shingling, "_BATCH_BYTES", batch_bytes)
        assert sum(len(batch) for batch in batches(texts)) == len(texts)
        parts = sketch(texts)
    assert np.array_equal(whole.bands, parts.bands)
    assert np.array_equal(whole.signatures, parts.signatures)


def test_however_short_texts_are_only_some_thousands_are_sketched_at_a_time():
    """What is made of each takes some kilobytes: of 300,000 questions at once more than a gigabyte."""
    texts = column(["a b"] * 20_000)
    sizes = [len(batch) for batch in batches(texts)]
    assert (sum(sizes), max(sizes) <= 1 << 13) == (20_000, True)


# -- pairs and clusters ----------------------------------------------------------------------------------------------


def naive_clusters(pairs: list[tuple[int, int]]) -> dict[int, int]:
    label = {one: one for pair in pairs for one in pair}
    changed = True
    while changed:
        changed = False
        for a, b in pairs:
            low = min(label[a], label[b])
            changed |= label[a] != low or label[b] != low
            label[a] = label[b] = low
    return label


PAIRS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).filter(lambda pair: pair[0] != pair[1]))


@given(PAIRS)
@settings(deadline=None)
def test_clusters_are_what_pairs_connect_named_by_their_smallest_id(pairs):
    ids, labels = clusters(np.array(pairs, dtype=np.int64).reshape(-1, 2))
    assert dict(zip(ids.tolist(), labels.tolist(), strict=True)) == naive_clusters(pairs)
    assert ids.tolist() == sorted(ids.tolist())


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=40), st.randoms())
@settings(deadline=None)
def test_all_who_share_a_bucket_are_connected_and_none_who_do_not(documents, random):
    ids = np.arange(len(documents), dtype=np.int64) * 7
    order = np.array(random.sample(range(len(documents)), len(documents)), dtype=int)
    buckets, signatures = (np.array([d[at] for d in documents], dtype=np.uint64) for at in (0, 1))
    found = candidate_pairs(buckets[order], ids[order], signatures[order], 0, never_asked)
    pairs = found.pairs
    again = candidate_pairs(buckets, ids, signatures, 0, never_asked)
    assert pairs.tolist() == again.pairs.tolist(), "in any order of the input"
    assert found.cut == 0
    assert (pairs[:, 0] < pairs[:, 1]).all()
    found = naive_clusters([tuple(pair) for pair in pairs.tolist()])
    for a, b in itertools.combinations(range(len(documents)), 2):
        together = found.get(7 * a, -1) == found.get(7 * b, -2)
        assert together == (documents[a][0] == documents[b][0])


def all_candidates(found: Sketches) -> np.ndarray:
    """Over all bands."""
    ids = np.arange(len(found.signatures))
    parts = [
        candidate_pairs(found.bands[band], ids, found.signatures, band, lambda some: found.bands[:, some]).pairs
        for band in range(BANDS)
    ]
    return unique_pairs(np.concatenate(parts))


def test_near_duplicates_are_found_among_hundreds_that_share_nearly_all_of_their_text():
    """Licence pages: 412 words that all have and 56 of their own, which makes 0.78. Copies share up to 20 of those."""
    chance = np.random.default_rng(3)
    boilerplate = [f"b{n}" for n in range(412)]
    own = [[f"u{chance.integers(1 << 40)}" for _ in range(56)] for _ in range(900)]
    other = [[f"v{chance.integers(1 << 40)}" for _ in range(56)] for _ in range(90)]
    copies = [[*own[at][: 8 + at % 13], *other[at][8 + at % 13 :]] for at in range(90)]
    texts = [" ".join([*boilerplate, *words]) for words in (*own, *copies)]
    sets = sets_of(texts)
    pairs = [(at, 900 + at) for at in range(90)]
    assert all(0.8 < jaccard(sets[a], sets[b]) < 0.9 for a, b in pairs)
    candidates = set(map(tuple, all_candidates(sketch(column(texts))).tolist()))
    assert len([pair for pair in pairs if pair not in candidates]) <= 1


def never_asked(ids: np.ndarray) -> np.ndarray:
    raise AssertionError("only large buckets need more than their own band")


def test_a_large_bucket_gives_every_pair_once_over_all_bands():
    """300 documents that share the first and the last band, and half of them a band between."""
    n = 300
    signatures = np.random.default_rng(0).permutation(n).astype(np.uint64)
    bands = np.zeros((BANDS, n), np.uint64)
    bands[1:-1] = np.arange(n)
    bands[7, : n // 2] = 0
    found = [candidate_pairs(bands[b], np.arange(n), signatures, b, lambda ids: bands[:, ids]) for b in range(BANDS)]
    assert unique_pairs(np.concatenate([some.pairs for some in found])).tolist() == [
        [a, b] for a in range(n) for b in range(a + 1, n)
    ]
    assert len(found[-1].pairs) < 65 * n, "those already named are not named again, but for each one's next few"
    assert not any(some.cut for some in found)


def test_a_bucket_too_large_for_all_its_pairs_is_connected_all_the_same_and_that_is_told(monkeypatch):
    monkeypatch.setattr(near_duplicates, "_BUCKET_PAIRS", 1_000)
    n = 3_000
    signatures = np.random.default_rng(0).permutation(n).astype(np.uint64)
    nothing = np.zeros((BANDS, n), np.uint64)
    found = [candidate_pairs(nothing[b], np.arange(n), signatures, b, lambda ids: nothing[:, ids]) for b in (0, 1)]
    assert [some.cut for some in found] == [n, n]
    assert all(len(some.pairs) < 65 * n for some in found)
    assert len(set(clusters(found[0].pairs)[1].tolist())) == 1
    assert len(unique_pairs(np.concatenate([some.pairs for some in found]))) > 1.9 * len(found[0].pairs)


def test_equal_documents_are_each_compared_with_the_first_alone():
    n = 3_000
    same = candidate_pairs(np.zeros(n, np.uint64), np.arange(n), np.zeros(n, np.uint64), 0, never_asked)
    assert same.pairs.tolist() == [[0, other] for other in range(1, n)]
    assert same.cut == 0


LABELLED = st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=30)


@settings(deadline=None)
@given(LABELLED, st.booleans(), st.booleans())
def test_what_is_removed(documents, drop, decontaminate):
    labels = np.array([label for label, _ in documents], dtype=np.int64)
    validation = np.array([held_out for _, held_out in documents], dtype=bool)
    repeats, contaminated = removals(labels, validation, drop, decontaminate)
    held_out = {label for label, is_validation in documents if is_validation}
    seen: set[int] = set()
    for at, (label, is_validation) in enumerate(documents):
        dirty = not is_validation and decontaminate and label in held_out
        assert contaminated[at] == dirty
        again = not is_validation and not dirty and drop and label in seen
        assert repeats[at] == again
        if not is_validation and not dirty:
            seen.add(label)
    assert not (validation & (repeats | contaminated)).any(), "validation documents always stay"


@given(st.lists(st.tuples(st.sampled_from([None, 1, 2, 3]), st.booleans()), min_size=1, max_size=12))
@settings(deadline=None)
def test_documents_without_the_removed_ones_leave_no_gap_in_their_ids(fates):
    """``fates``: the cluster of each document, and whether it is removed; a cluster keeps what the others leave."""
    kept = Counter(cluster for cluster, removed in fates if cluster and not removed)
    rows = [at for at, (cluster, _) in enumerate(fates) if cluster]
    schema = schemas.documents()
    documents = pa.table(
        {
            name: pa.array([f"k{at}" for at in range(len(fates))]).cast(schema.field(name).type)
            if name == "key"
            else pa.array([(5 << 32) + at for at in range(len(fates))])
            if name == "document_id"
            else pa.nulls(len(fates), schema.field(name).type)
            for name in schema.names
        },
        schema=schema,
    )
    duplicates = pa.table(
        {
            "row": pa.array(rows, pa.int32()),
            "cluster_id": pa.array([fates[at][0] for at in rows], pa.int64()),
            "cluster_kept": pa.array([kept[fates[at][0]] for at in rows], pa.int64()),
            "removed": pa.array(["near_duplicate" if fates[at][1] else None for at in rows], pa.string()),
        }
    )
    found = without_removed(documents, duplicates).to_pylist()
    staying = [at for at, (cluster, removed) in enumerate(fates) if not (cluster and removed)]
    assert [row["key"] for row in found] == [f"k{at}" for at in staying]
    assert [row["document_id"] for row in found] == [(5 << 32) + place for place in range(len(staying))]
    assert [row["cluster_id"] for row in found] == [
        cluster if cluster and kept[cluster] > 1 else None for cluster, _ in (fates[at] for at in staying)
    ]


# -- on real text ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dirty", "wiki_old_simple2017", "multilingual", "docs_old"])
def test_on_real_text_the_clusters_are_those_of_comparing_all_with_all(name):
    """The truth shares no code with what is tested but the 13-grams: an inverted index over every one of them."""
    texts = []
    with gzip.open(corpus(name), "rt", encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line).get("text")
            if isinstance(text, str) and text.strip():
                texts.append(text)
    sets = sets_of(texts)

    holders = defaultdict(list)
    for at, grams in enumerate(sets):
        for gram in grams.tolist():
            holders[gram].append(at)
    common: Counter[tuple[int, int]] = Counter()
    for some in holders.values():
        common.update(itertools.combinations(some, 2))
    truth = [p for p, n in common.items() if n / (len(sets[p[0]]) + len(sets[p[1]]) - n) >= THRESHOLD]

    found = sketch(column(texts))
    pairs = all_candidates(found)
    near = pairs[[jaccard(sets[a], sets[b]) >= THRESHOLD for a, b in pairs.tolist()]]
    members, labels = clusters(near)
    assert dict(zip(members.tolist(), labels.tolist(), strict=True)) == naive_clusters(truth)
