"""Llama (Touvron et al. 2023) as Hugging Face's ``LlamaForCausalLM`` saves it."""

from typing import Any

import torch

from retrodb.errors import InputError

_NAMES = {
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "inner.gate": "mlp.gate_proj",
    "inner.up": "mlp.up_proj",
    "inner.down": "mlp.down_proj",
}
_DEFAULT_ROTARY_BASE = 10_000.0


def sizes(card: dict[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig`. Raises KeyError for a field that is missing, InputError for what is not supported."""
    rotary = card.get("rope_parameters") or card.get("rope_scaling") or {}
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind != "default":
        raise InputError(f"a Llama with {kind!r} scaling of its positions is not supported.")
    if card.get("hidden_act", "silu") != "silu":
        raise InputError(f"a Llama with the activation {card['hidden_act']!r} is not supported.")
    heads = card["num_attention_heads"]
    return {
        "vocabulary": card["vocab_size"],
        "width": card["hidden_size"],
        "layers": card["num_hidden_layers"],
        "heads": heads,
        "head_width": card.get("head_dim") or card["hidden_size"] // heads,
        "key_value_heads": card.get("num_key_value_heads") or heads,
        "feed_forward": card["intermediate_size"],
        "norm_epsilon": card.get("rms_norm_eps", 1e-6),
        "attention_biases": card.get("attention_bias", False),
        "feed_forward_biases": card.get("mlp_bias", False),
        "rotary_base": rotary.get("rope_theta", card.get("rope_theta", _DEFAULT_ROTARY_BASE)),
        "tied": card.get("tie_word_embeddings", False),
    }


def weights(tensors: dict[str, torch.Tensor], card: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The decoder's weights."""
    given = {name.removeprefix("model."): value for name, value in tensors.items()}
    found = {"embedding.weight": given["embed_tokens.weight"], "norm.weight": given["norm.weight"]}
    if not card.get("tie_word_embeddings", False):
        found["head.weight"] = given["lm_head.weight"]
    for layer in range(card["num_hidden_layers"]):
        for ours, theirs in _NAMES.items():
            found[f"blocks.{layer}.{ours}.weight"] = given[f"layers.{layer}.{theirs}.weight"]
            if (bias := given.get(f"layers.{layer}.{theirs}.bias")) is not None:
                found[f"blocks.{layer}.{ours}.bias"] = bias
    return found
