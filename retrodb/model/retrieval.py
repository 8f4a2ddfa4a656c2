"""RETRO's own two parts: the neighbour encoder and chunked cross-attention (Borgeaud et al. 2022, section 2.4)."""

import torch
from torch import nn

from retrodb.model.batch import Batch
from retrodb.model.config import ModelConfig, RetrievalConfig
from retrodb.model.layers import (
    Attention,
    AttentionShape,
    FeedForward,
    make_linear,
    make_norm,
    residual_deviation,
)


def _attention(config: ModelConfig, retrieval: RetrievalConfig, memory_width: int) -> Attention:
    """An attention of the encoder: to itself, or to the decoder's activations."""
    heads = retrieval.encoder_heads
    return Attention(
        AttentionShape(
            width=retrieval.width,
            memory_width=memory_width,
            heads=heads,
            head_width=retrieval.width // heads,
            key_value_heads=heads,
            rotary_base=config.rotary_base,
            residual_deviation=residual_deviation(retrieval.encoder_layers),
        )
    )


def _some_key(keys: torch.Tensor) -> torch.Tensor:
    """``keys`` [.., R], all True in rows that hold none: those attend to padding, and what comes of it is masked."""
    return keys | ~keys.any(-1, keepdim=True)


class EncoderBlock(nn.Module):
    """One layer of the encoder: bidirectional attention, perhaps a look at the chunk, feed-forward."""

    def __init__(self, config: ModelConfig, retrieval: RetrievalConfig, *, conditioned: bool) -> None:
        super().__init__()
        epsilon = config.norm_epsilon
        self.attention_norm = make_norm("rms", retrieval.width, epsilon)
        self.attention = _attention(config, retrieval, retrieval.width)
        self.chunk_norm: nn.Module | None = None
        if conditioned:
            self.chunk_norm = make_norm("rms", retrieval.width, epsilon)
            self.chunk_attention = _attention(config, retrieval, config.width)
        self.feed_forward_norm = make_norm("rms", retrieval.width, epsilon)
        self.inner = FeedForward(
            retrieval.width,
            retrieval.feed_forward,
            "swiglu",
            biases=False,
            residual_deviation=residual_deviation(retrieval.encoder_layers),
        )

    def forward(
        self, e: torch.Tensor, chunk: torch.Tensor, keys: torch.Tensor, chunk_keys: torch.Tensor
    ) -> torch.Tensor:
        """One layer.

        Args:
            e: ``[C, k, 2m, d']``, the neighbours of C chunks.
            chunk: ``[C, m, d]``, the decoder's normalised activations of the chunks.
            keys: bool ``[C, k, 2m]``, which retrieved tokens exist; some of each.
            chunk_keys: bool ``[C, m]``, which of the chunks' do; some of each.
        """
        chunks, k, length, _ = e.shape
        at = torch.arange(length, device=e.device)
        apart = e.flatten(0, 1)
        x = self.attention_norm(apart)
        apart = apart + self.attention(x, x, keys.flatten(0, 1)[:, None, None, :], at, at)
        if self.chunk_norm is not None:
            together = apart.view(chunks, k * length, -1)
            x = self.chunk_norm(together)
            beside = at[: chunk.shape[1]]
            together = together + self.chunk_attention(x, chunk, chunk_keys[:, None, None, :], at.repeat(k), beside)
            apart = together.view(chunks * k, length, -1)
        return (apart + self.inner(self.feed_forward_norm(apart))).view(e.shape)


class NeighbourEncoder(nn.Module):
    """``E_u = Encoder(Ret(C_u), H_u)``: bidirectional over each neighbour with its continuation, conditioned on H_u."""

    def __init__(self, config: ModelConfig, retrieval: RetrievalConfig) -> None:
        super().__init__()
        self.projection = make_linear(config.width, retrieval.width, deviation=config.width**-0.5)
        self.memory_norm = make_norm("rms", config.width, config.norm_epsilon)
        self.blocks = nn.ModuleList(
            EncoderBlock(config, retrieval, conditioned=number in retrieval.conditioned)
            for number in range(1, retrieval.encoder_layers + 1)
        )
        self.norm = make_norm("rms", retrieval.width, config.norm_epsilon)

    def forward(self, embedded: torch.Tensor, h: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Encode the neighbours of every chunk.

        Args:
            embedded: ``[B, S, k, 2m, d]``, the embedded tokens of N and F.
            h: ``[B, n, d]``, the decoder's activations after the self-attention of layer min(P).
            batch: whose.

        Returns:
            ``[B * S, k, 2m, d']``.
        """
        e = self.projection(embedded).flatten(0, 1)
        chunk = self.memory_norm(h).unflatten(1, (-1, batch.chunk_tokens)).flatten(0, 1)
        keys = _some_key(batch.neighbour_keys).flatten(0, 1)
        chunk_keys = _some_key(batch.valid.unflatten(1, (-1, batch.chunk_tokens))).flatten(0, 1)
        for block in self.blocks:
            e = block(e, chunk, keys, chunk_keys)
        return self.norm(e)


class ChunkedCrossAttention(nn.Module):
    """CCA: the last token of chunk u and the first m - 1 of the next attend to the neighbours of chunk u."""

    def __init__(self, config: ModelConfig, retrieval: RetrievalConfig) -> None:
        super().__init__()
        self.norm = make_norm("rms", config.width, config.norm_epsilon)
        self.attention = Attention(
            AttentionShape(
                width=config.width,
                memory_width=retrieval.width,
                heads=config.heads,
                head_width=config.head_width + config.head_width % 2,
                key_value_heads=config.heads,
                rotary_base=config.rotary_base,
                residual_deviation=residual_deviation(config.layers),
            )
        )
        self.gate = nn.Parameter(torch.zeros(config.width)) if retrieval.gated else None

    def forward(self, h: torch.Tensor, encoded: torch.Tensor, batch: Batch) -> torch.Tensor:
        """What ``h`` takes from the neighbours, ``[B, n, d]``: exactly 0 at places that see none.

        Args:
            h: ``[B, n, d]``.
            encoded: ``[B * S, k, 2m, d']``, from `NeighbourEncoder`.
            batch: whose.
        """
        m = batch.chunk_tokens
        k, length = encoded.shape[1:3]
        x = batch.shifted(self.norm(h))
        keys = _some_key(batch.neighbour_keys.flatten(2)).flatten(0, 1)
        at = torch.arange(length, device=h.device)
        taken = self.attention(
            x.flatten(0, 1),
            encoded.flatten(1, 2),
            keys[:, None, None, :],
            torch.arange(m - 1, 2 * m - 1, device=h.device),
            at.repeat(k),
        )
        if self.gate is not None:
            taken = taken * self.gate
        taken = torch.where(batch.attending.unsqueeze(-1), taken.view(x.shape), 0)
        return batch.unshifted(taken)


class Retrieval(nn.Module):
    """All that RETRO adds to a decoder: one encoder, and a cross-attention for each layer of P."""

    def __init__(self, config: ModelConfig, retrieval: RetrievalConfig) -> None:
        super().__init__()
        self.encoder = NeighbourEncoder(config, retrieval)
        self.cross = nn.ModuleDict({str(layer): ChunkedCrossAttention(config, retrieval) for layer in retrieval.layers})
