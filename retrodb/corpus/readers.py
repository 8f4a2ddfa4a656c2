"""Segments of files become outcomes: the formats meet here.

A file that can only be streamed is read once for all the segments a split holds of it, in order.
"""

from collections.abc import Generator, Iterator
from typing import Final

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
from retrodb.corpus.source import open_raw, refuse_written
from retrodb.corpus.splits import Segment
from retrodb.errors import InputError

_NO_POSITION: Final = 1 << 63  # behind every record


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
        self.position = _NO_POSITION if end is None else end

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
        refuse_written(segment.url, segment.stamp)

    def close(self) -> None:
        """Close the file that is still open."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _stream_at(self, segment: Segment) -> _Stream:
        seekable_lines = segment.format == "jsonl" and segment.compression is None
        stream = self._stream
        if stream is None or seekable_lines or stream.url != segment.url or stream.position > segment.start:
            self.close()
            items = _lines(segment) if segment.format == "jsonl" else _batches(segment)
            stream = self._stream = _Stream(segment.url, items)
        return stream


# -- formats -------------------------------------------------------------------------------------------------------


def _lines(segment: Segment) -> Generator[Line, None, None]:
    """The lines from the segment's start on: of a plain file those of the segment, of a stream all that follow."""
    with open_raw(segment.url, expected_size=segment.size) as raw:
        blocks = read_blocks(raw, segment.compression)
        if segment.compression is not None:
            yield from read_lines(blocks, 0, segment.start)
        else:
            before = max(0, segment.start - 1)
            raw.seek(before)
            yield from read_lines(blocks, before, segment.start, segment.end)


def _batches(segment: Segment) -> Generator[RowBatch, None, None]:
    try:
        with open_parquet(segment.url, segment.compression, segment.size) as file:
            yield from read_batches(segment.url, file, segment.start)
    except BrokenParquet as error:
        raise InputError(
            f"{segment.url} was readable Parquet when it was scanned and is not now ({error}): it has changed. "
            "Run the build again once it is complete."
        ) from error


def _of_line(line: Line, source: str, fields: FieldNames) -> Iterator[Outcome]:
    if line.problem is not None and not line.torn:
        yield Quarantined(line.position, line.problem, line.data)
        return
    outcome = parse_line(line.data, line.position, source, fields)
    if line.problem is None:
        if outcome is not None:
            yield outcome
    elif isinstance(outcome, Quarantined):  # the record that the break cut
        yield Quarantined(line.position, line.problem, outcome.record)
    else:  # a whole record, or nothing, lies before the break
        if outcome is not None:
            yield outcome
        yield Quarantined(line.position + len(line.data), line.problem, b"")


def _of_rows(rows: RowBatch, source: str, fields: FieldNames) -> Iterator[Outcome]:
    if rows.batch is None:
        yield Quarantined(rows.position, rows.problem or "", b"")
        return
    for position, row in enumerate(rows_of(rows.batch), rows.position):
        yield parse_row(row, position, source, fields)


def _read_text(segment: Segment) -> Outcome:
    """The one document of a plain-text file."""
    parts: list[bytes] = []
    length = 0
    with open_raw(segment.url, expected_size=segment.size) as raw:
        try:
            for block in read_blocks(raw, segment.compression):
                length += len(block)
                parts.append(block)
                if length > MAX_RECORD_BYTES:
                    reason = f"the file has more than the {MAX_RECORD_BYTES} bytes that one document may have"
                    return Quarantined(0, reason, b"".join(parts[:2])[:RECORD_BYTES])
        except TornStream as torn:
            return Quarantined(0, torn.reason, b"".join(parts)[:RECORD_BYTES])
    return parse_text(b"".join(parts), segment.url)


def _read_damaged(segment: Segment) -> Outcome:
    """The one record that stands for a file which is no Parquet."""
    with open_raw(segment.url, expected_size=segment.size) as raw:
        return Quarantined(0, segment.damage or "", raw.peek(RECORD_BYTES))
