"""Every chunk's neighbours, as rounds of a shuffle in which an index shard is read once for many queries.

blocks of query shards x index shards -> search:  candidates of the block in one index shard    (key: piece of queries)
                                      -> merge:   the nearest of all index shards, by distance
                                      -> (fetch:  their vectors, by the candidates' shards; where they are far away)
                                      -> settle:  who is certain, who is asked again               (key: query shard)
                                      -> write:   the query shard's neighbours, or what is left of it for another round
"""

import functools
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import apache_beam as beam
import numpy as np
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.searching import LookingUp, SearchSettings, SearchShard, SearchStep, query_clusters, query_uids
from retrodb.pipelines.shards import ShardFiles, chunk_columns, vectors_of
from retrodb.pipelines.tasks import DealOut, Task, give_memory_back
from retrodb.schemas import ID_SHIFT

from retrodb.index import IndexFile, open_index_file, search_group
from retrodb.index.engine import Metric
from retrodb.neighbours import (
    Exclusion,
)
from retrodb.neighbours.asking import first_asks, rows_at_once
from retrodb.neighbours.rounds import (
    Candidates,
    Chunks,
    Queries,
    Unfinished,
    ask_bytes,
    candidates_of,
    merged,
    piece_rows,
    settled,
    wanted_chunks,
)
from retrodb.neighbours.select import BUDGET_BYTES

WAVE_BYTES: Final = 8 << 20
"""Candidates that one local shuffle may carry: the in-process runner holds each some seven times (measured)."""

SHARE_BYTES: Final = 512 << 20
"""Candidates that a query shard asks for in one round where a runner shuffles them through its disks: all of them, for
a shard of a million chunks. Every round opens every index shard again."""

BLOCK_QUERIES: Final = 8_192
"""Queries that are searched for each time an index shard is opened, at least: opening it then costs nothing beside."""

# -- between rounds: a file a query shard ------------------------------------------------------------------------------


def _rounds(book: ReceiptBook) -> ReceiptBook:
    """What is known of unfinished query shards: how many bytes their queries weigh in the next shuffle."""
    return replace(book, step="rounds")


def _state_path(book: ReceiptBook, number: int, rounds: int) -> str:
    return f"{_rounds(book).folder}/{number:05d}.{rounds}.arrays"


def unfinished(book: ReceiptBook, task: Task, exclusion: Exclusion, settings: SearchSettings) -> Unfinished:
    """Where a query shard (a task of `QueryShard`) stands: as so many rounds left it, or at the start."""
    if task.payload.rounds:
        return Unfinished.from_bytes(book.storage.read_bytes(_state_path(book, task.number, task.payload.rounds)))
    return Unfinished.start(len(exclusion), settings.k, first_asks(exclusion, settings.k, settings.searched))


def forget_search(book: ReceiptBook, numbers: Iterable[int]) -> None:
    """Query shards are to be searched again from the start, whatever was found for them."""
    book.storage.delete(*map(book.path, numbers))
    book.storage.delete_folder(_rounds(book).folder)


def _filled(tasks: Sequence[Task], a_query: int) -> Iterator[list[Task]]:
    """Tasks in waves of `WAVE_BYTES`; a task weighs so many queries of ``a_query`` bytes."""
    wave: list[Task] = []
    room = WAVE_BYTES
    for task in tasks:
        size = min(task.weight * a_query, WAVE_BYTES)
        if wave and size > room:
            yield wave
            wave, room = [], WAVE_BYTES
        wave.append(task)
        room -= size
    if wave:
        yield wave


def search_waves(book: ReceiptBook, settings: SearchSettings) -> Callable[[Sequence[Task], bool], Iterator[list[Task]]]:
    """Round after round until all query shards are finished, each in waves whose shuffle stays below `WAVE_BYTES`
    where it has to be bounded; one wave where nothing is shuffled.

    A task's weight within a wave is what is left of it.
    """
    first = first_asks(Exclusion.of_nothing(1), settings.k, settings.searched)
    a_query = sum(ask_bytes(ask, settings.dimension, settings.fetched) for ask in first) or 1

    def standing(tasks: Sequence[Task]) -> dict[int, Task]:
        """Tasks that a round has been over, as they stand."""
        receipts = _rounds(book).read_all([task.number for task in tasks])
        by_number = {task.number: task for task in tasks}
        return {
            number: replace(
                by_number[number],
                payload=replace(by_number[number].payload, rounds=receipt.counts["rounds"]),
                weight=max(1, receipt.counts["bytes"] // a_query),
            )
            for number, receipt in receipts.items()
        }

    def waves(tasks: Sequence[Task], bounded: bool) -> Iterator[list[Task]]:
        if settings.together:
            yield list(tasks)
            return
        known = standing(tasks)
        tasks = [known.get(task.number, task) for task in tasks]
        while tasks:
            for wave in _filled(tasks, a_query) if bounded else [list(tasks)]:
                yield wave
                gc.collect()  # a pipeline that is over holds its data in cycles: without this, waves pile up
                give_memory_back()
            done = book.read_all([task.number for task in tasks])
            known = standing(tasks)  # of a query shard that came to nothing there is neither: the executor tells
            tasks = [known[task.number] for task in tasks if task.number not in done and task.number in known]

    return waves


# -- steps -------------------------------------------------------------------------------------------------------------


class SearchIndexShard(SearchStep):
    """(place of an index shard, query shards) -> (piece, candidates). The index shard is opened once."""

    def process(self, element: tuple[int, list[Task]]) -> Iterator[tuple[int, bytes]]:
        place, tasks = element
        settings = self._settings
        with self._naming(place):
            index = open_index_file(self._storage, settings.index[place], settings.dimension, settings.metric)
        for task in tasks:
            with self._naming(task.number):
                yield from self._pieces(index, task, first=place == 0)

    def _pieces(self, index: Any, task: Task, first: bool) -> Iterator[tuple[int, bytes]]:
        """What one query shard finds in one index shard. The ``first`` index shard's candidates bring the queries."""
        settings = self._settings
        files = task.payload.files
        exclusion, chunk_ids, document_ids = self._exclusion(files)
        share = unfinished(self._book, task, exclusion, settings).share(
            WAVE_BYTES if settings.in_memory else SHARE_BYTES, settings.dimension, settings.fetched
        )
        vectors = vectors_of(self._storage, files, len(chunk_ids))
        clusters = query_clusters(self._storage, files, document_ids, settings.exclude)
        uids = query_uids(self._storage, files, len(chunk_ids), settings.blocks)
        queries = Queries(vectors, exclusion.first, exclusion.last, clusters, uids)
        key = task.number << ID_SHIFT
        for ask in share:
            size = piece_rows(ask.candidates, settings.dimension)
            at_once = rows_at_once(ask.candidates, settings.dimension, BUDGET_BYTES)
            for block in ask.cut(max(size, at_once // size * size)):
                own = np.asarray(vectors[block.rows]).astype(np.float32)
                raw, ids = search_group(index, own, ask.candidates, ask.nprobe)
                for start in range(0, len(block), size):
                    rows = slice(start, start + size)
                    piece = block.of(block.rows[rows])
                    known = queries.take(piece.rows) if first else None
                    yield key, candidates_of(piece, (raw[rows], ids[rows]), known).to_bytes()
                    key += 1


class MergeCandidates(beam.CombineFn):
    """Merges what index shards gave for one piece; the accumulator is one such list."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def create_accumulator(self) -> bytes:
        return b""

    def add_input(self, accumulator: bytes, found: bytes) -> bytes:
        return self.merge_accumulators([accumulator, found])

    def merge_accumulators(self, accumulators: Iterable[bytes]) -> bytes:
        whole = b""
        for data in accumulators:  # two at a time, however many there are
            if whole and data:
                whole = merged([Candidates.from_bytes(whole), Candidates.from_bytes(data)], self._metric).to_bytes()
            else:
                whole = whole or data
        return whole

    def extract_output(self, accumulator: bytes) -> bytes:
        return accumulator


class SettleByLooking(LookingUp):
    """(piece, candidates) -> (query shard, what became of it), with vectors looked up in their shards."""

    def process(self, element: tuple[int, bytes]) -> Iterator[tuple[int, bytes]]:
        number = element[0] >> ID_SHIFT
        settings = self._settings
        with self._naming(number):
            yield (
                number,
                settled(
                    Candidates.from_bytes(element[1]),
                    settings.searched,
                    self._vectors,
                    self._documents,
                    self._clusters,
                    settings.k,
                    settings.metric,
                    self._uids,
                    self._gone,
                ).to_bytes(),
            )


class AskForChunks(SearchStep):
    """(piece, candidates) -> (candidates' shard, (piece, ids))."""

    def process(self, element: tuple[int, bytes]) -> Iterator[tuple[int, tuple[int, bytes]]]:
        piece, data = element
        with self._naming(piece >> ID_SHIFT):
            for shard, ids in wanted_chunks(Candidates.from_bytes(data), self._gone).items():
                yield shard, (piece, ids.astype("<i8").tobytes())


class AnswerWithChunks(SearchStep):
    """(candidates' shard, asks) -> (piece, chunks). The shard is read once."""

    def process(self, element: tuple[int, Iterable[tuple[int, bytes]]]) -> Iterator[tuple[int, bytes]]:
        shard, asks = element
        settings, storage = self._settings, self._storage
        with self._naming(shard):
            files = ShardFiles(settings.documents[shard], settings.chunks[shard], settings.embeddings[shard])
            chunk_ids, document_ids = chunk_columns(storage, files)
            clusters = query_clusters(storage, files, document_ids, settings.exclude)
            uids = query_uids(storage, files, len(chunk_ids), settings.blocks)
            whole = Chunks(chunk_ids, vectors_of(storage, files, len(chunk_ids)), document_ids, clusters, uids)
            for piece, data in asks:
                yield piece, whole.take(np.frombuffer(data, "<i8")).to_bytes()


class SettleFromAnswers(SearchStep):
    """(piece, its candidates and their chunks) -> (query shard, what became of it)."""

    def process(self, element: tuple[int, dict[str, Any]]) -> Iterator[tuple[int, bytes]]:
        piece, parts = element
        settings = self._settings
        with self._naming(piece >> ID_SHIFT):
            chunks = Chunks.joined([Chunks.from_bytes(data) for data in parts["chunks"]], settings.dimension)
            for data in parts["candidates"]:
                found = Candidates.from_bytes(data)
                uids = chunks if settings.blocks else None
                arguments = (chunks, chunks, chunks, settings.k, settings.metric, uids, self._gone)
                yield piece >> ID_SHIFT, settled(found, settings.searched, *arguments).to_bytes()


class WriteFound(SearchStep):
    """(query shard, its task and what became of its queries) -> its neighbours, or what is left for another round."""

    def process(self, element: tuple[int, dict[str, Any]]) -> Iterator[int]:
        number, parts = element
        for task in parts["tasks"]:
            with self._naming(number):
                self._write(task, parts["settled"])
                yield number

    def _write(self, task: Task, parts: Iterable[bytes]) -> None:
        settings, storage, number = self._settings, self._storage, task.number
        exclusion, chunk_ids, _ = self._exclusion(task.payload.files)
        state = unfinished(self._book, task, exclusion, settings).updated(map(Unfinished.from_bytes, parts))
        if not state.is_done:
            left = sum(ask_bytes(ask, settings.dimension, settings.fetched) for ask in state.asks())
            rounds = task.payload.rounds + 1
            storage.commit_bytes(_state_path(self._book, number, rounds), state.to_bytes())
            _rounds(self._book).write(Receipt(number, counts={"bytes": left, "rounds": rounds}))
            return
        self._finish(number, state.neighbours(chunk_ids))


# -- the pipeline ------------------------------------------------------------------------------------------------------


def query_blocks(tasks: Sequence[Task], index: Sequence[IndexFile]) -> list[list[Task]]:
    """Query shards that are searched together: as many queries as the largest index shard has vectors.

    All pairs of two tables are read cheapest in blocks of equal size.
    """
    full = max([BLOCK_QUERIES, *(file.vectors for file in index)])
    blocks: list[list[Task]] = []
    held = full
    for task in tasks:
        if held >= full:
            blocks.append([])
            held = 0
        blocks[-1].append(task)
        held += task.weight
    return blocks


def search_pipeline(
    pipeline: beam.Pipeline, book: ReceiptBook, tasks: Sequence[Task], settings: SearchSettings
) -> beam.PCollection:
    """One round for some query shards."""
    if settings.together:
        return pipeline | DealOut(tasks) | "search" >> beam.ParDo(SearchShard(book, settings))
    found = (
        pipeline
        | "blocks" >> beam.Create(query_blocks(tasks, settings.index))
        | "by index shard" >> beam.FlatMap(functools.partial(_by_index_shard, len(settings.index)))
        | "spread" >> beam.Reshuffle()
        | "search" >> beam.ParDo(SearchIndexShard(book, settings))
        | "merge" >> beam.CombinePerKey(MergeCandidates(settings.metric))
    )
    if settings.fetched:
        chunks = (
            found
            | "ask" >> beam.ParDo(AskForChunks(book, settings))
            | "by candidates' shard" >> beam.GroupByKey()
            | "answer" >> beam.ParDo(AnswerWithChunks(book, settings))
        )
        joined = {"candidates": found, "chunks": chunks} | "by piece" >> beam.CoGroupByKey()
        results = joined | "settle" >> beam.ParDo(SettleFromAnswers(book, settings))
    else:
        results = found | "settle" >> beam.ParDo(SettleByLooking(book, settings))
    keyed = pipeline | DealOut(tasks) | "by number" >> beam.Map(_by_number)
    together = {"tasks": keyed, "settled": results} | "by query shard" >> beam.CoGroupByKey()
    return together | "write" >> beam.ParDo(WriteFound(book, settings))


def _by_index_shard(shards: int, block: list[Task]) -> list[tuple[int, list[Task]]]:
    return [(place, block) for place in range(shards)]


def _by_number(task: Task) -> tuple[int, Task]:
    return task.number, task
