"""swap: another corpus under the settings, the tokenizer and the encoder of a database, as its next version (realm.md,
C1).

A build in the version's own place, in which nothing of a model is trained; its shards are numbered behind all that any
version has had, so that no id means two things. The versions before keep theirs, and `retrodb.versions.switch` goes
back to one by the pointer alone.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from retrodb.pipelines.builder import Builder
from retrodb.pipelines.driver import run_mending
from retrodb.pipelines.holding import held, lay_out, refuse_damaged, refuse_unfinished
from retrodb.pipelines.ingredients import same_ingredients
from retrodb.pipelines.lineage import is_beginning
from retrodb.pipelines.progress import Progress
from retrodb.pipelines.runners import make_runner
from retrodb.pipelines.spans_stage import QueriesOfNew
from retrodb.pipelines.text_stages import scan_inputs

from retrodb.config import BuildConfig, RunSettings
from retrodb.corpus import Listing, ScannedFile, outside, with_validation
from retrodb.errors import InputError
from retrodb.manifest import MANIFEST_NAME, TABLES, Manifest, Version, taken_from, version_folder
from retrodb.sizes import count_of
from retrodb.storage import Storage
from retrodb.versions import VersionStorage, load_version, next_shard, next_version, now, publish, switch

MADE_BY: Final = "swap"


@dataclass(frozen=True)
class Swapped:
    """What a swap came to: the version that is current now, and what is in it."""

    version: int
    documents: int
    chunks: int


def swap(out: Storage, listing: Listing, run: RunSettings, progress: Progress) -> Swapped:
    """Build another corpus as a database is built, and publish that as its next version.

    Validation files that the database was built with are its validation files still. Where it has masked queries, those
    of the new corpus are drawn by the same taggers. Killed anywhere, the same command goes on.

    Args:
        out: the database.
        listing: the new corpus.
        run: how it is carried out.
        progress: is told what happens.

    Raises:
        InputError: there is no finished database, no document to build from, a version has just this corpus, or what
            drew the masked queries is not here.
        LockedError: another process changes the database.
        RecallError: the new index is below the recall gate; the current version stays.
        WorkerError: a worker failed; what was finished is kept.
    """
    runner = make_runner(run)
    with contextlib.closing(runner), held(out, progress, run.wait) as current:
        refuse_unfinished(out, current, "its corpus is swapped")
        queries = QueriesOfNew.of(current, out.url)
        with taken_from(out.describe(MANIFEST_NAME)):
            recorded = BuildConfig.model_validate(current.config)
        inputs = outside(with_validation(listing, recorded.validation).files, out.url)
        runner.check([out.url, *(file.url for file in inputs)])
        if recorded.validation and ("deleted" in current.tables or "deleted" in current.stages["corpus"].made_from):
            progress.note(
                f"documents were deleted from {out.url}: those of its validation files "
                f"({', '.join(recorded.validation)}) come back, unless they are taken out of the files as well"
            )
        config, ingredients = same_ingredients(out, current, recorded, run)
        view = VersionStorage(out.url, next_version(current))
        version = Version(view.version, current.version.id, MADE_BY, current.version.step)
        lay_out(view, Manifest(version=version), lambda left: is_beginning(left, version), progress)
        first = next_shard(out, current)

        def builder() -> Builder:
            return Builder(inputs, view, config, run, progress, ingredients, runner, TABLES, first)

        try:
            _refuse_known(out, current, scan_inputs(builder()))
            left = run_mending(builder, besides=queries.draw_all if queries is not None else None).manifest
        except InputError:
            view.delete_folder(version_folder(view.version))
            raise
        found = {**left.fingerprints, "encoder": current.fingerprints["encoder"]}  # where it is now
        made = replace(left, config=current.config, fingerprints=found, version=replace(version, created=now()))
        published = publish(out, current, made, left)
        done = Swapped(published.version.id, published.rows("documents"), published.rows("chunks"))
        progress.note(
            f"{count_of(done.documents, 'document')}, {count_of(done.chunks, 'chunk')}: version {done.version} is "
            "published"
        )
        return done


def swap_back(out: Storage, version: int, progress: Progress, wait: float | None = None) -> Swapped:
    """Make a version that is kept the current one again: one pointer, and nothing of it is written.

    ``wait`` is how many seconds another writer is waited for.

    Raises:
        InputError: there is no database, or no such version.
        DamagedError: its manifest is lost, or it or a shard is not what was published.
        LockedError: another process changes the database.
    """
    with held(out, progress, wait) as current:
        kept = load_version(out, version)
        if kept is not None and version != current.version.id:
            refuse_damaged(out, replace(kept, versions=current.versions), because="the current version stays")
        found = switch(out, current, version)
        progress.note(f"version {version} is current{' already' if current.version.id == version else ' again'}")
        return Swapped(version, found.rows("documents"), found.rows("chunks"))


def _refuse_known(out: Storage, current: Manifest, scans: Sequence[ScannedFile]) -> None:
    """Raises InputError: a version has just this corpus, under this encoder and these settings."""
    wanted = sorted(scan.sha256 for scan in scans)
    for number in [current.version.id, *(kept.version.id for kept in current.versions)]:
        found = load_version(out, number)
        if (
            found is not None
            and sorted(entry["sha256"] for entry in found.inputs) == wanted
            and found.fingerprints["encoder"]["fingerprint"] == current.fingerprints["encoder"]["fingerprint"]
            and not found.shards("deleted")
            and "deleted" not in found.stages["corpus"].made_from
        ):
            raise InputError(
                f"version {number} of {out.url} has just these inputs"
                + (
                    ", and is current."
                    if number == current.version.id
                    else f": `retrodb swap --to {number}` goes there."
                )
            )
