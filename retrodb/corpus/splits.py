"""The plan: which worker reads what, and into which document shard it goes.

A plan follows from the scans of the files and the configuration alone, never from the number of workers, so the same
input gives the same shards everywhere. Small files are packed together; a large one is cut. What can be read from the
middle (plain JSONL, Parquet) is cut into splits that any workers can take; what can only be streamed (anything
compressed, one huge row group) is one split that yields several shards in order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Final

from retrodb.corpus.compression import Compression
from retrodb.corpus.listing import TRAIN, VALIDATION, Format
from retrodb.corpus.scan import RowGroup, ScannedFile
from retrodb.errors import InputError

MIN_SHARD_BYTES: Final = 64 << 10
MAX_DEFAULT_SHARD_BYTES: Final = 16 << 20
LARGEST_SHARD_BYTES: Final = 512 << 20
DEFAULT_SHARDS: Final = 64
MANY_SHARDS: Final = 16384


@dataclass(frozen=True)
class Segment:
    """A part of one file, or the whole of it.

    Attributes:
        url, format, compression, size, damage, stamp: as scanned.
        start: first byte of the decompressed file (JSONL, text), or first row (Parquet).
        end: one past the last; None: to the end of the file. A record belongs where its first byte lies.
    """

    url: str
    format: Format
    compression: Compression | None
    size: int
    start: int = 0
    end: int | None = None
    damage: str | None = None
    stamp: str = ""


@dataclass(frozen=True)
class ShardPlan:
    """What goes into document shard ``number``, in order; about ``bytes`` decompressed bytes.

    ``split`` is that of its files, which are of one split all.
    """

    number: int
    segments: tuple[Segment, ...]
    bytes: int
    split: str = TRAIN


@dataclass(frozen=True)
class Split:
    """The unit of work: shards that one worker reads in order. Small, and pickles or goes to JSON and back."""

    shards: tuple[ShardPlan, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Split":
        """The inverse of `as_json`. Raises KeyError or TypeError where it is not one."""
        return Split(
            tuple(
                ShardPlan(
                    shard["number"],
                    tuple(Segment(**segment) for segment in shard["segments"]),
                    shard["bytes"],
                    shard["split"],
                )
                for shard in data["shards"]
            )
        )


@dataclass(frozen=True)
class Plan:
    """All splits; their shards are numbered 0, 1, .. in order. ``shard_bytes`` is the target that was used."""

    splits: tuple[Split, ...]
    shard_bytes: int

    @property
    def shards(self) -> int:
        """Number of document shards."""
        return sum(len(split.shards) for split in self.splits)

    @property
    def bytes(self) -> int:
        """Decompressed bytes to read."""
        return sum(shard.bytes for split in self.splits for shard in split.shards)

    def as_json(self) -> dict[str, Any]:
        return {"shard_bytes": self.shard_bytes, "splits": [split.as_json() for split in self.splits]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Plan":
        """The inverse of `as_json`. Raises KeyError or TypeError where it is not one."""
        return Plan(tuple(Split.from_json(split) for split in data["splits"]), data["shard_bytes"])


def default_shard_bytes(total: int) -> int:
    """Target size of a document shard for ``total`` decompressed bytes of input.

    About 64 shards, so that a handful of workers share a small corpus evenly; then 16 MiB each, some 60,000 chunks,
    so that one fits any worker and little is lost with one; beyond 256 GiB larger ones, so that there are not more than
    some 16,384.
    """
    size = min(max(-(-total // DEFAULT_SHARDS), MIN_SHARD_BYTES), MAX_DEFAULT_SHARD_BYTES)
    return min(max(size, -(-total // MANY_SHARDS)), LARGEST_SHARD_BYTES)


def plan(files: Sequence[ScannedFile], shard_bytes: int | None = None, first: int = 0) -> Plan:
    """Lay ``files`` out, in the order given, over shards of about ``shard_bytes`` (None: `default_shard_bytes`).

    Training files come first, and set the default size: a validation corpus beside them moves none of their shards.
    Shards are numbered from ``first`` on.

    Raises:
        InputError: ``shard_bytes`` is not positive.
    """
    if shard_bytes is not None and shard_bytes < 1:
        raise InputError(f"the size of a document shard is {shard_bytes} bytes: it must be at least 1.")
    training = [file for file in files if file.split == TRAIN]
    target = default_shard_bytes(sum(map(_weight, training))) if shard_bytes is None else shard_bytes
    layout = _Layout(target, _number=first)
    for file in training:
        layout.place(file)
    layout.close()
    layout.split = VALIDATION
    for file in files:
        if file.split == VALIDATION:
            layout.place(file)
    layout.close()
    return Plan(tuple(layout.splits), target)


Part = tuple[int, int | None, int]
"""Start, end and about how many bytes."""


@dataclass
class _Layout:
    """Collects splits, numbering their shards."""

    target: int
    split: str = TRAIN
    splits: list[Split] = field(default_factory=list)
    _number: int = 0
    _packed: list[Segment] = field(default_factory=list)
    _packed_bytes: int = 0

    def place(self, file: ScannedFile) -> None:
        """Pack a file with others, or cut it."""
        if file.format == "jsonl" and file.size == 0:
            return
        weight = _weight(file)
        if weight <= self.target or file.format == "text" or (file.format == "parquet" and not file.row_groups):
            self.pack(_segment(file), weight)
        else:
            self.close()
            for parts in _cut_lines(file, self.target) if file.format == "jsonl" else _cut_rows(file, self.target):
                self.add([([_segment(file, start, end)], size) for start, end, size in parts])

    def pack(self, segment: Segment, size: int) -> None:
        """Put a whole file with its neighbours into one shard, as long as they fit."""
        if self._packed_bytes + size > self.target:
            self.close()
        self._packed.append(segment)
        self._packed_bytes += size

    def close(self) -> None:
        """End the shard that is being packed, if any."""
        if self._packed:
            self.add([(self._packed, self._packed_bytes)])
            self._packed, self._packed_bytes = [], 0

    def add(self, shards: list[tuple[list[Segment], int]]) -> None:
        """One split."""
        plans = [
            ShardPlan(self._number + row, tuple(parts), size, self.split) for row, (parts, size) in enumerate(shards)
        ]
        self._number += len(plans)
        self.splits.append(Split(tuple(plans)))


def _weight(file: ScannedFile) -> int:
    """Bytes that reading the file will bring: for Parquet what its pages hold when uncompressed."""
    return sum(group.bytes for group in file.row_groups) if file.row_groups else file.length


def _segment(file: ScannedFile, start: int = 0, end: int | None = None) -> Segment:
    damage = file.damage if file.format == "parquet" else None  # a torn stream is found again where it breaks
    return Segment(file.url, file.format, file.compression, file.size, start, end, damage, file.stamp)


def _cuts(length: int, pieces: int) -> list[tuple[int, int]]:
    """``length`` in ``pieces`` ranges whose lengths differ by at most one."""
    bounds = [length * piece // pieces for piece in range(pieces + 1)]
    return list(pairwise(bounds))


def _cut_lines(file: ScannedFile, target: int) -> list[list[Part]]:
    """Splits of a JSONL file by byte ranges."""
    parts: list[Part] = [(start, end, end - start) for start, end in _cuts(file.length, -(-file.length // target))]
    start, _, size = parts[-1]
    parts[-1] = (start, None, size)  # whatever lies behind a break belongs to the last
    return [parts] if file.compression else [[part] for part in parts]


def _cut_rows(file: ScannedFile, target: int) -> list[list[Part]]:
    """Splits of a Parquet file: by row groups, and a row group larger than a shard by rows, in one split."""
    splits: list[list[Part]] = []
    first = row = size = 0
    for group in file.row_groups:
        if row > first and size + group.bytes > target:
            splits.append([(first, row, size)])
            first, size = row, 0
        if group.bytes > target:
            splits.append(_cut_group(group, row, target))
            first = row + group.rows
        else:
            size += group.bytes
        row += group.rows
    if row > first:
        splits.append([(first, row, size)])
    return [[part for parts in splits for part in parts]] if file.compression else splits


def _cut_group(group: RowGroup, first: int, target: int) -> list[Part]:
    pieces = max(1, min(group.rows, -(-group.bytes // target)))
    return [(first + start, first + end, group.bytes // pieces) for start, end in _cuts(group.rows, pieces)]
