"""Sampling that retrieves: whenever a chunk of the text is complete, its neighbours are looked up in the database."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch

from retrodb.chunking import OWN_TOKENIZER
from retrodb.database import Database
from retrodb.encoding import chunk_texts
from retrodb.errors import InputError, UsageError
from retrodb.learning.device import Device
from retrodb.model.batch import Batch
from retrodb.model.data import DataSettings
from retrodb.model.retro import Retro
from retrodb.sizes import count_of

_COLDEST: Final = 1e-6
"""Below, float32 logits that differ at all are as far apart as can be, and divided by it overflow."""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the predictions.

    Attributes:
        temperature: 0 takes the likeliest.
        top_k: only so many of the likeliest; None for all.
        top_p: only the likeliest that together have this probability (Holtzman et al. 2020), one of them at least.
        seed: of the draws.
    """

    temperature: float = 0.8
    top_k: int | None = 40
    top_p: float = 1.0
    seed: int = 0

    def draw(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        """A token of ``logits`` [vocabulary]."""
        if self.temperature < _COLDEST:
            return int(logits.argmax())
        scores, order = (logits / self.temperature).sort(descending=True, stable=True)
        shares = scores.softmax(-1)
        keep = shares.cumsum(-1) - shares < self.top_p
        keep[0] = True
        if self.top_k is not None:
            keep[self.top_k :] = False
        drawn = torch.multinomial(torch.where(keep, shares, 0), 1, generator=generator)
        return int(order[drawn])


@dataclass(frozen=True)
class Found:
    """What was retrieved for one chunk: ids and distances, and the tokens as a training row holds them."""

    chunk: int
    ids: list[int]
    distances: list[float]
    tokens: torch.Tensor
    """int64 ``[k, 2, m]``."""
    lengths: torch.Tensor
    """int64 ``[k, 2]``; 0 where fewer were found, or a neighbour has no continuation."""


class Retriever:
    """Neighbours of a chunk of any text, found by the database's own encoder and index (the one featuriser).

    Args:
        database: with an index.
        k: neighbours of a chunk.
        encoder: where the database's encoder is now, if not where it was.
    """

    def __init__(self, database: Database, k: int, encoder: str | None = None) -> None:
        self._database, self._k = database, k
        self._m = int(database.manifest.config["chunk_tokens"])
        self._own_tokens = database.manifest.fingerprints["tokenizer"]["name"] == OWN_TOKENIZER
        self._encoder = database.encoder(encoder)

    def find(self, number: int, tokens: Sequence[int]) -> Found:
        """The neighbours of chunk ``number`` (from 0) of a text of ``tokens``, each with its continuation."""
        vector = self._embed(number, tokens)
        hits = self._database.search(vector, self._k)
        found = torch.zeros(self._k, 2, self._m, dtype=torch.int64)
        lengths = torch.zeros(self._k, 2, dtype=torch.int64)
        for place, hit in enumerate(hits):
            following = self._database.continuation(hit.chunk_id)
            pieces = (self._database.chunk(hit.chunk_id).tokens, following.tokens if following else ())
            for part, piece in enumerate(pieces):
                found[place, part, : len(piece)] = torch.tensor(piece, dtype=torch.int64)
                lengths[place, part] = len(piece)
        return Found(number, [hit.chunk_id for hit in hits], [hit.distance for hit in hits], found, lengths)

    def _embed(self, number: int, tokens: Sequence[int]) -> np.ndarray:
        low, high = number * self._m, (number + 1) * self._m
        if self._own_tokens:
            return self._encoder.embed_own_tokens([list(tokens[low:high])])[0]
        decode = self._database.tokenizer.decode
        before, chunk, after = decode(tokens[:low]), decode(tokens[low:high]), decode(tokens[high:])
        bounds = np.array([len(before)]), np.array([len(before) + len(chunk)])
        try:
            text = chunk_texts(before + chunk + after, *bounds)[0]
        except UnicodeDecodeError:  # sampled bytes need not be text
            text = chunk.decode(errors="replace")
        return self._encoder.embed([text])[0]


class Continuation:
    """A text that grows token by token, as one row of one document; `next_logits` are those of the whole row.

    Each step computes the row anew: exact by construction, and quadratic in its length.
    """

    def __init__(
        self, model: Retro, tokens: Sequence[int], retriever: Retriever | None, k: int, device: Device
    ) -> None:
        self._model, self._retriever, self._k, self._device = model, retriever, k, device
        self._m = model.config.chunk_tokens
        self.tokens = list(tokens)
        self.found: list[Found] = []

    def batch(self) -> Batch:
        """The text so far as a batch of one row; what is complete has been retrieved for."""
        complete = len(self.tokens) // self._m
        while self._retriever is not None and len(self.found) < complete:
            self.found.append(self._retriever.find(len(self.found), self.tokens))
        slots = -(-len(self.tokens) // self._m)
        tokens = torch.zeros(1, slots * self._m, dtype=torch.int64)
        tokens[0, : len(self.tokens)] = torch.tensor(self.tokens)
        lengths = torch.full((1, slots), self._m)
        lengths[0, -1] = len(self.tokens) - (slots - 1) * self._m
        near = torch.zeros(1, slots, self._k, 2, self._m, dtype=torch.int64)
        near_lengths = torch.zeros(1, slots, self._k, 2, dtype=torch.int64)
        for found in self.found:
            near[0, found.chunk], near_lengths[0, found.chunk] = found.tokens, found.lengths
        row = Batch.made(tokens.view(1, slots, self._m), lengths, torch.zeros_like(lengths), near, near_lengths)
        return row.to(self._device.name)

    def next_logits(self) -> torch.Tensor:
        """float32 ``[vocabulary]`` of the token that comes next."""
        row = self.batch()  # retrieves: the encoder computes in the precision of the database's vectors, not in ours
        with torch.inference_mode(), self._device.autocast():
            h = self._model(row)
            return self._model.logits(h[0, len(self.tokens) - 1]).cpu()


@dataclass(frozen=True)
class Generated:
    """A prompt, what was made of it, and what was retrieved meanwhile."""

    prompt: str
    text: str
    tokens: list[int]
    found: list[Found] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        retrieved = [{"chunk": one.chunk, "ids": one.ids, "distances": one.distances} for one in self.found]
        return {"prompt": self.prompt, "text": self.text, "tokens": self.tokens, "retrieved": retrieved}


def generate(
    database: Database,
    model: Retro,
    prompt: str,
    *,
    tokens: int,
    sampling: Sampling,
    k: int | None = None,
    encoder: str | None = None,
    device: Device | None = None,
) -> Generated:
    """Continue a prompt by ``tokens`` tokens.

    Args:
        database: whose tokenizer, encoder and neighbours are used.
        model: trained on such tokens and chunks (`DataSettings.check_model`).
        prompt: at least one token.
        tokens: how many more.
        sampling: how they are drawn.
        k: neighbours of a chunk; None for k' of the training rows, or 0 for a model without retrieval.
        encoder: where the database's encoder is now, if not where it was.
        device: the CPU in fp32 by default.

    Raises:
        UsageError: the prompt is empty, or with the tokens longer than a sequence (n); or ``k`` is out of range.
        InputError: ``k`` neighbours are asked of a model without retrieval.
    """
    data = DataSettings.of(database)
    if k is None:
        k = data.neighbours if model.retrieval is not None else 0
    if k and model.retrieval is None:
        raise InputError(f"-k {k}: the model has no retrieval.")
    start = next(iter(database.tokenizer.tokenize([prompt]))).ids.tolist() if prompt else []
    if not start:
        raise UsageError("the prompt is empty: there is nothing to continue.")
    room = data.sequence_tokens - len(start)
    if tokens > room:
        raise UsageError(
            f"the prompt has {count_of(len(start), 'token')}; with {tokens} more it is longer than the "
            f"{data.sequence_tokens} of a sequence, all that the model was trained to see. "
            + (f"Ask for at most {room}." if room > 0 else "Shorten the prompt.")
        )
    chosen = device or Device("cpu", "fp32")
    retriever = Retriever(database, k, encoder) if k else None
    grown = Continuation(model.to(chosen.name).eval(), start, retriever, k, chosen)
    generator = torch.Generator().manual_seed(sampling.seed)
    for _ in range(tokens):
        known = grown.next_logits()[: data.vocabulary]
        grown.tokens.append(sampling.draw(known, generator))
    text = database.tokenizer.decode(grown.tokens[len(start) :]).decode(errors="replace")
    return Generated(prompt, text, grown.tokens, grown.found)
