"""training: sequences of chunks, joined with their neighbours' tokens (see `retrodb.pipelines.shuffle`)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import apache_beam as beam
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.shards import validation_chunks
from retrodb.pipelines.shuffle import FromAnswers, read_chunks, shuffle_pipeline, wanted_neighbours
from retrodb.pipelines.tasks import Task

from retrodb.manifest import Shard, shard_path
from retrodb.training.join import assemble
from retrodb.training.messages import Answer
from retrodb.training.sequences import pack
from retrodb.training.shards import VALIDATION_ROWS, write_training


@dataclass(frozen=True)
class JoinSettings:
    """n/m slots a sequence, k' neighbours a chunk."""

    slots: int
    neighbours: int


class Assemble(FromAnswers):
    """Packs the query's shard into sequences and writes them."""

    def __init__(self, book: ReceiptBook, settings: JoinSettings) -> None:
        super().__init__(book, settings.neighbours)
        self._slots = settings.slots

    def make(self, task: Task, messages: Iterable[bytes]) -> Receipt:
        chunks = read_chunks(self._storage, task.payload.chunks)
        validation = validation_chunks(self._storage, task.payload, chunks.document_ids)
        packed = pack(chunks.chunk_ids, chunks.document_ids, chunks.n_tokens, validation, self._slots)
        wanted = wanted_neighbours(self._storage, task.payload, self._neighbours)
        table = assemble(packed, chunks, wanted, map(Answer.from_bytes, messages), task.number)
        committed = write_training(self._storage, shard_path("training", task.number), table)
        counts = {"joined": int((wanted >= 0).sum()), "training_chunks": len(chunks)}
        shard = Shard.of(committed, task.number, table.num_rows)
        return Receipt(task.number, {"training": shard}, counts, {VALIDATION_ROWS: len(packed) - packed.training_rows})


def training_pipeline(
    pipeline: beam.Pipeline, book: ReceiptBook, tasks: Sequence[Task], settings: JoinSettings
) -> beam.PCollection:
    """Join query shards with their neighbours' tokens."""
    return shuffle_pipeline(pipeline, book, tasks, settings.neighbours, Assemble(book, settings))
