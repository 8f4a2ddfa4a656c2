"""add: documents join a database, at a cost that follows what is new, as its next version (realm.md, C2).

What is new goes through the text stages and the encoder as a small database of its own, whose shards are numbered where
those that are there end. Then the index takes the new vectors as further shards under the quantiser it has; the new
chunks are searched in all of it; and each old chunk, compared with the new index shards alone, takes what is nearer.
Training shards and leakage are made anew where neighbours changed. With an exact index the neighbours are those that a
build of everything would find.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import apache_beam as beam
import numpy as np
from retrodb.pipelines import index as index_stage
from retrodb.pipelines import stages
from retrodb.pipelines.builder import Builder
from retrodb.pipelines.chunk import VALIDATION_CHUNKS
from retrodb.pipelines.dedup_stage import build_dedup
from retrodb.pipelines.index import IndexSettings
from retrodb.pipelines.ingredients import Ingredients, resolve
from retrodb.pipelines.integrity import damaged_shards, mend_manifest
from retrodb.pipelines.leakage import WORST_PAIRS
from retrodb.pipelines.progress import Progress
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.report_stage import build_report
from retrodb.pipelines.retrieval_stages import CHOICE_FIELDS, build_neighbours, build_training, search_settings
from retrodb.pipelines.runners import Runner, make_runner
from retrodb.pipelines.runners.leftover import end_leftover_job
from retrodb.pipelines.searching import QueryShard, SearchSettings, SearchShard
from retrodb.pipelines.shards import ShardFiles, shard_files, validation_chunks
from retrodb.pipelines.tasks import DealOut, Task, finish
from retrodb.pipelines.text_stages import build_chunks, build_corpus, build_embeddings

from retrodb.config import BuildConfig, RunSettings
from retrodb.corpus import InputFile
from retrodb.errors import DamagedError, InputError
from retrodb.index import KeyChoice, bytes_per_vector, group_shards
from retrodb.lock import writer_lock
from retrodb.manifest import (
    LARGEST_NORM,
    MANIFEST_NAME,
    TEMPLATE_NUMBER,
    VERSIONED_TABLES,
    Manifest,
    Shard,
    StageState,
    Version,
    fingerprint,
    taken_from,
    version_folder,
)
from retrodb.neighbours import from_table
from retrodb.neighbours.table import Neighbours
from retrodb.quality.leakage import histograms, worst_rows
from retrodb.storage import Storage
from retrodb.training.columns import lists, scalars
from retrodb.training.shards import VALIDATION_ROWS
from retrodb.units import is_complete
from retrodb.versions import VersionStorage, load_version, next_version, now, publish

_NEW: Final = "added"
_TEXT_TABLES: Final = ("documents", "quarantine", "duplicates", "chunks")
_SMALL_VECTORS: Final = 30_000
_SMALL_QUERIES: Final = 6_000
_ROW_GROUP: Final = 1 << 14


@dataclass(frozen=True)
class Added:
    """What an addition came to: the version that is current now, and what is new in it."""

    version: int
    documents: int
    chunks: int
    changed: int
    """Shards of neighbours of chunks that were there before, in which something new is nearer."""


def add(out: Storage, inputs: Sequence[InputFile], run: RunSettings, progress: Progress) -> Added:
    """Add the documents of ``inputs``, and publish what comes of it as the next version.

    Ids of what is there stay; killed anywhere, the same command goes on.

    Args:
        out: the database.
        inputs: the listed input files.
        run: how it is carried out.
        progress: is told what happens.

    Raises:
        InputError: there is no finished database, its settings do not allow it, or an input is in it already.
        DamagedError: a shard that would be read is damaged.
        LockedError: another process changes the database.
        RecallError: the index, with what is new, stays below the recall gate; the current version stays.
        WorkerError: a worker failed; what was finished is kept.
    """
    if Manifest.recover(out) is None:
        out.check_bucket()
        raise InputError(f"{out.url} is not a retrodb database: it has no {MANIFEST_NAME}.")
    runner = make_runner(run)
    runner.check([out.url, *(file.url for file in inputs)])
    try:
        with writer_lock(out):
            end_leftover_job(out, progress)
            mend_manifest(out, progress)
            current = Manifest.load_whole(out)
            if current is None or not is_complete(current):
                raise InputError(f"{out.url} is not finished: run its build to the end before documents are added.")
            with taken_from(out.describe(MANIFEST_NAME)):
                config = BuildConfig.model_validate(current.config)
            _refuse_unfit(out, current, config)
            _refuse_damaged(out, current)
            number = next_version(current)
            new = _build_new(out, number, current, config, inputs, run, progress, runner)
            return _join(out, number, current, config, new, run, progress, runner)
    finally:
        runner.close()


def _refuse_unfit(out: Storage, current: Manifest, config: BuildConfig) -> None:
    """What an addition cannot keep true is refused.

    Raises:
        InputError: says which setting.
    """
    if config.unit == "block":
        raise InputError(f"{out.url} is of blocks: documents are added to databases of chunks alone as yet.")
    if config.has_validation and config.decontaminate:
        raise InputError(
            f"{out.url} keeps near-duplicates of its validation documents out: what is added is not compared with them "
            "as yet. Build anew with all inputs."
        )
    if config.exclude == "cluster" or config.dedup == "drop":
        raise InputError(
            f"{out.url} was built with --exclude {config.exclude}, --dedup {config.dedup}: what is added is not "
            "compared with the near-duplicates that are there as yet. Build anew with all inputs."
        )


def _refuse_damaged(out: Storage, current: Manifest) -> None:
    damage = damaged_shards(out, current)
    paths = [s.path for table, numbers in damage.items() for s in current.shards(table) if s.number in numbers]
    if paths:
        raise DamagedError(f"{', '.join(paths[:3])}{' and others' if paths[3:] else ''} of {out.url} are damaged.")


# -- what is new, by itself --------------------------------------------------------------------------------------------


def _build_new(
    out: Storage,
    number: int,
    current: Manifest,
    config: BuildConfig,
    inputs: Sequence[InputFile],
    run: RunSettings,
    progress: Progress,
    runner: Runner,
) -> Manifest:
    """The text and the vectors of what is new: a database that stops after the encoder, numbered behind what is there.

    Raises:
        InputError: an input is in the database already, or holds no document.
    """
    recorded = current.fingerprints["tokenizer"]
    config = config.model_copy(update={"validation": (), "tokenizer": _tokenizer(out, recorded, config.tokenizer)})
    place = VersionStorage(out.url, number, _NEW)
    end_leftover_job(place, progress)
    if Manifest.load(place) is None:
        place.delete_folder(version_folder(number))  # of an addition that was killed before it began, or of a refresh
        Manifest().save(place)
    ingredients = _ingredients(config, run, recorded, current)
    first = next_shard(out, current)
    builder = Builder(inputs, place, config, run, progress, ingredients, runner, (*_TEXT_TABLES, "embeddings"), first)
    for step in (build_corpus, build_dedup, build_chunks, build_embeddings):
        step(builder)
        if step is build_corpus:
            _refuse_known(out, current, builder.manifest)
    builder.clean_up()
    return builder.manifest


def _tokenizer(out: Storage, recorded: Mapping[str, Any], name: str) -> str:
    if not recorded.get("stored"):
        return name
    if not out.is_local:
        raise InputError(f"{out.url} keeps a tokenizer of its own: copy the database to a local disk to add to it.")
    return out.path(str(recorded["stored"]))


def _ingredients(config: BuildConfig, run: RunSettings, recorded: Mapping[str, Any], current: Manifest) -> Ingredients:
    """Encoder and tokenizer, which have to be those of the database.

    Raises:
        InputError: one is another.
    """
    found = resolve(config, run)
    if found.tokenizer is None or found.tokenizer.fingerprint != recorded["fingerprint"]:
        raise InputError(f"the tokenizer {config.tokenizer!r} is not the one that cut the database's chunks.")
    encoder = found.settled_encoder(current).fingerprint
    if encoder != current.fingerprints["encoder"]["fingerprint"]:
        raise InputError(f"the encoder {config.encoder!r} is not the one that made the database's vectors.")
    if found.encoder is not None:
        settled = found.settled_encoder(current)
        found = replace(found, encoder=replace(found.encoder, identity=settled, precision_given=True))
    return found


def next_shard(out: Storage, current: Manifest) -> int:
    """The number of the first document shard that no version has had."""
    manifests = [current, *(load_version(out, kept.version.id) for kept in current.versions)]
    return 1 + max(s.number for m in manifests if m is not None for s in m.shards("documents"))


def _refuse_known(out: Storage, current: Manifest, new: Manifest) -> None:
    """Raises InputError: an input has the very content of one that is in the database."""
    known = {entry["sha256"]: entry["url"] for entry in current.inputs}
    for entry in new.inputs:
        if entry["sha256"] in known:
            raise InputError(
                f"{entry['url']} is in {out.url} already (as {known[entry['sha256']]}): its documents would be there "
                "twice."
            )


# -- joined with what is there -----------------------------------------------------------------------------------------


def _join(
    out: Storage,
    number: int,
    current: Manifest,
    config: BuildConfig,
    new: Manifest,
    run: RunSettings,
    progress: Progress,
    runner: Runner,
) -> Added:
    view = VersionStorage(out.url, number)
    end_leftover_job(view, progress)
    merged = _merged(current, new, number)
    left = Manifest.load(view)
    if left is None or left.shards("chunks") != merged.shards("chunks"):
        merged.save(view)
    ingredients = Ingredients(None, "", None)
    builder = Builder([], view, config, run, progress, ingredients, runner, VERSIONED_TABLES)
    _extend_index(builder, current, new)
    changed = _extend_neighbours(builder, current, new)
    _extend_training(builder, current)
    _extend_report(builder, current)
    builder.clean_up()
    view.delete_folder(f"{version_folder(number)}/{_NEW}")
    made = replace(builder.manifest.version, created=now())
    published = publish(out, replace(builder.manifest, version=made))
    documents, chunks = new.rows("documents"), new.rows("chunks")
    progress.note(f"{documents:,} documents, {chunks:,} chunks added: version {published.version.id} is published")
    return Added(published.version.id, documents, chunks, changed)


def _merged(current: Manifest, new: Manifest, number: int) -> Manifest:
    """The manifest up to the encoder, as a build of everything would record it but for the numbers of its shards."""
    tables = {
        table: (*current.shards(table), *new.shards(table))
        for table in (*_TEXT_TABLES, "embeddings")
        if current.shards(table) or new.shards(table) or table in current.tables
    }
    tables["deleted"] = current.shards("deleted")
    corpus = current.stages["corpus"].made_from
    upstream: dict[str, dict[str, Any]] = {
        "corpus": {"inputs": {**corpus["inputs"], **new.stages["corpus"].made_from["inputs"]}},
        "dedup": {},
        "chunk": {},
        "embed": {},
    }
    states: dict[str, StageState] = {}
    for stage, changes in upstream.items():
        before, added = current.stages[stage], new.stages[stage]
        if stage == "dedup":
            changes = {"corpus": states["corpus"].fingerprint}  # noqa: PLW2901
        elif stage == "chunk":
            changes = {"documents": states["dedup"].fingerprint}  # noqa: PLW2901
        made_from = {**before.made_from, **changes}
        if stage == "embed":
            made_from["chunks"] = fingerprint(stages.chunks_of(states["chunk"].made_from))
        counts = {name: before.counts.get(name, 0) + added.counts.get(name, 0) for name in before.counts | added.counts}
        details = dict(before.details)
        if stage == "chunk":
            held_out = {**before.details.get(VALIDATION_CHUNKS, {}), **added.details.get(VALIDATION_CHUNKS, {})}
            details |= {VALIDATION_CHUNKS: held_out} if held_out else {}
        states[stage] = StageState(fingerprint(made_from), made_from, counts, details)
    return replace(
        current,
        inputs=[*current.inputs, *new.inputs],
        stages=states,
        tables={table: shards for table, shards in tables.items() if shards or table in ("quarantine", "duplicates")},
        fingerprints={
            **current.fingerprints,
            "stages": {name: state.fingerprint for name, state in states.items()},
        },
        version=Version(number, current.version.id, "add", current.version.step),
        versions=(),
    )


def _choice(current: Manifest) -> KeyChoice:
    details = current.stages["index"].details
    return KeyChoice(**{name: details[name] for name in CHOICE_FIELDS}, estimated_bytes=0)


def _extend_index(builder: Builder, current: Manifest, new: Manifest) -> None:
    """The index shards that are there, and further ones, all under the quantiser that is there."""
    state = current.stages["index"]
    choice = _choice(current)
    parts = stages.index_parts(builder.manifest.stages["embed"].fingerprint, builder.config, choice)
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
        small=_SMALL_VECTORS,
    )
    added = [receipt.shards["index"] for receipt in receipts.values()]
    counts = {**state.counts, "indexed": state.counts["indexed"] + sum(shard.rows for shard in added)}
    details = {**state.details, "vectors": state.details["vectors"] + sum(rows.values())}
    details["shards"] = state.details["shards"] + len(groups)
    if settings.metric == "ip":
        norms = [receipt.details.get(LARGEST_NORM, 0.0) for receipt in receipts.values()]
        details[LARGEST_NORM] = max([state.details.get(LARGEST_NORM, 0.0), *norms])
    builder.record("index", parts, {"index": [*there, *added]}, counts, details)
    builder.progress.end(f"{sum(rows.values()):,} vectors in {len(groups):,} more shards")


# -- neighbours --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OldNeighbours:
    """A query shard that was there, and its neighbours as they were."""

    query: QueryShard
    before: Shard


class TakeNearer(SearchShard):
    """Task (a query shard that was there) -> its neighbours, with what is nearer of the new index shards; the shard as
    it was where nothing is."""

    def process(self, task: Task) -> Iterator[int]:
        with self._naming(task.number):
            if self._left(task) is not None:
                self._take(task)
            yield task.number

    def _take(self, task: Task) -> None:
        payload: OldNeighbours = task.payload
        before = from_table(self._storage.read_table(payload.before))
        found = self._found(payload.query.files)
        merged = nearest_of(before, found, self._settings.metric)
        if np.array_equal(merged.neighbour_ids, before.neighbour_ids):
            finish(self._book, Receipt(task.number, {"neighbours": payload.before}, self._counts(before)))
        else:
            self._finish(task.number, merged)

    def _counts(self, found: Neighbours) -> dict[str, int]:
        return {
            "queries": len(found.chunk_ids),
            "found": int(found.n_valid.sum()),
            "short": int((found.n_valid < self._settings.k).sum()),
        }


def nearest_of(before: Neighbours, found: Neighbours, metric: str) -> Neighbours:
    """The k best of two sets of neighbours of the same queries that have none in common; ties by ascending id."""
    ids = np.concatenate([before.neighbour_ids, found.neighbour_ids], axis=1)
    documents = np.concatenate([before.neighbour_document_ids, found.neighbour_document_ids], axis=1)
    distances = np.concatenate([before.distances, found.distances], axis=1)
    keys = np.where(ids >= 0, -distances if metric == "ip" else distances, np.inf)
    order = np.lexsort((np.where(ids >= 0, ids, np.iinfo(np.int64).max), keys), axis=1)[:, : before.k]

    def taken(values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, order, axis=1)

    n_valid = np.minimum(before.n_valid + found.n_valid, before.k).astype(np.int16)
    return Neighbours(before.chunk_ids, taken(ids), taken(documents), taken(distances), n_valid)


def _extend_neighbours(builder: Builder, current: Manifest, new: Manifest) -> int:
    """The new chunks' neighbours, searched in everything; those of the others, as far as something new is nearer.

    Returns:
        The shards of old chunks that changed.
    """
    choice = _choice(current)
    index = builder.manifest.stages["index"]
    parts = stages.neighbours_parts(index.fingerprint, builder.config, choice)
    before = {shard.number: shard for shard in current.shards("neighbours")}
    if not builder.is_current("neighbours", parts):
        book = builder.book("neighbours", parts)
        there = set(current.shards("index"))
        settings = search_settings(builder, choice)
        nprobe = int(current.stages["neighbours"].details["nprobe"])
        some = tuple(file for file in settings.index if file.path not in there)
        settings = replace(settings, index=some, nprobe=nprobe, together=True)
        files = shard_files(builder.manifest)
        tasks = [
            Task(n, OldNeighbours(QueryShard(files[n]), shard), weight=shard.rows)
            for n, shard in sorted(before.items())
        ]
        builder.begin("neighbours", parts)
        builder.executor.complete(
            book, tasks, functools.partial(_take_pipeline, book, settings), unit="chunks", small=_SMALL_QUERIES
        )
        build_neighbours(builder)
    return sum(before.get(s.number, s) != s for s in builder.manifest.shards("neighbours"))


def _take_pipeline(
    book: ReceiptBook, settings: SearchSettings, pipeline: beam.Pipeline, tasks: Sequence[Task]
) -> beam.PCollection:
    return pipeline | DealOut(tasks) | "take nearer" >> beam.ParDo(TakeNearer(book, settings))


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


def _extend_training(builder: Builder, current: Manifest) -> None:
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


def _extend_report(builder: Builder, current: Manifest) -> None:
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
