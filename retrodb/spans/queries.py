"""Masked queries: a sentence's wordpieces with one salient span, or what is compared with it, masked.

A wordpiece is masked if it lies fully inside the span, and no other is (rule S2). A span without such a wordpiece
(``unmaskable``), with one beyond the query's end (``too_late``), or with too many (``too_many``) masks nothing.
What is drawn follows from the seed, the document's content and the sentence's place in it: not from workers, shards or
other documents.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from retrodb.chunking.tokenizer import TokenizedText
from retrodb.spans.find import Span
from retrodb.spans.settings import SpanSettings

UNMASKABLE, TOO_LATE, TOO_MANY = "unmaskable", "too_late", "too_many"
REJECTIONS: Final = (UNMASKABLE, TOO_LATE, TOO_MANY)

_GEOMETRIC: Final = 0.2
"""Of a random span's length in wordpieces (Joshi et al. 2020, SpanBERT, section 3.1)."""
_TOKEN_SHARE: Final = 0.15
"""Of random tokens (Devlin et al. 2019, section 3.1)."""


@dataclass(frozen=True)
class Masked:
    """A query: the wordpieces ``ids`` uint32 [n] of its sentence, cut, and the ``positions`` int64 [p] that are masked.

    ``span`` is the masked one, None where the mask is random; ``start`` and ``end`` are document bytes, None where
    single tokens are masked. ``read_to`` is the document byte where the last of ``ids`` ends.
    """

    ids: np.ndarray
    positions: np.ndarray
    span: Span | None
    start: int | None
    end: int | None
    read_to: int


def inside(tokens: TokenizedText, start: int, end: int) -> np.ndarray:
    """int64 [p]: the wordpieces whose bytes lie fully inside ``start:end``; one of no bytes lies nowhere."""
    own = (tokens.starts >= start) & (tokens.ends <= end) & (tokens.ends > tokens.starts)
    found: np.ndarray = np.flatnonzero(own)
    return found


def rejection(positions: np.ndarray, settings: SpanSettings) -> str | None:
    """Why a span of these wordpieces masks nothing, one of `REJECTIONS`; None where it can be masked."""
    if not len(positions):
        return UNMASKABLE
    if positions[-1] >= settings.max_tokens:
        return TOO_LATE
    return TOO_MANY if len(positions) > settings.max_masked else None


def salient_query(
    tokens: TokenizedText,
    sentence: tuple[int, int],
    spans: Sequence[Span],
    content_hash: bytes,
    settings: SpanSettings,
    rejected: Counter[str],
) -> Masked | None:
    """The query of a sentence: one of the spans that can be masked is drawn; None where there is none.

    Args:
        tokens: of the sentence, byte ranges from its beginning.
        sentence: its byte range in the document.
        spans: that lie in it, by bytes of the document.
        content_hash: of the document.
        settings: seed and bounds.
        rejected: counts the spans that cannot be masked, by rule.
    """
    choices = []
    for span in spans:
        positions = inside(tokens, span.start - sentence[0], span.end - sentence[0])
        if reason := rejection(positions, settings):
            rejected[reason] += 1
        else:
            choices.append((span, positions))
    if not choices:
        return None
    span, positions = choices[_generator(settings, content_hash, sentence[0]).integers(len(choices))]
    ids = tokens.ids[: settings.max_tokens]
    return Masked(ids, positions, span, span.start, span.end, sentence[0] + int(tokens.ends[len(ids) - 1]))


def random_query(
    tokens: TokenizedText, sentence: tuple[int, int], text: bytes, content_hash: bytes, settings: SpanSettings
) -> Masked | None:
    """The query of a sentence under a random mask; None where no word fits.

    Args:
        tokens, sentence, content_hash, settings: as in `salient_query`.
        text: the sentence's bytes.
    """
    random = _generator(settings, content_hash, sentence[0])
    ids = tokens.ids[: settings.max_tokens]
    usable = np.flatnonzero(tokens.ends[: len(ids)] > tokens.starts[: len(ids)])
    if not len(usable):
        return None
    read_to = sentence[0] + int(tokens.ends[usable[-1]])
    if settings.mask == "random-token":
        wanted = int(np.clip(round(_TOKEN_SHARE * len(usable)), 1, settings.max_masked))
        return Masked(ids, np.sort(random.choice(usable, wanted, replace=False)), None, None, None, read_to)
    words = [own for own in _words(tokens, text) if own[-1] < len(ids) and len(own) <= settings.max_masked]
    if not words:
        return None
    length = min(int(random.geometric(_GEOMETRIC)), settings.max_masked)
    first = int(random.integers(len(words)))
    positions = words[first]
    for own in words[first + 1 :]:
        follows = own[0] == positions[-1] + 1
        if len(positions) >= length or not follows or len(positions) + len(own) > settings.max_masked:
            break
        positions = np.concatenate([positions, own])
    start, end = (int(edge) + sentence[0] for edge in (tokens.starts[positions[0]], tokens.ends[positions[-1]]))
    return Masked(ids, positions, None, start, end, read_to)


def _words(tokens: TokenizedText, text: bytes) -> list[np.ndarray]:
    """The wordpieces of each word, in order: those between blanks, and punctuation apart."""
    usable = np.flatnonzero(tokens.ends > tokens.starts)
    if not len(usable):
        return []
    starts, ends = tokens.starts[usable], tokens.ends[usable]
    plain = np.array([_is_word(text[start:end]) for start, end in zip(starts, ends, strict=True)])
    joined = (starts[1:] == ends[:-1]) & plain[1:] & plain[:-1] & (np.diff(usable) == 1)
    return np.split(usable, np.flatnonzero(~joined) + 1)


def _is_word(piece: bytes) -> bool:
    return any(character.isalnum() for character in piece.decode(errors="replace"))


def _generator(settings: SpanSettings, content_hash: bytes, sentence_start: int) -> np.random.Generator:
    """What is drawn for a sentence: equal wherever and whenever its document is looked at."""
    key = f"{settings.seed} {settings.mask} {content_hash.hex()} {sentence_start}".encode()
    return np.random.default_rng(int.from_bytes(hashlib.sha256(key).digest()[:16], "little"))
