"""training: sequences of chunks, joined with their neighbours' tokens (see `retrodb.pipelines.join`)."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import apache_beam as beam
from retrodb.pipelines.integrity import proven
from retrodb.pipelines.join import FromAnswers, JoinItem, NeighbourSource, Wanted, join_pipeline, read_chunks
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.shards import validation_chunks
from retrodb.pipelines.tasks import Task

from retrodb.manifest import Shard, shard_path
from retrodb.training.join import Earlier, Joined, assemble
from retrodb.training.messages import Answer
from retrodb.training.sequences import pack
from retrodb.training.shards import TRAINING_ROW_GROUP, VALIDATION_ROWS, TrainingShard, write_training


class Assemble(FromAnswers):
    """Packs the query's shard into sequences and writes them."""

    def __init__(self, book: ReceiptBook, source: NeighbourSource, slots: int) -> None:
        super().__init__(book, source)
        self._slots = slots

    def make(self, task: Task, wanted: Wanted, answers: Iterable[Answer]) -> Receipt:
        item: JoinItem = task.payload
        counts = {"joined": int((wanted.ids >= 0).sum()), "training_chunks": len(wanted.ids)}
        if item.before is not None and wanted.stays:
            return Receipt(task.number, {"training": item.before.made}, counts, dict(item.before.details))
        chunks = read_chunks(self._storage, item.files.chunks)
        validation = validation_chunks(self._storage, item.files, chunks.document_ids)
        packed = pack(chunks.chunk_ids, chunks.document_ids, chunks.n_tokens, validation, self._slots)
        earlier = Earlier(wanted.fresh, self._joined_before(item.before.made)) if item.before is not None else None
        table = assemble(packed, chunks, wanted.ids, answers, task.number, earlier)
        committed = write_training(self._storage, shard_path("training", task.number), table)
        shard = Shard.of(committed, task.number, table.num_rows)
        return Receipt(task.number, {"training": shard}, counts, {VALIDATION_ROWS: len(packed) - packed.training_rows})

    def _joined_before(self, shard: Shard) -> Iterator[Joined]:
        """What a training shard of the version before holds, a row group at a time."""
        proven(self._storage, shard)
        with contextlib.closing(TrainingShard(self._storage, shard)) as there:
            for first in range(0, shard.rows, TRAINING_ROW_GROUP):
                columns = there.read(first, min(TRAINING_ROW_GROUP, shard.rows - first))
                used = columns["chunk_ids"] >= 0
                yield Joined(
                    columns["chunk_ids"][used], columns["neighbour_tokens"][used], columns["neighbour_lengths"][used]
                )


def training_pipeline(
    pipeline: beam.Pipeline, book: ReceiptBook, tasks: Sequence[Task], source: NeighbourSource, slots: int
) -> beam.PCollection:
    """Join query shards with their neighbours' tokens; ``slots`` are the n/m chunks of a sequence."""
    return join_pipeline(pipeline, book, tasks, source, Assemble(book, source, slots))
