"""What is damaged, found before a build: the manifest is put back, and exactly the damaged shards are made again."""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Final

from retrodb.pipelines.progress import Progress

from retrodb.corpus import ScannedFile
from retrodb.errors import DamagedError
from retrodb.formats import File
from retrodb.manifest import (
    DAMAGE_REPORT,
    MANIFEST_COPY,
    MANIFEST_NAME,
    REPORT_SHA256,
    STAGE_REPORTS,
    Manifest,
    Shard,
    changed_meanwhile,
    taken_from,
)
from retrodb.storage import Storage
from retrodb.versions import forget_killed

CHECK_ALL_BYTES: Final = 2 << 30
"""A database up to this size is checked byte by byte at every build (seconds); a larger one by sizes alone."""

_THREADS: Final = 4
_REMOTE_THREADS: Final = 16
"""Object stores answer slowly, and many at a time."""


def mend_manifest(storage: Storage, progress: Progress, *, fence: bool = False) -> bool:
    """Write ``manifest.json`` or its copy anew, whichever is not whole, from the other; says so. Needs the build lock.

    Args:
        storage: the database.
        progress: is told what is mended.
        fence: the lock was taken over from a writer that may wake up: it shall write no manifest (`Manifest.fenced`).

    Returns:
        Whether there is a manifest: False in a folder that is no database yet.

    Raises:
        InputError, MismatchError, DamagedError: as `Manifest.recover` does.
        LockedError: another process has written it meanwhile.
    """
    manifest = Manifest.recover(storage)
    if manifest is None:
        return False
    data = manifest.as_bytes()
    for name, other in ((MANIFEST_NAME, MANIFEST_COPY), (MANIFEST_COPY, MANIFEST_NAME)):
        if (there := storage.read_if_there(name)) != data:
            forget_killed(storage)  # its writer may have been, after a pointer that says all: nobody publishes again
            if not storage.exchange(name, there, data):
                raise changed_meanwhile(storage)
            progress.note(f"{name} was damaged, missing or out of date: written anew from {other}")
    if fence:
        replace(manifest, fenced=manifest.fenced + 1).save(storage, manifest)
        progress.note("its writer gave no sign of life for long: this one takes over")
    return True


def damaged_shards(
    storage: Storage, manifest: Manifest, tables: Collection[str] | None = None, *, hinted: bool = True
) -> dict[str, set[int]]:
    """Numbers of damaged shards by table: missing, of another size, or, where bytes are read, of another sha256.

    Args:
        storage: the database.
        manifest: what is recorded of it.
        tables: those to look at; None for all.
        hinted: take the word of an earlier verification, whose findings no checksum shows, until a build has mended
            them.
    """
    everything = sum(shard.bytes for shards in manifest.tables.values() for shard in shards) <= CHECK_ALL_BYTES
    entries = [
        (table, shard)
        for table, shards in manifest.tables.items()
        if tables is None or table in tables
        for shard in shards
    ]
    suspects = _suspected(storage) if hinted else set()

    def check(entry: tuple[str, Shard]) -> bool:
        shard = entry[1]
        return shard.path not in suspects and is_intact(storage, shard, read=everything)

    with ThreadPoolExecutor(_THREADS if storage.is_local else _REMOTE_THREADS) as pool:
        results = list(pool.map(check, entries))
    damaged: dict[str, set[int]] = {}
    for (table, shard), intact in zip(entries, results, strict=True):
        if not intact:
            damaged.setdefault(table, set()).add(shard.number)
    return damaged


def is_intact(storage: Storage, shard: Shard, read: bool) -> bool:
    """Whether a shard's file is there with the recorded size and, with ``read``, the recorded bytes."""
    try:
        return storage.fault(shard, read=read) is None
    except OSError:
        return False


def proven(storage: Storage, file: File) -> File:
    """A recorded shard of which rows go into another one, with a checksum of its own: damage must not go with them,
    whatever was looked at before.

    Raises:
        DamagedError: its bytes are not the recorded ones.
    """
    if isinstance(file, str) or not storage.is_local:  # what is fetched is compared with its checksum on the way
        return file
    fault = storage.fault(file)
    if fault is not None:
        raise DamagedError(
            f"{storage.describe(file)} {fault}: a version made from it would be wrong. Put it back from a copy of the "
            "database."
        )
    return file


def recorded_scans(manifest: Manifest) -> dict[str, ScannedFile]:
    """What an earlier build found of its inputs, by their URLs.

    Raises:
        DamagedError: the manifest does not say, or nonsense.
    """
    with taken_from(MANIFEST_NAME):
        return {scan.url: scan for scan in map(ScannedFile.from_json, manifest.inputs)}


def damaged_reports(storage: Storage, manifest: Manifest) -> set[str]:
    """The finished stages whose report is missing or not what was recorded."""
    recorded = {
        stage: manifest.stages[stage]
        for stage in STAGE_REPORTS
        if stage in manifest.stages and REPORT_SHA256 in manifest.stages[stage].details
    }
    return {
        stage
        for stage, state in recorded.items()
        if storage.sha256_if_there(state.report(stage)) != state.details[REPORT_SHA256]
    }


def _suspected(storage: Storage) -> set[str]:
    try:
        report: Any = storage.read_json(DAMAGE_REPORT)
    except DamagedError:
        return set()  # a hint that cannot be read is none
    paths = report.get("paths") if isinstance(report, dict) else None
    return {str(path) for path in paths} if isinstance(paths, list) else set()
