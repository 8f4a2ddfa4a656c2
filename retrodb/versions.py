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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from retrodb.errors import DamagedError, InputError
from retrodb.formats import Committed, File, HashingWriter, path_of
from retrodb.manifest import (
    FIRST_VERSION,
    MANIFEST_COPY,
    MANIFEST_NAME,
    REPORTS_FOLDER,
    TABLES,
    WORK_FOLDER,
    KeptVersion,
    Manifest,
    changed_meanwhile,
    fingerprint,
    version_folder,
    version_path,
)
from retrodb.sizes import count_of
from retrodb.storage import TEMPORARY_PREFIX, Storage

NEXT_SHARD: Final = "next_shard"
"""Key of a version's facts: the number of the first document shard that no version has had."""

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


def is_pinned(storage: Storage, version: int) -> bool:
    """Whether a reader on this machine holds a version; on an object store nobody can tell."""
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
    forget_killed(storage, own.version.id, current.version.id)
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


def forget_killed(storage: Storage, *versions: int) -> None:
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
