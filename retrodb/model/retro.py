"""RETRO: Algorithm 1 of Borgeaud et al. 2022, over a batch of training rows."""

import torch
from torch import nn
from torch.nn import functional

from retrodb.model.batch import Batch
from retrodb.model.config import ModelConfig
from retrodb.model.decoder import Decoder
from retrodb.model.retrieval import Retrieval


class Retro(nn.Module):
    """A decoder, and its retrieval where the config has any.

    Any number of neighbours k at run time; with k = 0, and where every neighbour is missing, it is the plain decoder.
    Weights are drawn from torch's global generator: seed it first.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = Decoder(config)
        self.retrieval = None if config.retrieval is None else Retrieval(config, config.retrieval)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Final activations ``[B, n, d]`` of each place; `logits` makes predictions of the next token of them."""
        h = self.decoder.embed(batch)
        encoded = None
        for number, block in enumerate(self.decoder.layers, start=1):
            h = block.attend(h, batch)
            if self.retrieval is not None and batch.neighbours and str(number) in self.retrieval.cross:
                if encoded is None:  # p = min(P)
                    table = self.decoder.embedding
                    encoded = self.retrieval.encoder(table(batch.neighbour_tokens).flatten(3, 4), h, batch)
                h = h + self.retrieval.cross[str(number)](h, encoded, batch)
            h = block.feed_forward(h)
        return self.decoder.norm(h)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """float32 ``[.., vocabulary]`` of activations ``[.., d]``."""
        return self.decoder.logits(h).float()

    def nats(self, batch: Batch) -> torch.Tensor:
        """float32 ``[T]``: minus the log probability of each token that has a prediction, in the order of the places.

        That is, of the targets of the places where ``batch.predicts``.
        """
        h = self(batch)[batch.predicts]
        return functional.cross_entropy(self.logits(h), batch.targets[batch.predicts], reduction="none")

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean of `nats`; 0, with zero gradients, where nothing is predicted."""
        nats = self.nats(batch)
        return nats.sum() / max(1, nats.numel())

    def freeze_base(self) -> None:
        """Leave nothing to train but the retrieval: RETROfit (the paper's section 4.2)."""
        self.decoder.requires_grad_(False)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of the decoder, of its embedding, of the retrieval; and those that train."""

        def count(module: nn.Module | None) -> int:
            return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())

        return {
            "decoder": count(self.decoder),
            "embedding": self.decoder.embedding.weight.numel(),
            "retrieval": count(self.retrieval),
            "training": sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad),
        }
