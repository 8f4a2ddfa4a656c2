"""Blocks: whole sentences with their title, within the budget without exception; nothing lost, nothing across."""

import gzip
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import corpus

from retrodb import schemas
from retrodb.chunking import load_tokenizer
from retrodb.chunking.blocks import Room, block_documents, uid_of
from retrodb.chunking.pairs import PairTemplate
from retrodb.chunking.sentences import sentences
from retrodb.encoding import DEFAULT_ENCODER, resolve_encoder

SPECIAL = 3
WORDS = st.sampled_from(
    ["one", "two. ", "Three? ", " ", "\n", "\n\n", "é", "日本。", "antidisestablishment", "\x00", "𝒳! ", "."]
)
TEXT = st.lists(WORDS, max_size=60).map("".join) | st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
TITLE = st.none() | st.lists(WORDS, max_size=12).map("".join)


@pytest.fixture(scope="module")
def transformer():
    return resolve_encoder(DEFAULT_ENCODER).transformer


@pytest.fixture(scope="module")
def wordpiece(transformer):
    return load_tokenizer(str(transformer / "tokenizer.json"))


def tokens_of(tokenizer, text):
    return next(iter(tokenizer.tokenize([text])))


def check(titles, texts, tokenizer, budget):
    table, counts = block_documents(np.arange(len(texts)) + 5, titles, texts, tokenizer, Room(budget, SPECIAL), shard=7)
    assert table.schema.equals(schemas.blocks(budget, "uint16"))
    rows = table.to_pylist()
    assert [row["chunk_id"] for row in rows] == [(7 << 32) + at for at in range(len(rows))]
    assert len(rows) == counts.sum()
    for document, (title, text) in enumerate(zip(titles, texts, strict=True)):
        own = [row for row in rows if row["document_id"] == document + 5]
        assert len(own) == counts[document]
        check_document(title or "", text, own, tokenizer, budget)
    return rows


def check_document(title, text, rows, tokenizer, budget):
    tokens, data = tokens_of(tokenizer, text), text.encode()
    title_ids = tokens_of(tokenizer, title).ids.tolist()
    assert [row["position"] for row in rows] == list(range(len(rows)))
    bodies = [row["tokens"][: row["n_tokens"]] for row in rows]
    assert list(itertools.chain(*bodies)) == tokens.ids.tolist(), "no token is lost or doubled"
    end = 0
    for row, body in zip(rows, bodies, strict=True):
        assert body
        assert not any(row["tokens"][row["n_tokens"] :])
        assert SPECIAL + len(row["title_tokens"]) + len(body) <= budget, "within the budget without exception"
        assert row["title_tokens"] == title_ids[: len(row["title_tokens"])]
        assert row["truncated_title"] == (len(row["title_tokens"]) < len(title_ids))
        assert len(row["title_tokens"]) == min(len(title_ids), (budget - SPECIAL) // 2)
        assert end <= row["start"] < row["end"] <= len(data)
        end = row["end"]
        assert row["uid"] == uid_of(title, data[row["start"] : row["end"]])
    covered = b"".join(data[row["start"] : row["end"]] for row in rows)
    if rows:
        spans = sentences(text)
        edges = {int(edge) for edge in spans.reshape(-1)}
        for before, row in zip([None, *rows[:-1]], rows, strict=True):
            if not row["split_sentence"]:
                assert row["start"] in edges, "whole sentences"
                assert row["end"] in edges
            room = budget - SPECIAL - len(row["title_tokens"])
            if before is not None and not row["split_sentence"]:
                first = next(s for s in spans if s[0] == row["start"])
                n_first = len([e for e in tokens.ends if first[0] < e <= first[1]])
                assert before["n_tokens"] + n_first > room, "packed greedily"
        if not any(row["split_sentence"] for row in rows):
            assert "".join(text.split()) == "".join(covered.decode().split()), "all of the text is in some block"


@given(documents=st.lists(st.tuples(TITLE, TEXT), max_size=4), budget=st.sampled_from([16, 24, 288]))
@settings(max_examples=200, deadline=None)
def test_blocks_B1_within_the_budget_and_no_token_lost_or_doubled(wordpiece, documents, budget):
    check([title for title, _ in documents], [text for _, text in documents], wordpiece, budget)


def test_blocks_B1_a_longer_sentence_is_split_at_token_boundaries_and_flagged(wordpiece):
    long = "word " * 40 + "end."
    rows = check(["A title"], [f"Short one. {long} After it. " + "More words follow here. " * 4], wordpiece, 24)
    assert [row["n_tokens"] for row in rows] == [3, 19, 19, 17, 10]
    assert [row["split_sentence"] for row in rows] == [False, True, True, True, False]


def test_blocks_B1_a_longer_title_is_truncated_to_half_of_the_budget_and_flagged(wordpiece):
    rows = check(["title " * 100, "title " * 10, None], ["A body."] * 3, wordpiece, 23)
    assert [len(row["title_tokens"]) for row in rows] == [10, 10, 0]
    assert [row["truncated_title"] for row in rows] == [True, False, False]


def test_blocks_B1_real_texts_within_288(wordpiece):
    for name in ("multilingual", "wiki_featured"):
        with gzip.open(corpus(name), "rt", encoding="utf-8") as lines:
            records = [json.loads(line) for _, line in zip(range(20), lines, strict=False)]
        check([r.get("title") for r in records], [r["text"][:20_000] for r in records], wordpiece, 288)


def test_blocks_B2_the_uid_tells_title_from_body(wordpiece):
    assert uid_of("ab", b"c") != uid_of("a", b"bc")
    rows = check(["T", "T", "U"], ["The same body.", "The same body.", "The same body."], wordpiece, 32)
    assert rows[0]["uid"] == rows[1]["uid"] != rows[2]["uid"]
    assert rows[0]["uid"].hex() == "5662472cf4d9ef3203be48c2e13cb123", "the same in every run, and every version"


def test_blocks_B1_the_template_is_the_encoders_own(transformer):
    pairs = PairTemplate.load(transformer)
    assert (pairs.special_tokens, pairs.typed) == (3, True)
    assert pairs.wrap([], []) == [101, 102, 102]
    assert pairs.wrap([7], [8, 9]) == [101, 7, 102, 8, 9, 102]
    assert pairs.second([7]) == 3
