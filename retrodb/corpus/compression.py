"""gzip and zstd streams that may be broken: everything before the break comes out, then `TornStream`.

A torn download is the commonest damage of a corpus, and the usual readers lose data at it or hide it: `gzip.GzipFile`
throws away what it had decoded when it meets the break, `zstandard`'s reader takes a truncated frame for a whole one.
So gzip is fed to zlib by hand, with a copy of the decoder's state to go back to, and zstd is fed block by block. What
is yielded before a break depends on the bytes alone, never on how they were read.
"""

import zlib
from collections.abc import Generator, Iterator
from typing import Final, Literal, Protocol, get_args

import zstandard

from retrodb.corpus.source import READ_BYTES

Compression = Literal["gzip", "zstd"]
COMPRESSIONS: Final[tuple[Compression, ...]] = get_args(Compression)
MAGIC_BYTES: Final = 4
"""How much of a file `detect` wants to see."""

_GZIP_MAGIC: Final = b"\x1f\x8b"
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_SKIPPABLE_MAGIC: Final = b"\x2a\x4d\x18"
_GZIP_WINDOW: Final = 31  # zlib's wbits for a gzip wrapper with its checks
_OUT_BYTES: Final = 1 << 20
_ZSTD_MAX_BLOCK: Final = 1 << 17  # RFC 8878, 3.1.1.2.3
_ZSTD_MAX_WINDOW: Final = 1 << 31  # what `zstd --long=31` writes, as large public dumps do
_TRUNCATED: Final = "the {} stream ends in the middle (the file is truncated)"
_GARBAGE: Final = "the {} stream is followed by other data"


class Readable(Protocol):
    """A file read forwards; ``read`` returns nothing only at its end."""

    def read(self, size: int, /) -> bytes: ...


class TornStream(Exception):  # noqa: N818 it is what a stream is, not a failure of retrodb
    """The stream is broken at ``offset`` (in decompressed bytes, all of them delivered) for ``reason``."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(offset, reason)
        self.offset = offset
        self.reason = reason


class _Break(Exception):  # noqa: N818
    """Raised inside this module; `read_blocks` knows the offset."""


def detect(head: bytes) -> Compression | None:
    """The compression of a file that begins with ``head`` (`MAGIC_BYTES` bytes). Names are not asked: they lie."""
    if head.startswith(_GZIP_MAGIC):
        return "gzip"
    if head.startswith(_ZSTD_MAGIC) or _is_skippable(head):
        return "zstd"
    return None


def read_blocks(file: Readable, compression: Compression | None) -> Iterator[bytes]:
    """The decompressed bytes of ``file`` in non-empty blocks of at most about 1 MiB.

    Several gzip members or zstd frames in a row are one stream; zeros after the last are padding.

    Raises:
        TornStream: truncation, a wrong checksum, damage, or other data after the last member; raised after everything
            that could be decoded before it has been yielded.
    """
    if compression is None:
        while block := file.read(READ_BYTES):
            yield block
        return
    delivered = 0
    try:
        for block in _gunzip(file) if compression == "gzip" else _unzstd(file):
            if block:
                delivered += len(block)
                yield block
    except _Break as error:
        raise TornStream(delivered, str(error)) from None


# -- gzip ----------------------------------------------------------------------------------------------------------


def _gunzip(file: Readable) -> Iterator[bytes]:
    pending = file.read(READ_BYTES)
    while pending:
        pending = yield from _gzip_member(file, pending)
        while pending or (pending := file.read(READ_BYTES)):
            pending = pending.lstrip(b"\0")
            if pending:
                break


def _gzip_member(file: Readable, pending: bytes) -> Generator[bytes, None, bytes]:
    """Yield one member's data; return what was read beyond its end."""
    state = zlib.decompressobj(wbits=_GZIP_WINDOW)
    while True:
        before = state.copy()
        try:
            block = state.decompress(pending, _OUT_BYTES)
        except zlib.error as error:
            yield from _salvage(before, pending)
            raise _Break(_gzip_reason(error)) from None
        yield block
        if state.eof:
            return state.unused_data
        pending = state.unconsumed_tail
        # A full block may mean that the decoder holds more back: ask it before reading on.
        if not pending and len(block) < _OUT_BYTES:
            pending = file.read(READ_BYTES)
            if not pending:
                raise _Break(_TRUNCATED.format("gzip"))


def _salvage(state: "zlib._Decompress", data: bytes) -> Iterator[bytes]:
    """What ``state`` can still decode of ``data``, which fails somewhere, to the last byte before the failure."""
    good, bad = 0, len(data)  # data[:good] decodes, data[:bad] does not
    while bad - good > 1:
        middle = (good + bad) // 2
        trial = state.copy()
        try:
            block = trial.decompress(data[good:middle])
        except zlib.error:
            bad = middle
        else:
            state, good = trial, middle
            yield block
    rest = data[good:bad]
    saved = bytearray()  # at most what one input byte may stand for: a few matches of 258 bytes
    try:
        while block := state.decompress(rest, 1):
            saved += block
            rest = state.unconsumed_tail
    except zlib.error:
        pass
    yield bytes(saved)


def _gzip_reason(error: zlib.error) -> str:
    message = str(error).rpartition(": ")[2]
    if message == "incorrect header check":
        return _GARBAGE.format("gzip")
    if message in ("incorrect data check", "incorrect length check"):
        return "the gzip checksum does not match (the file is damaged)"
    return f"the gzip stream is damaged ({message})"


# -- zstd ----------------------------------------------------------------------------------------------------------


class _Bytes:
    """Takes exact numbers of bytes from a file."""

    def __init__(self, file: Readable) -> None:
        self._file = file
        self._data = b""
        self._at = 0

    def take(self, size: int) -> bytes:
        """``size`` bytes, fewer only at the end of the file."""
        while len(self._data) - self._at < size and (block := self._file.read(READ_BYTES)):
            self._data = self._data[self._at :] + block
            self._at = 0
        taken = self._data[self._at : self._at + size]
        self._at += len(taken)
        return taken

    def take_all(self, size: int) -> bytes:
        """``size`` bytes. Raises _Break where the file ends before."""
        taken = self.take(size)
        if len(taken) < size:
            raise _Break(_TRUNCATED.format("zstd"))
        return taken


def _is_skippable(magic: bytes) -> bool:
    return len(magic) >= 4 and magic[0] & 0xF0 == 0x50 and magic[1:4] == _SKIPPABLE_MAGIC


def _unzstd(file: Readable) -> Iterator[bytes]:
    source = _Bytes(file)
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW)
    while magic := source.take(MAGIC_BYTES):
        if magic == _ZSTD_MAGIC:
            try:
                yield from _zstd_frame(source, decompressor.decompressobj())
            except zstandard.ZstdError as error:
                raise _Break(f"the zstd stream is damaged ({str(error).rpartition(': ')[2]})") from None
        elif _is_skippable(magic):
            left = int.from_bytes(source.take_all(4), "little")
            while left:
                left -= len(source.take_all(min(left, READ_BYTES)))
        elif magic.strip(b"\0"):
            truncated = len(magic) < MAGIC_BYTES and _ZSTD_MAGIC.startswith(magic)
            raise _Break((_TRUNCATED if truncated else _GARBAGE).format("zstd"))


def _zstd_frame(source: _Bytes, state: "zstandard.ZstdDecompressionObj") -> Iterator[bytes]:
    """One frame after its magic number (RFC 8878, 3.1.1), fed block by block, so that an error costs one block."""
    descriptor = source.take_all(1)
    flags = descriptor[0]
    single_segment = flags >> 5 & 1
    content_size = (single_segment, 2, 4, 8)[flags >> 6]
    header = source.take_all((1 - single_segment) + (0, 1, 2, 4)[flags & 3] + content_size)
    yield state.decompress(_ZSTD_MAGIC + descriptor + header)
    last = False
    while not last:
        block_header = source.take_all(3)
        fields = int.from_bytes(block_header, "little")
        last, kind, size = bool(fields & 1), fields >> 1 & 3, fields >> 3
        if kind == 3 or (kind != 1 and size > _ZSTD_MAX_BLOCK):
            raise _Break("the zstd stream is damaged (impossible block header)")
        size = 1 if kind == 1 else size  # a run is one byte, repeated
        block = source.take(size)
        yield state.decompress(block_header + block)  # of a truncated raw block, what there is
        if len(block) < size:
            raise _Break(_TRUNCATED.format("zstd"))
    if flags >> 2 & 1:
        yield state.decompress(source.take_all(4))
