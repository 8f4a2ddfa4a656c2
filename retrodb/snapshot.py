"""A database as it was at one moment: what a reader opens is what the manifest said then, or an error, never a mix.

A build takes what it is going to change out of the manifest before it touches a file. So a shard that was opened while
the manifest still named it is the shard that was meant, and looking at the manifest after each opening is enough:
readers stop no build. A version that a reader has open is held for it (`retrodb.versions.pin`): others may be
published, and it goes on with its own.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from retrodb.errors import DamagedError, MismatchError
from retrodb.formats import File, path_of
from retrodb.manifest import MANIFEST_NAME, Manifest, Shard
from retrodb.storage import Storage
from retrodb.versions import load_version, pin


@dataclass
class Snapshot(Storage):
    """A `Storage` whose recorded shards are those of ``manifest``. Opening one that is so no longer is refused."""

    manifest: Manifest = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._seen: tuple[int, int, int] | None = None
        self._named: dict[str, Shard] = {}
        self._pin = pin(self, self.manifest)

    def __reduce__(self) -> tuple[Any, ...]:
        return Snapshot, (self.url, self.manifest)

    def release(self) -> None:
        """Hold the version no longer: it may be retired."""
        if self._pin is not None:
            self._pin.close()
            self._pin = None

    @cached_property
    def _recorded(self) -> dict[str, Shard]:
        return _by_path(self.manifest)

    @contextlib.contextmanager
    def local_copy(self, file: File) -> Iterator[Path]:
        """As `Storage.local_copy`, whose caller opens or maps the file before it leaves.

        Raises:
            MismatchError: the database was rebuilt meanwhile.
        """
        try:
            with super().local_copy(file) as path:
                yield path
        except (DamagedError, OSError):
            self._look_back(path_of(file))
            raise
        if self.is_local:  # what comes from elsewhere was compared with its checksum
            self._look_back(path_of(file))

    def _look_back(self, path: str) -> None:
        if path not in self._recorded:
            return
        stamp = self._stamp()
        if stamp is None or stamp != self._seen:
            now = self._now()
            self._seen, self._named = stamp, {} if now is None else _by_path(now)
        if self._named.get(path) != self._recorded[path]:
            raise MismatchError(
                f"{self.describe(path)} is no longer what it was when {self.url} was opened: a build is making it "
                "anew, or has done so, or its version was retired. Open the database again."
            )

    def _now(self) -> Manifest | None:
        """The same version's manifest as it is by now; None where it was retired."""
        storage, version = Storage(self.url), self.manifest.version.id
        current = Manifest.load(storage)
        if current is None or current.version.id == version:
            return current
        kept = any(entry.version.id == version for entry in current.versions)
        return load_version(storage, version) if kept else None

    def _stamp(self) -> tuple[int, int, int] | None:
        """What differs when the manifest was replaced, where that can be told without reading it."""
        if not self.is_local:
            return None
        try:
            found = os.lstat(self.path(MANIFEST_NAME))
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns


def _by_path(manifest: Manifest) -> dict[str, Shard]:
    return {shard.path: shard for shards in manifest.tables.values() for shard in shards}
