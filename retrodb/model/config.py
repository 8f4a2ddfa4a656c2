"""What a model is: frozen, validated, and JSON as it lies in a checkpoint. Imports no torch."""

from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from retrodb.errors import InputError

LARGEST_WIDTH: Final = 1 << 17
"""Of anything in a model: what is beyond is a slip of the finger, or a checkpoint that is not what it says."""
MOST_LAYERS: Final = 1 << 12
_LARGEST_VOCABULARY: Final = 1 << 24


class RetrievalConfig(BaseModel):
    """The neighbour encoder and where the decoder looks at it (the paper's section 2.4)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[int, ...] = Field(min_length=1, max_length=MOST_LAYERS)
    """P: the decoder layers, from 1, that have chunked cross-attention."""
    width: int = Field(ge=1, le=LARGEST_WIDTH)
    """d' of the encoder."""
    encoder_layers: int = Field(default=2, ge=1, le=MOST_LAYERS)
    encoder_heads: int = Field(ge=1, le=LARGEST_WIDTH)
    feed_forward: int = Field(ge=1, le=8 * LARGEST_WIDTH)
    conditioned: tuple[int, ...] = Field(default=(1,), min_length=1)
    """P_enc: the encoder layers that look at the decoder's activations of the chunk."""
    gated: bool = False
    """Whether each cross-attention ends in a gate that starts at zero: RETROfit."""


class ModelConfig(BaseModel):
    """A decoder, and its retrieval where it has any.

    ``vocabulary`` and ``chunk_tokens`` (m) follow from a database. ``positions`` is ``rotary``, or ``learned`` as in
    GPT-2, which needs ``max_positions``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocabulary: int = Field(ge=1, le=_LARGEST_VOCABULARY)
    chunk_tokens: int = Field(ge=1)
    width: int = Field(ge=1, le=LARGEST_WIDTH)
    layers: int = Field(ge=1, le=MOST_LAYERS)
    heads: int = Field(ge=1, le=LARGEST_WIDTH)
    head_width: int = Field(ge=1, le=LARGEST_WIDTH)
    key_value_heads: int = Field(ge=1, le=LARGEST_WIDTH)
    feed_forward: int = Field(ge=1, le=8 * LARGEST_WIDTH)
    activation: Literal["swiglu", "gelu_tanh", "gelu"] = "swiglu"
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = Field(default=1e-5, gt=0)
    attention_biases: bool = False
    feed_forward_biases: bool = False
    positions: Literal["rotary", "learned"] = "rotary"
    rotary_base: float = Field(default=10_000.0, gt=0)
    max_positions: int | None = Field(default=None, ge=1, le=_LARGEST_VOCABULARY)
    tied: bool = True
    """Whether the output projection is the embedding table."""
    retrieval: RetrievalConfig | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.positions == "learned" and self.max_positions is None:
            raise ValueError("learned positions need max_positions")
        if self.heads % self.key_value_heads:
            raise ValueError(f"heads {self.heads} is no multiple of key_value_heads {self.key_value_heads}")
        if self.positions == "rotary" and self.head_width % 2:
            raise ValueError(f"rotary positions turn pairs of numbers: head_width {self.head_width} is odd")
        if self.retrieval is not None:
            wrong = [layer for layer in self.retrieval.layers if not 1 <= layer <= self.layers]
            wrong += [layer for layer in self.retrieval.conditioned if not 1 <= layer <= self.retrieval.encoder_layers]
            if wrong:
                raise ValueError(f"there is no layer {wrong[0]}: layers are numbered from 1")
            if self.retrieval.width % (2 * self.retrieval.encoder_heads):
                raise ValueError(
                    f"the encoder's width {self.retrieval.width} is no multiple of twice its"
                    f" {self.retrieval.encoder_heads} heads"
                )
        return self

    @staticmethod
    def preset(
        name: str,
        *,
        vocabulary: int,
        chunk_tokens: int,
        retrieval: bool = True,
        overrides: dict[str, Any] | None = None,
    ) -> "ModelConfig":
        """A model of a named size, perhaps with other ``width``, ``layers``, ``heads`` or ``feed_forward``.

        Raises:
            InputError: there is no such preset, or the sizes do not fit each other.
        """
        if name not in PRESETS:
            raise InputError(f"there is no preset {name!r}; the presets are {', '.join(PRESETS)}.")
        sizes = {**PRESETS[name], **(overrides or {})}
        if sizes["width"] % sizes["heads"] and "head_width" not in sizes:
            raise InputError(f"width {sizes['width']} is no multiple of heads {sizes['heads']}.")
        sizes.setdefault("head_width", sizes["width"] // sizes["heads"])
        sizes.setdefault("feed_forward", swiglu_width(sizes["width"]))
        return parse_model(
            {
                **sizes,
                "vocabulary": vocabulary,
                "chunk_tokens": chunk_tokens,
                "key_value_heads": sizes["heads"],
                "retrieval": default_retrieval(sizes["width"], sizes["layers"]) if retrieval else None,
            }
        )


def parse_model(settings: dict[str, Any]) -> ModelConfig:
    """A `ModelConfig` from plain data. Raises InputError, which names the setting, for what is no model."""
    try:
        return ModelConfig.model_validate(settings)
    except ValidationError as error:
        item = error.errors()[0]
        where = ".".join(map(str, item["loc"])) or "the model"
        raise InputError(f"{where}: {item['msg'].removeprefix('Value error, ')}.") from error


PRESETS: Final[dict[str, dict[str, int]]] = {
    "tiny": {"width": 64, "layers": 2, "heads": 2},
    "small": {"width": 256, "layers": 6, "heads": 4},
    "medium": {"width": 512, "layers": 8, "heads": 8},
    "retro-172m": {"width": 896, "layers": 12, "heads": 16, "head_width": 64, "feed_forward": 3584},
}
"""``small`` trains in minutes on two cores; ``retro-172m`` has the sizes of the paper's smallest model."""


def swiglu_width(width: int) -> int:
    """Inner width, a multiple of 16, that gives SwiGLU's three matrices the size of two of 4 x width (Shazeer 2020)."""
    return -(-width * 8 // 3 // 16) * 16


def cross_attention_layers(layers: int) -> tuple[int, ...]:
    """P: every third layer from the sixth (the paper's section 2.4); fewer than nine: every second from the middle."""
    return tuple(range(6, layers + 1, 3)) if layers >= 9 else tuple(range(max(1, layers // 2), layers + 1, 2))


def default_retrieval(width: int, layers: int, *, gated: bool = False) -> RetrievalConfig:
    """Retrieval for a decoder of that size: an encoder of two layers, as wide as it is, up to the paper's 896."""
    heads = max(1, min(width, 896) // 64)
    inner = max(2, min(width, 896) // (2 * heads) * 2 * heads)
    return RetrievalConfig(
        layers=cross_attention_layers(layers),
        width=inner,
        encoder_heads=heads,
        feed_forward=swiglu_width(inner),
        gated=gated,
    )
