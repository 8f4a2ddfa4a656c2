"""The spans of one document: each in one sentence, none overlapping another; what is left out is counted by rule."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from retrodb.chunking.sentences import sentences
from retrodb.chunking.tokenizer import byte_offsets
from retrodb.spans.taggers import Tagger, source_of

CROSSING, OVERLAPPING = "crossing", "overlapping"
RULES = (CROSSING, OVERLAPPING)
"""Why a span is left out: it crosses the end of a sentence; a longer one, or one of an earlier tagger, covers part."""


class Span(NamedTuple):
    """A span by UTF-8 byte offsets into its document's text. ``sentence`` is the number of its sentence."""

    start: int
    end: int
    label: str | None
    tagger: str
    sentence: int


class Imported(NamedTuple):
    """A span from elsewhere, by byte offsets into the document."""

    start: int
    end: int
    label: str | None
    tagger: str


@dataclass
class Found:
    """What was found in a document: ``sentences`` int64 [s, 2] byte ranges, ``spans`` in order of place."""

    sentences: np.ndarray
    spans: list[Span] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def find_spans(text: str, taggers: Sequence[Tagger], imported: Iterable[Imported] = ()) -> Found:
    """The spans of a document.

    Sentences are tagged one by one, so that what is found in one depends on its document alone.

    Args:
        text: the document's.
        taggers: in order: of two spans of one length that overlap the earlier tagger's stays.
        imported: from elsewhere, whose offsets are known to decode; after all taggers.
    """
    found = Found(sentences(text))
    data = text.encode()
    texts = [data[start:end].decode() for start, end in found.sentences.tolist()]
    candidates: list[tuple[int, Span]] = []
    for rank, tagger in enumerate(taggers):
        source = source_of(tagger.identity)
        for number, (sentence, tagged) in enumerate(zip(texts, tagger.tag(texts), strict=True)):
            if not tagged:
                continue
            at = byte_offsets(sentence) + found.sentences[number, 0]
            for start, end, label in tagged:
                candidates.append((rank, Span(int(at[start]), int(at[end]), label, source, number)))
    for start, end, label, source in imported:
        number = _sentence(found.sentences, start, end)
        if number < 0:
            found.dropped[CROSSING] += 1
        else:
            candidates.append((len(taggers), Span(start, end, label, source, number)))
    found.spans = _apart(candidates, found.dropped)
    return found


def _sentence(ranges: np.ndarray, start: int, end: int) -> int:
    """The sentence that a byte range lies in; -1 where it lies in none."""
    number = int(np.searchsorted(ranges[:, 0], start, side="right")) - 1
    return number if number >= 0 and end <= ranges[number, 1] else -1


def _apart(candidates: Sequence[tuple[int, Span]], dropped: Counter[str]) -> list[Span]:
    """The longest spans of those that overlap, of equal ones that of the first tagger; in order of place."""
    kept: dict[int, list[Span]] = {}
    for _, span in sorted(candidates, key=lambda one: (one[1].start - one[1].end, one[0], one[1].start)):
        others = kept.setdefault(span.sentence, [])
        if any(span.start < other.end and other.start < span.end for other in others):
            dropped[OVERLAPPING] += 1
        else:
            others.append(span)
    return sorted(span for others in kept.values() for span in others)
