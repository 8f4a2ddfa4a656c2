"""Decoders of others as a base for RETROfit: one small module for each Hugging Face layout.

A layout is a module with two pure functions, entered in `LAYOUTS` under the ``model_type`` of its ``config.json``:

    sizes(card)             fields of `ModelConfig` from config.json; InputError for what the decoder cannot do
    weights(tensors, card)  the checkpoint's tensors under the names of `retrodb.model.decoder.Decoder`

Weights are read from safetensors alone, never from a pickle.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from retrodb.chunking.tokenizer import ChunkTokenizer, load_tokenizer
from retrodb.errors import InputError, MismatchError
from retrodb.model.bases import gpt2, llama
from retrodb.model.checkpoint import WEIGHTS, load_weights, open_checkpoint, read_tensors
from retrodb.model.config import ModelConfig, parse_model
from retrodb.model.data import DataSettings
from retrodb.model.decoder import Decoder

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """How a Hugging Face checkpoint is read."""

    sizes: Callable[[dict[str, Any]], dict[str, Any]]
    weights: Callable[[Tensors, dict[str, Any]], Tensors]


LAYOUTS: Final = {
    "gpt2": Layout(gpt2.sizes, gpt2.weights),
    "llama": Layout(llama.sizes, llama.weights),
}

_PROBE: Final = "The quick brown fox, 1984: naïve café — don't\n\n  def f(x):\treturn x**2  # 中文 ok"
"""A text on which tokenizers that differ at all differ."""


@dataclass(frozen=True)
class Base:
    """A decoder's sizes and weights, under our names (``embedding.weight``, ..)."""

    name: str
    config: ModelConfig
    weights: Tensors


def load_base(spec: str, data: DataSettings, tokenizer: ChunkTokenizer, database: str) -> Base:
    """A base for RETROfit on a database.

    Args:
        spec: a checkpoint of `retrodb train`, a folder in a Hugging Face layout, or a hub name.
        data: of the database.
        tokenizer: the database's.
        database: its name, for messages.

    Raises:
        InputError: there is no such base, it cannot be read, or its positions are too few for the database's rows.
        MismatchError: its tokens are not the database's.
    """
    path = Path(spec).expanduser()
    if not (path / "config.json").is_file() and (path.is_dir() or "://" in spec):
        return _own(spec, data, database)
    folder = path if path.is_dir() else _from_hub(spec)
    card = _card(folder, spec)
    layout = LAYOUTS[card["model_type"]]
    try:
        sizes = layout.sizes(card)
        config = parse_model({**sizes, "chunk_tokens": data.chunk_tokens})
        weights = layout.weights(_tensors(folder), card)
        load_weights(Decoder(config), weights, str(folder))
    except KeyError as error:
        raise InputError(
            f"the base {spec!r} is no whole {card['model_type']} checkpoint: {error} is missing."
        ) from error
    except SafetensorError as error:
        raise InputError(f"the base {spec!r} cannot be read: {error}.") from error
    _check_tokens(folder, spec, config, tokenizer, database)
    _check_positions(spec, config, data)
    return Base(spec, config, weights)


def _own(spec: str, data: DataSettings, database: str) -> Base:
    storage, checkpoint = open_checkpoint(spec)
    data.check_model(checkpoint.data, storage.url, database)
    if checkpoint.model.retrieval is not None:
        raise InputError(
            f"{storage.url} has retrieval already; RETROfit takes a plain decoder: retrodb train --no-retrieval."
        )
    tensors = read_tensors(storage, checkpoint.files, WEIGHTS)
    weights = {name.removeprefix("decoder."): value for name, value in tensors.items()}
    load_weights(Decoder(checkpoint.model), weights, storage.url)
    _check_positions(spec, checkpoint.model, data)
    return Base(storage.url, checkpoint.model, weights)


def _from_hub(spec: str) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only when a hub name is given

    try:
        return Path(snapshot_download(spec, allow_patterns=["*.json", "*.safetensors", "*.model"]))
    except Exception as error:  # the hub client raises many kinds; all mean the same to the user
        raise InputError(
            f"no base {spec!r}: it is no folder here, and the model hub did not give it ({type(error).__name__}). "
            "Name a checkpoint of retrodb train, or a folder in a Hugging Face layout."
        ) from error


def _card(folder: Path, spec: str) -> dict[str, Any]:
    try:
        card = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"the base {spec!r} has no readable config.json: {error}.") from error
    kind = card.get("model_type") if isinstance(card, dict) else None
    if kind not in LAYOUTS:
        raise InputError(f"the base {spec!r} is of the type {kind!r}; what can be read is {', '.join(LAYOUTS)}.")
    return card


def _tensors(folder: Path) -> Tensors:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} has no .safetensors weights; convert them (pickles are not read).")
    tensors: Tensors = {}
    for file in files:
        tensors |= {name: value.float() for name, value in load_file(file).items()}
    return tensors


def _check_tokens(folder: Path, spec: str, config: ModelConfig, tokenizer: ChunkTokenizer, database: str) -> None:
    """Compare tokenizers on a text where the base has one; else their sizes, which is all that is known."""
    if config.vocabulary < tokenizer.vocabulary_size:
        raise MismatchError(
            f"the base {spec!r} has {config.vocabulary} tokens; {database} has {tokenizer.vocabulary_size}"
            f" ({tokenizer.name!r}, fingerprint {tokenizer.fingerprint[:16]}). Build it with the base's tokenizer."
        )
    if not (folder / "tokenizer.json").is_file():
        return
    theirs = load_tokenizer(str(folder))
    ids = [next(iter(one.tokenize([_PROBE]))).ids.tolist() for one in (theirs, tokenizer)]
    if ids[0] != ids[1]:
        raise MismatchError(
            f"the base {spec!r} has another tokenizer (fingerprint {theirs.fingerprint[:16]}) than {database}"
            f" ({tokenizer.name!r}, fingerprint {tokenizer.fingerprint[:16]}). Build the database with it: --tokenizer"
            f" {folder}."
        )


def _check_positions(spec: str, config: ModelConfig, data: DataSettings) -> None:
    if config.max_positions is not None and config.max_positions < data.sequence_tokens:
        raise InputError(
            f"the base {spec!r} has {config.max_positions} learned positions, too few for sequences of"
            f" {data.sequence_tokens} tokens: build the database with --sequence-tokens {config.max_positions}."
        )
