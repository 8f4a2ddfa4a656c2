"""add: documents join a database, at a cost that follows what is new, as its next version (realm.md, C2).

What is new goes through the text stages and the encoder as a small database of its own, whose shards are numbered where
those that are there end; near-duplicates are looked for in what is there, too (`retrodb.pipelines.extend_dedup`). Then
the index takes the new vectors as further shards under the quantiser it has; the new chunks are searched in all of it;
and each old chunk, compared with the new index shards alone, takes what is nearer. Training shards and leakage are made
anew where neighbours changed. With an exact index the neighbours are those that a build of everything would find.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
from retrodb.pipelines.builder import Builder
from retrodb.pipelines.chunk import VALIDATION_CHUNKS
from retrodb.pipelines.dedup_stage import CUT, comparable, report_anew
from retrodb.pipelines.execute import Executor
from retrodb.pipelines.extend import (
    extend_block_duplicates,
    extend_index,
    extend_neighbours,
    extend_report,
    extend_training,
)
from retrodb.pipelines.extend_dedup import extend_dedup, relabel
from retrodb.pipelines.holding import held, lay_out, refuse_damaged, refuse_unfinished
from retrodb.pipelines.ingredients import Ingredients, same_ingredients
from retrodb.pipelines.integrity import damaged_shards
from retrodb.pipelines.lineage import beginning, chained, goes_on
from retrodb.pipelines.progress import Progress
from retrodb.pipelines.runners import Runner, make_runner
from retrodb.pipelines.runners.leftover import end_leftover_job
from retrodb.pipelines.spans_stage import QueriesOfNew
from retrodb.pipelines.stages import STAGE_TABLES
from retrodb.pipelines.text_stages import build_chunks, build_corpus, build_embeddings

from retrodb import schemas
from retrodb.config import BuildConfig, RunSettings
from retrodb.corpus import InputFile, outside
from retrodb.deletions import Deletions
from retrodb.errors import InputError
from retrodb.manifest import (
    MANIFEST_NAME,
    SPANS_STAGE,
    VERSIONED_TABLES,
    Manifest,
    Version,
    taken_from,
    version_folder,
)
from retrodb.sizes import count_of
from retrodb.storage import Storage
from retrodb.versions import VersionStorage, next_shard, next_version, now, publish

_NEW: Final = "added"
_TEXT_TABLES: Final = ("documents", "quarantine", "duplicates", "chunks")


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
        InputError: there is no finished database, its settings do not allow it, an input is in it already, or all of
            them are its own files.
        DamagedError: a shard that would be read is damaged.
        LockedError: another process changes the database.
        RecallError: the index, with what is new, stays below the recall gate; the current version stays.
        WorkerError: a worker failed; what was finished is kept.
    """
    inputs = outside(inputs, out.url)
    runner = make_runner(run)
    runner.check([out.url, *(file.url for file in inputs)])
    with contextlib.closing(runner), held(out, progress, run.wait) as current:
        refuse_unfinished(out, current, "documents are added")
        with taken_from(out.describe(MANIFEST_NAME)):
            config = BuildConfig.model_validate(current.config)
        _refuse_unfit(out, current, config)
        queries = QueriesOfNew.of(current, out.url)
        refuse_damaged(out, current)
        addition = _Addition(out, next_version(current), current, config, run, progress, runner, queries)
        return addition.joined(addition.new(inputs))


def _refuse_unfit(out: Storage, current: Manifest, config: BuildConfig) -> None:
    """What an addition cannot keep true is refused.

    Raises:
        InputError: near-duplicates matter, but there is no text to find them in.
    """
    decontaminated = config.has_validation and config.decontaminate and config.dedup != "off"
    matters = {"--exclude cluster": config.exclude == "cluster", "--dedup drop": config.dedup == "drop"}
    matters["validation documents kept apart"] = decontaminated
    named = [name for name, given in matters.items() if given]
    if named and current.rows("documents") and not comparable(current):
        raise InputError(
            f"{out.url} has {named[0]}, and its text is not kept (--no-text): what is added cannot be compared with it "
            "for near-duplicates. Build anew with all inputs."
        )


@dataclass
class _Addition:
    """One addition under way, as the version ``number`` of the database ``out``."""

    out: Storage
    number: int
    current: Manifest
    config: BuildConfig
    run: RunSettings
    progress: Progress
    runner: Runner
    queries: QueriesOfNew | None
    """Where the database has masked queries."""

    def new(self, inputs: Sequence[InputFile]) -> Manifest:
        """The text and the vectors of what is new: a database that stops after the encoder, numbered behind what is
        there.

        Raises:
            InputError: an input is in the database already, or holds no document.
        """
        config, ingredients = same_ingredients(self.out, self.current, self.config, self.run)
        config = config.model_copy(update={"validation": ()})
        place = VersionStorage(self.out.url, self.number, _NEW)
        lay_out(place, Manifest(), lambda left: not any(damaged_shards(place, left).values()), self.progress)
        builder = Builder(
            inputs,
            place,
            config,
            self.run,
            self.progress,
            ingredients,
            self.runner,
            (*_TEXT_TABLES, "embeddings"),
            next_shard(self.out, self.current),
            self.current,
        )
        for step in (build_corpus, extend_dedup, build_chunks, build_embeddings):
            step(builder)
            if step is build_corpus:
                _refuse_known(self.out, self.current, builder.manifest)
        builder.clean_up()
        return builder.manifest

    def joined(self, new: Manifest) -> Added:
        """What is there and what is new together, published."""
        view = VersionStorage(self.out.url, self.number)
        end_leftover_job(view, self.progress)
        merged = relabel(_merged(self.current, new, self.number), new, view, Executor(self.runner, self.progress))
        left = Manifest.load(view)
        if not goes_on(left, merged):
            merged.save(view, left)
        nothing = Ingredients(None, "", None)
        tables = (*VERSIONED_TABLES, *STAGE_TABLES[SPANS_STAGE])
        builder = Builder([], view, self.config, self.run, self.progress, nothing, self.runner, tables)
        report_anew(builder)
        extend_block_duplicates(builder)
        extend_index(builder, self.current, new)
        changed = extend_neighbours(builder, self.current)
        if self.config.unit == "chunk":
            extend_training(builder, self.current)
            extend_report(builder, self.current)
        if self.queries is not None:
            self.queries.draw(builder)
        builder.clean_up()
        view.delete_folder(f"{version_folder(self.number)}/{_NEW}")
        made = replace(builder.manifest.version, created=now())
        published = publish(self.out, self.current, replace(builder.manifest, version=made), builder.manifest)
        documents, chunks = new.rows("documents"), new.rows("chunks")
        self.progress.note(
            f"{count_of(documents, 'document')}, {count_of(chunks, 'chunk')} added: version {self.number} is published"
        )
        return Added(published.version.id, documents, chunks, changed)


def _refuse_known(out: Storage, current: Manifest, new: Manifest) -> None:
    """Raises InputError: an input has the very content of one of which documents are in the database, not deleted.

    A file that was written anew since has documents of the same source that are not of this content: both must agree.
    """
    for entry in new.inputs:
        known = {each["url"] for each in current.inputs if each["sha256"] == entry["sha256"]}
        if not known:
            continue
        own = pa.chunked_array(_hashes(out, new, entry["url"]), schemas.documents().field("content_hash").type)
        for url in sorted(known):
            documents = sum(pc.sum(pc.is_in(hashes, own)).as_py() or 0 for hashes in _hashes(out, current, url))
            if documents:
                raise InputError(
                    f"{entry['url']} is in {out.url} already (as {url}): {count_of(documents, 'document')} of it would "
                    "be there twice. Delete what is there of it first, or add the others from a file of their own."
                )


def _hashes(out: Storage, manifest: Manifest, source: str) -> list[pa.Array]:
    """By shard, ``content_hash`` of the documents of a source that are not deleted."""
    gone, found = Deletions.of(out, manifest), []
    for shard in manifest.shards("documents"):
        table = out.read_table(shard, ["document_id", "source", "content_hash"]).combine_chunks()
        stays = pa.array(~gone.of_documents(table["document_id"].to_numpy()))
        own = table.filter(stays).filter(pc.field("source") == source)
        found += own["content_hash"].chunks
    return found


def _merged(current: Manifest, new: Manifest, number: int) -> Manifest:
    """The manifest up to the encoder, as a build of everything would record it but for the numbers of its shards."""
    tables = {
        table: tuple(sorted({shard.number: shard for shard in (*current.shards(table), *new.shards(table))}.values()))
        for table in (*_TEXT_TABLES, "embeddings")
        if current.shards(table) or new.shards(table) or table in current.tables
    }
    for table in ("deleted", "null"):  # what the encoder makes of no document is as it was
        tables[table] = current.shards(table)
    inputs = {**current.stages["corpus"].made_from["inputs"], **new.stages["corpus"].made_from["inputs"]}
    counts = {stage: _sum(current.stages[stage].counts, state.counts) for stage, state in new.stages.items()}
    held_out = [manifest.stages["chunk"].details.get(VALIDATION_CHUNKS, {}) for manifest in (current, new)]
    merged = beginning(
        current,
        chained(current, {"inputs": inputs}, counts, {**held_out[0], **held_out[1]}),
        {table: shards for table, shards in tables.items() if shards or table in ("quarantine", "duplicates")},
        Version(number, current.version.id, "add", current.version.step),
    )
    dedup = merged.stages["dedup"]
    details = dict(dedup.details)
    details[CUT] = max(manifest.stages["dedup"].details.get(CUT, 0) for manifest in (current, new))
    return replace(
        merged,
        inputs=[*current.inputs, *new.inputs],
        stages={**merged.stages, "dedup": replace(dedup, details=details)},
    )


def _sum(before: Mapping[str, int], added: Mapping[str, int]) -> dict[str, int]:
    return {name: before.get(name, 0) + added.get(name, 0) for name in {**before, **added}}
