"""A split becomes the document and quarantine tables of its shards, one shard at a time.

What a worker holds is about one shard: texts are moved into Arrow as they come, and a shard's tables are handed out
before the next shard is read.
"""

import contextlib
import hashlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa

from retrodb import schemas
from retrodb.corpus.readers import SegmentReader
from retrodb.corpus.records import RULES, Document, Dropped, FieldNames, Outcome, Quarantined
from retrodb.corpus.splits import ShardPlan, Split

SplitOf = Callable[[str, bytes], str]
"""Names the split (`retrodb.schemas.SPLITS`) of a document by its key and content hash."""

_BATCH_BYTES: Final = 16 << 20


@dataclass(frozen=True)
class ShardOutput:
    """What one shard's records became.

    Attributes:
        number: of the document shard.
        documents: table of schema `retrodb.schemas.documents`; ``n_chunks`` and ``cluster_id`` are null.
        quarantine: table of schema `retrodb.schemas.quarantine`.
        counts: ``in``, ``kept``, ``quarantined`` and ``dropped.<rule>`` for every rule;
            in = kept + quarantined + the sum of dropped.
    """

    number: int
    documents: pa.Table
    quarantine: pa.Table
    counts: dict[str, int]


def all_train(key: str, content_hash: bytes) -> str:
    """The `SplitOf` of a build without validation documents."""
    return "train"


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
    rows = _Rows(shard.number, split_of)
    for segment in shard.segments:
        for outcome in reader.read(segment):
            rows.add(segment.url, outcome)
    return rows.finish()


class _Batches:
    """Rows of one table; every `_BATCH_BYTES` they move from Python objects into Arrow."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._batches: list[pa.RecordBatch] = []
        self._start()

    def _start(self) -> None:
        self._columns: dict[str, list[Any]] = {name: [] for name in self._schema.names}
        self._bytes = 0

    def add(self, row: dict[str, Any], size: int) -> None:
        """One row, of about ``size`` bytes."""
        for name, column in self._columns.items():
            column.append(row[name])
        self._bytes += size
        if self._bytes >= _BATCH_BYTES:
            self._move()

    def _move(self) -> None:
        arrays = [pa.array(self._columns[field.name], field.type) for field in self._schema]
        self._batches.append(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        self._start()

    def finish(self) -> pa.Table:
        self._move()
        return pa.Table.from_batches(self._batches, schema=self._schema)


@dataclass
class _Rows:
    """The rows of one shard, moved into Arrow every few megabytes."""

    number: int
    split_of: SplitOf
    counts: dict[str, int] = field(
        default_factory=lambda: {"in": 0, "kept": 0, "quarantined": 0, **{f"dropped.{rule}": 0 for rule in RULES}}
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
        content_hash = hashlib.sha256(document.text).digest()
        row = {
            "document_id": (self.number << schemas.ID_SHIFT) + self.counts["kept"],
            "key": document.key,
            "source": source,
            "title": document.title,
            "text": document.text,
            "n_chunks": None,
            "content_hash": content_hash,
            "metadata": document.metadata,
            "cluster_id": None,
            "split": self.split_of(document.key, content_hash),
        }
        extra = len(document.key) + len(document.title or b"") + len(document.metadata or b"")
        self._documents.add(row, len(document.text) + extra)

    def _add_quarantined(self, source: str, record: Quarantined) -> None:
        row = {"source": source, "position": record.position, "reason": record.reason, "record": record.record}
        self._quarantine.add(row, len(record.record))

    def finish(self) -> ShardOutput:
        return ShardOutput(self.number, self._documents.finish(), self._quarantine.finish(), self.counts)
