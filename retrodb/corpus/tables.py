"""A split becomes the document and quarantine tables of its shards, one shard at a time.

What a worker holds is about one shard: texts are moved into Arrow as they come, and a shard's tables are handed out
before the next shard is read.
"""

import contextlib
import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa

from retrodb import schemas
from retrodb.corpus.listing import TRAIN, VALIDATION
from retrodb.corpus.readers import SegmentReader
from retrodb.corpus.records import RULES, Document, Dropped, FieldNames, Outcome, Quarantined
from retrodb.corpus.splits import ShardPlan, Split

SplitOf = Callable[[bytes], str]
"""Names the split (`retrodb.schemas.SPLITS`) of a document by its content hash."""

_BATCH_BYTES: Final = 16 << 20
_ROW_BYTES: Final = 512  # what a row's Python objects take besides their data


@dataclass(frozen=True)
class ShardOutput:
    """What one shard's records became.

    Attributes:
        number: of the document shard.
        documents: table of schema `retrodb.schemas.documents`; ``n_chunks``, ``cluster_id`` and ``sketch`` are null.
        quarantine: table of schema `retrodb.schemas.quarantine`.
        counts: ``in``, ``kept``, ``quarantined`` and ``dropped.<rule>`` for every rule;
            in = kept + quarantined + the sum of dropped. ``validation`` of the kept are of that split.
    """

    number: int
    documents: pa.Table
    quarantine: pa.Table
    counts: dict[str, int]


def all_train(content_hash: bytes) -> str:
    """The `SplitOf` of a build that sets no documents apart."""
    return TRAIN


def all_validation(content_hash: bytes) -> str:
    """The `SplitOf` of validation files."""
    return VALIDATION


@dataclass(frozen=True)
class FractionSplit:
    """The `SplitOf` that sets a seeded random ``fraction`` of the documents apart for validation.

    By content, so that equal documents share a split, and neither the order of the inputs nor others matter.
    """

    fraction: float
    seed: int

    def __call__(self, content_hash: bytes) -> str:
        drawn = hashlib.sha256(self.seed.to_bytes(8, "little") + content_hash).digest()
        return VALIDATION if int.from_bytes(drawn[:8], "little") < self.fraction * 2**64 else TRAIN


def read_split(
    split: Split,
    fields: FieldNames,
    wanted: Collection[int] | None = None,
    split_of: SplitOf = all_train,
) -> Iterator[ShardOutput]:
    """Read the shards of ``split`` in order; if ``wanted`` is given, only those of these numbers.

    What a shard holds does not depend on which others are wanted.

    Raises:
        InputError: a file cannot be read, or has changed since it was scanned.
    """
    with contextlib.closing(SegmentReader(fields)) as reader:
        for shard in split.shards:
            if wanted is None or shard.number in wanted:
                # Nothing here may hold on to the tables while the next shard is read.
                yield _read_shard(shard, reader, split_of)


def _read_shard(shard: ShardPlan, reader: SegmentReader, split_of: SplitOf) -> ShardOutput:
    rows = _Rows(shard.number, all_validation if shard.split == VALIDATION else split_of)
    for segment in shard.segments:
        for outcome in reader.read(segment):
            rows.add(segment.url, outcome)
    return rows.finish()


class _Batches:
    """Rows of one table; every `_BATCH_BYTES` they move from Python objects into Arrow."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._batches: list[pa.RecordBatch] = []
        self._rows: list[tuple[Any, ...]] = []
        self._bytes = 0

    def add(self, row: tuple[Any, ...], size: int) -> None:
        """One row, in the order of the schema, with values of about ``size`` bytes."""
        self._rows.append(row)
        self._bytes += size + _ROW_BYTES
        if self._bytes >= _BATCH_BYTES:
            self._move()

    def _move(self) -> None:
        columns = list(zip(*self._rows, strict=True)) or [()] * len(self._schema)
        arrays = [_array(values, field.type) for values, field in zip(columns, self._schema, strict=True)]
        self._batches.append(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        self._rows, self._bytes = [], 0

    def finish(self) -> pa.Table:
        self._move()
        return pa.Table.from_batches(self._batches, schema=self._schema)


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    if not pa.types.is_large_string(kind):
        return pa.array(values, kind)
    # Texts, known to be UTF-8 and never null: joined, which is several times faster than one by one.
    offsets = np.zeros(len(values) + 1, np.int64)
    np.cumsum([len(text) for text in values], out=offsets[1:])
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(values))])


@dataclass
class _Rows:
    """The rows of one shard, moved into Arrow every few megabytes."""

    number: int
    split_of: SplitOf
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("in", "kept", "validation", "quarantined", *(f"dropped.{rule}" for rule in RULES)), 0
        )
    )
    _documents: "_Batches" = field(default_factory=lambda: _Batches(schemas.documents()))
    _quarantine: "_Batches" = field(default_factory=lambda: _Batches(schemas.quarantine()))

    def add(self, source: str, outcome: Outcome) -> None:
        self.counts["in"] += 1
        if isinstance(outcome, Document):
            self._add_document(source, outcome)
            self.counts["kept"] += 1
        elif isinstance(outcome, Dropped):
            self.counts[f"dropped.{outcome.rule}"] += 1
        else:
            self._add_quarantined(source, outcome)
            self.counts["quarantined"] += 1

    def _add_document(self, source: str, document: Document) -> None:
        key, title, text, metadata = document
        content_hash = hashlib.sha256(text).digest()
        split = self.split_of(content_hash)
        self.counts["validation"] += split == VALIDATION
        row = (
            (self.number << schemas.ID_SHIFT) + self.counts["kept"],
            key,
            source,
            title,
            text,
            None,  # n_chunks
            content_hash,
            metadata,
            None,  # cluster_id
            split,
            None,  # sketch
        )
        self._documents.add(row, len(text) + len(key) + len(title or b"") + len(metadata or b""))

    def _add_quarantined(self, source: str, record: Quarantined) -> None:
        self._quarantine.add((source, record.position, record.reason, record.record), len(record.record))

    def finish(self) -> ShardOutput:
        return ShardOutput(self.number, self._documents.finish(), self._quarantine.finish(), self.counts)
