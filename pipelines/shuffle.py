"""Neighbours' tokens for query shards, as a shuffle of arrays: what the training join and the leakage report share.

tasks -> ask:    what each query shard wants of each neighbour's shard     (key: the neighbour's shard)
      -> answer: the neighbour's shard read once, tokens looked up         (key: the query's shard)
      -> a `FromAnswers` of the stage: the query's shard made from its answers, and its receipt
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import apache_beam as beam
import numpy as np
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.shards import ShardFiles
from retrodb.pipelines.tasks import DealOut, StageDoFn, Task, finish

from retrodb.formats import File
from retrodb.manifest import Shard, shard_path
from retrodb.storage import Storage
from retrodb.training.join import (
    CHUNK_COLUMNS,
    NEIGHBOUR_COLUMNS,
    ChunkArrays,
    answer,
    neighbour_ids,
    requests,
)
from retrodb.training.messages import Request

WAVE_BYTES: Final = 16 << 20
"""Tokens that one local shuffle may carry: the in-process runner keeps them in memory."""


class _NeighboursDoFn(StageDoFn):
    """Knows how many neighbours of each chunk are asked for."""

    def __init__(self, book: ReceiptBook, neighbours: int) -> None:
        super().__init__(book)
        self._neighbours = neighbours


class Ask(_NeighboursDoFn):
    """Task -> (neighbour's shard, request)."""

    def process(self, task: Task) -> Iterator[tuple[int, bytes]]:
        with self._naming(task.number):
            wanted = wanted_neighbours(self._storage, task.payload, self._neighbours)
            for shard, request in requests(wanted, task.number).items():
                yield shard, request.to_bytes()


class AnswerRequests(_NeighboursDoFn):
    """(neighbour's shard, requests) -> (query's shard, answer)."""

    def process(self, element: tuple[int, Iterable[bytes]]) -> Iterator[tuple[int, bytes]]:
        shard, messages = element
        with self._naming(shard):
            chunks = read_chunks(self._storage, shard_path("chunks", shard))
            for message in messages:
                request = Request.from_bytes(message)
                yield request.query_shard, answer(request, chunks).to_bytes()


class FromAnswers(_NeighboursDoFn):
    """(query's shard, its task and answers) -> the stage's shard, and its receipt."""

    def process(self, element: tuple[int, dict[str, Any]]) -> Iterator[int]:
        number, parts = element
        with self._naming(number):
            for task in parts["tasks"]:
                finish(self._book, self.make(task, parts["answers"]))
                yield number

    def make(self, task: Task, messages: Iterable[bytes]) -> Receipt:
        """Write the shard of a task from the answers to its requests."""
        raise NotImplementedError


def read_chunks(storage: Storage, path: File) -> ChunkArrays:
    """A chunk shard's columns that the join needs."""
    return ChunkArrays.from_table(storage.read_table(path, list(CHUNK_COLUMNS)))


def wanted_neighbours(storage: Storage, item: ShardFiles, k: int) -> np.ndarray:
    """int64 [N, k'] neighbour ids of a query shard, -1 where missing."""
    chunk_ids = storage.read_table(item.chunks, ["chunk_id"])["chunk_id"].to_numpy()
    return neighbour_ids(storage.read_table(item.neighbours, list(NEIGHBOUR_COLUMNS)), chunk_ids, k)


def join_tasks(files: Mapping[int, ShardFiles], chunks: Sequence[Shard]) -> list[Task]:
    """One task a chunk shard."""
    return [Task(shard.number, files[shard.number], weight=shard.rows) for shard in chunks]


def join_waves(bytes_a_chunk: int) -> Callable[[Sequence[Task], bool], list[list[Task]]]:
    """Cuts tasks into parts whose shuffle stays below `WAVE_BYTES`, where it has to be bounded."""

    def waves(tasks: Sequence[Task], bounded: bool) -> list[list[Task]]:
        if not bounded:
            return [list(tasks)]
        parts: list[list[Task]] = [[]]
        room = WAVE_BYTES
        for task in tasks:
            if parts[-1] and task.weight * bytes_a_chunk > room:
                parts.append([])
                room = WAVE_BYTES
            parts[-1].append(task)
            room -= task.weight * bytes_a_chunk
        return parts

    return waves


def shuffle_pipeline(
    pipeline: beam.Pipeline, book: ReceiptBook, tasks: Sequence[Task], neighbours: int, last: FromAnswers
) -> beam.PCollection:
    """Make query shards from the tokens of their first ``neighbours`` neighbours."""
    dealt = pipeline | DealOut(tasks)
    answers = (
        dealt
        | "ask" >> beam.ParDo(Ask(book, neighbours))
        | "by neighbour's shard" >> beam.GroupByKey()
        | "answer" >> beam.ParDo(AnswerRequests(book, neighbours))
    )
    keyed = dealt | "by number" >> beam.Map(functools.partial(_by_number))
    joined = {"tasks": keyed, "answers": answers} | "by query's shard" >> beam.CoGroupByKey()
    return joined | type(last).__name__.lower() >> beam.ParDo(last)


def _by_number(task: Task) -> tuple[int, Task]:
    return task.number, task
