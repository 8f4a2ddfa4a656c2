"""report: what every chunk has in common with its neighbours (see `retrodb.pipelines.join`)."""

from collections.abc import Iterable, Sequence
from typing import Final

import apache_beam as beam
from retrodb.pipelines.integrity import proven
from retrodb.pipelines.join import FromAnswers, JoinItem, NeighbourSource, Wanted, join_pipeline, read_chunks
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.shards import chunk_columns, validation_chunks
from retrodb.pipelines.tasks import Task

from retrodb.manifest import Shard, shard_path
from retrodb.quality.leakage import histograms, leakage_table, with_earlier, worst_rows
from retrodb.training.columns import scalars
from retrodb.training.messages import Answer

LEAKAGE_ROW_GROUP: Final = 1 << 16
WORST_PAIRS: Final = 20
"""Pairs in the report; as many of each shard are kept until they are merged."""


class Compare(FromAnswers):
    """Writes the overlaps of the query's shard; their histograms and the worst pairs go into the receipt."""

    def __init__(self, book: ReceiptBook, source: NeighbourSource, chunk_tokens: int) -> None:
        super().__init__(book, source)
        self._chunk_tokens = chunk_tokens

    def make(self, task: Task, wanted: Wanted, answers: Iterable[Answer]) -> Receipt:
        item: JoinItem = task.payload
        if item.before is not None and wanted.stays:
            shard, table = item.before.made, self._storage.read_table(proven(self._storage, item.before.made))
        else:
            chunks = read_chunks(self._storage, item.files.chunks)
            table = leakage_table(chunks, wanted.asked, answers, task.number)
            if item.before is not None:
                before = self._storage.read_table(proven(self._storage, item.before.made))
                table = with_earlier(table, before, wanted.fresh)
            committed = self._storage.commit_table(shard_path("leakage", task.number), table, LEAKAGE_ROW_GROUP)
            shard = Shard.of(committed, task.number, table.num_rows)
        overlap = scalars(table, "overlap")
        chunk_ids, document_ids = chunk_columns(self._storage, item.files)
        validation = validation_chunks(self._storage, item.files, document_ids)
        worst = worst_rows(overlap, chunk_ids, document_ids, WORST_PAIRS)
        rows = table.take(worst).select(["overlap", "chunk_id", "neighbour_id"]).to_pylist()
        details = {
            "histograms": histograms(overlap, validation, self._chunk_tokens),
            "worst": [list(row.values()) for row in rows],
        }
        return Receipt(task.number, {"leakage": shard}, {"compared": int((wanted.ids >= 0).sum())}, details)


def leakage_pipeline(
    pipeline: beam.Pipeline, book: ReceiptBook, tasks: Sequence[Task], source: NeighbourSource, chunk_tokens: int
) -> beam.PCollection:
    """Compare the chunks of query shards, of ``chunk_tokens`` each, with their neighbours."""
    return join_pipeline(pipeline, book, tasks, source, Compare(book, source, chunk_tokens))
