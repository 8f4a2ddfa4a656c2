"""Versions that are retired (``retrodb gc``): none in use, none of the newest, and no file that one names that stays.

What an older version alone has goes with it, and what killed runs have left that nobody goes on from. Asked to forget,
the newest go as well, as far as they hold a document that the current one does not.
"""

import contextlib
import datetime
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from retrodb.errors import DamagedError, InputError
from retrodb.manifest import (
    FIRST_VERSION,
    MANIFEST_COPY,
    STAGE_REPORTS,
    TABLES,
    VERSIONS_FOLDER,
    WORK_FOLDER,
    KeptVersion,
    Manifest,
    Shard,
    is_of_a_table,
    version_folder,
    version_path,
)
from retrodb.sizes import count_of
from retrodb.storage import Storage
from retrodb.versions import forget_killed, is_pinned, load_version, next_shard, next_version

KEPT_VERSIONS: Final = 3
"""The newest so many versions are kept, always."""
GRACE_SECONDS: Final = 24 * 3600
"""On an object store nobody can tell who still reads: a version is kept so long after another took its place."""


@dataclass(frozen=True)
class Collected:
    """What `collect` did: versions that went, files and bytes that went with them, and who was kept though it was to
    go, since it is, or may be, in use."""

    retired: tuple[int, ...]
    in_use: tuple[int, ...]
    files: int
    bytes: int


def collect(
    storage: Storage,
    current: Manifest,
    keep: int = KEPT_VERSIONS,
    grace: float = GRACE_SECONDS,
    *,
    forget: bool = False,
    dry_run: bool = False,
) -> Collected:
    """Retire old versions: all but the newest ``keep``, the current one, and those in use. Needs the build lock.

    A version leaves the manifest before a file of it goes, so that a kill in between leaves files that nobody names,
    which the next call removes. Files that a kept version names stay, whoever made them.

    Args:
        storage: the database.
        current: what ``manifest.json`` said when this writer got the lock.
        keep: so many of the newest stay, at least `KEPT_VERSIONS`.
        grace: seconds that a version stays on an object store, where nobody can tell who reads it.
        forget: retire also the newest, as far as they hold a document that the current one does not, and what killed
            runs have left: nothing of a document that was deleted stays, unless a version that holds it is in use.
        dry_run: say it, and do nothing.

    Raises:
        InputError: ``keep`` is too small; or, with ``forget``, the current version has deleted documents itself.
        DamagedError: a manifest, or with ``forget`` a shard of documents, cannot be read.
        LockedError: another writer has taken over meanwhile.
    """
    if keep < KEPT_VERSIONS:
        raise InputError(f"keep {keep}: the newest {KEPT_VERSIONS} versions are always kept.")
    if forget and (rows := current.rows("deleted")):
        raise InputError(
            f"{count_of(rows, 'deleted document is', 'deleted documents are')} still in the files of the current "
            f"version of {storage.url}: run `retrodb compact` first. Nothing was changed."
        )
    chosen = _choose(storage, current, keep, grace, forget)
    gone = _files_to_go(storage, current, chosen, forget)
    size = sum(storage.size(path) or 0 for path in gone)
    if not dry_run:
        copies = _copies_to_go(storage, chosen) if forget else []
        if chosen.retired or forget:  # to forget deletes what another writer may be at: it must still be our turn
            replace(current, versions=chosen.stay, used=_used(storage, current, chosen)).save(storage, current)
        storage.forget_copies(copies)
        storage.delete(*gone)
        forget_killed(storage, current.version.id)
        if forget:
            storage.delete_folder(WORK_FOLDER)
        there = {current.version.id, *(entry.version.id for entry in chosen.stay)}
        for name in storage.list_folders(VERSIONS_FOLDER):
            if name.isdigit() and int(name) not in there and not storage.list_below(f"{VERSIONS_FOLDER}/{name}"):
                storage.delete_folder(f"{VERSIONS_FOLDER}/{name}")
    retired = tuple(entry.version.id for entry in chosen.retired)
    return Collected(retired, tuple(entry.version.id for entry in chosen.in_use), len(gone), size)


@dataclass(frozen=True)
class _Choice:
    """Versions that stay, some of them because they are in use, and those that go."""

    stay: tuple[KeptVersion, ...]
    in_use: tuple[KeptVersion, ...]
    retired: tuple[KeptVersion, ...]


def _choose(storage: Storage, current: Manifest, keep: int, grace: float, forget: bool) -> _Choice:
    newest = {entry.version.id for entry in sorted(current.versions, key=lambda kept: kept.version.id)[-keep:]}
    to_go = [entry for entry in current.versions if entry.version.id != current.version.id]
    to_go = [e for e in to_go if e.version.id not in newest or (forget and _holds_more(storage, e, current))]
    used = [e for e in to_go if is_pinned(storage, e.version.id) or _is_recent(storage, e, grace)]
    retired = tuple(entry for entry in to_go if entry not in used)
    return _Choice(tuple(e for e in current.versions if e not in retired), tuple(used), retired)


def _files_to_go(storage: Storage, current: Manifest, chosen: _Choice, forget: bool) -> list[str]:
    """Files that no version names that stays, sorted."""
    manifests = [current] + [m for e in chosen.stay if (m := load_version(storage, e.version.id)) is not None]
    named = {shard.path for manifest in manifests for shard in _shards_of(manifest)}
    named |= {path for manifest in manifests for path in manifest.reports}
    kept = {manifest.version.id for manifest in manifests}
    gone = [path for entry in chosen.retired for path in _own_files(storage, entry.version.id, named)]
    if current.versions or forget:
        gone += _unnamed(storage, named, kept, next_version(current))
    if forget:
        gone += _leftovers(storage, named, kept)
    return sorted(set(gone))


def _copies_to_go(storage: Storage, chosen: _Choice) -> list[Shard]:
    """Shards of retired versions that this machine may have fetched, and that no version names that stays."""

    def named(entry: KeptVersion) -> list[Shard]:
        with contextlib.suppress(DamagedError):  # its manifest is lost
            manifest = load_version(storage, entry.version.id)
            return [] if manifest is None else list(_shards_of(manifest))
        return []

    kept = {shard.sha256 for entry in chosen.stay for shard in named(entry)}
    return [shard for entry in chosen.retired for shard in named(entry) if shard.sha256 not in kept]


def _used(storage: Storage, current: Manifest, chosen: _Choice) -> dict[str, int]:
    """The numbers that no version may have again, once the one is gone that says so."""
    newest = max((entry.version.id for entry in current.versions), default=current.version.id)
    if newest not in {entry.version.id for entry in chosen.retired}:
        return current.used
    return {"version": next_version(current) - 1, "shard": next_shard(storage, current)}


def _shards_of(manifest: Manifest) -> Iterator[Shard]:
    for shards in manifest.tables.values():
        yield from shards


def _holds_more(storage: Storage, entry: KeptVersion, current: Manifest) -> bool:
    """Whether a version has a document that the current one does not, or cannot be asked. An id stays in the shard of
    its number."""
    try:
        manifest = load_version(storage, entry.version.id)
    except DamagedError:
        return True
    own = {shard.number: shard for shard in current.shards("documents")}
    for shard in manifest.shards("documents") if manifest is not None else ():
        same = own.get(shard.number)
        if same is None and shard.rows:
            return True
        if same is not None and same != shard:
            ids = [storage.read_table(each, ["document_id"])["document_id"].to_numpy() for each in (shard, same)]
            if not np.isin(*ids).all():
                return True
    return False


def _is_recent(storage: Storage, entry: KeptVersion, grace: float) -> bool:
    """Whether an object store's version was replaced less than ``grace`` seconds ago."""
    if storage.is_local:
        return False
    if entry.replaced is None:
        return True
    at = datetime.datetime.fromisoformat(entry.replaced)
    return (datetime.datetime.now(datetime.UTC) - at).total_seconds() < grace


def _leftovers(storage: Storage, named: set[str], kept: set[int]) -> Iterator[str]:
    """What killed runs have left, which the same command would go on from: receipts, and parts of a next version."""
    yield from storage.list_below(WORK_FOLDER)
    control = {path for number in kept for path in (version_path(number), f"{version_folder(number)}/{MANIFEST_COPY}")}
    yield from (path for path in storage.list_below(VERSIONS_FOLDER) if path not in named and path not in control)


def _own_files(storage: Storage, number: int, named: set[str]) -> Iterator[str]:
    """What a retired version leaves: in its folder, and, of the first one, in the tables' own folders."""
    folder = version_folder(number)
    if folder:
        yield from (path for path in storage.list_below(folder) if path not in named)
    else:
        yield version_path(number)


def _unnamed(storage: Storage, named: set[str], kept: set[int], made: int) -> Iterator[str]:
    """Files that no kept version names: of retired ones, or of a collection that was killed. Version ``made`` is being
    made."""
    for table in TABLES:
        yield from (path for path in storage.list_below(table) if path not in named and is_of_a_table(path))
    if FIRST_VERSION not in kept:  # its reports show text, too
        reports = (path for path in STAGE_REPORTS.values() if path not in named)
        yield from (path for path in reports if storage.size(path) is not None)
    for name in storage.list_folders(VERSIONS_FOLDER):
        if name.isdigit() and int(name) not in kept and int(name) < made:
            yield from (path for path in storage.list_below(f"{VERSIONS_FOLDER}/{name}") if path not in named)
