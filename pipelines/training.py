"""training: the join, as a shuffle of arrays.

tasks -> ask:      what each query shard wants of each neighbour's shard     (key: the neighbour's shard)
      -> answer:   the neighbour's shard read once, tokens looked up         (key: the query's shard)
      -> assemble: the query's shard packed into sequences and written
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import apache_beam as beam
import numpy as np
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.shards import ShardFiles, validation_chunks
from retrodb.pipelines.tasks import DealOut, Task, TaskFailedError, finish

from retrodb.manifest import Shard, shard_path
from retrodb.storage import Storage
from retrodb.training.join import (
    CHUNK_COLUMNS,
    NEIGHBOUR_COLUMNS,
    ChunkArrays,
    answer,
    assemble,
    neighbour_ids,
    requests,
)
from retrodb.training.messages import Answer, Request
from retrodb.training.sequences import pack
from retrodb.training.shards import VALIDATION_ROWS, write_training

WAVE_BYTES: Final = 256 << 20
"""Tokens that one local shuffle may carry: the in-process runner keeps them in memory."""


@dataclass(frozen=True)
class JoinSettings:
    """n/m slots a sequence, k' neighbours a chunk."""

    slots: int
    neighbours: int


class _StageDoFn(beam.DoFn):
    """Names the shard in hand when something fails."""

    def __init__(self, book: ReceiptBook, settings: JoinSettings) -> None:
        self._book = book
        self._storage = book.storage
        self._settings = settings

    def _fail(self, number: int, error: BaseException) -> TaskFailedError:
        return TaskFailedError(self._book.stage, number, error)


class Ask(_StageDoFn):
    """Task -> (neighbour's shard, request)."""

    def process(self, task: Task) -> Iterator[tuple[int, bytes]]:
        try:
            wanted = wanted_neighbours(self._storage, task.payload, self._settings.neighbours)
            for shard, request in requests(wanted, task.number).items():
                yield shard, request.to_bytes()
        except Exception as error:
            raise self._fail(task.number, error) from error


class AnswerRequests(_StageDoFn):
    """(neighbour's shard, requests) -> (query's shard, answer)."""

    def process(self, element: tuple[int, Iterable[bytes]]) -> Iterator[tuple[int, bytes]]:
        shard, messages = element
        try:
            chunks = read_chunks(self._storage, shard_path("chunks", shard))
            for message in messages:
                request = Request.from_bytes(message)
                yield request.query_shard, answer(request, chunks).to_bytes()
        except Exception as error:
            raise self._fail(shard, error) from error


class Assemble(_StageDoFn):
    """(query's shard, its task and answers) -> a training shard, and its receipt."""

    def process(self, element: tuple[int, dict[str, Any]]) -> Iterator[int]:
        number, parts = element
        try:
            for task in parts["tasks"]:
                receipt = self._assemble(task, parts["answers"])
                finish(self._book, receipt)
                yield number
        except Exception as error:
            raise self._fail(number, error) from error

    def _assemble(self, task: Task, messages: Iterable[bytes]) -> Receipt:
        chunks = read_chunks(self._storage, task.payload.chunks)
        validation = validation_chunks(self._storage, task.payload, chunks.document_ids)
        packed = pack(chunks.chunk_ids, chunks.document_ids, chunks.n_tokens, validation, self._settings.slots)
        wanted = wanted_neighbours(self._storage, task.payload, self._settings.neighbours)
        table = assemble(packed, chunks, wanted, map(Answer.from_bytes, messages), task.number)
        committed = write_training(self._storage, shard_path("training", task.number), table)
        counts = {"joined": int((wanted >= 0).sum()), "training_chunks": len(chunks)}
        shard = Shard.of(committed, task.number, table.num_rows)
        return Receipt(task.number, {"training": shard}, counts, {VALIDATION_ROWS: len(packed) - packed.training_rows})


def read_chunks(storage: Storage, path: str) -> ChunkArrays:
    """A chunk shard's columns that the join needs."""
    return ChunkArrays.from_table(storage.read_table(path, list(CHUNK_COLUMNS)))


def wanted_neighbours(storage: Storage, item: ShardFiles, k: int) -> np.ndarray:
    """int64 [N, k'] neighbour ids of a query shard, -1 where missing."""
    chunk_ids = storage.read_table(item.chunks, ["chunk_id"])["chunk_id"].to_numpy()
    return neighbour_ids(storage.read_table(item.neighbours, list(NEIGHBOUR_COLUMNS)), chunk_ids, k)


def join_tasks(files: Mapping[int, ShardFiles], chunks: Sequence[Shard]) -> list[Task]:
    """One task a chunk shard."""
    return [Task(shard.number, files[shard.number], weight=shard.rows) for shard in chunks]


def join_waves(tasks: Sequence[Task], bytes_a_chunk: int) -> list[list[Task]]:
    """Tasks in parts whose shuffle stays below `WAVE_BYTES`."""
    waves: list[list[Task]] = [[]]
    room = WAVE_BYTES
    for task in tasks:
        if waves[-1] and task.weight * bytes_a_chunk > room:
            waves.append([])
            room = WAVE_BYTES
        waves[-1].append(task)
        room -= task.weight * bytes_a_chunk
    return waves


def training_pipeline(
    pipeline: beam.Pipeline, book: ReceiptBook, tasks: Sequence[Task], settings: JoinSettings
) -> beam.PCollection:
    """Join query shards with their neighbours' tokens."""
    dealt = pipeline | DealOut(tasks)
    answers = (
        dealt
        | "ask" >> beam.ParDo(Ask(book, settings))
        | "by neighbour's shard" >> beam.GroupByKey()
        | "answer" >> beam.ParDo(AnswerRequests(book, settings))
    )
    keyed = dealt | "by number" >> beam.Map(functools.partial(_by_number))
    joined = {"tasks": keyed, "answers": answers} | "by query's shard" >> beam.CoGroupByKey()
    return joined | "assemble" >> beam.ParDo(Assemble(book, settings))


def _by_number(task: Task) -> tuple[int, Task]:
    return task.number, task
