"""Compressed streams: all that can be decoded comes out, however the stream ends and however it is read."""

import gzip
import io
import random
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from retrodb.corpus import compression
from retrodb.corpus.compression import Compression, TornStream, detect, read_blocks

_RANDOM = random.Random(0)
TEXT = b"".join(b"line %d: %s\n" % (number, _RANDOM.randbytes(8).hex().encode()) for number in range(3000))
"""Compressible, but not to nothing."""


def zstd(data: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(level=3, **options).compress(data)


def decode(data: bytes) -> tuple[bytes, str | None]:
    """What comes out, and the reason if the stream is torn."""
    return drain(io.BytesIO(data), detect(data[:4]))


def drain(file: io.BytesIO, name: Compression | None) -> tuple[bytes, str | None]:
    got, offset, reason = b"", None, None
    try:
        for block in read_blocks(file, name):
            assert block, "an empty block means the end to most readers"
            got += block
    except TornStream as torn:
        offset, reason = torn.offset, torn.reason
    assert offset in (None, len(got))
    return got, reason


class Dribble(io.BytesIO):
    """Gives a few bytes at a time, as a network may."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(7 if size is None or size < 0 else min(size, 7))


def test_compression_is_told_by_the_first_bytes() -> None:
    assert detect(gzip.compress(b"")) == "gzip"
    assert detect(zstd(b"x")) == "zstd"
    assert detect(b"\x50\x2a\x4d\x18" + bytes(4)) == "zstd"  # a skippable frame, as pzstd writes first
    for plain in (b"", b"{", b"PAR1", b"\x1f", "\ufeff{".encode()):
        assert detect(plain) is None


@pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gzip", "zstd"])
@given(parts=st.lists(st.binary(max_size=400), max_size=5), padding=st.integers(0, 40))
@settings(deadline=None)
def test_members_in_a_row_are_one_stream_and_zeros_after_them_padding(
    pack: Callable[[bytes], bytes], parts: list[bytes], padding: int
) -> None:
    packed = b"".join(map(pack, parts)) + bytes(padding if parts else 0)
    assert decode(packed) == (b"".join(parts), None)


@pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gzip", "zstd"])
@pytest.mark.parametrize("rest", [b"garbage", b"\0\0garbage", b"{}\n"])
def test_other_data_after_the_stream_tears_it_and_costs_nothing(pack: Callable[[bytes], bytes], rest: bytes) -> None:
    got, reason = decode(pack(TEXT) + rest)
    assert got == TEXT
    assert reason is not None
    assert "other data" in reason


def test_a_truncated_gzip_gives_all_that_zlib_can_decode_at_every_length() -> None:
    packed = gzip.compress(TEXT[:4000]) + gzip.compress(TEXT[4000:6000])
    for length in range(4, len(packed)):
        first = zlib.decompressobj(31)
        expected = first.decompress(packed[:length])
        if first.eof:
            expected += zlib.decompressobj(31).decompress(first.unused_data)
        got, reason = decode(packed[:length])
        assert got == expected
        whole = length == len(gzip.compress(TEXT[:4000]))
        assert (reason is None) == whole


@given(position=st.integers(100, 30_000), mask=st.integers(1, 255))
@settings(max_examples=60, deadline=None)
def test_a_damaged_gzip_gives_the_same_whatever_the_size_of_the_reads(position: int, mask: int) -> None:
    packed = bytearray(gzip.compress(TEXT))
    packed[position % len(packed) or 1] ^= mask
    if detect(bytes(packed[:4])) is None:
        return
    assert drain(Dribble(packed), "gzip") == decode(bytes(packed))


@pytest.mark.parametrize("keep", [1, 100, 70_000, len(TEXT)])
def test_damage_in_a_gzip_keeps_the_bytes_before_it_to_the_last(keep: int) -> None:
    stream = zlib.compressobj(wbits=31)
    packed = stream.compress(TEXT[:keep]) + stream.flush(zlib.Z_FULL_FLUSH)
    got, reason = decode(packed + b"\x07" + b"more" * 1000)  # a block of the reserved type 3
    assert got == TEXT[:keep]
    assert reason == "the gzip stream is damaged (invalid block type)"


def test_a_wrong_checksum_keeps_everything_and_is_reported() -> None:
    packed = bytearray(gzip.compress(TEXT))
    packed[-6] ^= 1
    assert decode(bytes(packed)) == (TEXT, "the gzip checksum does not match (the file is damaged)")
    frame = bytearray(zstd(TEXT, write_checksum=True))
    frame[-1] ^= 1
    got, reason = decode(bytes(frame))
    assert got == TEXT
    assert reason is not None


def test_a_truncated_zstd_is_never_taken_for_a_whole_one() -> None:
    packed = zstd(TEXT[:500], write_checksum=True) + zstd(TEXT[500:900], write_content_size=False)
    boundary = len(zstd(TEXT[:500], write_checksum=True))
    for length in range(4, len(packed)):
        got, reason = decode(packed[:length])
        assert TEXT.startswith(got)
        assert (reason is None) == (length == boundary)
        assert got[:500] == TEXT[:500] or length < boundary


def test_damage_in_a_zstd_costs_no_block_before_it() -> None:
    noise = _RANDOM.randbytes(600_000)  # stored in blocks of 128 KiB
    packed = bytearray(zstd(noise))
    whole = len(packed)
    for keep in (200_000, 400_000):
        got, reason = decode(bytes(packed[:keep]))
        assert reason is not None
        assert keep - 64 <= len(got) <= keep
        assert noise.startswith(got)
    assert whole > 600_000


def test_zstd_frames_of_any_make_are_read() -> None:
    skippable = b"\x5a\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"
    runs = bytes(1_000_000)
    stream = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    streamed = b"".join(stream.compress(TEXT[at : at + 999]) + stream.flush(1) for at in range(0, 9990, 999))
    streamed += stream.flush()
    assert decode(skippable + zstd(runs) + skippable + streamed) == (runs + TEXT[:9990], None)
    assert decode(skippable[:-2])[1] is not None
    long = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    assert decode(zstandard.ZstdCompressor(compression_params=long).compress(TEXT)) == (TEXT, None)


@pytest.mark.parametrize("name", ["gzip", "zstd"])
def test_a_decompression_bomb_streams_in_small_blocks(name: str) -> None:
    bomb = gzip.compress(bytes(64 << 20)) if name == "gzip" else zstd(bytes(64 << 20))
    assert len(bomb) < 100_000
    sizes = [len(block) for block in read_blocks(io.BytesIO(bomb), detect(bomb[:4]))]
    assert sum(sizes) == 64 << 20
    assert max(sizes) <= compression._OUT_BYTES


def test_a_truncated_bomb_gives_what_the_decoder_holds_back_too() -> None:
    bomb = gzip.compress(bytes(4 << 20))
    for length in range(1000, 1060):  # where the first block of output is full
        got, reason = decode(bomb[:length])
        assert len(got) == len(zlib.decompressobj(31).decompress(bomb[:length]))
        assert reason is not None
