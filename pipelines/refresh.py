"""refresh: the same text under another encoder, as a new version beside the current one (realm.md, R1 to R7).

Readers of the current version notice nothing; what is made lies under ``versions/<n>/`` and does not exist until
`retrodb.versions.publish` replaces the pointer. Killed anywhere, the next refresh to the same encoder goes on from the
receipts; a refresh to another encoder clears them away.
"""

import dataclasses
from dataclasses import dataclass

from retrodb.pipelines.builder import Builder
from retrodb.pipelines.driver import run_mending
from retrodb.pipelines.ingredients import Ingredients, located, resolve
from retrodb.pipelines.integrity import damaged_shards, mend_manifest
from retrodb.pipelines.progress import Progress
from retrodb.pipelines.runners import make_runner
from retrodb.pipelines.runners.leftover import end_leftover_job
from retrodb.pipelines.stages import STAGE_TABLES

from retrodb.chunking import OWN_TOKENIZER
from retrodb.config import BuildConfig, RunSettings
from retrodb.errors import DamagedError, InputError, MismatchError
from retrodb.lock import writer_lock
from retrodb.manifest import (
    MANIFEST_NAME,
    STAGES,
    TEXT_STAGES,
    VERSIONED_TABLES,
    Manifest,
    Version,
    taken_from,
    version_folder,
)
from retrodb.storage import Storage
from retrodb.units import is_complete
from retrodb.versions import VersionStorage, next_version, now, publish


@dataclass(frozen=True)
class RefreshOutcome:
    """What a refresh came to: the manifest that is current now, and the stages that did something (none: a no-op)."""

    manifest: Manifest
    done: tuple[str, ...]
    seconds: dict[str, float]

    @property
    def version(self) -> int:
        """The current version's id."""
        return self.manifest.version.id


def refresh(
    out: Storage, encoder: str, run: RunSettings, progress: Progress, step: int | None = None
) -> RefreshOutcome:
    """Embed the text of a database with another encoder, and publish that as its next version.

    Args:
        out: the database.
        encoder: as ``build --encoder``.
        run: how it is carried out.
        progress: is told what happens.
        step: the training step of the encoder's checkpoint, to be recorded.

    Raises:
        InputError: there is no finished database, or the encoder does not exist or does not fit it.
        DamagedError: a shard of the text is damaged.
        LockedError: another process is building it.
        RecallError: the new index stays below the recall gate; the current version stays.
        WorkerError: a worker failed; what was finished is kept.
    """
    if Manifest.recover(out) is None:
        out.check_bucket()
        raise InputError(f"{out.url} is not a retrodb database: it has no {MANIFEST_NAME}.")
    runner = make_runner(run)
    runner.check([out.url])
    try:
        with writer_lock(out):
            end_leftover_job(out, progress)
            mend_manifest(out, progress)
            current = _finished(out)
            with taken_from(out.describe(MANIFEST_NAME)):
                recorded = BuildConfig.model_validate(current.config)
            config = located(recorded.model_copy(update={"encoder": encoder}))
            ingredients = resolve(config, run)
            if _is_same(current, ingredients):
                progress.note(f"version {current.version.id} has this encoder already: nothing to do")
                return RefreshOutcome(current, (), {})
            _refuse_other_tokenizer(current, config, ingredients)
            _refuse_damaged(out, current)
            view = VersionStorage(out.url, next_version(current))
            end_leftover_job(view, progress)
            _lay_out(view, current, step)
            outcome = run_mending(
                lambda: Builder([], view, config, run, progress, ingredients, runner, VERSIONED_TABLES), "embed"
            )
            made = dataclasses.replace(outcome.manifest.version, step=step, created=now())
            published = publish(out, dataclasses.replace(outcome.manifest, version=made))
            progress.note(f"version {published.version.id} is published")
            return RefreshOutcome(published, outcome.done, outcome.seconds)
    finally:
        runner.close()


def _finished(out: Storage) -> Manifest:
    current = Manifest.load_whole(out)
    if current is None or not is_complete(current):
        raise InputError(f"{out.url} is not finished: run its build to the end before it is refreshed.")
    return current


def _is_same(current: Manifest, ingredients: Ingredients) -> bool:
    return ingredients.settled_encoder(current).fingerprint == current.fingerprints["encoder"]["fingerprint"]


def _refuse_other_tokenizer(current: Manifest, config: BuildConfig, ingredients: Ingredients) -> None:
    """Chunks that the encoder's own tokenizer cut are read by it as they are.

    Raises:
        MismatchError: the new encoder has another one.
    """
    if config.tokenizer != OWN_TOKENIZER or ingredients.tokenizer is None:
        return
    recorded, found = current.fingerprints["tokenizer"]["fingerprint"], ingredients.tokenizer.fingerprint
    if recorded != found:
        raise MismatchError(
            f"the chunks were cut by their encoder's own tokenizer ({recorded[:16]}); {config.encoder!r} has another "
            f"({found[:16]}). Build another database for it."
        )


def _refuse_damaged(out: Storage, current: Manifest) -> None:
    text = [table for stage in TEXT_STAGES for table in STAGE_TABLES[stage]]
    damage = damaged_shards(out, current, text)
    paths = [s.path for table, numbers in damage.items() for s in current.shards(table) if s.number in numbers]
    if paths:
        raise DamagedError(
            f"{', '.join(paths[:3])}{' and others' if paths[3:] else ''} of {out.url} are damaged: a version made from "
            "them would be wrong. Run the build again to repair them first."
        )


def _lay_out(view: VersionStorage, current: Manifest, step: int | None) -> None:
    """The new version's manifest: the text that is there, and what an interrupted refresh of the same text has made."""
    text = current.without(
        [stage for stage in STAGES if stage not in TEXT_STAGES],
        [table for table in current.tables if table in VERSIONED_TABLES],
    )
    version = Version(view.version, current.version.id, "refresh", step)
    start = dataclasses.replace(text, version=version, versions=())
    try:
        left = Manifest.load_whole(view)
    except (InputError, DamagedError):
        left = None
    if left is not None and _text_of(left) == _text_of(start):
        return
    view.delete_folder(version_folder(view.version))
    start.save(view)


def _text_of(manifest: Manifest) -> dict[str, object]:
    return {table: shards for table, shards in manifest.tables.items() if table not in VERSIONED_TABLES}
