"""The driver: runs, stage by stage, what the manifest says is missing, and records what became of it.

For each stage it does one of three things: nothing (same fingerprint, shards intact), exactly the damaged shards, or
all of it. In the last case the tables that depend on it leave the manifest first, so that no reader ever sees new
shards beside old ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from retrodb.pipelines import stages
from retrodb.pipelines.builder import Builder
from retrodb.pipelines.dedup_stage import build_dedup
from retrodb.pipelines.execute import forget_scans
from retrodb.pipelines.ingredients import located, refuse_foreign, resolve
from retrodb.pipelines.integrity import mend_manifest
from retrodb.pipelines.progress import Progress
from retrodb.pipelines.report_stage import build_report
from retrodb.pipelines.retrieval_stages import build_index, build_neighbours, build_training
from retrodb.pipelines.runners import JobRecord, make_runner
from retrodb.pipelines.runners.leftover import end_leftover_job
from retrodb.pipelines.text_stages import build_chunks, build_corpus, build_embeddings

from retrodb.config import BuildConfig, RunSettings
from retrodb.corpus import InputFile
from retrodb.errors import DamagedError, InputError
from retrodb.lock import writer_lock
from retrodb.manifest import (
    MANIFEST_COPY,
    MANIFEST_NAME,
    REPORTS_FOLDER,
    SPANS_STAGE,
    STAGES,
    TABLES,
    WORK_FOLDER,
    Manifest,
)
from retrodb.storage import Storage
from retrodb.units import BLOCK_TOKENS, stages_of


@dataclass(frozen=True)
class BuildOutcome:
    """What a build came to.

    ``done`` are the stages that did something: empty when nothing was to do. ``jobs`` is what the runner said of each.
    """

    manifest: Manifest
    done: tuple[str, ...]
    seconds: dict[str, float]
    jobs: tuple[JobRecord, ...] = ()


def build(
    inputs: Sequence[InputFile], out: Storage, config: BuildConfig, run: RunSettings, progress: Progress
) -> BuildOutcome:
    """Build a database, or bring it up to date, up to ``run.until``.

    Args:
        inputs: the listed input files.
        out: where the database is or shall be.
        config: what shapes the tables.
        run: how it is carried out.
        progress: is told what happens.

    Raises:
        InputError: the folder holds something else, no document is left to build from, or a setting does not fit.
        DamagedError: neither the manifest nor its copy is whole.
        LockedError: another build holds the database.
        RecallError: the index stays below the recall gate.
        WorkerError: a worker failed; what was finished is kept.
    """
    refuse_foreign(out)
    given, config = config, located(config)
    ingredients = resolve(config, run)
    runner = make_runner(run)
    runner.check([out.url, *(file.url for file in inputs)])
    made = out.make_root()
    try:
        with writer_lock(out, wait=run.wait, tell=progress.note) as taken_over:
            end_leftover_job(out, progress)
            new = not mend_manifest(out, progress, fence=taken_over)
            if new:
                Manifest().save(out, None)  # from here on the folder is a database, whatever happens
            else:
                _refuse_later_version(out)
            if config.unit == "block" and config.chunk_tokens < given.chunk_tokens == BLOCK_TOKENS:
                progress.note(f"blocks of {config.chunk_tokens} tokens, not {BLOCK_TOKENS}: the encoder reads no more")
            try:
                return run_mending(lambda: Builder(inputs, out, config, run, progress, ingredients, runner))
            except InputError:
                forget_scans(out)
                if new:
                    _abandon(out)
                raise
    finally:
        runner.close()
        out.unmake(made)


def _refuse_later_version(out: Storage) -> None:
    """A build makes a first version: over later ones it would undo what they are.

    Raises:
        InputError: the database has later versions.
    """
    manifest = Manifest.load_whole(out)
    if manifest is not None and manifest.versions:
        raise InputError(
            f"{out.url} has had several versions (current: {manifest.version.id}, made by {manifest.version.made_by}): "
            "a build would undo them. Use `retrodb refresh` for another encoder, or build into another folder."
        )


def _abandon(out: Storage) -> None:
    """Leave nothing of a database that was refused before it held anything."""
    manifest = Manifest.load(out)
    if manifest is not None and not manifest.tables:
        out.delete_folder(WORK_FOLDER)
        out.delete(MANIFEST_COPY)  # before the manifest: left alone, it would be taken for what a lost one said
        for folder in (*TABLES, REPORTS_FOLDER):
            if not out.list_files(folder):
                out.delete_folder(folder)
        out.delete(MANIFEST_NAME)


_STEPS: dict[str, Callable[[Builder], None]] = {
    "corpus": build_corpus,
    "dedup": build_dedup,
    "chunk": build_chunks,
    "embed": build_embeddings,
    "index": build_index,
    "neighbours": build_neighbours,
    "training": build_training,
    "report": build_report,
}


def run_mending(
    make_builder: Callable[[], Builder],
    first: str = STAGES[0],
    besides: Callable[[Builder], None] | None = None,
) -> BuildOutcome:
    """Run the stages from ``first`` on; once more where a shard was damaged on the way, which a new builder repairs.

    ``besides`` is done after them, before what is left over is cleared away.
    """
    try:
        return _run_all(make_builder(), first, besides)
    except DamagedError as error:
        builder = make_builder()
        if not builder.damage:
            raise
        builder.progress.note(f"a shard was damaged while it was used ({error}) Repairing it, and going on.")
        return _run_all(builder, first, besides)


def _run_all(builder: Builder, first: str, besides: Callable[[Builder], None] | None) -> BuildOutcome:
    builder.ingredients.prove(builder.manifest, builder.run)
    names = stages_of(builder.config.unit)
    for stage in names[names.index(first) :]:
        _STEPS[stage](builder)
        if stage == builder.run.until:
            break
    if besides is not None:
        besides(builder)
    if damaged := [table for table in stages.STAGE_TABLES[SPANS_STAGE] if builder.damage.get(table)]:
        builder.progress.note(
            f"{' and '.join(damaged)} have damaged shards: run retrodb spans again, which repairs them"
        )
    builder.clean_up()
    return BuildOutcome(builder.manifest, tuple(builder.done), builder.executor.seconds, tuple(builder.executor.jobs))
