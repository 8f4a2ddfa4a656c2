"""report: what every chunk has in common with its neighbours (see `retrodb.pipelines.join`)."""

from collections.abc import Iterable, Sequence
from typing import Final

import apache_beam as beam
from retrodb.pipelines.join import FromAnswers, NeighbourSource, join_pipeline, read_chunks
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.shards import validation_chunks
from retrodb.pipelines.tasks import Task

from retrodb.manifest import Shard, shard_path
from retrodb.quality.leakage import histograms, leakage_table, worst_rows
from retrodb.training.messages import Answer

LEAKAGE_ROW_GROUP: Final = 1 << 16
WORST_PAIRS: Final = 20
"""Pairs in the report; as many of each shard are kept until they are merged."""


class Compare(FromAnswers):
    """Writes the overlaps of the query's shard; their histograms and the worst pairs go into the receipt."""

    def make(self, task: Task, answers: Iterable[Answer]) -> Receipt:
        chunks = read_chunks(self._storage, task.payload.chunks)
        validation = validation_chunks(self._storage, task.payload, chunks.document_ids)
        wanted = self._wanted(task.payload)
        table = leakage_table(chunks, wanted, answers, task.number)
        committed = self._storage.commit_table(shard_path("leakage", task.number), table, LEAKAGE_ROW_GROUP)
        overlap = table["overlap"].to_numpy()
        worst = worst_rows(overlap, chunks.chunk_ids, chunks.document_ids, WORST_PAIRS)
        rows = table.take(worst).select(["overlap", "chunk_id", "neighbour_id"]).to_pylist()
        details = {
            "histograms": histograms(overlap, validation, chunks.chunk_tokens),
            "worst": [list(row.values()) for row in rows],
        }
        counts = {"compared": int((wanted >= 0).sum())}
        return Receipt(task.number, {"leakage": Shard.of(committed, task.number, table.num_rows)}, counts, details)


def leakage_pipeline(
    pipeline: beam.Pipeline, book: ReceiptBook, tasks: Sequence[Task], source: NeighbourSource
) -> beam.PCollection:
    """Compare the chunks of query shards with their neighbours."""
    return join_pipeline(pipeline, book, tasks, source, Compare(book, source))
