"""neighbours: exact truth for a sample, and the cheapest nprobe that reaches the gate. The rest is `search`."""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import apache_beam as beam
import numpy as np
from retrodb.pipelines.index import indexed_part
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.searching import SearchSettings, WholeIndexStep, query_clusters, query_uids
from retrodb.pipelines.shards import ShardFiles, chunk_columns, vectors_of
from retrodb.pipelines.tasks import DealOut, StageDoFn, Task

from retrodb.index.engine import Metric
from retrodb.manifest import Shard
from retrodb.neighbours import (
    NO_CLUSTER,
    ClusterSource,
    Exclude,
    ExcludedPairs,
    Exclusion,
    SameBlock,
    SameCluster,
    StoredClusters,
    StoredDocuments,
    StoredUids,
    UidSource,
)
from retrodb.quality.recall import RECALL_AT, distinct_top, exact_top, merge_exact, recall_at
from retrodb.storage import Storage

TRUTH_NUMBER: Final = -1
TUNING_NUMBER: Final = -1000
"""The receipt of nprobe p has number ``TUNING_NUMBER - p``."""


@dataclass(frozen=True)
class Sample:
    """Query chunks drawn for measuring recall: ids, excluded ranges, clusters and uids (0 for chunks) int64 [q],
    vectors float16 [q, d]."""

    chunk_ids: np.ndarray
    first: np.ndarray
    last: np.ndarray
    clusters: np.ndarray
    uids: np.ndarray
    vectors: np.ndarray

    def exclusion(
        self, clusters: ClusterSource, uids: UidSource | None, deleted: ExcludedPairs | None = None
    ) -> Exclusion:
        """Of these queries; the sources know the candidates, of which none is ``deleted``."""
        exclusion = Exclusion(self.first, self.last, np.arange(len(self.chunk_ids), dtype=np.int64), deleted)
        if (self.clusters != NO_CLUSTER).any():
            exclusion = exclusion.also(SameCluster(self.clusters, clusters))
        if uids is not None:
            exclusion = exclusion.also(SameBlock(self.uids, np.ones(len(exclusion), dtype=bool), uids))
        return exclusion

    def to_bytes(self) -> bytes:
        buffer = io.BytesIO()
        np.savez(buffer, **vars(self))
        return buffer.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> "Sample":
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return Sample(**{field.name: arrays[field.name] for field in fields(Sample)})


def draw_sample(
    storage: Storage, files: Mapping[int, ShardFiles], rows: Mapping[int, np.ndarray], exclude: Exclude, blocks: bool
) -> Sample:
    """The chunks at the given rows of each shard, as queries."""
    parts = []
    for number, own in sorted(rows.items()):
        if not len(own):
            continue
        chunk_ids, document_ids = chunk_columns(storage, files[number])
        exclusion = Exclusion.of_chunks(chunk_ids, document_ids, exclude).take(own)
        clusters = query_clusters(storage, files[number], document_ids, exclude)[own]
        vectors = np.asarray(vectors_of(storage, files[number], len(chunk_ids))[own])
        uids = query_uids(storage, files[number], len(chunk_ids), blocks)[own]
        parts.append((chunk_ids[own], exclusion.first, exclusion.last, clusters, uids, vectors))
    return Sample(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def sample_path(book: ReceiptBook) -> str:
    """Where the sample of a neighbours stage lies while it runs."""
    return f"{book.folder}/sample.npz"


class MergeTruth(beam.CombineFn):
    """Merges exact top lists of shards; the accumulator is one such list."""

    def __init__(self, metric: Metric, kept: int) -> None:
        self._metric = metric
        self._kept = kept

    def create_accumulator(self) -> list[Any]:
        return []

    def add_input(self, accumulator: list[Any], top: Any) -> list[Any]:
        return self._merged([*accumulator, top])

    def merge_accumulators(self, accumulators: Iterable[list[Any]]) -> list[Any]:
        return self._merged([top for accumulator in accumulators for top in accumulator])

    def extract_output(self, accumulator: list[Any]) -> Any:
        return accumulator[0] if accumulator else None

    def _merged(self, tops: list[Any]) -> list[Any]:
        return [merge_exact(tops, self._kept, self._metric)] if tops else []


class _SampleDoFn(StageDoFn):
    """Reads the sampled queries once a worker."""

    def __init__(self, book: ReceiptBook, metric: Metric, blocks: bool) -> None:
        super().__init__(book)
        self._metric = metric
        self._blocks = blocks
        self._sample: Sample | None = None

    def _queries(self) -> Sample:
        if self._sample is None:
            self._sample = Sample.from_bytes(self._storage.read_bytes(sample_path(self._book)))
        return self._sample


class ExactOfShard(_SampleDoFn):
    """Task -> the exact nearest of every sampled query within one shard."""

    def __init__(self, book: ReceiptBook, metric: Metric, blocks: bool, left_out: tuple[Shard, ...]) -> None:
        super().__init__(book, metric, blocks)
        self._left_out = left_out

    def process(self, task: Task) -> Iterator[Any]:
        with self._naming(task.number):
            sample = self._queries()
            storage, files = self._storage, task.payload
            chunk_ids, vectors = indexed_part(storage, files, self._left_out)
            documents = StoredDocuments(storage, {task.number: files.chunks})
            uids = StoredUids(documents) if self._blocks else None
            exclusion = sample.exclusion(StoredClusters(documents, {task.number: files.documents}), uids)
            kept = kept_for_truth(self._blocks)
            yield exact_top(sample.vectors, exclusion, chunk_ids, vectors, k=kept, metric=self._metric)


class WriteTruth(StageDoFn):
    """The merged truth -> a receipt that holds its distances, of equal blocks the best one's alone."""

    def __init__(self, book: ReceiptBook, blocks: Mapping[int, Shard]) -> None:
        super().__init__(book)
        self._blocks = blocks

    def process(self, top: Any) -> Iterator[int]:
        with self._naming(TRUTH_NUMBER):
            if self._blocks:
                top = distinct_top(top, StoredUids(StoredDocuments(self._storage, self._blocks)), RECALL_AT)
            distances = np.asarray(top[0], dtype=np.float64)
            rows = [[None if np.isnan(cell) else float(cell) for cell in row] for row in distances]
            self._book.write(Receipt(TRUTH_NUMBER, details={"distances": rows}))
            yield TRUTH_NUMBER


def kept_for_truth(blocks: bool) -> int:
    """How many exact neighbours are kept until equal blocks are told: enough for four of each. Where there are more,
    recall is measured at fewer than ten."""
    return 4 * RECALL_AT if blocks else RECALL_AT


def truth_tasks(files: Mapping[int, ShardFiles], chunks: Sequence[Shard]) -> list[Task]:
    """One task a shard; together they give one receipt."""
    return [Task(shard.number, files[shard.number], (TRUTH_NUMBER,), shard.rows) for shard in chunks]


def truth_pipeline(
    pipeline: beam.Pipeline,
    book: ReceiptBook,
    tasks: Sequence[Task],
    metric: Metric,
    blocks: Mapping[int, Shard],
    left_out: tuple[Shard, ...],
) -> beam.PCollection:
    """Exact search of the sample over all shards; ``blocks`` are these, by number, where the unit is the block;
    ``left_out`` as in `indexed_part`."""
    return (
        pipeline
        | DealOut(tasks)
        | "compare with all" >> beam.ParDo(ExactOfShard(book, metric, bool(blocks), left_out))
        | "merge" >> beam.CombineGlobally(MergeTruth(metric, kept_for_truth(bool(blocks))))
        | "write" >> beam.ParDo(WriteTruth(book, blocks))
    )


def truth_distances(receipt: Receipt) -> np.ndarray:
    """float32 [q, 10] of a truth receipt, NaN where missing."""
    rows = receipt.details["distances"]
    return np.array([[np.nan if cell is None else cell for cell in row] for row in rows], dtype=np.float32)


class TryNprobe(WholeIndexStep):
    """Task (an nprobe) -> the recall it gives on the sample."""

    def process(self, task: Task) -> Iterator[int]:
        with self._naming(task.number):
            sample = Sample.from_bytes(self._storage.read_bytes(sample_path(self._book)))
            truth = self._book.read(TRUTH_NUMBER)
            assert truth is not None, "tuning follows the truth"
            self._index.nprobe = task.payload
            found = self._find(
                sample.chunk_ids, sample.vectors, sample.exclusion(self._clusters, self._uids, self._gone)
            )
            at = min(RECALL_AT, self._settings.k)  # as the rows that are written are measured
            recall = recall_at(found.distances, truth_distances(truth), self._settings.metric, at)
            self._book.write(Receipt(task.number, details={"nprobe": task.payload, "recall": recall}))
            yield task.number


def nprobe_tasks(nprobes: Sequence[int], queries: int) -> list[Task]:
    """One task an nprobe."""
    return [Task(TUNING_NUMBER - nprobe, nprobe, weight=queries) for nprobe in nprobes]


def tuning_pipeline(
    pipeline: beam.Pipeline, book: ReceiptBook, tasks: Sequence[Task], settings: SearchSettings
) -> beam.PCollection:
    """Measure the recall of some nprobes on the sample."""
    return pipeline | DealOut(tasks) | "try" >> beam.ParDo(TryNprobe(book, settings))
