"""Versions of a database: the same text under other vectors, each opened whole, switched by one pointer.

``manifest.json`` at the top describes the *current* version and names all that can be opened. A later version's own
tables, manifest, reports and receipts lie under ``versions/<n>/``; the text tables are shared. To publish is to replace
``manifest.json``, atomically: a kill leaves the old version or the new one, and what was not published does not exist.
Realm's refresh (Guu et al. 2020, section 3.3) is one use of it; `docs/versions.md` tells the others.
"""

import contextlib
import datetime
import fcntl
import hashlib
import os
import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from retrodb.errors import DamagedError, InputError
from retrodb.formats import Committed, File, HashingWriter, path_of
from retrodb.manifest import (
    FIRST_VERSION,
    MANIFEST_COPY,
    MANIFEST_NAME,
    REPORTS_FOLDER,
    STAGE_REPORTS,
    TABLES,
    VERSIONS_FOLDER,
    WORK_FOLDER,
    KeptVersion,
    Manifest,
    Shard,
    changed_meanwhile,
    fingerprint,
    is_of_a_table,
    version_folder,
    version_path,
)
from retrodb.sizes import count_of
from retrodb.storage import TEMPORARY_PREFIX, Storage

KEPT_VERSIONS: Final = 3
"""The newest so many versions are kept, always."""
NEXT_SHARD: Final = "next_shard"
"""Key of a version's facts: the number of the first document shard that no version has had."""
GRACE_SECONDS: Final = 24 * 3600
"""On an object store nobody can tell who still reads: a version is kept so long after another took its place."""

_CONTROL: Final = (MANIFEST_NAME, REPORTS_FOLDER, WORK_FOLDER)


@dataclass
class VersionStorage(Storage):
    """The database as a build of version ``version`` sees it: what it writes goes to that version's folder.

    Recorded files are read where they are recorded, of whatever version; what is *written* goes below
    ``versions/<n>/``, where the version's manifest, reports and receipts lie too.
    """

    version: int = field(default=FIRST_VERSION)
    step: str = ""
    """A part of the version that is made by itself: its manifest, reports and receipts lie in a folder of this name."""

    def __reduce__(self) -> tuple[Any, ...]:
        return VersionStorage, (self.url, self.version, self.step)

    def _own(self, relative: str, folders: Sequence[str]) -> str:
        folder = version_folder(self.version)
        return f"{folder}/{relative}" if folder and relative.split("/", 1)[0] in folders else relative

    def placed(self, relative: str) -> str:
        return self._control(self._own(relative, TABLES))

    def owns(self, relative: str) -> bool:
        return relative.startswith(f"{version_folder(self.version)}/")

    def _control(self, relative: str) -> str:
        if not self.step or relative.split("/", 1)[0] not in _CONTROL:
            return self._own(relative, _CONTROL)
        return f"{version_folder(self.version)}/{self.step}/{relative}"

    def path(self, relative: str) -> str:
        return super().path(self._control(relative))

    def describe(self, file: File) -> str:
        return super().describe(self._control(path_of(file)))

    def commit(self, relative: str, write: Callable[[HashingWriter], None]) -> Committed:
        """As `Storage.commit`; what it returns has the path where the file lies."""
        return super().commit(self._own(relative, TABLES), write)

    def delete_folder(self, relative: str) -> None:
        super().delete_folder(self._own(relative, TABLES))

    def list_files(self, relative: str) -> list[str]:
        return super().list_files(self._own(relative, TABLES))

    def list_folders(self, relative: str) -> list[str]:
        return super().list_folders(self._own(relative, TABLES))

    def list_below(self, folder: str) -> list[str]:
        return super().list_below(self._own(folder, TABLES))


# -- opening -----------------------------------------------------------------------------------------------------------


def load_version(storage: Storage, version: int | None) -> Manifest | None:
    """The manifest of a version; None takes the current one. None where there is no database.

    Raises:
        InputError: there is no such version; names those there are.
        DamagedError: its manifest is lost or malformed.
    """
    current = Manifest.load(storage)
    if current is None or version is None or version == current.version.id:
        return current
    kept = {entry.version.id: entry for entry in current.versions}
    if version not in kept:
        there = ", ".join(map(str, sorted(kept))) or str(current.version.id)
        raise InputError(f"{storage.url} has no version {version}; there are: {there} (current: {current.version.id}).")
    data = storage.read_json(kept[version].path)
    if data is None:
        raise DamagedError(
            f"{storage.describe(kept[version].path)} is missing: version {version} cannot be opened. Put it back "
            f"from a copy of the database; or `retrodb gc {storage.url} --forget` gives it up, and every other version "
            "that has a document which the current one lacks."
        )
    return Manifest.parse(data, storage.describe(kept[version].path))


class Pin:
    """A lock on a version, until it is closed or nobody has it any more.

    Raises:
        BlockingIOError: another process, or another one of this process, holds it otherwise.
        OSError: what is to be locked is not there, or cannot be locked.
    """

    def __init__(self, path: str, how: int) -> None:
        self._descriptor: int | None = os.open(path, os.O_RDONLY)
        fcntl.flock(self._descriptor, how | fcntl.LOCK_NB)

    def close(self) -> None:
        """Let go."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it was never open
            self.close()


def pin(storage: Storage, manifest: Manifest) -> Pin | None:
    """Hold a version, so that `collect` leaves it, for as long as the answer is open; None where that cannot be.

    A shared ``flock``: it needs no write permission, and ends with the process.
    """
    if not storage.is_local:
        return None
    try:
        return Pin(_pinned_path(storage, manifest.version.id), fcntl.LOCK_SH)
    except OSError:
        return None


def _pinned_path(storage: Storage, version: int) -> str:
    """A version's own manifest; for the first one, whose manifest is written anew by whoever draws spans or builds on,
    the database's folder."""
    return storage.url if version == FIRST_VERSION else storage.path(version_path(version))


def _is_pinned(storage: Storage, version: int) -> bool:
    if not storage.is_local:
        return False
    try:
        Pin(_pinned_path(storage, version), fcntl.LOCK_EX).close()
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


# -- publishing --------------------------------------------------------------------------------------------------------


def now() -> str:
    """UTC in ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def next_version(current: Manifest) -> int:
    """An id that no version of the database has had."""
    known = [current.version.id, current.used.get("version", 0), *(kept.version.id for kept in current.versions)]
    return max(known) + 1


def next_shard(storage: Storage, current: Manifest) -> int:
    """The number of the first document shard that no version has had, retired ones too: ids are never used again.

    Every version but the first says so in its facts, of all before it; one version alone has its own shards.

    Raises:
        DamagedError: the first version's manifest is lost or malformed, and no later one says.
    """
    known = [kept.version.facts[NEXT_SHARD] for kept in current.versions if NEXT_SHARD in kept.version.facts]
    if not known:
        manifests = (load_version(storage, kept.version.id) for kept in current.versions)
        known = [_first_free(manifest) for manifest in manifests if manifest is not None]
    return max([_first_free(current), current.used.get("shard", 0), *known])


def _first_free(manifest: Manifest) -> int:
    own = 1 + max((shard.number for shard in manifest.shards("documents")), default=-1)
    return max(own, int(manifest.version.facts.get(NEXT_SHARD, 0)))


def corpus_fingerprint(manifest: Manifest) -> str:
    """What the vectors of a version are of: the recorded chunk shards."""
    return fingerprint({shard.path: shard.sha256 for shard in manifest.shards("chunks")})


def facts_of(manifest: Manifest) -> dict[str, Any]:
    """What a version records of its vectors (`Version.facts`).

    Raises:
        DamagedError: there is not one vector a chunk: such a version is never published.
    """
    rows, chunks = manifest.rows("embeddings"), manifest.rows("chunks")
    if rows != chunks:
        raise DamagedError(
            f"there are {count_of(rows, 'vector')} for {count_of(chunks, 'chunk')}: this version is not published."
        )
    encoder = manifest.fingerprints["encoder"]
    return {
        "corpus": corpus_fingerprint(manifest),
        "encoder": encoder["fingerprint"],
        "metric": manifest.stages["index"].made_from["metric"],
        "dim": encoder["dimension"],
        "dtype": "float16",
        "rows": rows,
    }


def publish(storage: Storage, current: Manifest, made: Manifest, left: Manifest | None) -> Manifest:
    """Make a finished version the current one. Needs the build lock.

    On an object store every step is a conditional write, so that a writer from which another has taken over publishes
    nothing, whenever it wakes up.

    Args:
        storage: the database.
        current: what ``manifest.json`` said when this writer got the lock: the version that this one follows.
        made: the new version's manifest, with its `Version`.
        left: the manifest that lies in the version's folder; None where there is none.

    Returns:
        What ``manifest.json`` says now.

    Raises:
        DamagedError: it lacks vectors (`facts_of`).
        LockedError: another writer has taken over meanwhile.
    """
    own = replace(made, version=replace(made.version, facts=facts_of(made))).own
    facts = {**own.version.facts, NEXT_SHARD: max(next_shard(storage, current), _first_free(own))}
    own = replace(own, version=replace(own.version, facts=facts))
    _forget_killed(storage, own.version.id, current.version.id)
    kept = list(current.versions) or [_keep_first(storage, current)]
    data, path = own.as_bytes(), version_path(own.version.id)
    if not storage.exchange(path, None if left is None else left.as_bytes(), data):
        raise changed_meanwhile(storage)
    kept = _replaced(kept, current.version.id)
    kept.append(KeptVersion(own.version, len(data), hashlib.sha256(data).hexdigest()))
    published = replace(own.beside(current), versions=tuple(kept))
    published.save(storage, current)
    return published


def switch(storage: Storage, current: Manifest, version: int) -> Manifest:
    """Make a kept version the current one again: one pointer. Needs the build lock.

    Args:
        storage: the database.
        current: what ``manifest.json`` said when this writer got the lock.
        version: which.

    Raises:
        InputError: there is no such version.
        DamagedError: its manifest is lost, or not what was published.
        LockedError: another writer has taken over meanwhile.
    """
    found = load_version(storage, version)
    if found is None:
        raise DamagedError(f"{storage.url} has lost its {MANIFEST_NAME}: run the same command again.")
    if version == current.version.id:
        return current
    kept = next(entry for entry in current.versions if entry.version.id == version)
    if storage.sha256(kept.path) != kept.sha256:
        raise DamagedError(f"{storage.describe(kept.path)} is not what was published: version {version} is refused.")
    versions = _replaced([replace(k, replaced=None) if k == kept else k for k in current.versions], current.version.id)
    switched = replace(found.beside(current), versions=tuple(versions))
    switched.save(storage, current)
    return switched


def _replaced(kept: Sequence[KeptVersion], number: int) -> list[KeptVersion]:
    """The versions there are once another one takes the place of ``number``."""
    return [replace(entry, replaced=now()) if entry.version.id == number else entry for entry in kept]


def _forget_killed(storage: Storage, *versions: int) -> None:
    """Remove what a writer of manifests that was killed had begun to write: an object store shows nothing of that.

    In the reports' folder the copies of the manifest alone: a verification leaves its report there without a lock.
    """
    if storage.is_local:
        copies = f"{TEMPORARY_PREFIX}{posixpath.basename(MANIFEST_COPY)}"
        folders = {posixpath.dirname(version_path(version)): TEMPORARY_PREFIX for version in versions}
        for folder, begun in {"": TEMPORARY_PREFIX, REPORTS_FOLDER: copies, **folders}.items():
            names = storage.list_files(folder)
            storage.delete(*[posixpath.join(folder, name) for name in names if name.startswith(begun)])


def _keep_first(storage: Storage, current: Manifest) -> KeptVersion:
    """Give the first version a manifest of its own, as the current one is about to be another's."""
    place = version_path(current.version.id)
    data = current.own.as_bytes()
    # What was there before the pointer was looked at is no other writer's publication, or the exchange fails.
    there = storage.read_if_there(place)
    if storage.read_if_there(MANIFEST_NAME) != current.as_bytes():
        raise changed_meanwhile(storage)
    if there != data and not storage.exchange(place, there, data):
        raise changed_meanwhile(storage)
    version = replace(current.version, created=current.version.created or _written(storage), facts=facts_of(current))
    return KeptVersion(version, len(data), hashlib.sha256(data).hexdigest())


def _written(storage: Storage) -> str:
    """When the first version's manifest was written, as far as that can be told: a plain build does not say."""
    seconds = os.stat(storage.path(MANIFEST_NAME)).st_mtime if storage.is_local else None
    at = (
        datetime.datetime.now(datetime.UTC)
        if seconds is None
        else datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    )
    return at.isoformat(timespec="seconds")


# -- retiring ----------------------------------------------------------------------------------------------------------


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
            f"{rows:,} documents of {storage.url} are deleted, and still in the files of its current version: run "
            "`retrodb compact` first. Nothing was changed."
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
        _forget_killed(storage, current.version.id)
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
    used = [e for e in to_go if _is_pinned(storage, e.version.id) or _is_recent(storage, current, e, grace)]
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


def _is_recent(storage: Storage, current: Manifest, entry: KeptVersion, grace: float) -> bool:
    """Whether an object store's version was replaced less than ``grace`` seconds ago."""
    if storage.is_local:
        return False
    replaced = entry.replaced
    if replaced is None:  # of a database whose versions did not say so
        created = [k.version.created for k in current.versions if k.version.id > entry.version.id]
        replaced = min((each for each in created if each), default=None)
    if replaced is None:
        return True
    at = datetime.datetime.fromisoformat(replaced)
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
