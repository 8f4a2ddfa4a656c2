"""JSONL input: the lines of a byte stream with their offsets, across blocks, cuts and breaks."""

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from retrodb.corpus.compression import TornStream
from retrodb.corpus.records import RECORD_BYTES

MAX_RECORD_BYTES: Final = 512 << 20
"""Longest record that is read, so that a file without newlines cannot fill the memory."""


class Line(NamedTuple):
    """A line without its newline.

    Attributes:
        position: offset of its first byte in the decompressed file.
        data: its bytes; of one that is too long, its first `RECORD_BYTES`.
        problem: why the line is not whole: too long, or (``torn``) the stream breaks inside or right after it.
        torn: whether the stream ends in a break. Such a line is the last one, and may be empty.
    """

    position: int
    data: bytes
    problem: str | None = None
    torn: bool = False

    def cut(self, at: int) -> tuple["Line | None", "Line | None"]:
        """A line is never cut: it belongs where its first byte lies, before ``at`` or not."""
        return (self, None) if self.position < at else (None, self)


def read_lines(
    blocks: Iterable[bytes],
    position: int,
    start: int = 0,
    stop: int | None = None,
    limit: int = MAX_RECORD_BYTES,
) -> Iterator[Line]:
    """The lines of ``blocks`` whose first byte lies in ``[start, stop)``.

    Lines end at ``\\n`` alone; the last one may do without. A break (`TornStream`) is reported by a last, possibly
    empty line with ``torn`` set. Blocks are read no further than needed.

    Args:
        blocks: consecutive bytes of the decompressed file, in non-empty pieces.
        position: offset of the first of them. To read from the middle of a file, give the blocks from the byte before
            ``start`` on: whether that is a newline tells whether a line begins at ``start``.
        start: first offset wanted.
        stop: first offset not wanted, None for the whole rest.
        limit: longest record in bytes; of a longer one only the beginning is kept in memory.
    """
    line = _Partial(position, limit)
    torn: TornStream | None = None
    try:
        for block in blocks:
            pieces = block.split(b"\n")
            for piece in pieces[:-1]:
                line.add(piece)
                if line.position >= start:
                    yield line.take()
                line = _Partial(line.position + line.length + 1, limit)
                if stop is not None and line.position >= stop:
                    return
            line.add(pieces[-1])
            if stop is not None and line.position < start and line.position + line.length + 1 >= stop:
                return  # the range lies inside one line that began before it
    except TornStream as error:
        torn = error
    if line.length and line.position >= start and (torn is None or line.is_too_long):
        yield line.take()
        line = _Partial(line.position + line.length, limit)
    if torn is not None:
        yield Line(line.position, line.take().data, torn.reason, torn=True)


class _Partial:
    """The beginning of a line whose end may be in a later block."""

    __slots__ = ("_head", "_limit", "_parts", "length", "position")

    def __init__(self, position: int, limit: int) -> None:
        self.position = position
        self.length = 0
        self._limit = limit
        self._parts: list[bytes] = []
        self._head = b""

    @property
    def is_too_long(self) -> bool:
        return self.length > self._limit

    def add(self, piece: bytes) -> None:
        was_too_long = self.is_too_long
        self.length += len(piece)
        if not self.is_too_long:
            self._parts.append(piece)
        elif not was_too_long:
            self._head = (b"".join(self._parts) + piece)[:RECORD_BYTES]
            self._parts.clear()

    def take(self) -> Line:
        if not self.is_too_long:
            data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            return Line(self.position, data)
        problem = f"the record has {self.length} bytes, more than the {self._limit} that are read"
        return Line(self.position, self._head, problem)
