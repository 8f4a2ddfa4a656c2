"""Near-duplicates of documents that join a database, among themselves and among those that are there.

What is there stays, so that the rules of a build are turned to what is new: with ``--dedup drop`` what repeats a
document that is there is removed; beside validation documents, whatever repeats one of the other side. A cluster that
takes in something new keeps its name, the smallest of several that become one; its documents' shards are written anew
where a ``cluster_id`` changes (`retrodb.pipelines.add`).
"""

import functools
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import apache_beam as beam
import numpy as np
import pyarrow as pa
from retrodb.pipelines.builder import Builder, add_counts, shards_by_table
from retrodb.pipelines.corpus import DOCUMENT_ROW_GROUP
from retrodb.pipelines.dedup import DUPLICATE_ROW_GROUP, Assignments, final_ids
from retrodb.pipelines.dedup_stage import (
    CUT,
    build_dedup,
    comparable,
    dedup_parts,
    describe,
    near_duplicate_pairs,
    of_validation,
    rule_codes,
    write_duplicates,
)
from retrodb.pipelines.execute import Executor
from retrodb.pipelines.integrity import proven
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.tasks import DealOut, DoTasks, Task
from retrodb.schemas import ID_SHIFT

from retrodb import schemas
from retrodb.config import BuildConfig
from retrodb.corpus import VALIDATION
from retrodb.corpus.near_duplicates import DEDUP_RULES, clusters, removals
from retrodb.deletions import Deletions
from retrodb.errors import InputError
from retrodb.formats import File
from retrodb.manifest import Manifest, Shard, fingerprint, shard_path
from retrodb.neighbours.sources import by_shard
from retrodb.sizes import count_of
from retrodb.storage import Storage

_SMALL_SHARDS: Final = 64
_ROW_MASK: Final = (1 << ID_SHIFT) - 1


def extend_dedup(builder: Builder) -> None:
    """duplicates: of what is new, and of what is there where its clusters grew.

    What is counted is what this adds to the counts of the version that is joined.

    Raises:
        InputError: nothing of what is new is left.
    """
    assert builder.joins is not None, "documents join something"
    if builder.config.dedup == "off" or not comparable(builder.joins):
        build_dedup(builder)
        return
    parts = dedup_parts(builder)
    if builder.is_current("dedup", parts):
        return
    builder.begin("dedup", parts)
    book = builder.book("dedup", parts)
    pairs, cut = near_duplicate_pairs(builder, book)
    found, grown = _settle(builder, builder.joins, pairs)
    _refuse_nothing_new(builder, int(np.count_nonzero(found.rules)))
    written = write_duplicates(builder, book, found)
    counts = {**dict.fromkeys([f"dropped.{rule}" for rule in DEDUP_RULES], 0), "clustered": 0, **add_counts(written)}
    counts["clustered"] += len(grown.ids)
    counts["clusters"] = grown.more
    written |= _write_grown(builder, book, builder.joins, grown)
    builder.record("dedup", parts, shards_by_table(written, "duplicates"), counts, {CUT: cut})
    builder.progress.end(describe(counts))


def _refuse_nothing_new(builder: Builder, removed: int) -> None:
    read = builder.manifest.stages["corpus"].counts["kept"]
    if removed == read:
        raise InputError(
            f"nothing is new: of {count_of(read, 'document')} each is a near-duplicate of one that is there. "
            "The database was left as it was."
        )


# -- clusters ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grown:
    """What becomes of documents that are there.

    Attributes:
        labels: int64 [c], ascending: clusters that took in something; ``names`` int64 [c] and ``kept`` int64 [c], what
            they are called now, and how many documents of them are there.
        ids: int64 [n], ascending: documents that were in no cluster; ``clusters`` and ``sizes`` likewise.
        more: by how many clusters there are more now.
        shards: the document shards whose rows of ``duplicates`` are others now, ascending.
    """

    labels: np.ndarray
    names: np.ndarray
    kept: np.ndarray
    ids: np.ndarray
    clusters: np.ndarray
    sizes: np.ndarray
    more: int
    shards: tuple[int, ...]

    def to_bytes(self, shard: int) -> bytes:
        """What the task of one shard needs of it."""
        own = self.ids >> ID_SHIFT == shard
        buffer = io.BytesIO()
        np.savez(
            buffer,
            labels=self.labels,
            names=self.names,
            kept=self.kept,
            ids=self.ids[own],
            clusters=self.clusters[own],
            sizes=self.sizes[own],
        )
        return buffer.getvalue()


@dataclass(frozen=True)
class Clustered:
    """The rows of ``duplicates`` of a database: the document of each (-1 where it was removed, or is deleted), its
    cluster and its shard; int64 [n] each."""

    ids: np.ndarray
    labels: np.ndarray
    shards: np.ndarray

    @staticmethod
    def of(storage: Storage, manifest: Manifest) -> "Clustered":
        gone = Deletions.of(storage, manifest)
        parts = [np.empty((3, 0), np.int64)]
        for shard in manifest.shards("duplicates"):
            table = storage.read_table(shard, ["document_id", "cluster_id"])
            ids = table["document_id"].fill_null(-1).to_numpy()
            ids = np.where(gone.of_documents(ids), -1, ids)
            parts.append(np.stack([ids, table["cluster_id"].to_numpy(), np.full(len(ids), shard.number)]))
        return Clustered(*np.concatenate(parts, axis=1))


def _settle(builder: Builder, there: Manifest, pairs: np.ndarray) -> tuple[Assignments, Grown]:
    """Clusters of near-duplicates int64 [p, 2], by the ids that `near_duplicate_pairs` gives."""
    storage, first = builder.storage, builder.first_shard << ID_SHIFT
    known = Clustered.of(storage, there)
    nodes = _as_nodes(pairs, first, known)
    ids, label = clusters(nodes)
    is_new = ids >= first
    new, old = ids[is_new], ids[~is_new]
    was_clustered = np.isin(old, known.labels)
    members = (known.ids >= 0) & np.isin(known.labels, old)
    # Of documents that are there: (document, what it was called, what connects it now).
    own = np.concatenate([known.ids[members], old[~was_clustered]])
    called = np.concatenate([known.labels[members], old[~was_clustered]])
    component = label[np.searchsorted(ids, called)]
    rules, stays = _rules(builder, there, np.concatenate([component, label[is_new]]), own, new)
    return _named(known, ids, label, is_new, called, rules, stays)


def _as_nodes(pairs: np.ndarray, first: int, known: Clustered) -> np.ndarray:
    """``pairs`` with a document that is there as its cluster, or as it is where it has none."""
    ids = np.unique(pairs[pairs < first])
    order = np.argsort(known.ids, kind="stable")
    at = np.searchsorted(known.ids, ids, sorter=order)
    clustered = np.isin(ids, known.ids)
    node = ids.copy()
    node[clustered] = known.labels[order[at[clustered]]]
    result = pairs.copy()
    result[pairs < first] = node[np.searchsorted(ids, pairs[pairs < first])]
    return result


def _rules(
    builder: Builder, there: Manifest, component: np.ndarray, own: np.ndarray, new: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of new documents int64 [m] beside those that are there int64 [n]: `Assignments.rules`, and bool [m], which
    stay."""
    config = BuildConfig.model_validate(there.config)
    before = np.arange(len(own) + len(new)) < len(own)
    validation = np.concatenate([_validation_there(builder.storage, there, config, own), of_validation(builder, new)])
    repeats, contaminated = removals(component, validation, config.dedup == "drop", config.decontaminate, before)
    rules = rule_codes(repeats, contaminated)[len(own) :]
    return rules, rules == 0


def _validation_there(storage: Storage, there: Manifest, config: BuildConfig, ids: np.ndarray) -> np.ndarray:
    """bool [n]: which documents, by their ids, are of the validation split."""
    if not config.has_validation:
        return np.zeros(len(ids), dtype=bool)
    documents = {shard.number: shard for shard in there.shards("documents")}

    def held_out(shard: int, some: np.ndarray) -> np.ndarray:
        table = storage.read_table(documents[shard], ["document_id", "split"])
        split = table["split"].to_numpy()[np.searchsorted(table["document_id"].to_numpy(), some)]
        return np.array(split == VALIDATION)

    return by_shard(ids, held_out, np.empty(0, bool))


def _named(
    known: Clustered,
    ids: np.ndarray,
    label: np.ndarray,
    is_new: np.ndarray,
    called: np.ndarray,
    rules: np.ndarray,
    stays: np.ndarray,
) -> tuple[Assignments, Grown]:
    """Names and sizes of what is connected: ``ids`` int64 [n] are the new documents as they were read and what the
    others were called, ``called`` int64 [o] those of every document that is there.

    What is removed connects nothing: where nothing new stays, what is there stays as it was, and the first of it lends
    its name to what was removed.
    """
    names, component = np.unique(label, return_inverse=True)
    n = len(names)
    of_new, of_old, old = component[is_new], component[~is_new], ids[~is_new]
    first_old = np.full(n, np.iinfo(np.int64).max)
    np.minimum.at(first_old, of_old, old)
    takes_in = np.bincount(of_new[stays], minlength=n) > 0
    name = first_old.copy()
    np.minimum.at(name, of_new[stays], final_ids(ids[is_new], stays)[stays])
    counted = takes_in[component[~is_new]] | (old == first_old[of_old])
    size_of_old = np.bincount(np.searchsorted(old, called), minlength=len(old))
    kept = np.bincount(of_old[counted], weights=size_of_old[counted], minlength=n).astype(np.int64)
    kept += np.bincount(of_new[stays], minlength=n)
    was = np.isin(old, known.labels)
    grew, joined = counted & was & takes_in[of_old], counted & ~was
    labels = old[grew]
    touched = np.isin(known.labels, labels)
    grown = Grown(
        labels=labels,
        names=name[of_old[grew]],
        kept=kept[of_old[grew]],
        ids=old[joined],
        clusters=name[of_old[joined]],
        sizes=kept[of_old[joined]],
        more=len(np.unique(np.concatenate([np.flatnonzero(takes_in), of_old[joined]]))) - len(labels),
        shards=tuple(np.union1d(known.shards[touched], old[joined] >> ID_SHIFT).tolist()),
    )
    return Assignments(ids[is_new], name[of_new], kept[of_new], rules), grown


# -- the rows of what is there -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GrownShard:
    """The files of a shard with documents whose clusters grew; ``duplicates`` is "" where it had none."""

    documents: Shard
    duplicates: File


def _write_grown(builder: Builder, book: ReceiptBook, there: Manifest, grown: Grown) -> dict[int, Receipt]:
    """The ``duplicates`` shards of documents that are there, where they changed."""
    step = replace(book, step="grown")
    documents = {shard.number: shard for shard in there.shards("documents")}
    duplicates = {shard.number: shard for shard in there.shards("duplicates")}
    for number in grown.shards:
        builder.storage.commit_bytes(_grown_path(step, number), grown.to_bytes(number))
    return builder.executor.complete(
        step,
        [Task(number, GrownShard(documents[number], duplicates.get(number, ""))) for number in grown.shards],
        lambda pipeline, tasks: _grown_pipeline(pipeline, step, tasks),
        unit="shards",
        small=_SMALL_SHARDS,
    )


def _grown_path(book: ReceiptBook, shard: int) -> str:
    return f"{book.folder}/assigned/{shard:05d}.npz"


def _grown_pipeline(pipeline: beam.Pipeline, book: ReceiptBook, tasks: Sequence[Task]) -> beam.PCollection:
    return pipeline | DealOut(tasks) | "grow" >> beam.ParDo(DoTasks(book, functools.partial(_grow, book)))


def _grow(book: ReceiptBook, task: Task) -> Iterator[Receipt]:
    storage, number = book.storage, task.number
    item: GrownShard = task.payload
    with np.load(io.BytesIO(storage.read_bytes(_grown_path(book, number))), allow_pickle=False) as arrays:
        grown = {name: arrays[name] for name in arrays.files}
    before = (
        storage.read_table(proven(storage, item.duplicates)) if item.duplicates else schemas.duplicates().empty_table()
    )
    table = pa.concat_tables([_renamed(before, grown), _joining(storage, item.documents, before, grown)])
    committed = storage.commit_table(shard_path("duplicates", number), table.sort_by("row"), DUPLICATE_ROW_GROUP)
    yield Receipt(number, {"duplicates": Shard.of(committed, number, table.num_rows)})


def _renamed(before: pa.Table, grown: dict[str, np.ndarray]) -> pa.Table:
    """The rows there were, of clusters as they are now."""
    cluster, kept = before["cluster_id"].to_numpy().copy(), before["cluster_kept"].to_numpy().copy()
    changed = np.isin(cluster, grown["labels"])
    at = np.searchsorted(grown["labels"], cluster[changed])
    cluster[changed], kept[changed] = grown["names"][at], grown["kept"][at]
    columns = {"cluster_id": pa.array(cluster), "cluster_kept": pa.array(kept)}
    return pa.table({name: columns.get(name, before[name]) for name in before.column_names}, schema=before.schema)


def _joining(storage: Storage, documents: Shard, before: pa.Table, grown: dict[str, np.ndarray]) -> pa.Table:
    """The rows of documents that were in no cluster. ``row`` is their place as they were read: an id counts those that
    stayed."""
    ids = grown["ids"]
    table = storage.read_table(documents, ["document_id", "key", "source", "content_hash"])
    described = table.take(pa.array(np.searchsorted(table["document_id"].to_numpy(), ids)))
    removed = before.filter(before["removed"].is_valid())["row"].to_numpy()
    place = ids & _ROW_MASK
    row = place + np.searchsorted(removed - np.arange(len(removed)), place, side="right")
    columns = [
        pa.array(row, pa.int32()),
        pa.array(ids),
        pa.array(grown["clusters"]),
        pa.array(grown["sizes"]),
        pa.nulls(len(ids), pa.string()),
        *(described[name] for name in ("key", "source", "content_hash")),
    ]
    return pa.Table.from_arrays(columns, schema=schemas.duplicates())


# -- their documents ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelledShard:
    """A document shard, and its rows of ``duplicates`` as they are now."""

    documents: Shard
    duplicates: Shard


def relabel(merged: Manifest, new: Manifest, storage: Storage, executor: Executor) -> Manifest:
    """The manifest of what is there and what is new, with document shards that name their documents' clusters."""
    documents = {shard.number: shard for shard in merged.shards("documents")}
    own = {shard.number for shard in new.shards("documents")}
    grown = [shard for shard in new.shards("duplicates") if shard.number not in own]
    tasks = [Task(shard.number, LabelledShard(documents[shard.number], shard)) for shard in grown]
    made_from = [[shard.path, shard.sha256] for task in tasks for shard in vars(task.payload).values()]
    book = ReceiptBook(storage, "clusters", fingerprint({"shards": made_from}))
    work = functools.partial(_relabel, storage)
    receipts = executor.complete(
        book,
        tasks,
        lambda pipeline, some: pipeline | DealOut(some) | "relabel" >> beam.ParDo(DoTasks(book, work)),
        unit="shards",
        small=_SMALL_SHARDS,
    )
    written = {number: receipt.shards["documents"] for number, receipt in receipts.items()}
    return replace(merged, tables={**merged.tables, "documents": tuple(sorted({**documents, **written}.values()))})


def _relabel(storage: Storage, task: Task) -> Iterator[Receipt]:
    item: LabelledShard = task.payload
    table = storage.read_table(item.documents, ["document_id", "cluster_id"])
    rows = storage.read_table(item.duplicates, ["document_id", "cluster_id", "cluster_kept"])
    rows = rows.filter(rows["document_id"].is_valid())
    cluster = np.zeros(table.num_rows, dtype=np.int64)
    alone = np.ones(table.num_rows, dtype=bool)
    at = np.searchsorted(table["document_id"].to_numpy(), rows["document_id"].to_numpy())
    cluster[at], alone[at] = rows["cluster_id"].to_numpy(), rows["cluster_kept"].to_numpy() < 2
    column = pa.chunked_array([pa.array(cluster, mask=alone)])
    shard = item.documents
    if not column.equals(table["cluster_id"]):
        whole = storage.read_table(proven(storage, shard))
        place = whole.column_names.index("cluster_id")
        whole = whole.set_column(place, whole.schema.field(place), column)
        committed = storage.commit_table(shard_path("documents", task.number), whole, DOCUMENT_ROW_GROUP)
        shard = Shard.of(committed, task.number, whole.num_rows)
    yield Receipt(task.number, {"documents": shard})
