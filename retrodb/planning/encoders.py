"""Encoders as far as a plan needs them: how wide their vectors are, and how much they multiply."""

import json
from dataclasses import dataclass
from typing import Final

from retrodb.encoding import DEFAULT_ENCODER, resolve_encoder
from retrodb.errors import InputError


@dataclass(frozen=True)
class EncoderSize:
    """``dimension`` of the vectors; ``parameters`` of the layers, each of which multiplies once a token."""

    name: str
    dimension: int
    parameters: float


def _layers(layers: int, hidden: int, inner: int) -> float:
    return layers * (4 * hidden * hidden + 2 * hidden * inner)


_KNOWN: Final = {
    size.name: size
    for size in (
        EncoderSize(DEFAULT_ENCODER, 384, _layers(6, 384, 1536)),
        EncoderSize("bert-base-uncased", 768, _layers(12, 768, 3072)),
        EncoderSize("bert-large-uncased", 1024, _layers(24, 1024, 4096)),
    )
}


def encoder_size(spec: str) -> EncoderSize:
    """The size of an encoder: one of the usual three by name alone, any other by its card.

    Raises:
        InputError: there is no such encoder, or its card says no sizes.
    """
    if spec in _KNOWN:
        return _KNOWN[spec]
    card = resolve_encoder(spec).transformer / "config.json"
    try:
        config = json.loads(card.read_text(encoding="utf-8"))
        hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
        return EncoderSize(spec, hidden, _layers(int(config["num_hidden_layers"]), hidden, inner))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{card} does not say how large the encoder is ({error!r}); name another --encoder."
        ) from error
