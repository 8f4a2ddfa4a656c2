"""A database that is about to get another version: held, whole, and finished enough; and where the version is made."""

import contextlib
from collections.abc import Callable, Collection, Iterator

from retrodb.pipelines.integrity import damaged_shards, mend_manifest
from retrodb.pipelines.progress import Progress
from retrodb.pipelines.runners.leftover import end_leftover_job
from retrodb.pipelines.stages import STAGE_TABLES

from retrodb.errors import DamagedError, InputError
from retrodb.lock import writer_lock
from retrodb.manifest import MANIFEST_NAME, SPANS_STAGE, Manifest, version_folder
from retrodb.storage import Storage
from retrodb.units import is_complete
from retrodb.versions import VersionStorage


@contextlib.contextmanager
def held(out: Storage, progress: Progress, wait: float | None = None) -> Iterator[Manifest]:
    """The current manifest of a database whose lock is held; a job that an earlier driver left is ended.

    Args:
        out: the database.
        progress: is told what happens.
        wait: seconds that another writer is waited for; None: not at all.

    Raises:
        InputError: there is no database.
        DamagedError: neither its manifest nor the copy is whole.
        LockedError: another process changes it, still.
    """
    if Manifest.recover(out) is None:
        out.check_bucket()
        raise InputError(f"{out.url} is not a retrodb database: it has no {MANIFEST_NAME}.")
    with writer_lock(out, wait=wait, tell=progress.note) as taken_over:
        end_leftover_job(out, progress)
        mend_manifest(out, progress, fence=taken_over)
        current = Manifest.load_whole(out)
        assert current is not None, "it was there, and nobody else writes"
        yield current


def refuse_unfinished(out: Storage, current: Manifest, purpose: str) -> None:
    """Raises InputError: a stage is missing; ``purpose`` says before what it is needed."""
    if not is_complete(current):
        raise InputError(f"{out.url} is not finished: run its build to the end before {purpose}.")


def refuse_damaged(
    out: Storage,
    current: Manifest,
    tables: Collection[str] | None = None,
    because: str = "a version made from them would be wrong",
) -> None:
    """What is damaged goes into no new version, and becomes none that is current.

    Args:
        out: the database.
        current: its manifest.
        tables: those that would be read; None for all.
        because: why, in the message.

    Raises:
        DamagedError: a shard is missing, or its bytes are not the recorded ones.
    """
    damage = damaged_shards(out, current, tables, hinted=False)
    paths = [s.path for table, numbers in damage.items() for s in current.shards(table) if s.number in numbers]
    if not paths:
        return
    of_spans = {table for table, numbers in damage.items() if numbers} <= set(STAGE_TABLES[SPANS_STAGE])
    remedy = (
        "Run `retrodb spans` again: it repairs them."
        if of_spans
        else "Put them back from a copy of the database: a build repairs a first version alone."
        if current.versions
        else "Run the build again: it repairs them."
    )
    raise DamagedError(
        f"{', '.join(paths[:3])}{' and others' if paths[3:] else ''} of {out.url} are damaged: {because}. {remedy}"
    )


def lay_out(view: VersionStorage, start: Manifest, goes_on: Callable[[Manifest], bool], progress: Progress) -> None:
    """Begin the version that ``view`` makes, or go on with what a killed run has left of the very same.

    Args:
        view: the version's place.
        start: its manifest, before anything is made.
        goes_on: whether what is left is a beginning of the same.
        progress: is told of a job that is ended.
    """
    end_leftover_job(view, progress)
    try:
        left = Manifest.load_whole(view)
    except (InputError, DamagedError):
        left = None
    if left is None or not goes_on(left):
        view.delete_folder(version_folder(view.version))
        start.save(view, None)
