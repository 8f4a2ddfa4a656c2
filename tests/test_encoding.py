"""The featuriser: vectors equal sentence-transformers' own, and depend on nothing but the texts."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrodb.corpus.quickstart import quickstart_lines
from retrodb.encoding import DEFAULT_ENCODER, chunk_texts, identify, length_batches, resolve_encoder
from retrodb.errors import InputError


@pytest.fixture(scope="module")
def encoder():
    from retrodb.encoding.encoder import Encoder

    return Encoder.load(resolve_encoder(DEFAULT_ENCODER))


@pytest.fixture(scope="module")
def texts():
    text = json.loads(quickstart_lines()[3])["text"]
    return [text[i : i + 290] for i in range(0, 12_000, 290)] + ["", "a", "한국어 텍스트 " * 200]


def test_vectors_equal_those_of_sentence_transformers(encoder, texts):
    from sentence_transformers import SentenceTransformer

    own = SentenceTransformer(str(resolve_encoder(DEFAULT_ENCODER).folder), device="cpu").encode(texts)
    cosine = (encoder.embed(texts).astype(np.float32) * own).sum(axis=1) / np.linalg.norm(own, axis=1)
    assert cosine.mean() >= 0.9998
    assert cosine.min() >= 0.995


def test_cards_run_directly_and_by_sentence_transformers_give_the_same_vectors(encoder, texts):
    from retrodb.encoding.encoder import _SentenceTransformersNetwork

    folder = resolve_encoder(DEFAULT_ENCODER).folder
    other = replace(encoder, network=_SentenceTransformersNetwork(folder, encoder.identity, "cpu"))
    np.testing.assert_array_equal(encoder.embed(texts), other.embed(texts))


def test_embedding_the_same_shard_again_gives_the_same_bytes(encoder, texts):
    np.testing.assert_array_equal(encoder.embed(texts), encoder.embed(texts))


def test_chunks_of_the_encoders_own_tokens_are_embedded_as_their_text(encoder):
    text = "generators produce values one at a time"
    own = encoder.featuriser.tokenize([text])[0]
    np.testing.assert_array_equal(encoder.embed_own_tokens([own[1:-1]]), encoder.embed([text]))


def test_no_row_is_longer_than_the_encoder_reads(encoder):
    assert len(encoder.featuriser.wrap(range(1000, 2000))) == encoder.identity.max_length
    assert len(encoder.featuriser.tokenize(["word " * 1000])[0]) == encoder.identity.max_length


def test_the_fingerprint_tells_precision_length_and_pooling_but_not_the_name(encoder):
    identity = encoder.identity
    others = [
        replace(identity, precision="bf16"),
        replace(identity, max_length=128),
        replace(identity, pooling="cls"),
        replace(identity, normalise=False),
        replace(identity, prompt="query: "),
        replace(identity, files_sha256="0" * 64),
    ]
    assert len({identity.fingerprint, *(other.fingerprint for other in others)}) == len(others) + 1
    assert replace(identity, name="elsewhere").fingerprint == identity.fingerprint


def test_the_card_is_read_without_torch():
    identity = identify(resolve_encoder(DEFAULT_ENCODER), "fp32")
    assert (identity.dimension, identity.max_length, identity.pooling, identity.normalise) == (384, 256, "mean", True)


@given(st.lists(st.integers(1, 300), max_size=200), st.integers(1, 5000))
def test_batches_hold_every_row_once_within_the_budget(lengths, budget):
    batches = list(length_batches(lengths, budget))
    assert sorted(np.concatenate(batches).tolist() if batches else []) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= budget


@given(st.text(st.characters(exclude_categories=["Cs"])), st.data())
def test_chunk_text_is_its_bytes_widened_to_whole_characters(text, data):
    raw = text.encode()
    start = data.draw(st.integers(0, len(raw)))
    end = data.draw(st.integers(start, len(raw)))
    (found,) = chunk_texts(raw, np.array([start]), np.array([end]))
    assert found.encode() in raw
    assert raw[start:end] in found.encode()
    assert len(found.encode()) - (end - start) <= 6


def test_an_unknown_encoder_is_named_with_what_would_do():
    with pytest.raises(InputError, match=f"no encoder 'no/such-thing'.*{DEFAULT_ENCODER}"):
        resolve_encoder("no/such-thing")


def test_a_folder_without_an_encoder_is_refused(tmp_path):
    with pytest.raises(InputError, match="neither a config.json nor a modules.json"):
        resolve_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(InputError, match="no .safetensors"):
        identify(resolve_encoder(str(tmp_path)), "fp32")


@pytest.mark.slow
def test_bf16_keeps_the_ten_nearest_neighbours_of_fp32(encoder):
    """Emulated where the CPU lacks it: slower, but the same numbers as native bf16 to the last bits."""
    from retrodb.encoding.encoder import Encoder

    text = " ".join(json.loads(line)["text"] for line in quickstart_lines()[:12])
    chunks = [text[i : i + 290] for i in range(0, min(len(text), 290 * 400), 290)]
    exact = encoder.embed(chunks).astype(np.float32)
    half = Encoder.load(resolve_encoder(DEFAULT_ENCODER), "bf16").embed(chunks).astype(np.float32)
    assert (exact * half).sum(axis=1).min() > 0.999
    distances = ((exact[:, None] - exact[None]) ** 2).sum(axis=2) + np.eye(len(exact)) * 10
    limit = np.sort(distances, axis=1)[:, 9]
    found = np.argsort(((half[:, None] - half[None]) ** 2).sum(axis=2) + np.eye(len(half)) * 10, axis=1)[:, :10]
    hits = np.take_along_axis(distances, found, axis=1) <= limit[:, None] + 1e-6
    assert hits.mean() >= 0.99
