"""What an addition makes of the stages behind the encoder: what is there stays, and takes in what is new.

`retrodb.pipelines.add` tells the whole; the stages themselves are those of a build, which find receipts for all that
stays as it was.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import apache_beam as beam
import numpy as np
from retrodb.pipelines import index as index_stage
from retrodb.pipelines import stages
from retrodb.pipelines.block_duplicates import TABLE, find_block_duplicates
from retrodb.pipelines.builder import Builder
from retrodb.pipelines.chunk import VALIDATION_CHUNKS
from retrodb.pipelines.index import IndexSettings
from retrodb.pipelines.leakage import WORST_PAIRS
from retrodb.pipelines.lineage import FIRST_SHARDS, choice_of, first_shards
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.report_stage import build_report
from retrodb.pipelines.retrieval_stages import (
    SMALL_VECTORS,
    Earlier,
    build_neighbours,
    build_training,
    neighbours_parts,
    renew_neighbours,
)
from retrodb.pipelines.searching import QueryShard, SearchSettings, SearchShard
from retrodb.pipelines.shards import ShardFiles, chunk_clusters, chunk_columns, shard_files, validation_chunks
from retrodb.pipelines.tasks import DealOut, Task

from retrodb.index import MISSING, bytes_per_vector, group_shards
from retrodb.manifest import LARGEST_NORM, LEFT_OUT, TEMPLATE_NUMBER, Manifest, Shard
from retrodb.neighbours import NO_CLUSTER, UidSource, from_table
from retrodb.neighbours.select import distinct
from retrodb.neighbours.table import Neighbours
from retrodb.quality.leakage import histograms, worst_rows
from retrodb.sizes import count_of
from retrodb.training.columns import lists, scalars
from retrodb.training.shards import VALIDATION_ROWS


def extend_block_duplicates(builder: Builder) -> None:
    """Which blocks are equal, found anew among all."""
    if builder.config.unit != "block" or TABLE in builder.manifest.tables:
        return
    shards, counts = find_block_duplicates(builder, builder.manifest.shards("chunks"))
    state = builder.manifest.stages["chunk"]
    counted = replace(state, counts={**state.counts, **counts})
    builder.save(builder.manifest.with_stage("chunk", counted, {TABLE: shards}))


def extend_index(builder: Builder, current: Manifest, new: Manifest) -> None:
    """The index shards that are there, and further ones, all under the quantiser that is there."""
    state = current.stages["index"]
    choice = choice_of(current)
    left_out = state.made_from.get(LEFT_OUT)
    parts = stages.index_parts(builder.manifest.stages["embed"].fingerprint, builder.config, choice, left_out)
    if builder.is_current("index", parts):
        return
    there = current.shards("index")
    template = next(shard for shard in there if shard.number == TEMPLATE_NUMBER)
    held_out = new.stages["chunk"].details.get(VALIDATION_CHUNKS, {})
    rows = {shard.number: shard.rows - held_out.get(str(shard.number), 0) for shard in new.shards("chunks")}
    dimension = int(current.fingerprints["encoder"]["dimension"])
    settings = IndexSettings(choice.key, builder.config.metric, dimension, builder.config.seed)
    data = builder.storage.read_bytes(template)
    vector_bytes = bytes_per_vector(data, dimension, settings.metric)
    numbers = sorted(rows)
    groups = group_shards([rows[number] for number in numbers], len(data), vector_bytes, choice.exact)
    files = shard_files(builder.manifest)
    made = index_stage.add_tasks(
        [[files[numbers[at]] for at in group] for group in groups],
        [sum(rows[numbers[at]] for at in group) for group in groups],
    )
    first = max(shard.number for shard in there) + 1
    tasks = [replace(task, number=first + task.number) for task in made]
    book = builder.book("index", parts)
    builder.begin("index", parts)
    receipts = builder.executor.complete(
        book,
        tasks,
        lambda pipeline, some: index_stage.add_pipeline(pipeline, book, some, settings, template),
        unit="vectors",
        small=SMALL_VECTORS,
    )
    added = [receipt.shards["index"] for receipt in receipts.values()]
    counts = {**state.counts, "indexed": state.counts["indexed"] + sum(shard.rows for shard in added)}
    details = {**state.details, "vectors": state.details["vectors"] + sum(rows.values())}
    details["shards"] = state.details["shards"] + len(groups)
    details[FIRST_SHARDS] = [*first_shards(current), *(numbers[group[0]] for group in groups)]
    if settings.metric == "ip":
        norms = [receipt.details.get(LARGEST_NORM, 0.0) for receipt in receipts.values()]
        details[LARGEST_NORM] = max([state.details.get(LARGEST_NORM, 0.0), *norms])
    builder.record("index", parts, {"index": [*there, *added]}, counts, details)
    builder.progress.end(f"{count_of(sum(rows.values()), 'vector')} in {count_of(len(groups), 'more shard')}")


# -- neighbours --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OldNeighbours:
    """A query shard that was there, and its neighbours as they were."""

    query: QueryShard
    before: Shard


class TakeNearer(SearchShard):
    """Task (a query shard that was there) -> its neighbours, with what is nearer of the new index shards; the shard as
    it was where nothing is.

    Chunks with a neighbour whose document has become a near-duplicate of theirs are searched anew, where those are
    excluded: ``whole`` are the settings for all of the index. So are chunks that something new is nearer to and that
    name a deleted one: what stands behind the k that they had is not known. To others that name one nothing happens,
    lest an addition cost what a compaction does: readers pass over it.
    """

    def __init__(self, book: ReceiptBook, settings: SearchSettings, whole: SearchSettings) -> None:
        super().__init__(book, settings)
        self._anew = SearchShard(book, whole)

    def setup(self) -> None:
        super().setup()
        self._anew.setup()

    def process(self, task: Task) -> Iterator[int]:
        with self._naming(task.number):
            if self._left(task) is not None:
                self._take(task)
            yield task.number

    def _take(self, task: Task) -> None:
        payload: OldNeighbours = task.payload
        before = from_table(self._storage.read_table(payload.before))
        found = self._found(payload.query.files)
        gone = self._gone.of_chunks(before.neighbour_ids)
        merged = nearest_of(before, found, self._settings.metric, self._uids, gone)
        nearer = np.isin(merged.neighbour_ids, found.neighbour_ids[found.neighbour_ids >= 0]).any(axis=1)
        outdated = gone.any(axis=1)
        rows = np.flatnonzero((outdated & nearer) | self._joined(payload.query.files, before))
        taken = np.flatnonzero(nearer & ~outdated)
        if not len(rows) and not len(taken):
            self._account(task.number, before, payload.before, searched=0)
            return
        after = before.put(taken, merged.take(taken))
        if len(rows):
            after = after.put(rows, self._anew._found(payload.query.files, rows))
        self._finish(task.number, after, searched=len(rows))

    def _joined(self, files: ShardFiles, before: Neighbours) -> np.ndarray:
        """bool [n]: which rows name a chunk of what is their own near-duplicate cluster now."""
        if self._settings.exclude != "cluster":
            return np.zeros(len(before.chunk_ids), dtype=bool)
        document_ids = chunk_columns(self._storage, files)[1]
        own = chunk_clusters(self._storage, files, document_ids)
        found, there = before.neighbour_document_ids, before.neighbour_ids >= 0
        theirs = np.full(found.shape, NO_CLUSTER)
        theirs[there] = self._clusters.of_documents(found[there])
        joined: np.ndarray = ((theirs == own[:, None]) & (theirs != NO_CLUSTER)).any(axis=1)
        return joined


def nearest_of(
    before: Neighbours,
    found: Neighbours,
    metric: str,
    uids: UidSource | None = None,
    gone: np.ndarray | None = None,
) -> Neighbours:
    """The k best of two sets of neighbours of the same queries that have none in common; ties by ascending id.

    With ``uids``, of equal blocks the best one alone. Each set has the k best distinct ones of its own part of the
    chunks, so that the k best of both are those of all.

    ``gone``, bool [n, k], are neighbours of ``before`` that were deleted since. They keep their places, so that what
    is not as near as the last one does not come in; but they stand for no equal, and behind what is as near as they.
    """
    gone = np.zeros(before.neighbour_ids.shape, dtype=bool) if gone is None else gone
    gone = np.concatenate([gone, np.zeros(found.neighbour_ids.shape, dtype=bool)], axis=1)
    ids = np.concatenate([before.neighbour_ids, found.neighbour_ids], axis=1)
    documents = np.concatenate([before.neighbour_document_ids, found.neighbour_document_ids], axis=1)
    distances = np.concatenate([before.distances, found.distances], axis=1)
    keys = np.where(ids >= 0, -distances if metric == "ip" else distances, np.inf)
    order = np.lexsort((np.where(ids >= 0, ids, np.iinfo(np.int64).max), gone, keys), axis=1)
    if uids is not None:
        kept = np.take_along_axis(gone, order, axis=1)
        kept |= distinct(np.take_along_axis(np.where(gone, MISSING, ids), order, axis=1), uids)
        copies = ~np.take_along_axis(kept, np.argsort(order, axis=1), axis=1)
        ids, documents = np.where(copies, MISSING, ids), np.where(copies, MISSING, documents)
        distances = np.where(copies, np.float32(np.nan), distances)
        order = np.take_along_axis(order, np.argsort(~kept, axis=1, kind="stable"), axis=1)
    order = order[:, : before.k]

    def taken(values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, order, axis=1)

    nearest = taken(ids)
    n_valid = (nearest >= 0).sum(axis=1).astype(np.int16)
    return Neighbours(before.chunk_ids, nearest, taken(documents), taken(distances), n_valid)


def extend_neighbours(builder: Builder, current: Manifest) -> int:
    """The new chunks' neighbours, searched in everything; those of the others, as far as something new is nearer.

    Where candidates are re-ranked all are searched anew: those that gave way to better ones are not kept.

    Returns:
        The shards of old chunks that changed.
    """
    before = {shard.number: shard for shard in current.shards("neighbours")}
    if builder.config.rerank != "none":
        build_neighbours(builder)
    elif not builder.is_current("neighbours", neighbours_parts(builder)):
        files = shard_files(builder.manifest)
        tasks = [
            Task(n, OldNeighbours(QueryShard(files[n]), shard), weight=shard.rows)
            for n, shard in sorted(before.items())
        ]
        nprobe = int(current.stages["neighbours"].details["nprobe"])
        there = frozenset(current.shards("index"))
        renew_neighbours(builder, Earlier(nprobe, tasks, functools.partial(_take_pipeline, there)))
    return sum(before.get(s.number, s) != s for s in builder.manifest.shards("neighbours"))


def _take_pipeline(
    there: frozenset[Shard],
    pipeline: beam.Pipeline,
    book: ReceiptBook,
    tasks: Sequence[Task],
    whole: SearchSettings,
) -> beam.PCollection:
    """``there`` are the index shards that the old neighbours were found in."""
    settings = replace(whole, index=tuple(file for file in whole.index if file.path not in there))
    return pipeline | DealOut(tasks) | "take nearer" >> beam.ParDo(TakeNearer(book, settings, whole))


# -- what follows from neighbours --------------------------------------------------------------------------------------


def _unchanged(builder: Builder, current: Manifest) -> list[int]:
    """The shards whose neighbours are as they were."""
    before = {shard.number: shard for shard in current.shards("neighbours")}
    return [s.number for s in builder.manifest.shards("neighbours") if before.get(s.number) == s]


def _inherit(
    builder: Builder,
    current: Manifest,
    stage: str,
    table: str,
    parts: dict[str, Any],
    receipt_of: Callable[[Shard, ShardFiles], Receipt],
) -> None:
    """Leave receipts for the shards that stay as they are, so that a stage makes the others alone."""
    book = builder.book(stage, parts)
    files = shard_files(builder.manifest)
    made = {shard.number: shard for shard in current.shards(table)}
    for number in _unchanged(builder, current):
        if book.read(number) is None:
            book.write(receipt_of(made[number], files[number]))


def extend_training(builder: Builder, current: Manifest) -> None:
    """Sequences of the shards whose neighbours changed, and of the new ones."""
    parts = stages.training_parts(builder.manifest.stages["neighbours"].fingerprint, builder.config)
    if not builder.is_current("training", parts):
        validation = current.stages["training"].details[VALIDATION_ROWS]

        def receipt_of(shard: Shard, files: ShardFiles) -> Receipt:
            found = lists(builder.storage.read_table(files.neighbours, ["neighbour_ids"]), "neighbour_ids", -1)
            joined = int((found[:, : builder.config.training_neighbours] >= 0).sum())
            counts = {"joined": joined, "training_chunks": len(found)}
            return Receipt(shard.number, {"training": shard}, counts, {VALIDATION_ROWS: validation[str(shard.number)]})

        builder.begin("training", parts)
        _inherit(builder, current, "training", "training", parts, receipt_of)
    build_training(builder)


def extend_report(builder: Builder, current: Manifest) -> None:
    """The leakage of the same shards, and the report of all."""
    parts = stages.report_parts(builder.manifest.stages["neighbours"].fingerprint, builder.config)
    if not builder.is_current("report", parts):

        def receipt_of(shard: Shard, files: ShardFiles) -> Receipt:
            storage, k = builder.storage, parts["neighbours"]
            table = storage.read_table(shard, ["overlap", "chunk_id", "neighbour_id"])
            chunks = storage.read_table(files.chunks, ["chunk_id", "document_id"])
            document_ids, overlap = scalars(chunks, "document_id"), scalars(table, "overlap")
            worst = worst_rows(overlap, scalars(chunks, "chunk_id"), document_ids, WORST_PAIRS)
            found = lists(storage.read_table(files.neighbours, ["neighbour_ids"]), "neighbour_ids", -1)
            details = {
                "histograms": histograms(
                    overlap, validation_chunks(storage, files, document_ids), builder.config.chunk_tokens
                ),
                "worst": [list(row.values()) for row in table.take(worst).to_pylist()],
            }
            return Receipt(shard.number, {"leakage": shard}, {"compared": int((found[:, :k] >= 0).sum())}, details)

        builder.begin("report", parts)
        _inherit(builder, current, "report", "leakage", parts, receipt_of)
    build_report(builder)
