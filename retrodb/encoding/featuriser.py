"""The text side of an encoder: texts to token ids, as its card says. A BERT's needs neither torch nor transformers."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer


class TextTokenizer(Protocol):
    """Texts to token ids with special tokens, truncated."""

    def __call__(self, texts: list[str]) -> list[list[int]]: ...


@dataclass(frozen=True)
class Featuriser:
    """The text side of an encoder: token ids with the special tokens, never longer than ``max_length``.

    ``concurrent`` says whether threads may tokenise at the same time: transformers' tokenizers set their truncation
    anew in each call, and refuse ("already borrowed").
    """

    tokenizer: TextTokenizer
    max_length: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    padding_id: int
    concurrent: bool = False

    @staticmethod
    def load(folder: Path, max_length: int) -> "Featuriser":
        if (own := _bert_tokenizer(folder)) is not None:
            return _bert_featuriser(own, max_length)
        return _transformers_featuriser(folder, max_length)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, truncated as sentence-transformers truncates."""
        return self.tokenizer(list(texts)) if texts else []

    def wrap(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
        """A chunk of the encoder's own tokens between its special tokens, int32 [n]."""
        room = self.max_length - len(self.prefix) - len(self.suffix)
        return np.concatenate([np.asarray(part, dtype=np.int32) for part in (self.prefix, ids[:room], self.suffix)])


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

    around = _around(probe.ids, probe.special_tokens_mask)
    return Featuriser(tokenize, max_length, *around, tokenizer.token_to_id("[PAD]") or 0, concurrent=True)


def _transformers_featuriser(folder: Path, max_length: int) -> Featuriser:
    quieten()
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


def quieten() -> None:
    """Keep libraries' progress bars and advice off the user's screen; never reach for the network by surprise."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415 - seconds

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
