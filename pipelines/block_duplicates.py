"""The second step of chunk, where the unit is the block: which blocks are equal. A shuffle by ranges of their uids."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import apache_beam as beam
import numpy as np
import pyarrow.compute as pc
from retrodb.pipelines.builder import Builder, add_counts, shards_by_table
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.tasks import DealOut, StageDoFn, Task, finish
from retrodb.schemas import UID_BYTES

from retrodb.chunking.duplicates import PART_BLOCKS, part_count, parts_of, repeated, uid_matrix
from retrodb.manifest import Shard, shard_path

TABLE: Final = "block_duplicates"
EQUALS_ROW_GROUP: Final = 1 << 16
_SMALL_BLOCKS: Final = 1 << 20


class UidsOfShard(StageDoFn):
    """A shard of blocks -> (part, its uids and ids as bytes), for the wanted parts."""

    def __init__(self, book: ReceiptBook, parts: int, wanted: frozenset[int]) -> None:
        super().__init__(book)
        self._parts = parts
        self._wanted = wanted

    def process(self, task: Task) -> Iterator[tuple[int, tuple[bytes, bytes]]]:
        with self._naming(task.number):
            table = self._storage.read_table(task.payload, ["chunk_id", "uid"])
            uids, chunk_ids = uid_matrix(table), table["chunk_id"].to_numpy()
            parts = parts_of(uids, self._parts)
            for part in sorted(self._wanted.intersection(np.unique(parts).tolist())):
                own = parts == part
                yield part, (uids[own].tobytes(), chunk_ids[own].astype("<i8").tobytes())


class WriteDuplicates(StageDoFn):
    """(part, its uids and ids) -> its shard of ``block_duplicates``, and its receipt."""

    def process(self, element: tuple[int, Iterable[tuple[bytes, bytes]]]) -> Iterator[int]:
        number, parts = element
        with self._naming(number):
            found = list(parts)
            uids = np.frombuffer(b"".join(data for data, _ in found), dtype=np.uint8).reshape(-1, UID_BYTES)
            chunk_ids = np.frombuffer(b"".join(data for _, data in found), dtype="<i8")
            table = repeated(uids, chunk_ids)
            committed = self._storage.commit_table(shard_path(TABLE, number), table, EQUALS_ROW_GROUP)
            blocks = int(pc.sum(pc.list_value_length(table["chunk_ids"])).as_py() or 0)
            counts = {"repeated_uids": table.num_rows, "duplicate_blocks": blocks - table.num_rows}
            finish(self._book, Receipt(number, {TABLE: Shard.of(committed, number, table.num_rows)}, counts))
            yield number


def duplicates_pipeline(
    pipeline: beam.Pipeline, book: ReceiptBook, chunks: Sequence[Shard], parts: int, tasks: Sequence[Task]
) -> beam.PCollection:
    """Compare the blocks of some parts."""
    wanted = frozenset(task.number for task in tasks)
    shards = [Task(shard.number, shard, weight=shard.rows) for shard in chunks]
    uids = pipeline | DealOut(shards) | "uids" >> beam.ParDo(UidsOfShard(book, parts, wanted))
    none = pipeline | "none" >> beam.Create([(part, (b"", b"")) for part in sorted(wanted)])  # a part may have no uid
    together = (uids, none) | beam.Flatten() | "by part" >> beam.GroupByKey()
    return together | "compare" >> beam.ParDo(WriteDuplicates(book))


def _waves(tasks: Sequence[Task], bounded: bool) -> Iterable[Sequence[Task]]:
    """Part by part where the shuffle is held in memory: every part reads the uids of all shards, and keeps its own."""
    return [[task] for task in tasks] if bounded else [list(tasks)]


def _compared(builder: Builder, chunks: Sequence[Shard]) -> tuple[ReceiptBook, dict[int, Receipt]]:
    rows = sum(shard.rows for shard in chunks)
    parts = part_count(rows)
    tables = {shard.path: shard.sha256 for shard in chunks}
    book = builder.book("chunk", {"blocks": tables})
    receipts = builder.executor.complete(
        book,
        [Task(part, None, weight=min(rows, PART_BLOCKS)) for part in range(parts)],
        lambda pipeline, tasks: duplicates_pipeline(pipeline, book, chunks, parts, tasks),
        unit="blocks",
        small=_SMALL_BLOCKS,
        waves=_waves,
    )
    return book, receipts


def find_block_duplicates(builder: Builder, chunks: Sequence[Shard]) -> tuple[list[Shard], dict[str, int]]:
    """The shards of ``block_duplicates``, and how many blocks repeat another."""
    book, receipts = _compared(builder, sorted(chunks))
    builder.storage.delete_folder(book.folder)
    return shards_by_table(receipts, TABLE)[TABLE], add_counts(receipts)


def mend_block_duplicates(builder: Builder) -> None:
    """Make ``block_duplicates`` again where it, or the blocks themselves, were damaged."""
    if TABLE not in builder.manifest.tables or not (builder.damage.get(TABLE) or "chunk" in builder.done):
        return
    builder.progress.note(f"chunk: repairing {TABLE}")
    book, receipts = _compared(builder, builder.manifest.shards("chunks"))
    builder.record_repair("chunk", receipts)
    builder.storage.delete_folder(book.folder)
