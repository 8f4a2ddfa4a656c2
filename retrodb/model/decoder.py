"""The plain decoder: what RETRO is without retrieval, and what RETROfit takes as its frozen base."""

from typing import cast

import torch
from torch import nn
from torch.nn import functional

from retrodb.model.batch import Batch
from retrodb.model.config import ModelConfig
from retrodb.model.layers import (
    INITIAL_DEVIATION,
    FeedForward,
    make_linear,
    make_norm,
    residual_deviation,
    self_attention,
)


class DecoderBlock(nn.Module):
    """One pre-norm layer in its two halves; RETRO's cross-attention stands between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config.norm, config.width, config.norm_epsilon)
        self.attention = self_attention(config)
        self.feed_forward_norm = make_norm(config.norm, config.width, config.norm_epsilon)
        self.inner = FeedForward(
            config.width,
            config.feed_forward,
            config.activation,
            biases=config.feed_forward_biases,
            residual_deviation=residual_deviation(config.layers),
        )

    def attend(self, h: torch.Tensor, batch: Batch) -> torch.Tensor:
        """``H = Attn(H)``, ``[B, n, d]``: each place looks at what its document held before it."""
        x = self.attention_norm(h)
        return h + self.attention(x, x, batch.self_attention, batch.positions, batch.positions)

    def feed_forward(self, h: torch.Tensor) -> torch.Tensor:
        """``H = FFW(H)``, ``[B, n, d]``."""
        return h + self.inner(self.feed_forward_norm(h))


class Decoder(nn.Module):
    """Embeddings, layers, the last norm, and the output projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        nn.init.normal_(self.embedding.weight, std=INITIAL_DEVIATION)
        self.positions: nn.Embedding | None = None
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_positions or 1, config.width)
            nn.init.normal_(self.positions.weight, std=INITIAL_DEVIATION / 2)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.layers))
        self.norm = make_norm(config.norm, config.width, config.norm_epsilon)
        self.head = None if config.tied else make_linear(config.width, config.vocabulary)

    @property
    def layers(self) -> list[DecoderBlock]:
        """The layers, first to last."""
        return cast("list[DecoderBlock]", list(self.blocks))

    def embed(self, batch: Batch) -> torch.Tensor:
        """``H = Emb(X)``, ``[B, n, d]``."""
        h = self.embedding(batch.tokens.flatten(1))
        return h if self.positions is None else h + self.positions(batch.positions)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """``[.., vocabulary]`` of final activations ``[.., d]``."""
        return functional.linear(h, self.embedding.weight) if self.head is None else self.head(h)
