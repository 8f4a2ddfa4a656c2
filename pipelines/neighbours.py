"""neighbours: exact truth for a sample, and the cheapest nprobe that reaches the gate. The rest is `search`."""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import apache_beam as beam
import numpy as np
from retrodb.pipelines.index import indexed_part
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.searching import SearchSettings, WholeIndexStep, query_clusters
from retrodb.pipelines.shards import ShardFiles, chunk_columns, vectors_of
from retrodb.pipelines.tasks import DealOut, StageDoFn, Task

from retrodb.index.engine import Metric
from retrodb.manifest import Shard
from retrodb.neighbours import (
    NO_CLUSTER,
    ClusterSource,
    Exclude,
    Exclusion,
    SameCluster,
    StoredClusters,
    StoredDocuments,
)
from retrodb.quality.recall import RECALL_AT, exact_top, merge_exact, recall_at
from retrodb.storage import Storage

TRUTH_NUMBER: Final = -1
TUNING_NUMBER: Final = -1000
"""The receipt of nprobe p has number ``TUNING_NUMBER - p``."""


@dataclass(frozen=True)
class Sample:
    """Query chunks drawn for measuring recall: ids, excluded ranges and clusters int64 [q], vectors float16 [q, d]."""

    chunk_ids: np.ndarray
    first: np.ndarray
    last: np.ndarray
    clusters: np.ndarray
    vectors: np.ndarray

    def exclusion(self, source: ClusterSource) -> Exclusion:
        """Of these queries; ``source`` knows the clusters of candidates."""
        hook = SameCluster(self.clusters, source) if (self.clusters != NO_CLUSTER).any() else None
        return Exclusion(self.first, self.last, np.arange(len(self.chunk_ids), dtype=np.int64), hook)

    def to_bytes(self) -> bytes:
        buffer = io.BytesIO()
        np.savez(buffer, **vars(self))
        return buffer.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> "Sample":
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return Sample(**{name: arrays[name] for name in ("chunk_ids", "first", "last", "clusters", "vectors")})


def draw_sample(
    storage: Storage, files: Mapping[int, ShardFiles], rows: Mapping[int, np.ndarray], exclude: Exclude
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
        parts.append((chunk_ids[own], exclusion.first, exclusion.last, clusters, vectors))
    return Sample(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def sample_path(book: ReceiptBook) -> str:
    """Where the sample of a neighbours stage lies while it runs."""
    return f"{book.folder}/sample.npz"


class MergeTruth(beam.CombineFn):
    """Merges exact top lists of shards; the accumulator is one such list."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def create_accumulator(self) -> list[Any]:
        return []

    def add_input(self, accumulator: list[Any], top: Any) -> list[Any]:
        return self._merged([*accumulator, top])

    def merge_accumulators(self, accumulators: Iterable[list[Any]]) -> list[Any]:
        return self._merged([top for accumulator in accumulators for top in accumulator])

    def extract_output(self, accumulator: list[Any]) -> Any:
        return accumulator[0] if accumulator else None

    def _merged(self, tops: list[Any]) -> list[Any]:
        return [merge_exact(tops, RECALL_AT, self._metric)] if tops else []


class _SampleDoFn(StageDoFn):
    """Reads the sampled queries once a worker."""

    def __init__(self, book: ReceiptBook, metric: Metric) -> None:
        super().__init__(book)
        self._metric = metric
        self._sample: Sample | None = None

    def _queries(self) -> Sample:
        if self._sample is None:
            self._sample = Sample.from_bytes(self._storage.read_bytes(sample_path(self._book)))
        return self._sample


class ExactOfShard(_SampleDoFn):
    """Task -> the exact nearest of every sampled query within one shard."""

    def process(self, task: Task) -> Iterator[Any]:
        with self._naming(task.number):
            sample = self._queries()
            storage, files = self._storage, task.payload
            chunk_ids, vectors = indexed_part(storage, files)
            documents = StoredDocuments(storage, {task.number: files.chunks})
            exclusion = sample.exclusion(StoredClusters(documents, {task.number: files.documents}))
            yield exact_top(sample.vectors, exclusion, chunk_ids, vectors, k=RECALL_AT, metric=self._metric)


class WriteTruth(StageDoFn):
    """The merged truth -> a receipt that holds its distances."""

    def process(self, top: Any) -> Iterator[int]:
        with self._naming(TRUTH_NUMBER):
            distances = np.asarray(top[0], dtype=np.float64)
            rows = [[None if np.isnan(cell) else float(cell) for cell in row] for row in distances]
            self._book.write(Receipt(TRUTH_NUMBER, details={"distances": rows}))
            yield TRUTH_NUMBER


def truth_tasks(files: Mapping[int, ShardFiles], chunks: Sequence[Shard]) -> list[Task]:
    """One task a shard; together they give one receipt."""
    return [Task(shard.number, files[shard.number], (TRUTH_NUMBER,), shard.rows) for shard in chunks]


def truth_pipeline(
    pipeline: beam.Pipeline, book: ReceiptBook, tasks: Sequence[Task], metric: Metric
) -> beam.PCollection:
    """Exact search of the sample over all shards."""
    return (
        pipeline
        | DealOut(tasks)
        | "compare with all" >> beam.ParDo(ExactOfShard(book, metric))
        | "merge" >> beam.CombineGlobally(MergeTruth(metric))
        | "write" >> beam.ParDo(WriteTruth(book))
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
            found = self._find(sample.chunk_ids, sample.vectors, sample.exclusion(self._clusters))
            recall = recall_at(found.distances, truth_distances(truth), self._settings.metric)
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
