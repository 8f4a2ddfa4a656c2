"""corpus: raw files to ``documents`` and ``quarantine`` shards; and the scan that the plan of splits comes from."""

import functools
from collections.abc import Iterator, Sequence

import apache_beam as beam
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.tasks import DealOut, DoTasks, Task

from retrodb.corpus import FieldNames, InputFile, Split, SplitOf, all_train, read_split, scan_file
from retrodb.manifest import Shard, shard_path
from retrodb.storage import Storage

DOCUMENT_ROW_GROUP = 1024


def scan_tasks(files: Sequence[InputFile]) -> list[Task]:
    """One task a file: its checksum and its decompressed size."""
    return [Task(number, file, weight=file.size) for number, file in enumerate(files)]


def _scan(task: Task) -> Iterator[Receipt]:
    yield Receipt(task.number, details=scan_file(task.payload).as_json())


def scan_pipeline(pipeline: beam.Pipeline, book: ReceiptBook, tasks: Sequence[Task]) -> beam.PCollection:
    """Scan every file once, in parallel over files."""
    return pipeline | DealOut(tasks) | "scan" >> beam.ParDo(DoTasks(book, _scan))


def read_tasks(splits: Sequence[Split]) -> list[Task]:
    """One task a split; a split that is one stream may give several shards."""
    tasks = []
    for split in splits:
        numbers = tuple(shard.number for shard in split.shards)
        tasks.append(Task(numbers[0], split, numbers, sum(shard.bytes for shard in split.shards)))
    return tasks


def _read(storage: Storage, fields: FieldNames, split_of: SplitOf, folder: str, task: Task) -> Iterator[Receipt]:
    for output in read_split(task.payload, fields, set(task.numbers), split_of):
        shards = {}
        for table, rows in (("documents", output.documents), ("quarantine", output.quarantine)):
            if table == "documents" or rows.num_rows:
                place = (
                    folder + shard_path(table, output.number)
                    if table == "documents"
                    else shard_path(table, output.number)
                )
                committed = storage.commit_table(place, rows, DOCUMENT_ROW_GROUP)
                shards[table] = Shard.of(committed, output.number, rows.num_rows)
        receipt = Receipt(output.number, shards, output.counts)
        del output, rows  # one shard's documents at a time: the next one is read before these names are bound again
        yield receipt


def corpus_pipeline(
    pipeline: beam.Pipeline,
    book: ReceiptBook,
    tasks: Sequence[Task],
    fields: FieldNames,
    split_of: SplitOf = all_train,
    folder: str = "",
) -> beam.PCollection:
    """Read splits, write quarantine shards and document shards, these below ``folder`` if given (ends in a slash)."""
    work = functools.partial(_read, book.storage, fields, split_of, folder)
    return pipeline | DealOut(tasks) | "read" >> beam.ParDo(DoTasks(book, work))
