"""Neighbours' tokens for query shards: what the training join and the leakage report share.

On a cluster, a shuffle of arrays:

tasks -> ask:    what each query shard wants of each neighbour's shard     (key: the neighbour's shard)
      -> answer: the neighbour's shard read once, tokens looked up         (key: the query's shard)
      -> a `FromAnswers` of the stage: the query's shard made from its answers, and its receipt

On one machine, whose in-process runner holds what is shuffled in memory, several times over, a query shard's worker
opens the neighbours' shards itself, one after the other, and holds one of them and one piece of its answer at a time.
The answers are the same, and so are the bytes made from them.

Where a version is made from another, most chunks have the neighbours they had: only those of the others are asked for,
the rest is taken from what was made before, and a shard of which nothing changed stays the file it is (`Before`).
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import apache_beam as beam
import numpy as np
import pyarrow as pa
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.shards import ShardFiles
from retrodb.pipelines.tasks import DealOut, StageDoFn, Task, finish

from retrodb.errors import DamagedError
from retrodb.formats import File
from retrodb.manifest import Shard
from retrodb.recent import Recent
from retrodb.storage import Storage
from retrodb.training.join import (
    CHUNK_COLUMNS,
    MISSING,
    NEIGHBOUR_COLUMNS,
    ChunkArrays,
    answer,
    locate,
    neighbour_ids,
    requests,
)
from retrodb.training.messages import Answer, Request

ANSWER_ROWS: Final = 1 << 14
"""Neighbours in one answer, at most: 4 MB of tokens with m = 64, whatever a shard's size."""

NEIGHBOUR_CACHE_BYTES: Final = 32 << 20
"""Chunk shards that a worker keeps to look neighbours up in; at least one."""


@dataclass(frozen=True)
class NeighbourSource:
    """Whose neighbours, and where they are.

    Attributes:
        chunks: every chunk shard by its number, as recorded.
        neighbours: how many of each chunk are asked for.
        looked_up: by the query shard's worker, instead of by a shuffle.
    """

    chunks: Mapping[int, File]
    neighbours: int
    looked_up: bool

    def read(self, storage: Storage, shard: int) -> ChunkArrays:
        """A chunk shard's columns that the join needs.

        Raises:
            DamagedError: there is no such shard.
        """
        if shard not in self.chunks:
            raise DamagedError(
                f"chunk shard {shard}, of which there are neighbours, does not exist. Run the build again."
            )
        return read_chunks(storage, self.chunks[shard])


@dataclass(frozen=True)
class Before:
    """What a stage made of a query shard in the version before: of these neighbours this shard; what it told."""

    neighbours: Shard
    made: Shard
    details: Mapping[str, Any]


@dataclass(frozen=True)
class JoinItem:
    """A query shard, and what was made of it before, if it was."""

    files: ShardFiles
    before: Before | None = None


@dataclass(frozen=True)
class Wanted:
    """The neighbours of a query shard that are joined.

    Attributes:
        ids: int64 [N, k'], -1 where missing.
        fresh: bool [N], the chunks whose neighbours are not those they had.
        same_chunks: whether the shard has just the chunks that it had.
    """

    ids: np.ndarray
    fresh: np.ndarray
    same_chunks: bool

    @property
    def asked(self) -> np.ndarray:
        """int64 [N, k']: those that have to be looked up, -1 elsewhere."""
        return np.where(self.fresh[:, None], self.ids, MISSING)

    @property
    def stays(self) -> bool:
        """Whether what was made before is what would be made now."""
        return self.same_chunks and not self.fresh.any()


class _NeighboursDoFn(StageDoFn):
    """Knows where neighbours are."""

    def __init__(self, book: ReceiptBook, source: NeighbourSource) -> None:
        super().__init__(book)
        self._source = source

    def _wanted(self, item: JoinItem) -> Wanted:
        """What a query shard wants."""
        chunk_ids = self._storage.read_table(item.files.chunks, ["chunk_id"])["chunk_id"].to_numpy()
        ids = neighbour_ids(self._neighbours(item.files), chunk_ids, self._source.neighbours)
        if item.before is None:
            return Wanted(ids, np.ones(len(ids), dtype=bool), same_chunks=False)
        if item.before.neighbours == item.files.neighbours:
            return Wanted(ids, np.zeros(len(ids), dtype=bool), same_chunks=True)
        table = self._neighbours(item.before)
        earlier = table["chunk_id"].to_numpy()
        were = neighbour_ids(table, earlier, self._source.neighbours)
        same = (were[locate(earlier, chunk_ids)] == ids).all(axis=1)
        return Wanted(ids, ~same, same_chunks=len(earlier) == len(chunk_ids))

    def _neighbours(self, held: ShardFiles | Before) -> pa.Table:
        return self._storage.read_table(held.neighbours, list(NEIGHBOUR_COLUMNS))


class Ask(_NeighboursDoFn):
    """Task -> (neighbour's shard, request)."""

    def process(self, task: Task) -> Iterator[tuple[int, bytes]]:
        with self._naming(task.number):
            if self._left(task) is None:
                return
            for shard, request in requests(self._wanted(task.payload).asked, task.number).items():
                yield shard, request.to_bytes()


class AnswerRequests(_NeighboursDoFn):
    """(neighbour's shard, requests) -> (query's shard, answer)."""

    def process(self, element: tuple[int, Iterable[bytes]]) -> Iterator[tuple[int, bytes]]:
        shard, messages = element
        with self._naming(shard):
            chunks = self._source.read(self._storage, shard)
            for message in messages:
                request = Request.from_bytes(message)
                for part in request.cut(ANSWER_ROWS):
                    yield request.query_shard, answer(part, chunks).to_bytes()


class FromAnswers(_NeighboursDoFn):
    """(query's shard, its task and answers) -> the stage's shard, and its receipt.

    Or, where neighbours are looked up, a task -> the same.
    """

    def setup(self) -> None:
        super().setup()
        self._recent = Recent(
            functools.partial(self._source.read, self._storage), lambda chunks: chunks.nbytes, NEIGHBOUR_CACHE_BYTES
        )

    def process(self, element: Any) -> Iterator[int]:
        if self._source.looked_up:
            yield from self._look_up(element)
            return
        number, parts = element
        with self._naming(number):
            for task in parts["tasks"]:
                if self._left(task) is not None:
                    answers = map(Answer.from_bytes, parts["answers"])
                    finish(self._book, self.make(task, self._wanted(task.payload), answers))
                yield number

    def _look_up(self, task: Task) -> Iterator[int]:
        with self._naming(task.number):
            if self._left(task) is not None:
                wanted = self._wanted(task.payload)
                finish(self._book, self.make(task, wanted, self._answers(task.number, wanted)))
            yield task.number

    def _answers(self, number: int, wanted: Wanted) -> Iterator[Answer]:
        """The shards that are at hand first: read in turn, each would have gone when its turn comes again."""
        asked = requests(wanted.asked, number)
        for shard in sorted(asked, key=lambda shard: (shard not in self._recent, shard)):
            for part in asked[shard].cut(ANSWER_ROWS):
                yield answer(part, self._recent.get(shard))

    def make(self, task: Task, wanted: Wanted, answers: Iterable[Answer]) -> Receipt:
        """Write the shard of a task, which wants that, from the answers to its requests."""
        raise NotImplementedError


def read_chunks(storage: Storage, path: File) -> ChunkArrays:
    """A chunk shard's columns that the join needs."""
    return ChunkArrays.from_table(storage.read_table(path, list(CHUNK_COLUMNS)))


def join_tasks(
    files: Mapping[int, ShardFiles], chunks: Sequence[Shard], before: Mapping[int, Before] | None = None
) -> list[Task]:
    """One task a chunk shard; ``before`` are those of the version that another is made from."""
    made = before or {}
    return [Task(s.number, JoinItem(files[s.number], made.get(s.number)), weight=s.rows) for s in chunks]


def join_pipeline(
    pipeline: beam.Pipeline, book: ReceiptBook, tasks: Sequence[Task], source: NeighbourSource, last: FromAnswers
) -> beam.PCollection:
    """Make query shards from the tokens of their nearest neighbours."""
    dealt = pipeline | DealOut(tasks)
    name = type(last).__name__.lower()
    if source.looked_up:
        return dealt | name >> beam.ParDo(last)
    answers = (
        dealt
        | "ask" >> beam.ParDo(Ask(book, source))
        | "by neighbour's shard" >> beam.GroupByKey()
        | "answer" >> beam.ParDo(AnswerRequests(book, source))
    )
    keyed = dealt | "by number" >> beam.Map(_by_number)
    joined = {"tasks": keyed, "answers": answers} | "by query's shard" >> beam.CoGroupByKey()
    return joined | name >> beam.ParDo(last)


def _by_number(task: Task) -> tuple[int, Task]:
    return task.number, task
