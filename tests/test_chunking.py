"""Chunks tile the text, tokens decode to exactly those bytes, and no chunk crosses a document."""

import gzip
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import corpus

from retrodb import schemas
from retrodb.chunking import chunk_documents, load_tokenizer, token_type_for
from retrodb.chunking.tokenizer import byte_offsets, split_long, tokenizer_from_json, train_tokenizer
from retrodb.encoding import DEFAULT_ENCODER, resolve_encoder
from retrodb.errors import InputError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=400)


@pytest.fixture(scope="module")
def gpt2():
    return load_tokenizer("gpt2")


def check_tiling(texts, table, counts, tokenizer, m):
    rows = table.to_pylist()
    assert sum(counts) == len(rows)
    at = 0
    for document, (text, n_chunks) in enumerate(zip(texts, counts, strict=True)):
        data, end = text.encode(), 0
        for position in range(n_chunks):
            row = rows[at]
            assert row["chunk_id"] == (7 << 32) + at
            assert (row["document_id"], row["position"]) == (document, position)
            assert row["start"] == end, "ranges tile the text"
            end = row["end"]
            assert tokenizer.decode(row["tokens"][: row["n_tokens"]]) == data[row["start"] : end]
            assert row["n_tokens"] == m or position == n_chunks - 1, "only the last chunk is shorter"
            assert set(row["tokens"][row["n_tokens"] :]) <= {0}
            at += 1
        assert end == len(data), "nothing of the text is lost"


@given(texts=st.lists(TEXT, max_size=6), m=st.sampled_from([1, 2, 7, 64]))
@settings(max_examples=150, deadline=None)
def test_chunk_ranges_tile_any_unicode_and_decode_to_its_bytes(gpt2, texts, m):
    table, counts = chunk_documents(np.arange(len(texts)), texts, gpt2, m, shard=7)
    assert table.schema.equals(schemas.chunks(m, "uint16"))
    check_tiling(texts, table, counts, gpt2, m)


def test_chunk_ranges_tile_the_multilingual_corpus(gpt2):
    with gzip.open(corpus("multilingual"), "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for _, line in zip(range(120), lines, strict=False)]
    table, counts = chunk_documents(np.arange(len(texts)), texts, gpt2, 64, shard=7)
    check_tiling(texts, table, counts, gpt2, 64)
    cuts_a_character = [
        row for row in table.to_pylist() if (texts[row["document_id"]].encode() + b" ")[row["end"]] & 0xC0 == 0x80
    ]
    assert cuts_a_character, "the corpus has chunk ends inside characters, or this test shows nothing"


@given(TEXT.map(lambda text: text * 5), st.integers(4, 40))
def test_pieces_of_a_long_text_are_the_text(text, limit):
    assert "".join(split_long(text, limit)) == text


def test_cutting_a_long_text_changes_no_token(gpt2):
    from retrodb.corpus.quickstart import quickstart_lines

    text = " ".join(json.loads(line)["text"] for line in quickstart_lines()[:40])
    whole = gpt2._tokenizer.encode(text, add_special_tokens=False).ids
    assert len(list(split_long(text))) > 1
    assert next(iter(gpt2.tokenize([text]))).ids.tolist() == whole


def test_special_tokens_in_the_text_are_text(gpt2):
    ids = next(iter(gpt2.tokenize(["a<|endoftext|>b"]))).ids.tolist()
    assert 50256 not in ids
    assert gpt2.decode(ids) == b"a<|endoftext|>b"


def test_gpt2_is_the_published_one(gpt2):
    assert gpt2.vocabulary_size == 50257
    assert gpt2.lossless
    assert next(iter(gpt2.tokenize(["Hello world"]))).ids.tolist() == [15496, 995]


def test_a_trained_tokenizer_is_lossless_and_the_same_twice():
    texts = ["the cat sat on the mat. " * 50, "Ünïcödé 한국어 text " * 30]
    first, second = train_tokenizer(texts, 400), train_tokenizer(texts, 400)
    assert first == second
    tokenizer = tokenizer_from_json(first, "train:400")
    assert tokenizer.lossless
    table, counts = chunk_documents(np.arange(2), texts, tokenizer, 8, shard=7)
    check_tiling(texts, table, counts, tokenizer, 8)


def test_the_encoders_tokenizer_gives_ranges_inside_the_text():
    tokenizer = load_tokenizer(str(resolve_encoder(DEFAULT_ENCODER).folder))
    assert not tokenizer.lossless
    text = "Résumé of 日本語 naïve words, twice over. " * 20
    table, _ = chunk_documents(np.arange(1), [text], tokenizer, 16, shard=0)
    rows = table.to_pylist()
    assert all(0 <= row["start"] < row["end"] <= len(text.encode()) for row in rows)
    assert all(a["end"] <= b["start"] + 4 for a, b in itertools.pairwise(rows))


@given(TEXT)
def test_byte_offsets_are_those_of_utf8(text):
    assert byte_offsets(text).tolist() == [len(text[:i].encode()) for i in range(len(text) + 1)]


def test_token_type_follows_the_vocabulary():
    assert token_type_for(50257) == "uint16"
    assert token_type_for(65536) == "uint16"
    assert token_type_for(65537) == "uint32"


def test_an_unknown_tokenizer_is_named_with_what_would_do(tmp_path):
    with pytest.raises(InputError, match="no tokenizer 'no/such-thing'.*train:VOCAB"):
        load_tokenizer("no/such-thing")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path))
