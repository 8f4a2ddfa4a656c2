"""The encoder's own tokenizer and its mask token: queries are in its wordpieces, whatever made the chunks."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer

from retrodb.chunking import ChunkTokenizer, load_tokenizer, token_type_for
from retrodb.encoding import resolve_encoder
from retrodb.errors import InputError

_USUAL: Final = ("[MASK]", "<mask>")


@dataclass(frozen=True)
class Wordpieces:
    """A tokenizer with a mask token. ``fingerprint`` is of its file."""

    tokenizer: ChunkTokenizer
    mask_id: int

    @property
    def fingerprint(self) -> str:
        return self.tokenizer.fingerprint

    @property
    def token_type(self) -> str:
        """``uint16`` or ``uint32``."""
        return token_type_for(self.tokenizer.vocabulary_size)


@lru_cache(maxsize=2)
def load_wordpieces(encoder: str) -> Wordpieces:
    """The tokenizer of an encoder, without its weights.

    Args:
        encoder: as `resolve_encoder` takes it.

    Raises:
        InputError: there is none, or it has no mask token.
    """
    folder = resolve_encoder(encoder).transformer
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"the encoder {encoder!r} has no tokenizer.json, of which masked queries are made.")
    tokenizer = load_tokenizer(str(path))
    vocabulary = Tokenizer.from_file(str(path))
    for name in (*_named(folder / "special_tokens_map.json"), *_named(folder / "tokenizer_config.json"), *_USUAL):
        if (mask := vocabulary.token_to_id(name)) is not None:
            return Wordpieces(tokenizer, mask)
    raise InputError(f"the tokenizer of the encoder {encoder!r} has no mask token (looked for {', '.join(_USUAL)}).")


def _named(path: Path) -> list[str]:
    """The mask token that a settings file names."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("mask_token")
    except (OSError, ValueError, AttributeError):
        return []
    content = value.get("content") if isinstance(value, dict) else value
    return [content] if isinstance(content, str) else []
