"""The frozen encoder: texts, or pairs of title and body, in; float16 vectors out. Imports torch; `source` does not."""

import gc
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError

from retrodb.chunking.pairs import PairTemplate
from retrodb.encoding.bert import Bert, is_common_bert
from retrodb.encoding.cards import choose_device, count_cards
from retrodb.encoding.featuriser import Featuriser, quieten
from retrodb.encoding.feeding import Batch, Featurised, Network, Place, tokenised, vectors_of
from retrodb.encoding.source import EncoderFiles, EncoderIdentity, identify, query_prompt
from retrodb.errors import EncoderError, InputError, MismatchError

_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Encoder:
    """A loaded encoder. ``identity`` says what it is; `embed` is the one way from texts to stored vectors.

    ``query_prompt`` is put before a query, where the card has one of its own for queries.
    """

    identity: EncoderIdentity
    place: Place
    featuriser: Featuriser
    network: Network
    transformer: Path
    query_prompt: str

    @staticmethod
    def load(files: EncoderFiles, precision: str = "fp32", device: str = "cpu") -> "Encoder":
        """Load an encoder's weights.

        Raises:
            InputError: the folder cannot be loaded as an encoder, or the device is missing.
        """
        device = choose_device(device)
        identity = identify(files, precision)
        try:
            network: Network
            if _is_plain_card(identity):
                network = _CardNetwork(files.transformer, identity, device)
            else:
                network = _SentenceTransformersNetwork(files.folder, identity, device)
            featuriser = Featuriser.load(files.transformer, identity.max_length)
            place = Place.of(device, identity.dimension, _DTYPES[precision].itemsize)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise InputError(f"cannot load the encoder {files.name!r} from {files.folder}: {error}") from error
        return Encoder(identity, place, featuriser, network, files.transformer, query_prompt(files, identity))

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float16 [n, d]: the stored vectors of ``texts``.

        Raises:
            EncoderError: a vector is not finite in float16.
        """
        return self.vectors(self.featurise(texts))

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        """float16 [n, d]: vectors of questions to search with: as `embed`, with the card's prompt for queries."""
        return self.vectors(self.featurise(texts, self.query_prompt))

    def embed_own_tokens(self, chunks: Sequence[Sequence[int]]) -> np.ndarray:
        """float16 [n, d] for chunks that the encoder's own tokenizer made: ids without special tokens."""
        return self.vectors(self.featurise_own_tokens(chunks))

    def featurise(self, texts: Sequence[str], prompt: str | None = None) -> Featurised:
        """The token ids of texts after ``prompt``, the identity's where it is None.

        Where a card computes, threads begin to make them at once.
        """
        prompt = self.identity.prompt if prompt is None else prompt
        asked = [prompt + text for text in texts] if prompt else texts
        return tokenised(self.featuriser.tokenize, asked, self.place.slab_rows, self._tokenizers())

    def featurise_own_tokens(self, chunks: Iterable[Sequence[int] | np.ndarray]) -> Featurised:
        """The same for chunks that the encoder's own tokenizer made."""
        rows = [self.featuriser.wrap(ids) for ids in chunks]
        step = self.place.slab_rows or max(1, len(rows))
        return Featurised(len(rows), (rows[start : start + step] for start in range(0, len(rows), step)))

    @cached_property
    def pairs(self) -> PairTemplate:
        """How a title is put before a body. Raises InputError where the encoder does not say."""
        return PairTemplate.load(self.transformer)

    def featurise_pairs(
        self, titles: Sequence[Sequence[int]], bodies: Iterable[Sequence[int] | np.ndarray]
    ) -> Featurised:
        """The same for blocks: n titles and n bodies as ids of the encoder's own tokenizer. Nothing is truncated.

        Raises:
            MismatchError: a block is longer than what the encoder reads.
        """
        wrap = self.pairs.wrap
        rows = [np.array(wrap(title, body), dtype=np.int32) for title, body in zip(titles, bodies, strict=True)]
        longest = max(map(len, rows), default=0)
        if longest > self.identity.max_length:
            raise MismatchError(
                f"a block has {longest} tokens with its title; the encoder {self.identity.name!r} reads "
                f"{self.identity.max_length}. Build with --chunk-tokens {self.identity.max_length}."
            )
        second = np.array([self.pairs.second(title) for title in titles], dtype=np.int64)
        step = self.place.slab_rows or max(1, len(rows))
        slabs = (rows[start : start + step] for start in range(0, len(rows), step))
        return Featurised(len(rows), slabs, second if self.pairs.typed else None)

    def embed_pairs(self, titles: Sequence[Sequence[int]], bodies: Sequence[Sequence[int]]) -> np.ndarray:
        """float16 [n, d] of blocks."""
        return self.vectors(self.featurise_pairs(titles, bodies))

    def embed_null(self) -> np.ndarray:
        """float16 [1, d]: the null document, an empty title with an empty body."""
        return self.embed_pairs([[]], [[]])

    def vectors(self, rows: Featurised) -> np.ndarray:
        """float16 [n, d] for rows of token ids that hold the special tokens.

        Raises:
            MismatchError: the vectors are not as wide as the card says.
            EncoderError: a vector is not finite in float16.
            WorkerError: the card has no memory left.
        """
        vectors = vectors_of(self.network, rows, self.place, self.featuriser.padding_id, self.identity.dimension)
        if not np.isfinite(vectors).all():
            row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
            raise EncoderError(
                f"the encoder {self.identity.name!r} gave row {row} a vector with NaN, or with a component beyond "
                f"{np.finfo(np.float16).max:,.0f}, which float16 cannot hold. Vectors are stored as the encoder gives "
                "them: scale its last layer, or end it with a Normalize module."
            )
        return vectors

    def _tokenizers(self) -> Executor | None:
        """Threads that tokenise while a card computes: this worker's share of the cores."""
        if self.place.slab_rows is None:
            return None
        share = len(os.sched_getaffinity(0)) // max(1, count_cards())
        return _threads(max(1, share) if self.featuriser.concurrent else 1)


@lru_cache(maxsize=1)
def _threads(count: int) -> Executor:
    return ThreadPoolExecutor(count, thread_name_prefix="tokenize")


_loaded: dict[tuple[EncoderFiles, str, str], Encoder] = {}
_loading = threading.Lock()


def load_cached(files: EncoderFiles, precision: str, device: str) -> Encoder:
    """`Encoder.load`, once a process: a worker embeds many shards with one copy of the weights.

    The one before is let go of first, and at once: modules refer to one another in circles, and a refresher that
    follows a trainer for days would otherwise hold a dozen of them until Python comes to look.
    """
    key = (files, precision, device)
    with _loading:
        if key not in _loaded:
            _loaded.clear()
            gc.collect()
            _loaded[key] = Encoder.load(files, precision, device)
        return _loaded[key]


def try_out(files: EncoderFiles, precision: str, device: str) -> None:
    """Embed a text, and let go of the encoder again. Raises as `Encoder.load` and `Encoder.embed`."""
    try:
        Encoder.load(files, precision, device).embed(["text"])
    finally:
        gc.collect()


def _is_plain_card(identity: EncoderIdentity) -> bool:
    """Whether the card is one transformer, mean or CLS pooling, and perhaps normalisation."""
    plain = identity.modules in ((), ("Transformer", "Pooling"), ("Transformer", "Pooling", "Normalize"))
    return plain and identity.pooling in ("mean", "cls")


class _CardNetwork:
    """The common card, run directly: importing sentence-transformers alone costs several seconds a worker."""

    def __init__(self, folder: Path, identity: EncoderIdentity, device: str) -> None:
        dtype = _DTYPES[identity.precision]
        common = is_common_bert(folder)
        self._hidden = Bert(folder, dtype, device) if common else _transformers_model(folder, dtype, device)
        self._pooling = identity.pooling
        self._normalise = identity.normalise

    def __call__(self, batch: Batch) -> torch.Tensor:
        hidden = self._hidden(batch).float()
        if self._pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weights = batch.mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(pooled, dim=1) if self._normalise else pooled


def _transformers_model(folder: Path, dtype: torch.dtype, device: str) -> Callable[[Batch], torch.Tensor]:
    quieten()
    from transformers import AutoModel  # noqa: PLC0415 - seconds

    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "dtype": dtype}
    try:
        model = AutoModel.from_pretrained(folder, add_pooling_layer=False, **options)
    except TypeError:  # architectures without a pooling layer do not know the option
        model = AutoModel.from_pretrained(folder, **options)
    model = model.eval().requires_grad_(False).to(device)
    typed = _has_token_types(model)

    def hidden_states(batch: Batch) -> torch.Tensor:
        types = {"token_type_ids": batch.types} if typed and batch.types is not None else {}
        found: torch.Tensor = model(input_ids=batch.ids, attention_mask=batch.mask, **types).last_hidden_state
        return found

    return hidden_states


def _has_token_types(model: Any) -> bool:
    """Whether a transformers model tells a second text from a first one."""
    return int(getattr(model.config, "type_vocab_size", 0) or 0) > 1


class _SentenceTransformersNetwork:
    """Any other card: sentence-transformers runs its modules."""

    def __init__(self, folder: Path, identity: EncoderIdentity, device: str) -> None:
        quieten()
        from sentence_transformers import SentenceTransformer  # noqa: PLC0415 - seconds

        self._model = SentenceTransformer(str(folder), device=device, local_files_only=True).eval()
        self._model.requires_grad_(False)
        if identity.precision != "fp32":
            self._model.to(_DTYPES[identity.precision])
        inner = getattr(self._model[0], "auto_model", None)
        self._typed = inner is not None and _has_token_types(inner)

    def __call__(self, batch: Batch) -> torch.Tensor:
        features = {"input_ids": batch.ids, "attention_mask": batch.mask}
        if self._typed and batch.types is not None:
            features["token_type_ids"] = batch.types
        output = self._model(features)
        embedding: torch.Tensor = output["sentence_embedding"]
        return embedding.float()
