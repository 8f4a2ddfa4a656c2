"""The pieces of both towers: normalisation, attention, rotary positions, feed-forward."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from retrodb.model.config import ModelConfig

INITIAL_DEVIATION = 0.02
"""Of every matrix and embedding, as in GPT-2; what writes into the residual stream gets less: `residual_deviation`."""


def make_norm(kind: str, width: int, epsilon: float) -> nn.Module:
    """``rms`` (Zhang and Sennrich 2019) or ``layer``."""
    return nn.RMSNorm(width, eps=epsilon) if kind == "rms" else nn.LayerNorm(width, eps=epsilon)


def make_linear(inputs: int, outputs: int, *, bias: bool = False, deviation: float = INITIAL_DEVIATION) -> nn.Linear:
    """A linear layer with normal weights of that standard deviation and zero bias."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=deviation)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def rotate(values: torch.Tensor, positions: torch.Tensor, base: float) -> torch.Tensor:
    """Rotary positions (Su et al. 2021), pairs of the first and second half as Llama has them.

    Args:
        values: ``[B, heads, T, head_width]``.
        positions: ``[B, T]`` or ``[T]``.
        base: of the geometric row of wavelengths.
    """
    half = values.shape[-1] // 2
    rates = base ** (-torch.arange(half, device=values.device, dtype=torch.float32) / half)
    angles = positions.unsqueeze(-1).float() * rates
    angles = angles.unsqueeze(-3)  # all heads alike
    cosine, sine = angles.cos().to(values.dtype), angles.sin().to(values.dtype)
    first, second = values[..., :half], values[..., half:]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of an attention: what its queries, and its keys and values, are made from.

    ``rotary_base`` is None where positions are no matter of the attention.
    """

    width: int
    memory_width: int
    heads: int
    head_width: int
    key_value_heads: int
    rotary_base: float | None
    biases: bool = False
    residual_deviation: float = INITIAL_DEVIATION


class Attention(nn.Module):
    """Multi-head attention of ``x`` to a memory (its own normalised self, or something else) under a mask."""

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__()
        self.shape = shape
        inner, shared = shape.heads * shape.head_width, shape.key_value_heads * shape.head_width
        self.query = make_linear(shape.width, inner, bias=shape.biases)
        self.key = make_linear(shape.memory_width, shared, bias=shape.biases)
        self.value = make_linear(shape.memory_width, shared, bias=shape.biases)
        self.output = make_linear(inner, shape.width, bias=shape.biases, deviation=shape.residual_deviation)

    def forward(
        self,
        x: torch.Tensor,
        memory: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        memory_positions: torch.Tensor,
    ) -> torch.Tensor:
        """What each of ``x`` takes from ``memory``.

        Args:
            x: ``[B, T, width]``.
            memory: ``[B, R, memory_width]``.
            mask: bool, broadcast to ``[B, 1, T, R]``; each row holds at least one True.
            positions: ``[B, T]`` or ``[T]``.
            memory_positions: ``[B, R]`` or ``[R]``.
        """
        heads, shared = self.shape.heads, self.shape.key_value_heads
        query = self._split(self.query(x), heads)
        key, value = self._split(self.key(memory), shared), self._split(self.value(memory), shared)
        if self.shape.rotary_base is not None:
            query = rotate(query, positions, self.shape.rotary_base)
            key = rotate(key, memory_positions, self.shape.rotary_base)
        if shared < heads:
            key, value = (part.repeat_interleave(heads // shared, dim=1) for part in (key, value))
        taken = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.output(taken.transpose(1, 2).flatten(2))

    def _split(self, values: torch.Tensor, heads: int) -> torch.Tensor:
        return values.unflatten(2, (heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020), or two layers with GELU, exact or by tanh as GPT-2 has it."""

    def __init__(self, width: int, inner: int, activation: str, *, biases: bool, residual_deviation: float) -> None:
        super().__init__()
        self.activation = activation
        self.gate = make_linear(width, inner, bias=biases) if activation == "swiglu" else None
        self.up = make_linear(width, inner, bias=biases)
        self.down = make_linear(inner, width, bias=biases, deviation=residual_deviation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[.., width]`` to ``[.., width]``."""
        if self.gate is not None:
            return self.down(functional.silu(self.gate(x)) * self.up(x))
        return self.down(functional.gelu(self.up(x), approximate="tanh" if self.activation == "gelu_tanh" else "none"))


def residual_deviation(layers: int, sublayers: int = 2) -> float:
    """Initial deviation of what is added to the residual stream ``sublayers`` times a layer (GPT-2's rule)."""
    return INITIAL_DEVIATION / (sublayers * layers) ** 0.5


def self_attention(config: ModelConfig) -> Attention:
    """The decoder's own attention."""
    return Attention(
        AttentionShape(
            width=config.width,
            memory_width=config.width,
            heads=config.heads,
            head_width=config.head_width,
            key_value_heads=config.key_value_heads,
            rotary_base=config.rotary_base if config.positions == "rotary" else None,
            biases=config.attention_biases,
            residual_deviation=residual_deviation(config.layers),
        )
    )
