"""A database as it was at one moment: what a reader opens is what the manifest said then, or an error, never a mix.

A build takes what it is going to change out of the manifest before it touches a file. So a shard that was opened while
the manifest still named it is the shard that was meant, and looking at the manifest after each opening is enough:
readers take no lock and stop no build.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from retrodb.errors import MismatchError
from retrodb.manifest import MANIFEST_NAME, Manifest, Shard
from retrodb.storage import Storage


@dataclass
class Snapshot(Storage):
    """A `Storage` whose recorded shards are those of ``manifest``. Opening one that is so no longer is refused."""

    manifest: Manifest = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._seen: object = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Snapshot, (self.url, self.manifest)

    @cached_property
    def _recorded(self) -> dict[str, Shard]:
        return _by_path(self.manifest)

    def _opened(self, relative: str) -> None:
        if relative not in self._recorded:
            return
        stamp = self.stamp(MANIFEST_NAME)
        if stamp is not None and stamp == self._seen:
            return
        now = Manifest.load(Storage(self.url))
        if now is None or _by_path(now).get(relative) != self._recorded[relative]:
            raise MismatchError(
                f"{self.describe(relative)} is no longer what it was when {self.url} was opened: a build is making it "
                "anew, or has done so. Open the database again."
            )
        self._seen = stamp


def _by_path(manifest: Manifest) -> dict[str, Shard]:
    return {shard.path: shard for shards in manifest.tables.values() for shard in shards}
