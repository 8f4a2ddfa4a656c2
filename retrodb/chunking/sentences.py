"""Sentences with byte offsets: what blocks are packed from, and what salient spans lie in.

`sentencex` (Wikimedia) splits paragraphs: rules and abbreviation lists in native code, no model, no download, some 300
languages. Paragraphs are found here, for it knows blank lines alone: see `_paragraphs`. What `sentencex` is given is
bounded, because unpaired quotes cost it the square of a paragraph's length.
"""

import re
from collections.abc import Iterator
from importlib.metadata import version
from typing import Final

import numpy as np
import sentencex

from retrodb.chunking.tokenizer import byte_offsets

_LANGUAGE: Final = "en"
"""Whose abbreviations end no sentence. Full stops of other scripts are known with any."""
_LINE: Final = re.compile(r"\S[^\n]*")
_OTHER_SPACE: Final = re.compile(r"[^\S ]")
"""A line break inside a paragraph is a space; and some other blanks (U+0085) make `sentencex` fail."""
_FILLED: Final = range(50, 101)
"""Characters of a line that was wrapped to fit a page or a terminal. Shorter ones are headings, items, verse; longer
ones are whole paragraphs."""
_MOST_CHARACTERS: Final = 1 << 14
"""A longer sentence, such as a table without a full stop, is cut."""


def splitter_identity() -> str:
    """What split the sentences, for a fingerprint: another version may split otherwise."""
    return f"sentencex {version('sentencex')} {_LANGUAGE}"


def sentences(text: str) -> np.ndarray:
    """int64 [n, 2]: the UTF-8 byte range of each sentence.

    Ranges ascend and do not overlap; each begins and ends with a character that is not blank, and every such character
    lies in exactly one of them. A sentence never crosses a paragraph: a blank line ends one, and so does a line break
    unless the line was filled (50 to 100 characters), or the next one goes on in lower case.
    """
    spans = np.array(
        [span for start, end in _paragraphs(text) for span in _split(text, start, end)], dtype=np.int64
    ).reshape(-1, 2)
    return spans if text.isascii() else byte_offsets(text)[spans]


def _paragraphs(text: str) -> Iterator[tuple[int, int]]:
    """Character ranges of paragraphs; they begin with a character that is not blank."""
    start = line_start = end = -1
    for line in _LINE.finditer(text):
        first, last = line.span()
        goes_on = end - line_start in _FILLED or text[first].islower()
        if start < 0:
            start = first
        elif not (goes_on and text.count("\n", end, first) == 1):
            yield start, end
            start = first
        line_start, end = first, last
    if start >= 0:
        yield start, end


def _split(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Character ranges of a paragraph's sentences, without the blanks around them."""
    while start < end:
        piece = text[start : min(end, start + _MOST_CHARACTERS)]
        found = _segments(piece)
        cut = start + len(piece) < end
        if cut and len(found) > 1:
            found.pop()  # it may go on: it begins the next piece
        for segment in found:
            bare = segment.strip()
            if bare:
                at = start + len(segment) - len(segment.lstrip())
                yield at, at + len(bare)
            start += len(segment)


def _segments(piece: str) -> list[str]:
    """The sentences of a piece of a paragraph; joined, they are as long as it."""
    flat = _OTHER_SPACE.sub(" ", piece)
    try:
        found: list[str] = sentencex.segment(_LANGUAGE, flat)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a fault in its native code, which is no Exception
            raise
        return [piece]
    return found if sum(map(len, found)) == len(piece) else [piece]
