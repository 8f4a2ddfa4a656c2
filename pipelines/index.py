"""index: one quantiser trained on a seeded sample over all shards, then index shards added in parallel."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import apache_beam as beam
import numpy as np
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.shards import ShardFiles, chunk_columns, validation_chunks, vectors_of
from retrodb.pipelines.tasks import DealOut, DoTasks, StageDoFn, Task, finish

from retrodb.deletions import Deletions
from retrodb.index import build_index_shard, commit_index_shard, largest_norm, seeded_sample, train_template
from retrodb.index.engine import Metric
from retrodb.manifest import LARGEST_NORM, TEMPLATE_NUMBER, TEMPLATE_PATH, Shard, shard_path
from retrodb.storage import Storage


@dataclass(frozen=True)
class IndexSettings:
    """The index to make; ``left_out`` names what was deleted, and is not to be in it."""

    key: str
    metric: Metric
    dimension: int
    seed: int
    left_out: tuple[Shard, ...] = ()


@dataclass(frozen=True)
class SampleInput:
    """A shard, and which of its rows (among those that may be neighbours) train the quantiser."""

    files: ShardFiles
    rows: tuple[int, ...]


def indexed_part(
    storage: Storage, files: ShardFiles, left_out: tuple[Shard, ...] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Chunk ids int64 [n] and vectors float16 [n, d] of the chunks of a shard that may be neighbours: not those of
    validation documents, nor what the shards ``left_out`` of the table ``deleted`` name."""
    chunk_ids, document_ids = chunk_columns(storage, files)
    vectors = vectors_of(storage, files, len(chunk_ids))
    out = validation_chunks(storage, files, document_ids)
    if left_out:
        out |= Deletions.of_shards(storage, left_out).of_chunks(chunk_ids)
    return (chunk_ids[~out], vectors[~out]) if out.any() else (chunk_ids, vectors)


def sample_tasks(files: dict[int, ShardFiles], rows: dict[int, int], n: int, seed: int) -> list[Task]:
    """One task a shard that gives training vectors."""
    numbers = sorted(files)
    drawn = seeded_sample([rows[number] for number in numbers], n, seed)
    return [
        Task(number, SampleInput(files[number], tuple(some.tolist())), (TEMPLATE_NUMBER,), len(some))
        for number, some in zip(numbers, drawn, strict=True)
        if len(some)
    ]


class _Draw(StageDoFn):
    """Task -> (0, (shard, its training vectors as float16 bytes))."""

    def __init__(self, book: ReceiptBook, left_out: tuple[Shard, ...]) -> None:
        super().__init__(book)
        self._left_out = left_out

    def process(self, task: Task) -> Iterator[tuple[int, tuple[int, bytes]]]:
        with self._naming(task.number):
            _, vectors = indexed_part(self._storage, task.payload.files, self._left_out)
            rows = np.array(task.payload.rows, dtype=np.int64)
            yield 0, (task.number, np.ascontiguousarray(vectors[rows]).tobytes())


class _Train(StageDoFn):
    """(0, samples) -> the trained template, written once."""

    def __init__(self, book: ReceiptBook, settings: IndexSettings) -> None:
        super().__init__(book)
        self._settings = settings

    def process(self, element: tuple[int, Iterable[tuple[int, bytes]]]) -> Iterator[int]:
        settings = self._settings
        with self._naming(TEMPLATE_NUMBER):
            parts = [np.frombuffer(data, dtype=np.float16) for _, data in sorted(element[1])]
            sample = np.concatenate(parts).reshape(-1, settings.dimension).astype(np.float32)
            data = train_template(sample, settings.key, settings.metric, settings.seed)
            write_template(self._book, data, len(sample))
            yield TEMPLATE_NUMBER


def write_template(book: ReceiptBook, data: bytes, training_vectors: int) -> None:
    """Commit the trained template, and its receipt."""
    committed = book.storage.commit_bytes(TEMPLATE_PATH, data)
    receipt = Receipt(
        TEMPLATE_NUMBER, {"index": Shard.of(committed, TEMPLATE_NUMBER, 0)}, {"training_vectors": training_vectors}
    )
    finish(book, receipt)


def write_untrained(book: ReceiptBook, settings: IndexSettings) -> None:
    """The template of an index that nothing trains: done by the driver, in microseconds."""
    empty = np.zeros((0, settings.dimension), dtype=np.float32)
    write_template(book, train_template(empty, settings.key, settings.metric, settings.seed), 0)


def template_pipeline(
    pipeline: beam.Pipeline, book: ReceiptBook, tasks: Sequence[Task], settings: IndexSettings
) -> beam.PCollection:
    """Draw the sample on all workers, train on one."""
    return (
        pipeline
        | DealOut(tasks)
        | "draw" >> beam.ParDo(_Draw(book, settings.left_out))
        | "gather" >> beam.GroupByKey()
        | "train" >> beam.ParDo(_Train(book, settings))
    )


def _add(storage: Storage, settings: IndexSettings, template: Shard, task: Task) -> Iterator[Receipt]:
    norms = [0.0]

    def read(files: ShardFiles) -> tuple[np.ndarray, np.ndarray]:
        chunk_ids, vectors = indexed_part(storage, files, settings.left_out)
        norms.append(largest_norm(vectors))
        return chunk_ids, vectors

    parts = (read(files) for files in task.payload)
    index = build_index_shard(storage.read_bytes(template), parts, settings.dimension, settings.metric)
    vectors = int(index.ntotal)
    committed = commit_index_shard(storage, shard_path("index", task.number), index)
    shards = {"index": Shard.of(committed, task.number, vectors)}
    yield Receipt(task.number, shards, {"indexed": vectors}, {LARGEST_NORM: max(norms)})


def add_tasks(groups: Sequence[Sequence[ShardFiles]], rows: Sequence[int]) -> list[Task]:
    """One task a group of chunk shards."""
    return [Task(number, tuple(group), weight=rows[number]) for number, group in enumerate(groups)]


def add_pipeline(
    pipeline: beam.Pipeline, book: ReceiptBook, tasks: Sequence[Task], settings: IndexSettings, template: Shard
) -> beam.PCollection:
    """Add groups of shards to copies of the template."""
    work = functools.partial(_add, book.storage, settings, template)
    return pipeline | DealOut(tasks) | "add" >> beam.ParDo(DoTasks(book, work))
