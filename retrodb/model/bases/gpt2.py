"""GPT-2 (Radford et al. 2019) as Hugging Face's ``GPT2LMHeadModel`` saves it."""

from typing import Any

import torch

from retrodb.errors import InputError

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def sizes(card: dict[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig`. Raises KeyError for a field that is missing, InputError for what is not supported."""
    if card.get("scale_attn_by_inverse_layer_idx") or not card.get("scale_attn_weights", True):
        raise InputError("a GPT-2 with another scale of its attention is not supported.")
    activation = card.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        raise InputError(f"a GPT-2 with the activation {activation!r} is not supported.")
    width, heads = card["n_embd"], card["n_head"]
    return {
        "vocabulary": card["vocab_size"],
        "width": width,
        "layers": card["n_layer"],
        "heads": heads,
        "head_width": width // heads,
        "key_value_heads": heads,
        "feed_forward": card.get("n_inner") or 4 * width,
        "activation": _ACTIVATIONS[activation],
        "norm": "layer",
        "norm_epsilon": card.get("layer_norm_epsilon", 1e-5),
        "attention_biases": True,
        "feed_forward_biases": True,
        "positions": "learned",
        "max_positions": card["n_positions"],
        "tied": card.get("tie_word_embeddings", True),
    }


def weights(tensors: dict[str, torch.Tensor], card: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The decoder's weights. Its matrices are stored input first, and query, key and value as one."""
    given = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    found = {
        "embedding.weight": given["wte.weight"],
        "positions.weight": given["wpe.weight"],
        "norm.weight": given["ln_f.weight"],
        "norm.bias": given["ln_f.bias"],
    }
    if not card.get("tie_word_embeddings", True):
        found["head.weight"] = given["lm_head.weight"]
    for layer in range(card["n_layer"]):
        ours, theirs = f"blocks.{layer}", f"h.{layer}"
        for norm, name in (("attention_norm", "ln_1"), ("feed_forward_norm", "ln_2")):
            found |= {f"{ours}.{norm}.{part}": given[f"{theirs}.{name}.{part}"] for part in ("weight", "bias")}
        joint = given[f"{theirs}.attn.c_attn.weight"].T.chunk(3), given[f"{theirs}.attn.c_attn.bias"].chunk(3)
        for name, matrix, bias in zip(("query", "key", "value"), *joint, strict=True):
            found |= {f"{ours}.attention.{name}.weight": matrix, f"{ours}.attention.{name}.bias": bias}
        for name, source in (
            ("attention.output", "attn.c_proj"),
            ("inner.up", "mlp.c_fc"),
            ("inner.down", "mlp.c_proj"),
        ):
            found[f"{ours}.{name}.weight"] = given[f"{theirs}.{source}.weight"].T
            found[f"{ours}.{name}.bias"] = given[f"{theirs}.{source}.bias"]
    return {name: value.contiguous() for name, value in found.items()}
