"""One pass over an input file: what it is, how long it is once decompressed, and the hash that identifies it.

A scan is all that `retrodb.corpus.splits` needs to know of a file. It is small and goes to JSON and back, because it
travels between workers and is kept in the manifest: while a file's ``stamp`` stays the same it is not scanned again.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from retrodb.corpus.compression import MAGIC_BYTES, Compression, TornStream, detect, read_blocks
from retrodb.corpus.listing import TRAIN, Format, InputFile
from retrodb.corpus.parquet import BrokenParquet, open_parquet
from retrodb.corpus.source import READ_BYTES, open_raw
from retrodb.errors import InputError

_MOST_EXPANSION: Final = 1 << 12
"""Bytes that one compressed byte is taken to stand for at most (gzip: 1,032) when a manifest says so."""


@dataclass(frozen=True)
class RowGroup:
    """One row group of a Parquet file: ``rows``, and its uncompressed ``bytes`` as the footer says."""

    rows: int
    bytes: int


@dataclass(frozen=True)
class ScannedFile:
    """What one pass over a file found.

    Attributes:
        url: as listed.
        format: as listed.
        compression: by the file's first bytes; None for plain.
        size: raw bytes.
        stamp: as listed.
        sha256: of the raw bytes, in hex.
        length: decompressed bytes; of a torn stream, those before the break.
        row_groups: of a Parquet file, in order.
        damage: why the file cannot be read to its end (torn stream, no Parquet), else None. What can be read of it is
            read; the rest becomes one quarantined record.
        split: as listed.
    """

    url: str
    format: Format
    compression: Compression | None
    size: int
    stamp: str
    sha256: str
    length: int
    row_groups: tuple[RowGroup, ...] = ()
    damage: str | None = None
    split: str = TRAIN

    def is_of(self, file: InputFile) -> bool:
        """Whether this scan is of the file as it is listed now, and of a length that such a file can have.

        What is to be done is planned by scans, and they come from manifests.
        """
        most = self.size * (_MOST_EXPANSION if self.compression or self.format == "parquet" else 1)
        lengths = [self.length, sum(group.bytes for group in self.row_groups)]
        return (self.size, self.stamp) == (file.size, file.stamp) and all(0 <= length <= most for length in lengths)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON; row groups as ``[rows, bytes]``."""
        return {**asdict(self), "row_groups": [[group.rows, group.bytes] for group in self.row_groups]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "ScannedFile":
        """The inverse of `as_json`. Raises KeyError, TypeError or ValueError where it is not one."""
        groups = tuple(RowGroup(int(rows), int(size)) for rows, size in data["row_groups"])
        return ScannedFile(**{**data, "row_groups": groups})


def scan_file(file: InputFile) -> ScannedFile:
    """Read ``file`` once from its first byte to its last, in bounded memory.

    Raises:
        InputError: it cannot be read, or has changed since it was listed.
    """
    digest = hashlib.sha256()
    damage: str | None = None
    length = 0
    with open_raw(file.url, hasher=digest) as raw:
        compression = detect(raw.peek(MAGIC_BYTES))
        try:
            for block in read_blocks(raw, compression):
                length += len(block)
        except TornStream as torn:
            damage = torn.reason
        while raw.read(READ_BYTES):
            pass  # what lies behind a break is hashed as well
        size = raw.bytes_read
    if file.size not in (-1, size):
        raise InputError(
            f"{file.url} had {file.size} bytes when it was listed and {size} when it was read: it is being written. "
            "Run the build again once it is complete."
        )
    groups: tuple[RowGroup, ...] = ()
    if file.format == "parquet" and damage is None:
        groups, damage = _row_groups(file.url, compression, size)
    return ScannedFile(
        url=file.url,
        format=file.format,
        compression=compression,
        size=size,
        stamp=file.stamp,
        sha256=digest.hexdigest(),
        length=length,
        row_groups=groups,
        damage=damage,
        split=file.split,
    )


def _row_groups(url: str, compression: Compression | None, size: int) -> tuple[tuple[RowGroup, ...], str | None]:
    try:
        with open_parquet(url, compression, size) as file:
            groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
            return tuple(RowGroup(group.num_rows, max(0, group.total_byte_size)) for group in groups), None
    except BrokenParquet as error:
        return (), str(error)
