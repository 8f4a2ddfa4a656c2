"""What the parts of a REALM model begin as: the BERT of an encoder's folder, its sizes and special tokens."""

import json
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from retrodb.chunking import load_tokenizer
from retrodb.encoding import EncoderFiles
from retrodb.encoding.featuriser import quieten
from retrodb.errors import InputError

if TYPE_CHECKING:
    from transformers import BertConfig


def bert_card(files: EncoderFiles) -> dict[str, Any]:
    """The config.json of a BERT. Raises InputError: there is none, or it is no BERT's."""
    try:
        found = json.loads((files.transformer / "config.json").read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no object")
        if found.get("model_type") != "bert":
            raise InputError(f"the encoder {files.name!r} is a {found.get('model_type')!r}: REALM starts from a BERT.")
        full = _config(found)
    except (OSError, ValueError) as error:
        raise InputError(f"the encoder {files.name!r} has no readable config.json: {error}.") from error
    card: dict[str, Any] = full.to_diff_dict()
    return {**card, "hidden_size": full.hidden_size, "vocab_size": full.vocab_size}


def _config(card: dict[str, Any]) -> "BertConfig":
    """Raises ValueError: it is no BERT's. (What transformers raises for a value of another type depends on its version,
    and is not always one.)"""
    from transformers import BertConfig  # noqa: PLC0415 - seconds

    try:
        return BertConfig(**card)
    except Exception as error:
        raise ValueError(str(error)) from error


def load_bert(files: EncoderFiles) -> nn.Module:
    """A BERT's weights in float32, without dropout. Raises InputError: they cannot be loaded."""
    quieten()
    from transformers import BertModel  # noqa: PLC0415

    try:
        model: nn.Module = BertModel.from_pretrained(
            files.transformer, add_pooling_layer=False, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"the encoder {files.name!r} cannot be loaded: {error}") from error
    return model.float()


def blank_bert(card: dict[str, Any]) -> nn.Module:
    """A BERT of these sizes, with weights to be loaded. Raises ValueError: they are no BERT's."""
    from transformers import BertModel  # noqa: PLC0415

    return BertModel(_config(card), add_pooling_layer=False).eval()


def pooled(hidden: torch.Tensor, mask: torch.Tensor, pooling: Literal["cls", "mean"]) -> torch.Tensor:
    """One vector a row of a BERT's output.

    Args:
        hidden: float [n, T, width].
        mask: int64 [n, T], 1 for valid positions.
        pooling: the first position, or the mean of the valid ones.
    """
    if pooling == "cls":
        return hidden[:, 0]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def _tokenizer_json(files: EncoderFiles) -> str:
    path = files.transformer / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"the encoder {files.name!r} has no tokenizer.json.")
    return str(path)


def tokenizer_fingerprint(files: EncoderFiles) -> str:
    """As a database records the tokenizer of its encoder. Raises InputError: there is none."""
    return load_tokenizer(_tokenizer_json(files)).fingerprint


def special_tokens(files: EncoderFiles) -> dict[str, int]:
    """The ids of [CLS], [SEP] and [MASK] as ``cls``, ``sep``, ``mask``. Raises InputError: there is none of these."""
    from tokenizers import Tokenizer  # noqa: PLC0415

    tokenizer = Tokenizer.from_file(_tokenizer_json(files))
    found = {name: tokenizer.token_to_id(f"[{name.upper()}]") for name in ("cls", "sep", "mask")}
    if missing := sorted(name for name, number in found.items() if number is None):
        raise InputError(f"the tokenizer of {files.name!r} has no [{missing[0].upper()}] token: REALM needs it.")
    return {name: int(number) for name, number in found.items() if number is not None}
