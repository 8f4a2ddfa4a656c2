"""Decoders of others: their logits are ours, and what cannot be read is said."""

import json
from dataclasses import replace

import pytest
import torch

from retrodb.chunking.tokenizer import load_gpt2, train_tokenizer
from retrodb.errors import InputError, MismatchError
from retrodb.model import Batch, Retro
from retrodb.model.bases import LAYOUTS, load_base
from retrodb.model.checkpoint import load_weights
from retrodb.model.config import default_retrieval
from retrodb.model.data import DataSettings

M, VOCABULARY = 4, 50257
DATA = DataSettings("gpt2", "f" * 64, VOCABULARY, M, 16, 2, "0" * 64)


@pytest.fixture(scope="module")
def tokenizer():
    return load_gpt2()


def save_hugging_face(folder, kind: str, **changes):
    """A tiny random causal model as transformers saves it."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 32}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **{**sizes, **changes}))
    else:
        sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **{**sizes, **heads, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder, safe_serialization=True)
    return model.eval()


def one_document(tokens: torch.Tensor) -> Batch:
    slots = tokens.shape[1] // M
    full, none = torch.full((len(tokens), slots), M), torch.zeros((len(tokens), slots, 0, 2))
    return Batch.made(
        tokens.view(-1, slots, M), full, torch.zeros_like(full), none.unsqueeze(-1).expand(*none.shape, M), none
    )


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt2", {}),
        ("gpt2", {"n_inner": 24, "activation_function": "gelu"}),
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "rope_theta": 500.0}),
    ],
)
def test_logits_are_those_of_transformers(tmp_path, tokenizer, kind, changes):
    theirs = save_hugging_face(tmp_path, kind, **changes)
    base = load_base(str(tmp_path), DATA, tokenizer, "db")
    config = base.config.model_copy(
        update={"retrieval": default_retrieval(base.config.width, base.config.layers, gated=True)}
    )
    ours = Retro(config).eval()
    load_weights(ours.decoder, base.weights, "base")
    tokens = torch.randint(0, VOCABULARY, (2, 16))
    with torch.no_grad():
        expected = theirs(tokens).logits
        batch = one_document(tokens)
        found = ours.logits(ours(batch)).view(expected.shape)
        near = torch.randint(0, VOCABULARY, (2, 4, 2, 2, M))
        lengths = torch.full(near.shape[:-1], M)
        retrieving = replace(batch, neighbour_tokens=near, neighbour_lengths=lengths)
        assert torch.equal(ours.logits(ours(retrieving)).view(expected.shape), found)
    assert expected.std() > 0.5
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_every_layout_is_tested_here():
    assert set(LAYOUTS) == {"gpt2", "llama"}


def test_bases_that_do_not_fit_are_refused(tmp_path, tokenizer):
    save_hugging_face(tmp_path / "base", "gpt2")
    base = str(tmp_path / "base")
    with pytest.raises(InputError, match="32 learned positions, too few for sequences of 64 tokens"):
        load_base(base, replace(DATA, sequence_tokens=64), tokenizer, "db")
    (tmp_path / "base" / "tokenizer.json").write_bytes(train_tokenizer(["some other words"] * 9, 300))
    with pytest.raises(MismatchError, match=f"another tokenizer .*{tokenizer.fingerprint[:16]}"):
        load_base(base, DATA, tokenizer, "db")
    (tmp_path / "base" / "tokenizer.json").unlink()
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no \.safetensors weights"):
        load_base(base, DATA, tokenizer, "db")
    card = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**card, "model_type": "mamba"}))
    with pytest.raises(InputError, match="of the type 'mamba'; what can be read is gpt2, llama"):
        load_base(base, DATA, tokenizer, "db")


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path, tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    small = GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=2, n_positions=32)
    GPT2LMHeadModel(small).save_pretrained(tmp_path, safe_serialization=True)
    with pytest.raises(MismatchError, match="has 300 tokens; db has 50257"):
        load_base(str(tmp_path), DATA, tokenizer, "db")


def test_a_model_that_does_other_things_than_ours_is_refused():
    with pytest.raises(InputError, match="'llama3' scaling"):
        LAYOUTS["llama"].sizes({"rope_parameters": {"rope_type": "llama3"}})
    with pytest.raises(InputError, match="another scale of its attention"):
        LAYOUTS["gpt2"].sizes({"scale_attn_by_inverse_layer_idx": True})
