"""What a model sees of training rows, and which places may look at which: the rules of docs/model.md as masks.

Places are the ``n = S * m`` token slots of a row; ``S = n/m`` slots hold a chunk each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from retrodb.errors import InputError
from retrodb.sizes import count_of
from retrodb.training.dataset import Sample, neighbour_mask

EMPTY = -1
"""The document of an empty slot."""


@dataclass(frozen=True)
class Batch:
    """Rows of a training table. Whatever a padded token slot held is 0 here, so that nothing can depend on it.

    Attributes:
        tokens: int64 ``[B, S, m]``.
        lengths: int64 ``[B, S]``, valid tokens of each chunk.
        documents: int64 ``[B, S]``, -1 for an empty slot.
        neighbour_tokens: int64 ``[B, S, k, 2, m]``, N then F; k may be 0.
        neighbour_lengths: int64 ``[B, S, k, 2]``, valid tokens of both; 0 for what is missing.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    documents: torch.Tensor
    neighbour_tokens: torch.Tensor
    neighbour_lengths: torch.Tensor

    @staticmethod
    def of(samples: Sequence[Sample], neighbours: int) -> "Batch":
        """Samples of a `TrainingDataset` or `TrainingTable`, with their first ``neighbours`` neighbours (0 for none).

        Raises:
            InputError: the samples hold fewer neighbours.
        """
        together = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        return Batch.from_columns(together, neighbours)

    @staticmethod
    def from_columns(columns: Mapping[str, torch.Tensor], neighbours: int) -> "Batch":
        """As `of`, of samples that are batched already: ``[B, ..]`` tensors by name."""
        held = columns["neighbour_ids"].shape[-1]
        if not 0 <= neighbours <= held:
            raise InputError(
                f"{count_of(neighbours, 'neighbour a chunk is', 'neighbours a chunk are')} asked for; the rows hold "
                f"{held}. Ask for at most {held}, or build with more --training-neighbours."
            )
        rows, slots = columns["chunk_lengths"].shape
        found = neighbour_mask(dict(columns))[..., :neighbours]
        return Batch.made(
            columns["tokens"].view(rows, slots, -1),
            columns["chunk_lengths"],
            columns["document_ids"],
            columns["neighbour_tokens"][:, :, :neighbours],
            columns["neighbour_lengths"][:, :, :neighbours] * found.unsqueeze(-1),
        )

    @staticmethod
    def made(
        tokens: torch.Tensor,
        lengths: torch.Tensor,
        documents: torch.Tensor,
        neighbour_tokens: torch.Tensor,
        neighbour_lengths: torch.Tensor,
    ) -> "Batch":
        """A batch of such tensors, with its padded token slots set to 0."""
        places = torch.arange(tokens.shape[-1], device=tokens.device)
        return Batch(
            tokens.long().masked_fill(places >= lengths.unsqueeze(-1), 0),
            lengths.long(),
            documents.long(),
            neighbour_tokens.long().masked_fill(places >= neighbour_lengths.unsqueeze(-1), 0),
            neighbour_lengths.long(),
        )

    def to(self, device: str | torch.device) -> "Batch":
        """The batch on another device."""
        return Batch(**{name: value.to(device) for name, value in self._fields().items()})

    def __getitem__(self, rows: Any) -> "Batch":
        """Some of its rows."""
        return Batch(**{name: value[rows] for name, value in self._fields().items()})

    def _fields(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    # -- sizes and neighbours --------------------------------------------------------------------------------------

    @property
    def chunk_tokens(self) -> int:
        """m."""
        return self.tokens.shape[-1]

    @property
    def neighbours(self) -> int:
        """k."""
        return self.neighbour_tokens.shape[2]

    def with_neighbours(
        self, first: int | None = None, *, retrieved: bool = True, continuations: bool = True
    ) -> "Batch":
        """The first ``first`` neighbours of each chunk alone, perhaps without the neighbours N or their F."""
        kept = self.neighbour_lengths[:, :, :first] * self.neighbour_lengths.new_tensor([retrieved, continuations])
        places = torch.arange(self.chunk_tokens, device=kept.device)
        tokens = self.neighbour_tokens[:, :, :first].masked_fill(places >= kept.unsqueeze(-1), 0)
        return replace(self, neighbour_tokens=tokens, neighbour_lengths=kept)

    # -- places ----------------------------------------------------------------------------------------------------

    @cached_property
    def valid(self) -> torch.Tensor:
        """bool ``[B, n]``: which places hold text."""
        places = torch.arange(self.chunk_tokens, device=self.tokens.device)
        return (places < self.lengths.unsqueeze(-1)).flatten(1)

    @cached_property
    def document_at(self) -> torch.Tensor:
        """int64 ``[B, n]``: the document of each place."""
        return self.documents.repeat_interleave(self.chunk_tokens, dim=1)

    @cached_property
    def positions(self) -> torch.Tensor:
        """int64 ``[B, n]``: each token's number in its document's part of the row, from 0; 0 where padded."""
        before = self.valid.long().cumsum(1) - self.valid.long()
        begins = torch.ones_like(self.valid)
        begins[:, 1:] = self.document_at[:, 1:] != self.document_at[:, :-1]
        start = torch.where(begins, before, 0).cummax(1).values
        return torch.where(self.valid, before - start, 0)

    @cached_property
    def self_attention(self) -> torch.Tensor:
        """bool ``[B, 1, n, n]``: whether a place (row) may look at a place (column).

        At itself, and at the valid places before it that are of its document. A padded place sees itself, lest its
        softmax be one of nothing; nobody sees a padded place.
        """
        same = self.document_at.unsqueeze(2) == self.document_at.unsqueeze(1)
        n = self.valid.shape[1]
        earlier = torch.ones(n, n, dtype=torch.bool, device=same.device).tril(-1)
        itself = torch.eye(n, dtype=torch.bool, device=same.device)
        return (same & earlier & self.valid.unsqueeze(1) | itself).unsqueeze(1)

    @cached_property
    def _next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(place of the next token, whether there is one of the same document), ``[B, n]`` both."""
        n = self.valid.shape[1]
        own = torch.where(self.valid, torch.arange(n, device=self.valid.device), n)
        following = own.flip(1).cummin(1).values.flip(1)
        following = torch.nn.functional.pad(following[:, 1:], (0, 1), value=n)
        place = following.clamp(max=n - 1)
        same = self.document_at.gather(1, place) == self.document_at
        return place, self.valid & (following < n) & same

    @property
    def target_places(self) -> torch.Tensor:
        """int64 ``[B, n]``: where the token lies that each place predicts; any place where `predicts` is False."""
        return self._next[0]

    @property
    def predicts(self) -> torch.Tensor:
        """bool ``[B, n]``: which places have a target: a valid token that is followed by one of its document."""
        return self._next[1]

    @property
    def targets(self) -> torch.Tensor:
        """int64 ``[B, n]``: the token that each place predicts, where it does."""
        return self.tokens.flatten(1).gather(1, self.target_places)

    # -- chunked cross-attention -----------------------------------------------------------------------------------

    @cached_property
    def neighbour_keys(self) -> torch.Tensor:
        """bool ``[B, S, k, 2m]``: which retrieved tokens exist."""
        places = torch.arange(self.chunk_tokens, device=self.tokens.device)
        return (places < self.neighbour_lengths.unsqueeze(-1)).flatten(3)

    @cached_property
    def attending(self) -> torch.Tensor:
        """bool ``[B, S, m]``: which tokens of the attending chunk C_u+ look at the neighbours of chunk u.

        Token i of C_u+ lies at place ``u * m + m - 1 + i``. It must exist, be of the document of chunk u, and chunk u
        must have a neighbour.
        """
        here = self.shifted(self.valid)
        documents = self.shifted(self.document_at, EMPTY)
        found = self.neighbour_keys.flatten(2).any(-1, keepdim=True)
        return here & (documents == self.documents.unsqueeze(-1)) & found

    def shifted(self, at_places: torch.Tensor, fill: float = 0) -> torch.Tensor:
        """``[B, n, ..]`` values of places as those of the attending chunks ``[B, S, m, ..]``: m - 1 places later."""
        m = self.chunk_tokens
        ends = at_places.new_full((len(at_places), m - 1, *at_places.shape[2:]), fill)
        return torch.cat([at_places[:, m - 1 :], ends], dim=1).unflatten(1, (-1, m))

    def unshifted(self, attending: torch.Tensor) -> torch.Tensor:
        """The inverse of `shifted`: ``[B, S, m, ..]`` to ``[B, n, ..]``, 0 for the first m - 1 places."""
        m = self.chunk_tokens
        flat = attending.flatten(1, 2)
        starts = flat.new_zeros((len(flat), m - 1, *flat.shape[2:]))
        return torch.cat([starts, flat[:, : flat.shape[1] - (m - 1)]], dim=1)
