"""compact: the space of deleted documents is returned, as the next version of a database (realm.md, C2).

Shards that hold something deleted are written without it; all others are shared with the versions before. What is left
keeps its ids, so that nothing else names it differently. Index shards with a vector that goes are made again from the
stored vectors; chunks whose neighbours name a deleted chunk are searched anew, and only they; training shards and
leakage follow where neighbours changed. The old versions keep their files until `retrodb gc` retires them.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import apache_beam as beam
import numpy as np
from retrodb.pipelines import compaction, stages
from retrodb.pipelines import index as index_stage
from retrodb.pipelines.builder import Builder, add_counts
from retrodb.pipelines.chunk import VALIDATION_CHUNKS
from retrodb.pipelines.dedup_stage import report_anew
from retrodb.pipelines.execute import Executor
from retrodb.pipelines.extend import extend_report, extend_training
from retrodb.pipelines.holding import held, lay_out, refuse_damaged, refuse_unfinished
from retrodb.pipelines.index import IndexSettings
from retrodb.pipelines.ingredients import Ingredients
from retrodb.pipelines.lineage import beginning, chained, choice_of, goes_on, index_groups, is_beginning
from retrodb.pipelines.progress import Progress
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.retrieval_stages import SMALL_VECTORS, Earlier, neighbours_parts, renew_neighbours
from retrodb.pipelines.runners import Runner, make_runner
from retrodb.pipelines.shards import shard_files
from retrodb.pipelines.tasks import Task
from retrodb.schemas import ID_SHIFT

from retrodb.config import BuildConfig, RunSettings
from retrodb.deletions import Deletions
from retrodb.errors import InputError
from retrodb.manifest import (
    MANIFEST_NAME,
    SPANS_STAGE,
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
from retrodb.sizes import count_of
from retrodb.storage import Storage
from retrodb.units import stages_of
from retrodb.versions import VersionStorage, next_version, now, publish

MADE_BY: Final = "compact"
DROPPED: Final = "dropped.deleted"
"""What the corpus stage counts of documents that were deleted, and of which nothing is left; the spans stage likewise
counts spans, and imported ones that could not be used."""
_REWRITTEN: Final = ("documents", "chunks", "embeddings", "duplicates", *compaction.SPAN_TABLES)
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
    with contextlib.closing(runner), held(out, progress, run.wait) as current:
        refuse_unfinished(out, current, "it is compacted")
        gone = Deletions.of(out, current)
        size = named_bytes(current)
        if not len(gone):
            progress.note("nothing is deleted: nothing to do")
            return Compacted(current.version.id, 0, 0, 0, 0, size, size)
        with taken_from(out.describe(MANIFEST_NAME)):
            config = BuildConfig.model_validate(current.config)
        if int((gone.last - gone.first).sum()) == current.rows("chunks"):
            raise InputError(
                f"every document of {out.url} that has a {config.unit} is deleted: nothing would be left to retrieve. "
                "Delete the folder, or add documents first."
            )
        refuse_damaged(out, current)
        return _Compaction(out, current, gone, config, run, progress, runner).run_all()


def named_bytes(manifest: Manifest) -> int:
    """Bytes of all shards that a version names."""
    return sum(shard.bytes for shards in manifest.tables.values() for shard in shards)


_PipelineOf = Callable[[beam.Pipeline, ReceiptBook, Sequence[Task], compaction.Deleted], beam.PCollection]


@dataclass(frozen=True)
class _Kept:
    """What workers made of shards: by number of the shards that held something deleted, of those that say which blocks
    are equal, and of those with imported spans that could not be used."""

    text: Mapping[int, Receipt]
    equals: Mapping[int, Receipt]
    refused: Mapping[int, Receipt]


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
        if not goes_on(left, compacted):
            compacted.save(view, left)
        builder = Builder(
            [], view, self.config, self.run, self.progress, Ingredients(None, "", None), self.runner, TABLES
        )
        report_anew(builder)
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
            f"{count_of(done.documents, 'document')}, {count_of(chunks, 'chunk')} left out, "
            f"{count_of(searched, 'chunk')} searched anew, {count_of(written, 'shard')} written: version "
            f"{done.version} is published"
        )
        return done

    # -- the text and its vectors ----------------------------------------------------------------------------------

    def _without_deleted(self, view: VersionStorage, version: Version) -> Manifest:
        """The manifest up to the encoder, once the shards that held something deleted are written without it."""
        current, deleted = self.current, self.current.shards("deleted")
        files, numbers = shard_files(current), np.unique(self.gone.document_ids >> ID_SHIFT).tolist()
        executor = Executor(self.runner, self.progress)
        of_all = (*_REWRITTEN, "span_quarantine", "deleted")
        made_from = {table: [[s.path, s.sha256] for s in current.shards(table)] for table in of_all}
        book = ReceiptBook(view, MADE_BY, fingerprint(made_from))

        def left(step: str, tasks: Sequence[Task], pipeline_of: _PipelineOf) -> dict[int, Receipt]:
            if not tasks:
                return {}
            own = replace(book, step=step)
            return executor.complete(
                own,
                tasks,
                lambda pipeline, some: pipeline_of(pipeline, own, some, deleted),
                unit="shards",
                small=_SMALL_SHARDS,
            )

        kept = _Kept(
            left("", compaction.text_tasks(current, files, numbers), compaction.text_pipeline),
            left("equals", compaction.equals_tasks(current), compaction.equals_pipeline),
            left("refused", compaction.refused_tasks(current, files, numbers), compaction.refused_pipeline),
        )
        self.progress.end(f"{count_of(len(kept.text), 'shard holds', 'shards hold')} something deleted")
        return beginning(current, self._states(kept), _tables(current, kept), version)

    def _states(self, kept: "_Kept") -> dict[str, StageState]:
        """What the stages up to the encoder, and the spans, count and are made from, without what is deleted."""
        receipts = kept.text
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
        counts["chunk"] |= add_counts(kept.equals)
        counts["embed"]["vectors"] -= went["chunks"]
        held_out = dict(self.current.stages["chunk"].details.get(VALIDATION_CHUNKS, {}))
        for number, receipt in receipts.items():
            held_out[str(number)] = receipt.details[VALIDATION_CHUNKS]
        before: Any = self.current.stages["corpus"].made_from.get("deleted", [])
        without = [*before, *(shard.sha256 for shard in self.current.shards("deleted"))]
        states = chained(
            self.current, {"deleted": without}, counts, {number: rows for number, rows in held_out.items() if rows}
        )
        if SPANS_STAGE in self.current.stages:
            states[SPANS_STAGE] = self._spans_state(kept, states["chunk"])
        return states

    def _spans_state(self, kept: "_Kept", chunk: StageState) -> StageState:
        """The spans of what is left, as if they were found anew: what was read to find them stays as it was counted."""
        state = self.current.stages[SPANS_STAGE]
        counts, went = dict(state.counts), add_counts(kept.text) | add_counts(kept.refused)
        for name in (*compaction.SPAN_TABLES, compaction.QUARANTINED):
            counts[name] -= went.get(name, 0)
        gone = went.get("spans", 0) + went.get(compaction.QUARANTINED, 0)
        counts[DROPPED] = counts.get(DROPPED, 0) + gone
        made_from = {**state.made_from, "chunks": chunk.fingerprint}
        return StageState(fingerprint(made_from), made_from, counts, state.details)

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
        builder.progress.end(f"{count_of(len(receipts), 'index shard')} made again")

    def _neighbours(self, builder: Builder) -> int:
        """Neighbours of what is left; how many chunks were searched anew.

        Where candidates are re-ranked that is all of them: those that gave way to better ones are not kept.
        """
        if builder.is_current("neighbours", neighbours_parts(builder)):
            return 0
        if self.config.rerank != "none":
            return renew_neighbours(builder, None)
        deleted = self.current.shards("deleted")
        earlier = Earlier(
            int(self.current.stages["neighbours"].details["nprobe"]),
            compaction.neighbour_tasks(shard_files(builder.manifest), self.current.shards("neighbours")),
            lambda pipeline, book, tasks, settings: compaction.neighbours_pipeline(
                pipeline, book, tasks, settings, deleted
            ),
        )
        return renew_neighbours(builder, earlier)


def _tables(current: Manifest, kept: "_Kept") -> dict[str, tuple[Shard, ...]]:
    """The tables up to the vectors, and the spans. Nothing is deleted any more."""
    made_by = {
        **dict.fromkeys(_REWRITTEN, kept.text),
        "block_duplicates": kept.equals,
        "span_quarantine": kept.refused,
        "quarantine": {},
        "null": {},
    }
    tables: dict[str, tuple[Shard, ...]] = {}
    for table, receipts in made_by.items():
        if table in current.tables:
            shards = [shard for shard in current.shards(table) if shard.number not in receipts]
            shards += [receipt.shards[table] for receipt in receipts.values() if table in receipt.shards]
            tables[table] = tuple(sorted(shards))
    return tables
