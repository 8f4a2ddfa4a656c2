"""The featuriser: vectors equal sentence-transformers' own, and depend on nothing but the texts."""

import json
import shutil
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


@pytest.mark.parametrize("how", ["sentence_transformers", "transformers"])
def test_however_a_card_is_run_the_vectors_are_the_same_to_the_last_bit_of_float16(encoder, texts, how, monkeypatch):
    from retrodb.encoding import encoder as module

    folder = resolve_encoder(DEFAULT_ENCODER).folder
    monkeypatch.setattr(module, "is_common_bert", lambda folder: False)
    runs = module._SentenceTransformersNetwork if how == "sentence_transformers" else module._CardNetwork
    other = replace(encoder, network=runs(folder, encoder.identity, "cpu"))
    np.testing.assert_allclose(encoder.embed(texts), other.embed(texts), atol=7e-5)


def test_the_bert_tokenizer_read_directly_gives_the_ids_of_transformers(encoder, texts):
    from retrodb.encoding.featuriser import _transformers_featuriser

    other = _transformers_featuriser(resolve_encoder(DEFAULT_ENCODER).folder, encoder.identity.max_length)
    strange = [*texts, "\x00\u200b\ufeff a\u0301 \U0001f600 [SEP] [MASK] ##ing", "naïve İstanbul ǅ ß", "中文字 ﷺ"]
    assert encoder.featuriser.tokenize(strange) == other.tokenize(strange)
    assert replace(encoder.featuriser, tokenizer=other.tokenizer, concurrent=False) == other


def copy_of_the_encoder(folder, **changed):
    for path in resolve_encoder(DEFAULT_ENCODER).folder.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(resolve_encoder(DEFAULT_ENCODER).folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    for name, settings in changed.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return resolve_encoder(str(folder))


def test_an_encoder_whose_transformer_lies_in_a_folder_of_its_own_gives_the_same_vectors(encoder, texts, tmp_path):
    from retrodb.encoding.encoder import Encoder

    files = copy_of_the_encoder(tmp_path / "old")
    inner = files.folder / "0_Transformer"
    inner.mkdir()
    for path in [path for path in files.folder.iterdir() if path.is_file() and path.name != "modules.json"]:
        path.rename(inner / path.name)
    modules = json.loads((files.folder / "modules.json").read_text())
    modules[0]["path"] = inner.name
    (files.folder / "modules.json").write_text(json.dumps(modules))
    np.testing.assert_array_equal(Encoder.load(files).embed(texts), encoder.embed(texts))


def test_another_activation_or_casing_than_the_common_bert_is_left_to_transformers(tmp_path):
    from retrodb.encoding.bert import is_common_bert
    from retrodb.encoding.encoder import Encoder
    from retrodb.encoding.featuriser import _bert_tokenizer

    files = copy_of_the_encoder(
        tmp_path / "relu", config={"hidden_act": "relu"}, tokenizer_config={"do_lower_case": False}
    )
    assert not is_common_bert(files.folder)
    assert _bert_tokenizer(files.folder) is None
    found = Encoder.load(files).embed(["A Text"])
    common = Encoder.load(copy_of_the_encoder(tmp_path / "same")).embed(["A Text"])
    assert found.shape == (1, 384)
    assert (found.astype(np.float32) * common).sum() < 0.99


class WrongProducts:
    """oneDNN's operators in a version of torch where they mean something else."""

    @staticmethod
    def _reorder_linear_weight(weight, rows):
        return weight

    @staticmethod
    def _linear_pointwise(rows, weight, bias, *how):
        return (rows @ weight.T) * 2


@pytest.mark.parametrize("operators", [None, WrongProducts], ids=["missing", "other"])
def test_without_onednns_packed_products_the_public_operators_give_the_same_vectors(
    encoder, texts, monkeypatch, operators
):
    import torch

    from retrodb.encoding.encoder import Encoder

    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    other = Encoder.load(resolve_encoder(DEFAULT_ENCODER))
    np.testing.assert_allclose(encoder.embed(texts), other.embed(texts), atol=7e-5)


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
