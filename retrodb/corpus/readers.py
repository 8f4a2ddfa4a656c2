"""Segments of files become outcomes: the formats meet here.

A file that can only be streamed is read once for all the segments a split holds of it, in order.
"""

import contextlib
from collections.abc import Generator, Iterable, Iterator
from typing import Protocol, TypeVar

from retrodb.corpus.compression import TornStream, read_blocks
from retrodb.corpus.lines import MAX_RECORD_BYTES, Line, read_lines
from retrodb.corpus.parquet import BrokenParquet, RowBatch, open_parquet, read_batches, rows_of
from retrodb.corpus.records import (
    RECORD_BYTES,
    FieldNames,
    Outcome,
    Quarantined,
    parse_line,
    parse_row,
    parse_text,
)
from retrodb.corpus.source import open_raw, unreadable
from retrodb.corpus.splits import Segment


class _Item(Protocol):
    """Records at ``position`` and after; `Line` and `RowBatch` are such."""

    @property
    def position(self) -> int: ...


ItemT = TypeVar("ItemT", Line, RowBatch)


class _Stream:
    """Items of one file, in order of position, handed out range by range."""

    def __init__(self, url: str, items: Generator[Line, None, None] | Generator[RowBatch, None, None]) -> None:
        self.url = url
        self.position = 0
        self._items = items
        self._pending: Line | RowBatch | None = None

    def between(self, start: int, end: int | None) -> Iterator[Line | RowBatch]:
        """The items in ``[start, end)``; those before are passed over, those after kept for the next call."""
        self.position = start
        while (item := self._pending or next(self._items, None)) is not None:
            self._pending = None
            wanted: Line | RowBatch | None = item
            if item.position < start:
                _, wanted = item.cut(start)
            if wanted is not None and end is not None:
                wanted, self._pending = wanted.cut(end)
            if wanted is not None:
                yield wanted
            if self._pending is not None:
                break
        self.position = end if end is not None else start

    def close(self) -> None:
        self._items.close()


class SegmentReader:
    """Reads segments; keeps the file of the last one open, in case that the next goes on in it."""

    def __init__(self, fields: FieldNames) -> None:
        self._fields = fields
        self._stream: _Stream | None = None

    def read(self, segment: Segment) -> Iterator[Outcome]:
        """The outcomes of a segment's records, in order.

        Raises:
            InputError: the file cannot be read, or has changed since it was scanned.
        """
        if segment.format == "text":
            yield _read_text(segment)
        elif segment.damage is not None:
            yield _read_damaged(segment)
        else:
            for item in self._stream_at(segment).between(segment.start, segment.end):
                if isinstance(item, Line):
                    yield from _of_line(item, segment.url, self._fields)
                else:
                    yield from _of_rows(item, segment.url, self._fields)

    def close(self) -> None:
        """Close the file that is still open."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _stream_at(self, segment: Segment) -> _Stream:
        if self._stream is None or self._stream.url != segment.url or self._stream.position > segment.start:
            self.close()
            self._stream = _Stream(segment.url, _lines(segment) if segment.format == "jsonl" else _batches(segment))
        return self._stream
