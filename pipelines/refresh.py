"""refresh: the same text under another encoder, as a new version beside the current one (realm.md, R1 to R7).

Readers of the current version notice nothing; what is made lies under ``versions/<n>/`` and does not exist until
`retrodb.versions.publish` replaces the pointer. Killed anywhere, the next refresh to the same encoder goes on from the
receipts; a refresh to another encoder clears them away.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from retrodb.pipelines.builder import Builder
from retrodb.pipelines.driver import run_mending
from retrodb.pipelines.holding import held, lay_out, refuse_damaged, refuse_unfinished
from retrodb.pipelines.ingredients import Ingredients, check_surroundings, located, resolve
from retrodb.pipelines.progress import Progress
from retrodb.pipelines.runners import make_runner
from retrodb.pipelines.stages import STAGE_TABLES

from retrodb.chunking import refuse_other_tokenizer
from retrodb.config import BuildConfig, RunSettings
from retrodb.errors import EncoderError, InputError
from retrodb.manifest import (
    MANIFEST_NAME,
    STAGES,
    TEXT_STAGES,
    VERSIONED_TABLES,
    Manifest,
    Version,
    taken_from,
)
from retrodb.storage import Storage
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
        InputError: there is no finished database, or the device or the tokenizer it was built with is not here.
        EncoderError: the encoder does not exist, does not fit the database, or makes vectors that are not finite.
        DamagedError: a shard of the text is damaged.
        LockedError: another process is building it.
        RecallError: the new index stays below the recall gate; the current version stays.
        WorkerError: a worker failed; what was finished is kept.
    """
    runner = make_runner(run)
    runner.check([out.url])
    with contextlib.closing(runner), held(out, progress, run.wait) as current:
        refuse_unfinished(out, current, "it is refreshed")
        with taken_from(out.describe(MANIFEST_NAME)):
            recorded = BuildConfig.model_validate(current.config)
        check_surroundings(recorded, run)
        with _for_the_encoders_sake():
            config = located(recorded.model_copy(update={"encoder": encoder}))
            ingredients = resolve(config, run)
        if _is_same(current, ingredients):
            return RefreshOutcome(_found_at(out, current, config.encoder, ingredients, progress), (), {})
        if ingredients.tokenizer is not None:
            cut_by, found = current.fingerprints["tokenizer"], ingredients.tokenizer.fingerprint
            with _for_the_encoders_sake():
                refuse_other_tokenizer(cut_by, found, repr(config.encoder), "Build another database for it.")
        refuse_damaged(out, current, [table for stage in TEXT_STAGES for table in STAGE_TABLES[stage]])
        view = VersionStorage(out.url, next_version(current))
        start = _text_alone(current, view.version, step)
        lay_out(view, start, lambda left: _text_of(left) == _text_of(start), progress)
        with _for_the_encoders_sake():
            outcome = run_mending(
                lambda: Builder([], view, config, run, progress, ingredients, runner, VERSIONED_TABLES), "embed"
            )
        made = dataclasses.replace(
            outcome.manifest,
            config=config.model_dump(mode="json"),
            fingerprints={**outcome.manifest.fingerprints, "encoder": _recorded(ingredients, outcome.manifest)},
            version=dataclasses.replace(start.version, created=now()),
        )
        published = publish(out, current, made, outcome.manifest)
        progress.note(f"version {published.version.id} is published")
        return RefreshOutcome(published, outcome.done, outcome.seconds)


@contextlib.contextmanager
def _for_the_encoders_sake() -> Iterator[None]:
    """Inside, all but the encoder was found to be in order: what is refused still is the encoder's fault.

    Raises:
        EncoderError: it was refused. (`RecallError` says as much by itself: the vectors cannot be indexed.)
    """
    try:
        yield
    except EncoderError:
        raise
    except InputError as error:
        raise EncoderError(str(error)) from error


def _is_same(current: Manifest, ingredients: Ingredients) -> bool:
    return ingredients.settled_encoder(current).fingerprint == current.fingerprints["encoder"]["fingerprint"]


def _found_at(out: Storage, current: Manifest, place: str, ingredients: Ingredients, progress: Progress) -> Manifest:
    """Record where the encoder of the current version is to be found from now on; what there is stays as it is.

    ``manifest.json`` alone says so: a version's own manifest is what was published.
    """
    if place == current.config.get("encoder"):
        progress.note(f"version {current.version.id} has this encoder already: nothing to do")
        return current
    found = dataclasses.replace(
        current,
        config={**current.config, "encoder": place},
        fingerprints={**current.fingerprints, "encoder": _recorded(ingredients, current)},
    )
    found.save(out, current)
    progress.note(f"version {current.version.id} has this encoder already: found at {place} from now on")
    return found


def _recorded(ingredients: Ingredients, manifest: Manifest) -> dict[str, Any]:
    """What a manifest says of an encoder, by the place where it was found now."""
    return ingredients.settled_encoder(manifest).as_json()


def _text_alone(current: Manifest, number: int, step: int | None) -> Manifest:
    """A new version before anything is embedded for it."""
    text = current.without(
        [stage for stage in STAGES if stage not in TEXT_STAGES],
        [table for table in current.tables if table in VERSIONED_TABLES],
    )
    return dataclasses.replace(text, version=Version(number, current.version.id, "refresh", step), versions=())


def _text_of(manifest: Manifest) -> dict[str, object]:
    return {table: shards for table, shards in manifest.tables.items() if table not in VERSIONED_TABLES}
