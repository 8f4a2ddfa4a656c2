"""dedup: near-duplicate clusters, in steps that leave files for one another.

    sketch    documents                 -> their sketches                             `retrodb.pipelines.sketches`
    pair      bands of all sketches     -> candidates, by the first one's shard       grouped by band
    compare   candidates                -> near-duplicates                            grouped by the second one's shard
    cluster   near-duplicates           -> clusters, and which documents are removed  the driver
    write     a shard's clusters        -> its ``duplicates`` shard                   a task a shard

Documents are addressed by the ids they had when they were read; the ids they are given in the end leave no gap for
removed ones. Documents that join a database are compared with those that are there as well, which have their ids
(`retrodb.pipelines.extend_dedup`).
"""

import functools
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import apache_beam as beam
import numpy as np
import pyarrow as pa
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.shards import as_read
from retrodb.pipelines.sketches import read_sketches
from retrodb.pipelines.tasks import DealOut, DoTasks, StageDoFn, Task
from retrodb.schemas import ID_SHIFT

from retrodb import schemas
from retrodb.corpus.near_duplicates import DEDUP_RULES, THRESHOLD, candidate_pairs, unique_pairs
from retrodb.corpus.shingles import batches, jaccard, shingles
from retrodb.corpus.sketches import BANDS
from retrodb.formats import File
from retrodb.manifest import Shard, shard_path
from retrodb.storage import Storage

WAVE_BYTES: Final = 32 << 20
"""What one local shuffle may carry: the in-process runner keeps it in memory."""

_RECORD_BYTES: Final = 24
_PART_DOCUMENTS: Final = 4_000_000
_SET_BYTES: Final = 4
"""Bytes of shingle sets for a byte of compressed documents, at most about."""
DUPLICATE_ROW_GROUP: Final = 1 << 14
_ROW_MASK: Final = (1 << ID_SHIFT) - 1


# -- pair --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairSettings:
    """The files with the sketches of each shard, in how many parts the documents of a band are compared, and the first
    shard of documents that join others: of pairs of those before, all is known."""

    sketches: Mapping[int, str]
    parts: int
    joining: int = 0


def pairs_path(book: ReceiptBook, wave: int, shard: int) -> str:
    """int64 [p, 2]: candidates of a wave of bands whose first document is of ``shard``."""
    return f"{book.folder}/pairs/{wave:05d}-{shard:05d}.npy"


def pair_tasks(documents: int) -> list[Task]:
    """One task for as many bands as one shuffle carries."""
    bands_at_once = max(1, WAVE_BYTES // max(1, documents * _RECORD_BYTES))
    groups = [tuple(range(BANDS))[start : start + bands_at_once] for start in range(0, BANDS, bands_at_once)]
    return [Task(wave, bands, (), documents * len(bands), len(bands)) for wave, bands in enumerate(groups)]


def parts_for(documents: int) -> int:
    """In how many parts the documents of a band are grouped, so that a group stays in memory."""
    return 1 + documents // _PART_DOCUMENTS


class EmitBands(StageDoFn):
    """(wave, its bands, a shard) -> ((wave, band, part), its documents' buckets, ids and signatures)."""

    def __init__(self, book: ReceiptBook, settings: PairSettings) -> None:
        super().__init__(book)
        self._settings = settings

    def process(self, element: tuple[int, tuple[int, ...], int]) -> Iterator[tuple[tuple[int, int, int], bytes]]:
        wave, bands, shard = element
        with self._naming(shard):
            ids, sketches = read_sketches(self._storage, self._settings.sketches[shard])
            for band in bands:
                part_of = sketches.bands[band] % np.uint64(self._settings.parts)
                for part in np.unique(part_of):
                    own = part_of == part
                    records = np.stack(
                        [sketches.bands[band][own], ids[own].astype(np.uint64), sketches.signatures[own]]
                    )
                    yield (wave, band, int(part)), records.tobytes()


class FindPairs(StageDoFn):
    """((wave, band, part), records) -> ((wave, first one's shard), candidates); shard -1: how many were in too large a
    bucket."""

    def __init__(self, book: ReceiptBook, settings: PairSettings) -> None:
        super().__init__(book)
        self._settings = settings

    def process(self, element: tuple[tuple[int, int, int], Iterable[bytes]]) -> Iterator[tuple[tuple[int, int], bytes]]:
        (wave, band, _), parts = element
        with self._naming(band):
            read = [np.frombuffer(data, np.uint64).reshape(3, -1) for data in parts]
            buckets, ids, signatures = np.concatenate(read, axis=1)
            found = candidate_pairs(buckets, ids.astype(np.int64), signatures, band, self._bands_of)
            for shard, own in _by_shard(found.pairs[found.pairs[:, 1] >> ID_SHIFT >= self._settings.joining], 0):
                yield (wave, shard), own.tobytes()
            yield (wave, -1), np.array([[band, found.cut]], dtype=np.int64).tobytes()

    def _bands_of(self, ids: np.ndarray) -> np.ndarray:
        shards = ids >> ID_SHIFT
        parts = []
        for shard in np.unique(shards):
            known, sketches = read_sketches(self._storage, self._settings.sketches[int(shard)])
            parts.append(sketches.bands[:, np.searchsorted(known, ids[shards == shard])])
        return np.concatenate(parts, axis=1)


def _by_shard(pairs: np.ndarray, column: int) -> Iterator[tuple[int, np.ndarray]]:
    shards = pairs[:, column] >> ID_SHIFT
    for shard in np.unique(shards):
        yield int(shard), pairs[shards == shard]


def _pairs(parts: Iterable[bytes]) -> np.ndarray:
    return unique_pairs(np.concatenate([np.frombuffer(part, np.int64).reshape(-1, 2) for part in parts]))


class WritePairs(StageDoFn):
    """((wave, shard), candidates) -> (wave, (shard, 0)), the candidates written; or (wave, (-1, documents cut off))."""

    def process(self, element: tuple[tuple[int, int], Iterable[bytes]]) -> Iterator[tuple[int, tuple[int, int]]]:
        (wave, shard), parts = element
        with self._naming(shard):
            if shard >= 0:
                self._storage.commit_array(pairs_path(self._book, wave, shard), _pairs(parts))
                yield wave, (shard, 0)
            else:
                counted = np.concatenate([np.frombuffer(part, np.int64).reshape(-1, 2) for part in parts])
                yield wave, (-1, int(np.bincount(counted[:, 0], weights=counted[:, 1]).max()))


class EndPairs(StageDoFn):
    """(wave, (shards that have candidates, 0) and (-1, documents cut off)) -> its receipt."""

    def process(self, element: tuple[int, Iterable[tuple[int, int]]]) -> Iterator[int]:
        wave, parts = element
        told = list(parts)
        details = {"shards": sorted(shard for shard, _ in told if shard >= 0), "cut": max(cut for _, cut in told)}
        self._book.write(Receipt(wave, details=details))
        yield wave


def pair_pipeline(
    pipeline: beam.Pipeline, book: ReceiptBook, tasks: Sequence[Task], settings: PairSettings
) -> beam.PCollection:
    """Find candidates: documents that share a band."""
    dealt = pipeline | DealOut(tasks)
    written = (
        dealt
        | "sketches" >> beam.FlatMap(functools.partial(_shards_of_wave, tuple(settings.sketches)))
        | "spread" >> beam.Reshuffle()
        | "bands" >> beam.ParDo(EmitBands(book, settings))
        | "by band" >> beam.GroupByKey()
        | "pair" >> beam.ParDo(FindPairs(book, settings))
        | "by first shard" >> beam.GroupByKey()
        | "write pairs" >> beam.ParDo(WritePairs(book))
    )
    waves = dealt | "waves" >> beam.Map(_wave_alone)
    ended = (written, waves) | "all of a wave" >> beam.Flatten() | "by wave" >> beam.GroupByKey()
    return ended | "end" >> beam.ParDo(EndPairs(book))


def _shards_of_wave(shards: Sequence[int], task: Task) -> Iterator[tuple[int, Any, int]]:
    for shard in shards:
        yield task.number, task.payload, shard


def _wave_alone(task: Task) -> tuple[int, tuple[int, int]]:
    return task.number, (-1, 0)


# -- compare -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CompareSettings:
    """Where the documents and their candidates are; ``waves`` of candidates by the first one's shard."""

    pairs: ReceiptBook
    waves: Mapping[int, tuple[int, ...]]
    documents: Mapping[int, File]


def near_duplicates_path(book: ReceiptBook, number: int) -> str:
    """int64 [p, 2]: near-duplicates that a wave of shards found."""
    return f"{book.folder}/pairs/{number:05d}.npy"


def compare_tasks(documents: Sequence[Shard], having: Mapping[int, object]) -> list[Task]:
    """One task for as many shards with candidates as one shuffle carries."""
    groups: list[list[Shard]] = []
    room = 0
    for shard in documents:
        if shard.number in having:
            if not groups or shard.bytes * _SET_BYTES > room:
                groups.append([])
                room = WAVE_BYTES
            groups[-1].append(shard)
            room -= shard.bytes * _SET_BYTES
    return [
        Task(number, tuple(s.number for s in group), (), sum(s.bytes for s in group), len(group))
        for number, group in enumerate(groups)
    ]


def one_task_a_wave(tasks: Sequence[Task], bounded: bool) -> list[list[Task]]:
    """Each task is as much as a shuffle in memory carries."""
    return [[task] for task in tasks] if bounded else [list(tasks)]


class AskForSets(StageDoFn):
    """(wave, a shard) -> ((wave, second one's shard), candidates and the sets of their first ones)."""

    def __init__(self, book: ReceiptBook, settings: CompareSettings) -> None:
        super().__init__(book)
        self._settings = settings

    def process(self, element: tuple[int, int]) -> Iterator[tuple[tuple[int, int], bytes]]:
        wave, shard = element
        with self._naming(shard):
            settings = self._settings
            files = [pairs_path(settings.pairs, number, shard) for number in settings.waves[shard]]
            pairs = unique_pairs(np.concatenate([self._storage.read_array(path) for path in files]))
            sets = document_sets(self._storage, settings.documents[shard], pairs[:, 0])
            for other, own in _by_shard(pairs, 1):
                yield (wave, other), _message(own, sets)


def document_sets(storage: Storage, file: File, ids: np.ndarray) -> dict[int, np.ndarray]:
    """The shingle sets of some documents of a shard, by id: uint64, sorted and distinct."""
    wanted = np.unique(ids)
    table = storage.read_table(file, ["document_id", "text"])
    texts = table["text"].take(pa.array(np.searchsorted(table["document_id"].to_numpy(), wanted)))
    found: list[np.ndarray] = []
    for batch in batches(texts):
        values, offsets = shingles(batch)
        found += [np.unique(part) for part in np.split(values, offsets[1:-1])]
    return dict(zip(wanted.tolist(), found, strict=True))


def _message(pairs: np.ndarray, sets: Mapping[int, np.ndarray]) -> bytes:
    ids = np.unique(pairs[:, 0])
    parts = [sets[one] for one in ids.tolist()]
    buffer = io.BytesIO()
    sizes = np.array([len(part) for part in parts])
    np.savez(buffer, pairs=pairs, ids=ids, sizes=sizes, values=np.concatenate(parts))
    return buffer.getvalue()


class CompareSets(StageDoFn):
    """((wave, second one's shard), messages) -> (wave, near-duplicates)."""

    def __init__(self, book: ReceiptBook, settings: CompareSettings) -> None:
        super().__init__(book)
        self._settings = settings

    def process(self, element: tuple[tuple[int, int], Iterable[bytes]]) -> Iterator[tuple[int, bytes]]:
        (wave, shard), messages = element
        with self._naming(shard):
            for message in messages:
                with np.load(io.BytesIO(message), allow_pickle=False) as arrays:
                    pairs, ids, sizes, values = (arrays[name] for name in ("pairs", "ids", "sizes", "values"))
                firsts = dict(zip(ids.tolist(), np.split(values, np.cumsum(sizes)[:-1]), strict=True))
                seconds = document_sets(self._storage, self._settings.documents[shard], pairs[:, 1])
                alike = [jaccard(firsts[a], seconds[b]) >= THRESHOLD for a, b in pairs.tolist()]
                yield wave, pairs[np.array(alike)].tobytes()


class EndCompare(StageDoFn):
    """(wave, near-duplicates) -> written, with a receipt."""

    def process(self, element: tuple[int, Iterable[bytes]]) -> Iterator[int]:
        wave, parts = element
        with self._naming(wave):
            self._storage.commit_array(near_duplicates_path(self._book, wave), _pairs(parts))
            self._book.write(Receipt(wave))
            yield wave


def compare_pipeline(
    pipeline: beam.Pipeline, book: ReceiptBook, tasks: Sequence[Task], settings: CompareSettings
) -> beam.PCollection:
    """Keep the candidates that are near-duplicates, by their whole sets."""
    return (
        pipeline
        | DealOut(tasks)
        | "shards" >> beam.FlatMap(_numbered_shards)
        | "spread" >> beam.Reshuffle()
        | "ask" >> beam.ParDo(AskForSets(book, settings))
        | "by second shard" >> beam.GroupByKey()
        | "compare" >> beam.ParDo(CompareSets(book, settings))
        | "by wave" >> beam.GroupByKey()
        | "end" >> beam.ParDo(EndCompare(book))
    )


def _numbered_shards(task: Task) -> Iterator[tuple[int, int]]:
    for shard in task.payload:
        yield task.number, shard


# -- cluster and write -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Assignments:
    """The clusters of documents that have near-duplicates, ascending by document as it was read.

    Attributes:
        ids: int64 [n], documents as they were read.
        clusters: int64 [n], the final id of the first document of the cluster that is kept.
        kept: int64 [n], how many documents of the cluster are kept.
        rules: int8 [n], 1 + the place in `DEDUP_RULES` of the rule that removes it; 0 where it is kept.
    """

    ids: np.ndarray
    clusters: np.ndarray
    kept: np.ndarray
    rules: np.ndarray

    @staticmethod
    def of(ids: np.ndarray, labels: np.ndarray, rules: np.ndarray) -> "Assignments":
        """From clusters named by any label. Every cluster keeps a document."""
        _, cluster, sizes = np.unique(labels, return_inverse=True, return_counts=True)
        stays = rules == 0
        kept = np.bincount(cluster[stays], minlength=len(sizes))
        named = np.full(len(sizes), np.iinfo(np.int64).max)
        np.minimum.at(named, cluster[stays], final_ids(ids, stays)[stays])
        return Assignments(ids, named[cluster], kept[cluster], rules)

    def by_shard(self) -> Iterator[tuple[int, "Assignments"]]:
        """The assignments of each shard that has any."""
        shards = self.ids >> ID_SHIFT
        for shard in np.unique(shards):
            own = shards == shard
            yield int(shard), Assignments(self.ids[own], self.clusters[own], self.kept[own], self.rules[own])

    def to_bytes(self) -> bytes:
        buffer = io.BytesIO()
        np.savez(buffer, **vars(self))
        return buffer.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> "Assignments":
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return Assignments(**{name: arrays[name] for name in ("ids", "clusters", "kept", "rules")})


def final_ids(ids: np.ndarray, stays: np.ndarray) -> np.ndarray:
    """int64 [n]: the ids of documents once the removed ones of each shard are gone; of removed ones it says nothing.

    Args:
        ids: int64 [n], ascending, as read: at least all that are removed.
        stays: bool [n].
    """
    shards = ids >> ID_SHIFT
    gone = np.cumsum(~stays)
    before: np.ndarray = gone[np.searchsorted(shards, shards)] - ~stays[np.searchsorted(shards, shards)]
    return ids - (gone - before)


def assignment_path(book: ReceiptBook, shard: int) -> str:
    """`Assignments` of one shard, while the stage runs."""
    return f"{book.folder}/assigned/{shard:05d}.npz"


def _write(book: ReceiptBook, task: Task) -> Iterator[Receipt]:
    storage, number = book.storage, task.number
    own = Assignments.from_bytes(storage.read_bytes(assignment_path(book, number)))
    documents = storage.read_table(task.payload, ["key", "source", "content_hash"])
    rows, stays = own.ids & _ROW_MASK, own.rules == 0
    described = documents.take(pa.array(rows))
    names = np.array(["", *DEDUP_RULES], dtype=object)[own.rules]
    columns = [
        pa.array(rows, pa.int32()),
        pa.array(final_ids(own.ids, stays), mask=~stays),
        pa.array(own.clusters),
        pa.array(own.kept),
        pa.array(names, pa.string(), mask=stays),
        *(described[name] for name in ("key", "source", "content_hash")),
    ]
    table = pa.Table.from_arrays(columns, schema=schemas.duplicates())
    committed = storage.commit_table(shard_path("duplicates", number), table, DUPLICATE_ROW_GROUP)
    counts = {f"dropped.{rule}": int((own.rules == code).sum()) for code, rule in enumerate(DEDUP_RULES, 1)}
    counts["clustered"] = len(rows)
    yield Receipt(number, {"duplicates": Shard.of(committed, number, table.num_rows)}, counts)


def write_tasks(documents: Sequence[Shard], shards: Iterable[int]) -> list[Task]:
    """One task a shard that has near-duplicates."""
    paths = {shard.number: shard for shard in documents}
    return [Task(number, as_read(paths[number]), weight=paths[number].rows) for number in shards]


def write_pipeline(pipeline: beam.Pipeline, book: ReceiptBook, tasks: Sequence[Task]) -> beam.PCollection:
    """Write the ``duplicates`` shards."""
    return pipeline | DealOut(tasks) | "write" >> beam.ParDo(DoTasks(book, functools.partial(_write, book)))
