"""compact: the space of deleted documents is returned, as the next version of a database (realm.md, C2).

Shards that hold something deleted are written without it; all others are shared with the versions before. What is left
keeps its ids, so that nothing else names it differently. Index shards with a vector that goes are made again from the
stored vectors; chunks whose neighbours name a deleted chunk are searched anew, and only they; training shards and
leakage follow where neighbours changed. The old versions keep their files until `retrodb gc` retires them.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from retrodb.pipelines import compaction, stages
from retrodb.pipelines import index as index_stage
from retrodb.pipelines.builder import Builder, add_counts
from retrodb.pipelines.chunk import VALIDATION_CHUNKS
from retrodb.pipelines.dedup_stage import write_report
from retrodb.pipelines.execute import Executor
from retrodb.pipelines.extend import extend_report, extend_training
from retrodb.pipelines.holding import held, lay_out, refuse_damaged, refuse_unfinished
from retrodb.pipelines.index import IndexSettings
from retrodb.pipelines.ingredients import Ingredients
from retrodb.pipelines.lineage import beginning, chained, choice_of, index_groups, is_beginning
from retrodb.pipelines.progress import Progress
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.retrieval_stages import SMALL_QUERIES, SMALL_VECTORS, build_neighbours, search_settings
from retrodb.pipelines.runners import Runner, make_runner
from retrodb.pipelines.searching import SEARCHED
from retrodb.pipelines.shards import shard_files
from retrodb.pipelines.tasks import Task
from retrodb.schemas import ID_SHIFT

from retrodb.config import BuildConfig, RunSettings
from retrodb.deletions import Deletions
from retrodb.errors import InputError
from retrodb.manifest import (
    MANIFEST_NAME,
    REPORT_PATH,
    REPORT_SHA256,
    SPANS_STAGE,
    STAGE_REPORTS,
    TABLES,
    TEMPLATE_NUMBER,
    TEXT_STAGES,
    VERSIONED_TABLES,
    Manifest,
    Shard,
    StageState,
    Version,
    fingerprint,
    taken_from,
)
from retrodb.storage import Storage
from retrodb.units import stages_of
from retrodb.versions import VersionStorage, next_version, now, publish

MADE_BY: Final = "compact"
DROPPED: Final = "dropped.deleted"
"""What the corpus stage counts of documents that were deleted, and of which nothing is left."""
_REWRITTEN: Final = ("documents", "chunks", "embeddings", "duplicates")
_SMALL_SHARDS: Final = 64


@dataclass(frozen=True)
class Compacted:
    """What a compaction came to: the version that is current now, what went, and what was done for it.

    ``searched`` are the chunks that were searched anew; ``bytes_before`` and ``bytes_after`` all that the version
    before and this one name.
    """

    version: int
    documents: int
    chunks: int
    shards: int
    searched: int
    bytes_before: int
    bytes_after: int


def compact(out: Storage, run: RunSettings, progress: Progress) -> Compacted:
    """Write a database anew as far as it holds deleted documents, and publish that as its next version.

    Killed anywhere, the same command goes on. Where nothing is deleted, nothing is changed.

    Args:
        out: the database.
        run: how it is carried out.
        progress: is told what happens.

    Raises:
        InputError: there is no finished database, or nothing would be left of it.
        DamagedError: a shard is damaged.
        LockedError: another process changes the database.
        RecallError: the index, without what was deleted, is below the recall gate; the current version stays.
        WorkerError: a worker failed; what was finished is kept.
    """
    runner = make_runner(run)
    runner.check([out.url])
    with contextlib.closing(runner), held(out, progress) as current:
        refuse_unfinished(out, current, "it is compacted")
        gone = Deletions.of(out, current)
        size = named_bytes(current)
        if not len(gone):
            progress.note("nothing is deleted: nothing to do")
            return Compacted(current.version.id, 0, 0, 0, 0, size, size)
        if int((gone.last - gone.first).sum()) == current.rows("chunks"):
            raise InputError(
                f"every document of {out.url} is deleted: nothing would be left of it. Delete the folder, or add "
                "documents first."
            )
        with taken_from(out.describe(MANIFEST_NAME)):
            config = BuildConfig.model_validate(current.config)
        if config.rerank != "none":
            raise InputError(
                f"{out.url} was built with --rerank {config.rerank}: which candidates of its chunks take the place of "
                "deleted ones is not kept. Build anew without those documents; until then they are masked."
            )
        refuse_damaged(out, current)
        return _Compaction(out, current, gone, config, run, progress, runner).run_all()


def named_bytes(manifest: Manifest) -> int:
    """Bytes of all shards that a version names."""
    return sum(shard.bytes for shards in manifest.tables.values() for shard in shards)


@dataclass
class _Compaction:
    """One compaction under way, of the version ``current`` of the database ``out``."""

    out: Storage
    current: Manifest
    gone: Deletions
    config: BuildConfig
    run: RunSettings
    progress: Progress
    runner: Runner

    def run_all(self) -> Compacted:
        """All of it, published."""
        current, view = self.current, VersionStorage(self.out.url, next_version(self.current))
        version = Version(view.version, current.version.id, MADE_BY, current.version.step)
        lay_out(view, self._start(version), lambda left: is_beginning(left, version), self.progress)
        compacted = self._without_deleted(view, version)
        left = Manifest.load(view)
        if left is None or left.shards("chunks") != compacted.shards("chunks") or "embed" not in left.stages:
            compacted.save(view, left)
        builder = Builder(
            [], view, self.config, self.run, self.progress, Ingredients(None, "", None), self.runner, TABLES
        )
        self._dedup_report(builder)
        self._index(builder)
        searched = self._neighbours(builder)
        if "training" in stages_of(self.config.unit):
            extend_training(builder, current)
            extend_report(builder, current)
        builder.clean_up()
        made = replace(builder.manifest.version, created=now())
        published = publish(self.out, current, replace(builder.manifest, version=made), builder.manifest)
        return self._told(published, searched)

    def _start(self, version: Version) -> Manifest:
        """The new version before anything is done for it."""
        text = self.current.without(
            [stage for stage in self.current.stages if stage not in TEXT_STAGES], [*VERSIONED_TABLES, "deleted"]
        )
        return replace(text, version=version, versions=())

    def _told(self, published: Manifest, searched: int) -> Compacted:
        before = {shard for shards in self.current.tables.values() for shard in shards}
        written = sum(shard not in before for shards in published.tables.values() for shard in shards)
        chunks = int((self.gone.last - self.gone.first).sum())
        done = Compacted(
            published.version.id,
            len(self.gone),
            chunks,
            written,
            searched,
            named_bytes(self.current),
            named_bytes(published),
        )
        self.progress.note(
            f"{done.documents:,} documents, {chunks:,} chunks left out, {searched:,} chunks searched anew, {written:,} "
            f"shards written: version {done.version} is published"
        )
        if SPANS_STAGE in self.current.stages:
            self.progress.note("its spans are not in the new version: run `retrodb spans` again")
        return done

    # -- the text and its vectors ----------------------------------------------------------------------------------

    def _without_deleted(self, view: VersionStorage, version: Version) -> Manifest:
        """The manifest up to the encoder, once the shards that held something deleted are written without it."""
        current, deleted = self.current, self.current.shards("deleted")
        files = shard_files(current)
        executor = Executor(self.runner, self.progress)
        made_from = {table: [[s.path, s.sha256] for s in current.shards(table)] for table in (*_REWRITTEN, "deleted")}
        book = ReceiptBook(view, MADE_BY, fingerprint(made_from))
        receipts = executor.complete(
            book,
            compaction.text_tasks(
                files, current.shards("duplicates"), np.unique(self.gone.document_ids >> ID_SHIFT).tolist()
            ),
            lambda pipeline, tasks: compaction.text_pipeline(pipeline, book, tasks, deleted),
            unit="shards",
            small=_SMALL_SHARDS,
        )
        equals: dict[int, Receipt] = {}
        if current.shards("block_duplicates"):
            step = replace(book, step="equals")
            equals = executor.complete(
                step,
                [Task(shard.number, shard) for shard in current.shards("block_duplicates")],
                lambda pipeline, tasks: compaction.equals_pipeline(pipeline, step, tasks, deleted),
                unit="shards",
                small=_SMALL_SHARDS,
            )
        self.progress.end(f"{len(receipts):,} shards hold something deleted")
        return beginning(current, self._states(receipts, equals), _tables(current, receipts, equals), version)

    def _states(self, receipts: Mapping[int, Receipt], equals: Mapping[int, Receipt]) -> dict[str, StageState]:
        """What the stages up to the encoder count and are made from, without what is deleted."""
        went = add_counts(receipts)
        counts = {stage: dict(self.current.stages[stage].counts) for stage in (*TEXT_STAGES, "embed")}
        corpus, documents = counts["corpus"], went[compaction.GONE_DOCUMENTS]
        corpus["kept"] -= documents
        corpus[DROPPED] = corpus.get(DROPPED, 0) + documents
        if "validation" in corpus:
            corpus["validation"] -= went[compaction.GONE_VALIDATION]
        counts["dedup"]["clustered"] -= went.get(compaction.GONE_DUPLICATES, 0)
        for name in counts["chunk"]:
            counts["chunk"][name] -= went.get(name, 0)
        counts["chunk"] |= add_counts(equals)
        counts["embed"]["vectors"] -= went["chunks"]
        held_out = dict(self.current.stages["chunk"].details.get(VALIDATION_CHUNKS, {}))
        for number, receipt in receipts.items():
            held_out[str(number)] = receipt.details[VALIDATION_CHUNKS]
        before: Any = self.current.stages["corpus"].made_from.get("deleted", [])
        without = [*before, *(shard.sha256 for shard in self.current.shards("deleted"))]
        return chained(
            self.current, {"deleted": without}, counts, {number: rows for number, rows in held_out.items() if rows}
        )

    def _dedup_report(self, builder: Builder) -> None:
        """The report of near-duplicates names documents: it is written for those that are left."""
        state = builder.manifest.stages["dedup"]
        if REPORT_SHA256 not in state.details:
            return
        where = builder.storage.placed(STAGE_REPORTS["dedup"])
        details = {**state.details, REPORT_PATH: where, REPORT_SHA256: write_report(builder, state)}
        builder.save(builder.manifest.with_stage("dedup", replace(state, details=details), {}))

    # -- index and neighbours --------------------------------------------------------------------------------------

    def _index(self, builder: Builder) -> None:
        """Index shards without the vectors that go; the others, and the quantiser, as they are."""
        state, choice = self.current.stages["index"], choice_of(self.current)
        parts = stages.index_parts(builder.manifest.stages["embed"].fingerprint, builder.config, choice)
        if builder.is_current("index", parts):
            return
        there = {shard.number: shard for shard in self.current.shards("index")}
        before = {shard.number: shard for shard in self.current.shards("chunks")}
        rows = {s.number: s.rows for s in builder.manifest.shards("chunks")}
        changed = {s.number for s in builder.manifest.shards("chunks") if s != before[s.number]}
        groups = {n: group for n, group in index_groups(self.current).items() if changed.intersection(group)}
        files = shard_files(builder.manifest)
        made = index_stage.add_tasks(
            [[files[number] for number in group] for group in groups.values()],
            [sum(rows[number] for number in group) for group in groups.values()],
        )
        tasks = [replace(task, number=number) for number, task in zip(groups, made, strict=True)]
        settings = IndexSettings(
            choice.key, builder.config.metric, int(self.current.fingerprints["encoder"]["dimension"]), self.config.seed
        )
        book = builder.book("index", parts)
        builder.begin("index", parts)
        receipts = builder.executor.complete(
            book,
            tasks,
            lambda pipeline, some: index_stage.add_pipeline(pipeline, book, some, settings, there[TEMPLATE_NUMBER]),
            unit="vectors",
            small=SMALL_VECTORS,
        )
        shards = {**there, **{number: receipt.shards["index"] for number, receipt in receipts.items()}}
        vectors = sum(shard.rows for number, shard in shards.items() if number != TEMPLATE_NUMBER)
        # The largest norm stays: it is a bound on what is left.
        details = {**state.details, "vectors": vectors}
        builder.record("index", parts, {"index": list(shards.values())}, {**state.counts, "indexed": vectors}, details)
        builder.progress.end(f"{len(receipts):,} index shards made again")

    def _neighbours(self, builder: Builder) -> int:
        """Neighbours of what is left; how many chunks were searched anew."""
        index, choice = builder.manifest.stages["index"], choice_of(self.current)
        parts = stages.neighbours_parts(index.fingerprint, builder.config, choice)
        if builder.is_current("neighbours", parts):
            return 0
        book = builder.book("neighbours", parts)
        nprobe = int(self.current.stages["neighbours"].details["nprobe"])
        settings = replace(search_settings(builder, choice), nprobe=nprobe, together=True)
        deleted = self.current.shards("deleted")
        builder.begin("neighbours", parts)
        receipts = builder.executor.complete(
            book,
            compaction.neighbour_tasks(shard_files(builder.manifest), self.current.shards("neighbours")),
            lambda pipeline, tasks: compaction.neighbours_pipeline(pipeline, book, tasks, settings, deleted),
            unit="chunks",
            small=SMALL_QUERIES,
        )
        build_neighbours(builder)
        return sum(int(receipt.details[SEARCHED]) for receipt in receipts.values())


def _tables(
    current: Manifest, receipts: Mapping[int, Receipt], equals: Mapping[int, Receipt]
) -> dict[str, tuple[Shard, ...]]:
    """The tables up to the vectors. Nothing is deleted any more."""
    tables: dict[str, tuple[Shard, ...]] = {
        table: current.shards(table)
        for table in (*_REWRITTEN, "quarantine", "block_duplicates", "null")
        if table in current.tables
    }
    for table in _REWRITTEN:
        if table in tables:
            shards = {shard.number: shard for shard in current.shards(table) if shard.number not in receipts}
            shards |= {number: r.shards[table] for number, r in receipts.items() if table in r.shards}
            tables[table] = tuple(sorted(shards.values()))
    if equals:
        tables["block_duplicates"] = tuple(sorted(r.shards["block_duplicates"] for r in equals.values()))
    return tables
