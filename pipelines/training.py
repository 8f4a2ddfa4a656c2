"""training: sequences of chunks, joined with their neighbours' tokens (see `retrodb.pipelines.join`)."""

from collections.abc import Iterable, Sequence

import apache_beam as beam
from retrodb.pipelines.join import FromAnswers, NeighbourSource, join_pipeline, read_chunks
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.shards import validation_chunks
from retrodb.pipelines.tasks import Task

from retrodb.manifest import Shard, shard_path
from retrodb.training.join import assemble
from retrodb.training.messages import Answer
from retrodb.training.sequences import pack
from retrodb.training.shards import VALIDATION_ROWS, write_training


class Assemble(FromAnswers):
    """Packs the query's shard into sequences and writes them."""

    def __init__(self, book: ReceiptBook, source: NeighbourSource, slots: int) -> None:
        super().__init__(book, source)
        self._slots = slots

    def make(self, task: Task, answers: Iterable[Answer]) -> Receipt:
        chunks = read_chunks(self._storage, task.payload.chunks)
        validation = validation_chunks(self._storage, task.payload, chunks.document_ids)
        packed = pack(chunks.chunk_ids, chunks.document_ids, chunks.n_tokens, validation, self._slots)
        wanted = self._wanted(task.payload)
        table = assemble(packed, chunks, wanted, answers, task.number)
        committed = write_training(self._storage, shard_path("training", task.number), table)
        counts = {"joined": int((wanted >= 0).sum()), "training_chunks": len(chunks)}
        shard = Shard.of(committed, task.number, table.num_rows)
        return Receipt(task.number, {"training": shard}, counts, {VALIDATION_ROWS: len(packed) - packed.training_rows})


def training_pipeline(
    pipeline: beam.Pipeline, book: ReceiptBook, tasks: Sequence[Task], source: NeighbourSource, slots: int
) -> beam.PCollection:
    """Join query shards with their neighbours' tokens; ``slots`` are the n/m chunks of a sequence."""
    return join_pipeline(pipeline, book, tasks, source, Assemble(book, source, slots))
