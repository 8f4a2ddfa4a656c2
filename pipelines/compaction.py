"""What workers do of a compaction: shards without what was deleted, and the chunks that have to be searched anew.

`retrodb.pipelines.compact` tells the whole.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from retrodb.pipelines.block_duplicates import EQUALS_ROW_GROUP
from retrodb.pipelines.chunk import CHUNK_ROW_GROUP, VALIDATION_CHUNKS, chunk_counts
from retrodb.pipelines.corpus import DOCUMENT_ROW_GROUP
from retrodb.pipelines.dedup import DUPLICATE_ROW_GROUP
from retrodb.pipelines.integrity import proven
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.searching import QueryShard, SearchSettings, SearchShard
from retrodb.pipelines.shards import ShardFiles, vectors_of
from retrodb.pipelines.spans import SPAN_ROW_GROUP
from retrodb.pipelines.tasks import DealOut, DoTasks, Task

from retrodb.chunking.duplicates import repeated, uid_matrix
from retrodb.corpus import VALIDATION
from retrodb.deletions import Deletions
from retrodb.formats import File
from retrodb.manifest import Manifest, Shard, shard_path
from retrodb.neighbours import from_table
from retrodb.spans.imports import named_documents
from retrodb.storage import Storage

Deleted = tuple[Shard, ...]
"""The shards of the table ``deleted``."""

GONE_DOCUMENTS: Final = "documents"
GONE_VALIDATION: Final = "validation"
GONE_DUPLICATES: Final = "clustered"
SPAN_TABLES: Final = ("spans", "queries")
"""Tables with rows of documents that only a database with spans has; also what is counted of their rows that go."""
QUARANTINED: Final = "quarantined"
_REFUSED: Final = "span_quarantine"


# -- the text and its vectors ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Holder:
    """The files of a shard that holds something deleted; ``duplicates`` is "" where it has none.

    ``spans`` are those of `SPAN_TABLES` that the database has.
    """

    files: ShardFiles
    duplicates: File
    spans: Mapping[str, Shard]


def _without(storage: Storage, deleted: Deleted, task: Task) -> Iterator[Receipt]:
    """What stays of a shard: documents, chunks, vectors, near-duplicates, spans; what they counted that goes."""
    item: Holder = task.payload
    number, gone = task.number, Deletions.of_shards(storage, deleted)
    shards, counts = {}, {}

    def write(name: str, table: pa.Table, row_group: int) -> None:
        committed = storage.commit_table(shard_path(name, number), table, row_group)
        shards[name] = Shard.of(committed, number, table.num_rows)

    for file in (item.files.documents, item.files.chunks, item.files.embeddings, item.duplicates):
        proven(storage, file)
    documents = storage.read_table(item.files.documents)
    out = gone.of_documents(documents["document_id"].to_numpy())
    left, going = documents.filter(~out), documents.filter(out)
    write("documents", left, DOCUMENT_ROW_GROUP)
    counts[GONE_DOCUMENTS] = going.num_rows
    counts[GONE_VALIDATION] = int(pc.sum(pc.equal(going["split"], VALIDATION)).as_py() or 0)
    held_out = left.filter(pc.equal(left["split"], VALIDATION))
    chunks = storage.read_table(item.files.chunks)
    out = gone.of_documents(chunks["document_id"].to_numpy())
    counts |= chunk_counts(chunks.filter(out))
    vectors = np.ascontiguousarray(vectors_of(storage, item.files, chunks.num_rows)[~out])
    write("chunks", chunks.filter(~out), CHUNK_ROW_GROUP)
    committed = storage.commit_array(shard_path("embeddings", number), vectors)
    shards["embeddings"] = Shard.of(committed, number, len(vectors))
    if item.duplicates:
        table = storage.read_table(item.duplicates)
        out = gone.of_documents(table["document_id"].fill_null(-1).to_numpy())
        counts[GONE_DUPLICATES] = int(out.sum())
        if not out.all():
            write("duplicates", table.filter(~out), DUPLICATE_ROW_GROUP)
    for name, before in item.spans.items():
        table = storage.read_table(before)
        out = gone.of_documents(table["document_id"].to_numpy())
        counts[name] = int(out.sum())
        if out.any():
            proven(storage, before)
            write(name, table.filter(~out), SPAN_ROW_GROUP)
        else:
            shards[name] = before
    yield Receipt(number, shards, counts, {VALIDATION_CHUNKS: int(pc.sum(held_out["n_chunks"]).as_py() or 0)})


def text_tasks(current: Manifest, files: Mapping[int, ShardFiles], numbers: Sequence[int]) -> list[Task]:
    """One task a shard that holds something deleted."""
    found = {shard.number: shard for shard in current.shards("duplicates")}
    spans = {table: {shard.number: shard for shard in current.shards(table)} for table in SPAN_TABLES}

    def holder(number: int) -> Holder:
        own = {table: shards[number] for table, shards in spans.items() if number in shards}
        return Holder(files[number], found.get(number, ""), own)

    return [Task(number, holder(number)) for number in numbers]


def text_pipeline(
    pipeline: beam.Pipeline, book: ReceiptBook, tasks: Sequence[Task], deleted: Deleted
) -> beam.PCollection:
    """Write shards without what is deleted."""
    work = functools.partial(_without, book.storage, deleted)
    return pipeline | DealOut(tasks) | "leave out" >> beam.ParDo(DoTasks(book, work))


def _equals(storage: Storage, deleted: Deleted, task: Task) -> Iterator[Receipt]:
    """A shard of ``block_duplicates`` without deleted blocks; as it is where it names none."""
    before: Shard = task.payload
    gone = Deletions.of_shards(storage, deleted)
    table = storage.read_table(before)
    lists = table["chunk_ids"].combine_chunks()
    ids = pc.list_flatten(lists).to_numpy()
    uids = np.repeat(uid_matrix(table), pc.list_value_length(lists).to_numpy(), axis=0)
    stays = ~gone.of_chunks(ids)
    shard = before
    if not stays.all():
        proven(storage, before)
        table = repeated(uids[stays], ids[stays])
        committed = storage.commit_table(shard_path("block_duplicates", task.number), table, EQUALS_ROW_GROUP)
        shard = Shard.of(committed, task.number, table.num_rows)
    blocks = int(pc.sum(pc.list_value_length(table["chunk_ids"])).as_py() or 0)
    counts = {"repeated_uids": table.num_rows, "duplicate_blocks": blocks - table.num_rows}
    yield Receipt(task.number, {"block_duplicates": shard}, counts)


def equals_tasks(current: Manifest) -> list[Task]:
    """One task a shard of ``block_duplicates``."""
    return [Task(shard.number, shard) for shard in current.shards("block_duplicates")]


def equals_pipeline(
    pipeline: beam.Pipeline, book: ReceiptBook, tasks: Sequence[Task], deleted: Deleted
) -> beam.PCollection:
    """Which of the blocks that are left are equal."""
    work = functools.partial(_equals, book.storage, deleted)
    return pipeline | DealOut(tasks) | "equal blocks" >> beam.ParDo(DoTasks(book, work))


@dataclass(frozen=True)
class Judged:
    """All shards of ``span_quarantine``, and the document shards that hold something deleted."""

    before: tuple[Shard, ...]
    documents: tuple[File, ...]


def _refused(storage: Storage, deleted: Deleted, task: Task) -> Iterator[Receipt]:
    """Imported spans that could not be used, without those that say something of a deleted document.

    A row may lie in the shard of another document than it names. What names none, or cannot be read, goes too: nobody
    can tell whom it is about.
    """
    item: Judged = task.payload
    gone = Deletions.of_shards(storage, deleted)
    named: set[str] = set()
    for shard in item.before:
        named.update(*map(named_documents, storage.read_table(shard, ["record"])["record"].to_pylist()))
    absent = named.intersection(map(str, gone.document_ids.tolist()))
    for documents in item.documents:
        table = storage.read_table(documents, ["document_id", "key"])
        keys = table["key"].filter(pa.array(gone.of_documents(table["document_id"].to_numpy())))
        absent |= named.intersection(keys.to_pylist())
    for shard in item.before:
        if shard.number in task.receipts:
            table = storage.read_table(shard)
            names = map(named_documents, table["record"].to_pylist())
            stays = [bool(own) and absent.isdisjoint(own) for own in names]
            left = shard
            if not all(stays):
                proven(storage, shard)
                table = table.filter(pa.array(stays))
                committed = storage.commit_table(shard_path(_REFUSED, shard.number), table, SPAN_ROW_GROUP)
                left = Shard.of(committed, shard.number, table.num_rows)
            yield Receipt(shard.number, {_REFUSED: left} if any(stays) else {}, {QUARANTINED: stays.count(False)})


def refused_tasks(current: Manifest, files: Mapping[int, ShardFiles], numbers: Sequence[int]) -> list[Task]:
    """One task for all shards of imported spans that could not be used: each may name any document."""
    before = current.shards(_REFUSED)
    of_all = tuple(shard.number for shard in before)
    return [Task(of_all[0], Judged(before, tuple(files[n].documents for n in numbers)), of_all)] if before else []


def refused_pipeline(
    pipeline: beam.Pipeline, book: ReceiptBook, tasks: Sequence[Task], deleted: Deleted
) -> beam.PCollection:
    """What is left of the imported spans that could not be used."""
    work = functools.partial(_refused, book.storage, deleted)
    return pipeline | DealOut(tasks) | "imported spans" >> beam.ParDo(DoTasks(book, work))


# -- neighbours --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Left:
    """A query shard as it is left, and its neighbours as they were."""

    query: QueryShard
    before: Shard


class SearchAnew(SearchShard):
    """Task (`Left`) -> its neighbours without deleted ones; the shard as it was where it names none.

    A chunk whose neighbours are all left keeps them: nothing that is left has come nearer.
    """

    def __init__(self, book: ReceiptBook, settings: SearchSettings, deleted: Deleted) -> None:
        super().__init__(book, settings)
        self._deleted = deleted

    def setup(self) -> None:
        super().setup()
        self._gone = Deletions.of_shards(self._storage, self._deleted)

    def process(self, task: Task) -> Iterator[int]:
        with self._naming(task.number):
            if self._left(task) is not None:
                self._mend(task.number, task.payload)
            yield task.number

    def _mend(self, number: int, item: Left) -> None:
        before = from_table(self._storage.read_table(item.before))
        stays = ~self._gone.of_chunks(before.chunk_ids)
        kept = before.take(stays)
        rows = np.flatnonzero(self._gone.of_chunks(kept.neighbour_ids).any(axis=1))
        if stays.all() and not len(rows):
            self._account(number, before, item.before, searched=0)
            return
        proven(self._storage, item.before)
        if len(rows):
            kept = kept.put(rows, self._found(item.query.files, rows))
        self._finish(number, kept, searched=len(rows))


def neighbour_tasks(files: Mapping[int, ShardFiles], before: Sequence[Shard]) -> list[Task]:
    """One task a query shard."""
    return [Task(s.number, Left(QueryShard(files[s.number]), s), weight=s.rows) for s in before]


def neighbours_pipeline(
    pipeline: beam.Pipeline, book: ReceiptBook, tasks: Sequence[Task], settings: SearchSettings, deleted: Deleted
) -> beam.PCollection:
    """Search for the chunks that lost a neighbour."""
    return pipeline | DealOut(tasks) | "search anew" >> beam.ParDo(SearchAnew(book, settings, deleted))
