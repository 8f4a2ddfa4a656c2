"""The frozen encoder: texts in, float16 vectors out. Imports torch; `source` does not."""

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer

from retrodb.encoding.batches import length_batches
from retrodb.encoding.bert import Bert, is_common_bert
from retrodb.encoding.source import EncoderFiles, EncoderIdentity, identify
from retrodb.errors import InputError, MismatchError, WorkerError

CPU_BATCH_TOKENS: Final = 2048
"""About 32 chunks: small enough for a core's cache, large enough for its matrix units."""
CUDA_BATCH_TOKENS: Final = 65536

_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Network(Protocol):
    """A loaded network: token ids to one vector a row."""

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[b, l] int64 and [b, l] int64 -> [b, d] float32."""


def choose_device(device: str) -> str:
    """``cuda`` or ``cpu`` for ``auto``.

    Raises:
        InputError: cuda was asked for and there is none (never silently the CPU).
    """
    available = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if available else "cpu"
    if device.startswith("cuda") and not available:
        raise InputError(
            f"--device {device} was asked for, but torch {torch.__version__} sees no CUDA device here. "
            "Use --device cpu, or repair the driver."
        )
    return device


def cuda_precision() -> str:
    """bf16 where the card multiplies it natively, else fp16."""
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


@dataclass(frozen=True)
class Encoder:
    """A loaded encoder. ``identity`` says what it is; `embed` is the one way from texts to stored vectors."""

    identity: EncoderIdentity
    device: str
    featuriser: "Featuriser"
    network: Network

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
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise InputError(f"cannot load the encoder {files.name!r} from {files.folder}: {error}") from error
        return Encoder(identity, device, featuriser, network)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float16 [n, d]: the stored vectors of ``texts``.

        Raises:
            WorkerError: a vector is not finite in float16.
        """
        prompt = self.identity.prompt
        return self.embed_ids(self.featuriser.tokenize([prompt + text for text in texts] if prompt else texts))

    def embed_own_tokens(self, chunks: Sequence[Sequence[int]]) -> np.ndarray:
        """float16 [n, d] for chunks that the encoder's own tokenizer made: ids without special tokens."""
        return self.embed_ids([self.featuriser.wrap(ids) for ids in chunks])

    def embed_ids(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """float16 [n, d] for rows of token ids that hold the special tokens."""
        vectors = np.zeros((len(rows), self.identity.dimension), dtype=np.float16)
        budget = CUDA_BATCH_TOKENS if self.device.startswith("cuda") else CPU_BATCH_TOKENS
        with torch.inference_mode():
            for batch in length_batches([len(row) for row in rows], budget):
                ids, mask = pad([rows[i] for i in batch], self.featuriser.padding_id)
                output = self.network(ids.to(self.device), mask.to(self.device))
                if output.shape[1] != vectors.shape[1]:
                    raise MismatchError(
                        f"the encoder {self.identity.name!r} gives vectors of width {output.shape[1]}, "
                        f"its card says {vectors.shape[1]}."
                    )
                vectors[batch] = output.to(torch.float16).cpu().numpy()
        if not np.isfinite(vectors).all():
            row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
            raise WorkerError(f"the encoder {self.identity.name!r} gave a vector that is not finite for row {row}.")
        return vectors


def pad(rows: Sequence[Sequence[int]], padding_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [b, l] int64 and attention mask [b, l] int64 of a batch of rows."""
    lengths = np.array([len(row) for row in rows])
    longest = int(lengths.max())
    mask = np.arange(longest)[None, :] < lengths[:, None]
    ids = np.full(mask.shape, padding_id, dtype=np.int64)
    ids[mask] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


@lru_cache(maxsize=1)
def load_cached(files: EncoderFiles, precision: str, device: str) -> Encoder:
    """`Encoder.load`, once a process: a worker embeds many shards with one copy of the weights."""
    return Encoder.load(files, precision, device)


def _is_plain_card(identity: EncoderIdentity) -> bool:
    """Whether the card is one transformer, mean or CLS pooling, and perhaps normalisation."""
    plain = identity.modules in ((), ("Transformer", "Pooling"), ("Transformer", "Pooling", "Normalize"))
    return plain and identity.pooling in ("mean", "cls")


class TextTokenizer(Protocol):
    """Texts to token ids with special tokens, truncated."""

    def __call__(self, texts: list[str]) -> list[list[int]]: ...


@dataclass(frozen=True)
class Featuriser:
    """The text side of an encoder: token ids with the special tokens, never longer than ``max_length``."""

    tokenizer: TextTokenizer
    max_length: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    padding_id: int

    @staticmethod
    def load(folder: Path, max_length: int) -> "Featuriser":
        if (own := _bert_tokenizer(folder)) is not None:
            return _bert_featuriser(own, max_length)
        return _transformers_featuriser(folder, max_length)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, truncated as sentence-transformers truncates."""
        return self.tokenizer(list(texts)) if texts else []

    def wrap(self, ids: Sequence[int]) -> list[int]:
        """A chunk of the encoder's own tokens between its special tokens."""
        room = self.max_length - len(self.prefix) - len(self.suffix)
        return [*self.prefix, *(int(token) for token in ids[:room]), *self.suffix]


def _around(ids: Sequence[int], special_mask: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens before and after a text's own."""
    special = np.asarray(special_mask, dtype=bool)
    first, last = int(np.argmin(special)), len(special) - int(np.argmin(special[::-1]))
    return tuple(ids[:first]), tuple(ids[last:])


def _bert_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in tokenizer.json, where it is a BERT's whose settings say the same: transformers would take the
    settings' side, and costs two seconds to import."""
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        normaliser = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["normalizer"]
        expected = {
            "type": "BertNormalizer",
            "clean_text": True,
            "lowercase": settings.get("do_lower_case", True),
            "strip_accents": settings.get("strip_accents"),
            "handle_chinese_chars": settings.get("tokenize_chinese_chars", True),
        }
        if settings.get("tokenizer_class") not in ("BertTokenizer", "BertTokenizerFast") or normaliser != expected:
            return None
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # tokenizers raises bare Exceptions; whatever is wrong, transformers says it better
        return None


def _bert_featuriser(tokenizer: Tokenizer, max_length: int) -> Featuriser:
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    probe = tokenizer.encode("a")

    def tokenize(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]

    return Featuriser(
        tokenize, max_length, *_around(probe.ids, probe.special_tokens_mask), tokenizer.token_to_id("[PAD]") or 0
    )


def _transformers_featuriser(folder: Path, max_length: int) -> Featuriser:
    _quieten()
    from transformers import AutoTokenizer  # noqa: PLC0415 - seconds

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    probe = tokenizer("a", return_special_tokens_mask=True)

    def tokenize(texts: list[str]) -> list[list[int]]:
        encoded = tokenizer(
            texts,
            truncation=True,
            max_length=max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        return list(encoded["input_ids"])

    around = _around(probe["input_ids"], probe["special_tokens_mask"])
    return Featuriser(tokenize, max_length, *around, tokenizer.pad_token_id or 0)


class _CardNetwork:
    """The common card, run directly: importing sentence-transformers alone costs several seconds a worker."""

    def __init__(self, folder: Path, identity: EncoderIdentity, device: str) -> None:
        dtype = _DTYPES[identity.precision]
        common = is_common_bert(folder)
        self._hidden = Bert(folder, dtype, device) if common else _transformers_model(folder, dtype, device)
        self._pooling = identity.pooling
        self._normalise = identity.normalise

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self._hidden(input_ids, attention_mask).float()
        if self._pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(pooled, dim=1) if self._normalise else pooled


def _transformers_model(folder: Path, dtype: torch.dtype, device: str) -> Callable[..., torch.Tensor]:
    _quieten()
    from transformers import AutoModel  # noqa: PLC0415 - seconds

    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "dtype": dtype}
    try:
        model = AutoModel.from_pretrained(folder, add_pooling_layer=False, **options)
    except TypeError:  # architectures without a pooling layer do not know the option
        model = AutoModel.from_pretrained(folder, **options)
    model = model.eval().requires_grad_(False).to(device)

    def hidden_states(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return found

    return hidden_states


class _SentenceTransformersNetwork:
    """Any other card: sentence-transformers runs its modules."""

    def __init__(self, folder: Path, identity: EncoderIdentity, device: str) -> None:
        _quieten()
        from sentence_transformers import SentenceTransformer  # noqa: PLC0415 - seconds

        self._model = SentenceTransformer(str(folder), device=device, local_files_only=True).eval()
        self._model.requires_grad_(False)
        if identity.precision != "fp32":
            self._model.to(_DTYPES[identity.precision])

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        output = self._model({"input_ids": input_ids, "attention_mask": attention_mask})
        embedding: torch.Tensor = output["sentence_embedding"]
        return embedding.float()


def _quieten() -> None:
    """Keep libraries' progress bars and advice off the user's screen; never reach for the network by surprise."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415 - seconds

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
