"""What an addition makes of the stages behind the encoder: what is there stays, and takes in what is new.

`retrodb.pipelines.add` tells the whole; the stages themselves are those of a build, which find receipts for all that
stays as it was.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import apache_beam as beam
import numpy as np
from retrodb.pipelines import index as index_stage
from retrodb.pipelines import stages
from retrodb.pipelines.block_duplicates import TABLE, find_block_duplicates
from retrodb.pipelines.builder import Builder
from retrodb.pipelines.chunk import VALIDATION_CHUNKS
from retrodb.pipelines.index import IndexSettings, indexed_part
from retrodb.pipelines.integrity import proven
from retrodb.pipelines.join import Before
from retrodb.pipelines.lineage import FIRST_SHARDS, choice_of, first_shards
from retrodb.pipelines.receipts import ReceiptBook
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
from retrodb.pipelines.shards import (
    ShardFiles,
    chunk_clusters,
    chunk_columns,
    shard_files,
    vectors_of,
)
from retrodb.pipelines.tasks import DealOut, Task

from retrodb.index import HeldIndex, bytes_per_vector, group_shards
from retrodb.manifest import LARGEST_NORM, LEFT_OUT, TEMPLATE_NUMBER, Manifest, Shard
from retrodb.neighbours import NO_CLUSTER, CandidateSource, from_table
from retrodb.neighbours.joining import nearest_of, within_reach
from retrodb.neighbours.table import Neighbours
from retrodb.sizes import count_of
from retrodb.training.shards import VALIDATION_ROWS

HELD_BYTES: Final = 16 << 20
"""Vectors of what is new, as float32, that a worker holds to compare them with all that was there."""


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
    """Task (a query shard that was there) -> its neighbours, with what is nearer of what is ``new``; the shard as it
    was where nothing is.

    A chunk that has all its neighbours is only asked about where the nearest of the new vectors could be among them:
    of a small addition, nearly none. As long as the new vectors take little memory (`HELD_BYTES`) they are compared as
    they are stored, whatever the index is; else by its new shards, which tell that of exact codes alone.

    Chunks with a neighbour whose document has become a near-duplicate of theirs are searched anew, where those are
    excluded: ``whole`` are the settings for all of the index. So are chunks that something new is nearer to and that
    name a deleted one: what stands behind the k that they had is not known. To others that name one nothing happens,
    lest an addition cost what a compaction does: readers pass over it.
    """

    def __init__(
        self, book: ReceiptBook, settings: SearchSettings, whole: SearchSettings, new: Sequence[ShardFiles]
    ) -> None:
        super().__init__(book, settings)
        self._anew = SearchShard(book, whole)
        self._new = tuple(new)

    def setup(self) -> None:
        super().setup()
        self._anew.setup()
        settings = self._settings
        self._held: HeldIndex | None = None
        if settings.searched.ntotal * 4 * settings.dimension <= HELD_BYTES:
            parts = (indexed_part(self._storage, files) for files in self._new)
            self._held = HeldIndex(parts, settings.dimension, settings.metric)

    @property
    def _source(self) -> CandidateSource:
        return self._index if self._held is None else self._held

    def process(self, task: Task) -> Iterator[int]:
        with self._naming(task.number):
            if self._left(task) is not None:
                self._take(task)
            yield task.number

    def _take(self, task: Task) -> None:
        payload: OldNeighbours = task.payload
        files = payload.query.files
        before = from_table(self._storage.read_table(payload.before))
        vectors = vectors_of(self._storage, files, len(before.chunk_ids))
        asked = within_reach(before, vectors, self._source, self._settings.metric)
        joined = np.flatnonzero(self._joined(files, before))
        if not len(asked) and not len(joined):  # most shards, where little joins much
            self._account(task.number, before, payload.before, searched=0)
            return
        some, found = before.take(asked), self._found(files, asked)
        gone = self._gone.of_chunks(some.neighbour_ids)
        merged = nearest_of(some, found, self._settings.metric, self._uids, gone)
        nearer = np.isin(merged.neighbour_ids, found.neighbour_ids[found.neighbour_ids >= 0]).any(axis=1)
        outdated = gone.any(axis=1)
        taken = nearer & ~outdated
        anew = np.union1d(asked[nearer & outdated], joined)
        if not taken.any() and not len(anew):
            self._account(task.number, before, payload.before, searched=0)
            return
        proven(self._storage, payload.before)
        after = before.put(asked[taken], merged.take(taken))
        if len(anew):
            after = after.put(anew, self._anew._found(files, anew))
        self._finish(task.number, after, searched=len(anew))

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
        new = tuple(files[n] for n in sorted(files.keys() - before.keys()))
        there = frozenset(current.shards("index"))
        renew_neighbours(builder, Earlier(nprobe, tasks, functools.partial(_take_pipeline, there, new)))
    return sum(before.get(s.number, s) != s for s in builder.manifest.shards("neighbours"))


def _take_pipeline(
    there: frozenset[Shard],
    new: Sequence[ShardFiles],
    pipeline: beam.Pipeline,
    book: ReceiptBook,
    tasks: Sequence[Task],
    whole: SearchSettings,
) -> beam.PCollection:
    """``there`` are the index shards that the old neighbours were found in, ``new`` the shards whose chunks are not
    in them."""
    settings = replace(whole, index=tuple(file for file in whole.index if file.path not in there))
    return pipeline | DealOut(tasks) | "take nearer" >> beam.ParDo(TakeNearer(book, settings, whole, new))


# -- what follows from neighbours --------------------------------------------------------------------------------------


def _made_before(builder: Builder, current: Manifest, table: str, details: Mapping[int, Any]) -> dict[int, Before]:
    """What was made of the neighbours that are there, of the shards that still are; ``details`` as receipts told."""
    left = {shard.number for shard in builder.manifest.shards("neighbours")}
    neighbours = {shard.number: shard for shard in current.shards("neighbours")}
    return {
        shard.number: Before(neighbours[shard.number], shard, details.get(shard.number, {}))
        for shard in current.shards(table)
        if shard.number in left
    }


def extend_training(builder: Builder, current: Manifest) -> None:
    """Sequences of the new shards, and of those in which a neighbour that is joined changed: only what changed is
    fetched."""
    rows = current.stages["training"].details[VALIDATION_ROWS]
    details = {int(number): {VALIDATION_ROWS: count} for number, count in rows.items()}
    build_training(builder, _made_before(builder, current, "training", details))


def extend_report(builder: Builder, current: Manifest) -> None:
    """The leakage of chunks whose nearest neighbours changed, and the report of all."""
    build_report(builder, _made_before(builder, current, "leakage", {}))
