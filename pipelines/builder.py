"""One build under way: what every stage shares, from comparing fingerprints to recording shards."""

import platform
import posixpath
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import apache_beam as beam
from retrodb.pipelines import stages
from retrodb.pipelines.execute import Executor, Waves, forget_receipts, forget_scans, one_wave
from retrodb.pipelines.ingredients import Ingredients
from retrodb.pipelines.integrity import damaged_reports, damaged_shards
from retrodb.pipelines.progress import Progress
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.runners import Runner
from retrodb.pipelines.sketches import SKETCH_FOLDER
from retrodb.pipelines.tasks import Task

from retrodb import __version__
from retrodb.config import BuildConfig, RunSettings
from retrodb.corpus import InputFile
from retrodb.errors import DamagedError
from retrodb.manifest import (
    DAMAGE_REPORT,
    DEDUP_REPORT,
    FIRST_VERSION,
    LEAKAGE_REPORT,
    RECALL_REPORT,
    REPORT_PATH,
    REPORT_SHA256,
    REPORTS_FOLDER,
    STAGE_REPORTS,
    STAGES,
    TABLES,
    TRAINED_TOKENIZER,
    WORK_FOLDER,
    Manifest,
    Shard,
    StageState,
    fingerprint,
    is_of_a_table,
)
from retrodb.sizes import count_of
from retrodb.storage import TEMPORARY_PREFIX, Storage
from retrodb.units import is_complete, tables_of
from retrodb.versions import facts_of

_PACKAGES: Final = (
    "apache-beam",
    "autofaiss",
    "faiss-cpu",
    "numpy",
    "pyarrow",
    "rensa",
    "tokenizers",
    "torch",
    "transformers",
)


ReportWriter = Callable[[StageState], str]
"""Commits a stage's report from what is recorded of the stage and from the tables; its sha256."""


@dataclass(frozen=True)
class StageWork:
    """A stage as the builder sees it.

    ``tasks`` are all of the stage's tasks; ``damaged`` the shards to make again if it is done already; ``small`` the
    total weight below which worker processes cost more than they bring; ``rewritten_later`` the tables that a later
    stage finishes, whose bytes here say nothing yet; ``most`` the processes of this machine that can share it: its
    cards, where a card does the work; ``refuse`` raises where what was made afresh is no use: nothing of it is in place
    by then.
    """

    stage: str
    parts: dict[str, Any]
    tasks: Sequence[Task]
    damaged: Collection[int]
    pipeline: Callable[[beam.Pipeline, ReceiptBook, Sequence[Task]], object]
    unit: str
    small: int
    waves: Waves = one_wave
    rewritten_later: tuple[str, ...] = ()
    most: int | None = None
    refuse: Callable[[Mapping[int, Receipt]], None] = lambda receipts: None


@dataclass
class Builder:
    """One build under way. ``manifest`` is what exists at this moment."""

    inputs: Sequence[InputFile]
    storage: Storage
    config: BuildConfig
    run: RunSettings
    progress: Progress
    ingredients: Ingredients
    runner: Runner
    tables: Sequence[str] = TABLES
    """Those whose folders are this build's to clear: of a later version, its own alone."""
    first_shard: int = 0
    """The number of the first document shard: of documents that join others, the first that is free."""
    joins: Manifest | None = None
    """The version that the documents join, if they do."""
    manifest: Manifest = field(init=False)
    executor: Executor = field(init=False)
    damage: dict[str, set[int]] = field(init=False)
    done: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        found = Manifest.load(self.storage)
        self.manifest = found or Manifest()
        self.executor = Executor(self.runner, self.progress)
        self.damage = damaged_shards(self.storage, self.manifest)

    def save(self, manifest: Manifest) -> None:
        """From now on this is what exists.

        Raises:
            LockedError: another writer has taken over, and changed what existed.
        """
        manifest = _telling_facts(manifest)
        manifest.save(self.storage, self.manifest)
        self.manifest = manifest

    # -- what every stage shares -----------------------------------------------------------------------------------

    def book(self, stage: str, parts: Mapping[str, Any]) -> ReceiptBook:
        return ReceiptBook(self.storage, stage, fingerprint(parts))

    @property
    def read_folder(self) -> str:
        """Where documents lie that were read again, while finished ones are what readers see."""
        corpus = self.manifest.stages.get("corpus")
        return f"{WORK_FOLDER}/read-{corpus.fingerprint[:16] if corpus else ''}"

    def source_documents(self) -> list[Shard]:
        """The document shards to make others from: those recorded, or what was read again in their place."""
        again = set(self.storage.list_files(f"{self.read_folder}/documents"))
        return [
            replace(shard, path=f"{self.read_folder}/{shard.path}") if shard.path.split("/")[-1] in again else shard
            for shard in self.manifest.shards("documents")
        ]

    def is_current(self, stage: str, parts: Mapping[str, Any]) -> bool:
        """Whether the manifest has this stage, made from just these parts."""
        state = self.manifest.stages.get(stage)
        return state is not None and state.fingerprint == fingerprint(parts)

    def run_stage(self, work: StageWork) -> dict[int, Receipt] | None:
        """Do what a stage still lacks.

        Returns:
            The receipts of all its tasks, to be recorded by the caller; or None where the stage was done, and at most
            some damaged shards had to be made again.
        """
        current = self.is_current(work.stage, work.parts)
        if current and not work.damaged:
            return None
        book = self.book(work.stage, work.parts)
        tasks = list(work.tasks)
        if current:
            self.progress.note(f"{work.stage}: repairing {count_of(len(work.damaged), 'damaged shard')}")
            damaged = any(self.damage.get(table) for table in stages.STAGE_TABLES[work.stage])
            # Where bytes were damaged, an unfinished stage after this one may have been made from them.
            forget_receipts(self.storage, stages.downstream(work.stage) if damaged else [work.stage])
            tasks = [part for task in tasks if (part := task.restricted(work.damaged)) is not None]
        else:
            self.begin(work.stage, work.parts)
        receipts = self.executor.complete(
            book,
            tasks,
            lambda pipeline, some: work.pipeline(pipeline, book, some),
            work.unit,
            work.small,
            work.waves,
            most=work.most,
        )
        self.prove_read(work.stage)
        if not current:
            work.refuse(receipts)
        book.put_in_place(receipts.values())
        if not current:
            return receipts
        self.record_repair(work.stage, receipts, work.rewritten_later)
        self.storage.delete_folder(book.folder)
        self.progress.end(f"{count_of(len(receipts), 'shard')} repaired")
        return None

    def prove_read(self, stage: str) -> None:
        """What a stage was made from, found whole when the build began, still is: so it was while it was read.

        Raises:
            DamagedError: it is not.
        """
        if not self.storage.is_local:
            return  # each was compared with its checksum when a worker fetched it
        damage = damaged_shards(self.storage, self.manifest, stages.STAGE_READS[stage])
        known = self.damage  # mended by now; or finished documents, in place before their stage is recorded
        paths = [
            shard.path
            for table, numbers in damage.items()
            for shard in self.manifest.shards(table)
            if shard.number in numbers - known.get(table, set())
        ]
        if paths:
            raise DamagedError(
                f"{', '.join(paths[:3])}{' and others' if paths[3:] else ''} changed while {stage} was made from it. "
                "Check the disk, and run the build again: it repairs that first."
            )

    def begin(self, stage: str, parts: Mapping[str, Any]) -> None:
        """Before a stage runs afresh: what depends on it leaves the manifest, then the disk. Says what changed."""
        if self.is_current(stage, parts):
            return
        reasons = stages.why_rebuilt(self.manifest, stage, parts)
        if reasons:
            self.progress.note(f"{stage}: made again, because {'; '.join(reasons)}")
        gone_stages = stages.undone_by(self.manifest, stage, parts)
        self.undo(gone_stages)
        forget_receipts(self.storage, gone_stages, keep=self.book(stage, parts).folder)

    def undo(self, gone_stages: Sequence[str]) -> None:
        """Take stages and their tables out of the manifest, then off the disk."""
        gone_tables = [table for name in gone_stages for table in stages.STAGE_TABLES[name]]
        if any(name in self.manifest.stages for name in gone_stages):
            old = [shard for table in gone_tables for shard in self.manifest.shards(table)]
            self.save(self.manifest.without(gone_stages, gone_tables))
            self.storage.delete(*(shard.path for shard in old if self.storage.owns(shard.path)))
        for table in gone_tables:
            self.damage.pop(table, None)

    def replace_template(self, recorded: Shard, made: Shard) -> None:
        """A damaged quantiser was trained again. Other bytes than before undo every index shard and what follows."""
        self.damage["index"].discard(recorded.number)
        if made == recorded:
            self.done.append("index")
            return
        gone = stages.downstream("index")
        tables = [table for name in gone for table in stages.STAGE_TABLES[name]]
        self.save(self.manifest.without(gone, tables))

    def record(
        self,
        stage: str,
        parts: dict[str, Any],
        tables: Mapping[str, Sequence[Shard]],
        counts: dict[str, int],
        details: dict[str, Any],
        report: ReportWriter | None = None,
        **changes: Any,
    ) -> None:
        """A stage is done: now, and only now, its shards exist. Its ``report``, if it has one, is written before that,
        and its checksum kept in the details."""
        state = StageState(fingerprint(parts), parts, counts, details)
        if report is not None:
            before = self.manifest
            self.manifest = before.with_stage(stage, state, tables)  # what the report is made from
            where = self.storage.placed(STAGE_REPORTS[stage])
            elsewhere = {REPORT_PATH: where} if where != STAGE_REPORTS[stage] else {}
            state = replace(state, details={**details, **elsewhere, REPORT_SHA256: report(state)})
            self.manifest = before
        manifest = replace(self.manifest.with_stage(stage, state, tables), **changes)
        recorded = {name: state.fingerprint for name, state in manifest.stages.items()}
        self.save(
            replace(
                manifest,
                config=self.config.model_dump(mode="json"),
                software=dict(_software()),
                fingerprints={**manifest.fingerprints, "stages": recorded},
            )
        )
        self.storage.delete_folder(self.book(stage, parts).folder)
        self.done.append(stage)

    def mend_report(self, stage: str, write: ReportWriter) -> None:
        """Write the report of a finished stage anew where it is missing or not what was recorded."""
        if stage not in damaged_reports(self.storage, self.manifest):
            return
        self.progress.note(f"{stage}: {STAGE_REPORTS[stage]} was missing or damaged, and is written anew")
        state = self.manifest.stages[stage]
        sha256 = write(state)
        if sha256 != state.details[REPORT_SHA256]:
            mended = replace(state, details={**state.details, REPORT_SHA256: sha256})
            self.save(self.manifest.with_stage(stage, mended, {}))
        if stage not in self.done:
            self.done.append(stage)

    def record_repair(self, stage: str, receipts: Mapping[int, Receipt], ignore: Sequence[str] = ()) -> None:
        """Damaged shards were made again. The same bytes change nothing; other bytes undo what depends on them."""
        made = {table: shard for receipt in receipts.values() for table, shard in receipt.shards.items()}
        changed = False
        tables: dict[str, list[Shard]] = {}
        for table in made:
            if table in ignore:
                continue
            new = {r.shards[table].number: r.shards[table] for r in receipts.values() if table in r.shards}
            old = {shard.number: shard for shard in self.manifest.shards(table)}
            changed = changed or any(old.get(number) != shard for number, shard in new.items())
            tables[table] = list({**old, **new}.values())
        if changed:
            after = stages.downstream(stage)[1:]
            gone = [table for name in after for table in stages.STAGE_TABLES[name]]
            for table in gone:
                self.damage.pop(table, None)
            left = self.manifest.without(after, gone)
            self.save(left.with_stage(stage, self.manifest.stages[stage], tables))
        if stage not in self.done:
            self.done.append(stage)

    def clean_up(self) -> None:
        """Remove what no finished stage recorded: leftovers of killed writers, of earlier settings, of damage."""
        recorded = {shard.path for shards in self.manifest.tables.values() for shard in shards}
        gone = []
        # A folder that nobody ever wrote to is not asked for: each costs an object store two requests.
        made = {table for stage in STAGES for table in stages.STAGE_TABLES[stage]}
        made &= set(tables_of(self.config.unit))
        for table in [table for table in self.tables if table in made or table in self.manifest.tables]:
            gone += [path for path in self.storage.list_below(table) if path not in recorded and is_of_a_table(path)]
        outdated = set(self._outdated_files())
        for folder in ("", REPORTS_FOLDER):
            paths = [(posixpath.join(folder, name), name) for name in self.storage.list_files(folder)]
            gone += [path for path, name in paths if path in outdated or name.startswith(TEMPORARY_PREFIX)]
        self.storage.delete(*gone)
        self.storage.delete_folder(WORK_FOLDER if is_complete(self.manifest) else SKETCH_FOLDER)
        forget_scans(self.storage)

    def _outdated_files(self) -> Iterator[str]:
        """Files beside the tables that say nothing of the database as it is now."""
        yield DAMAGE_REPORT
        if "neighbours" not in self.manifest.stages:
            yield RECALL_REPORT
        dedup = self.manifest.stages.get("dedup")
        if dedup is None or dedup.made_from["dedup"] == "off":
            yield DEDUP_REPORT
        if "report" not in self.manifest.stages:
            yield LEAKAGE_REPORT
        learnt = self.manifest.fingerprints.get("tokenizer", {}).get("stored")
        if "chunk" in self.manifest.stages and not learnt and self.storage.owns(TRAINED_TOKENIZER):
            yield TRAINED_TOKENIZER  # but for a later version, which shares the first one's


def _telling_facts(manifest: Manifest) -> Manifest:
    """A first version says what it is as soon as it is finished, and no longer than that; of a later one `publish`
    does. When it was made it does not say: a build's manifest depends on its inputs and settings alone."""
    if manifest.version.id != FIRST_VERSION or manifest.versions:
        return manifest
    facts = facts_of(manifest) if is_complete(manifest) else {}
    return replace(manifest, version=replace(manifest.version, facts=facts))


@cache
def _software() -> dict[str, str]:
    found = {"retrodb": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def add_counts(receipts: Mapping[int, Receipt]) -> dict[str, int]:
    """The counts of all tasks together."""
    total: dict[str, int] = {}
    for receipt in receipts.values():
        for name, value in receipt.counts.items():
            total[name] = total.get(name, 0) + value
    return dict(sorted(total.items()))


def shards_by_table(receipts: Mapping[int, Receipt], *tables: str) -> dict[str, list[Shard]]:
    """The shards of all tasks, by table."""
    return {table: [r.shards[table] for r in receipts.values() if table in r.shards] for table in tables}
