"""Which texts are embedded together: a function of the shard alone, so that vectors do not depend on workers."""

from collections.abc import Iterator, Sequence

import numpy as np


def length_batches(lengths: Sequence[int] | np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Row numbers in batches of similar length, longest first.

    Args:
        lengths: tokens of each row, [n].
        batch_tokens: a batch holds at most this many tokens after padding (but at least one row).

    Yields:
        int64 arrays that together hold every row once.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, int(lengths[order[start]])))
        yield order[start : start + size]
        start += size


def chunk_texts(text: bytes, starts: np.ndarray, ends: np.ndarray) -> list[str]:
    """The text of each chunk of a document: its byte range, widened to whole characters.

    Args:
        text: the document's UTF-8 bytes.
        starts: int64 [n], first byte of each chunk.
        ends: int64 [n], one past the last byte of each chunk.
    """
    return [_widened(text, int(start), int(end)) for start, end in zip(starts, ends, strict=True)]


def _widened(text: bytes, start: int, end: int) -> str:
    while start > 0 and _is_continuation(text, start):
        start -= 1
    while end < len(text) and _is_continuation(text, end):
        end += 1
    return text[start:end].decode()


def _is_continuation(text: bytes, at: int) -> bool:
    return at < len(text) and (text[at] & 0xC0) == 0x80
