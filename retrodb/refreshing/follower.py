"""A trainer's side of the refresh: the newest version, and a wait where it is too stale (realm.md, R5, R7)."""

import time
import warnings
from collections.abc import Callable
from typing import Final, Literal

from retrodb.database import Database
from retrodb.manifest import Manifest
from retrodb.refreshing.exports import list_exports
from retrodb.refreshing.schedule import Staleness, StalenessLimit
from retrodb.sizes import count_of
from retrodb.storage import Storage

_POLL_SECONDS: Final = 0.5


class Follower:
    """The database as a trainer reads it while a refresher, another process, publishes versions of it.

    At each step `at` gives the newest version, opened. A version stays open, and is kept, until a newer one is taken:
    what was looked up in one stays true of it.

    Args:
        url: the database.
        limit: how stale the version may be at most: in steps between it and the trainer's, and in seconds since there
            was something newer to be published.
        on_stale: ``block`` waits for the refresher, ``warn`` says so once a version and goes on.
        timeout: seconds to wait at most; None for ever.
        exports: the folder that the trainer exports to. Seconds count from the oldest export there that is newer than
            the version, and none pass before there is one: a trainer never waits for its own next export. None: they
            count from the first `at` of a later step than the version's, which is when it fell behind as far as can be
            told; a limit in seconds must then be longer than the trainer takes from one export to the next.
    """

    def __init__(
        self,
        url: str,
        limit: StalenessLimit | None = None,
        on_stale: Literal["block", "warn"] = "warn",
        timeout: float | None = None,
        sleep: Callable[[float], None] = time.sleep,
        exports: str | None = None,
    ) -> None:
        self._limit = limit or StalenessLimit()
        self._on_stale = on_stale
        self._timeout = timeout
        self._sleep = sleep
        self._storage = Storage(url)
        self.database = Database.open(url)
        self._exports = exports
        self._behind: float | None = None  # since when
        self._warned: int | None = None

    def staleness(self, step: int) -> Staleness:
        """Of the version that is open, at training step ``step``; a version of no step counts from 0."""
        return Staleness(max(0, step - self._step), self._seconds(step))

    def at(self, step: int) -> Database:
        """The newest version; waits, or warns, where it is staler than it may be at training step ``step``.

        Raises:
            TimeoutError: it was waited for longer than ``timeout``.
        """
        self._take_newest(step)
        started = time.monotonic()
        while self._limit.is_passed(staleness := self.staleness(step)):
            version = self.database.version
            if self._on_stale == "warn":
                if self._warned != version:
                    self._warned = version
                    warnings.warn(
                        f"version {version} of {self._storage.url} is {count_of(staleness.steps, 'step')} and "
                        f"{staleness.seconds:.0f} s behind: is the refresher running?",
                        stacklevel=2,
                    )
                break
            if self._timeout is not None and time.monotonic() - started > self._timeout:
                raise TimeoutError(
                    f"version {version} of {self._storage.url} is still {count_of(staleness.steps, 'step')} and "
                    f"{staleness.seconds:.0f} s behind after {self._timeout:.0f} s: is the refresher running?"
                )
            self._sleep(_POLL_SECONDS)
            self._take_newest(step)
        return self.database

    @property
    def _step(self) -> int:
        """Of the version that is open."""
        return self.database.manifest.version.step or 0

    def _seconds(self, step: int) -> float:
        """Since there was something newer than the version that is open."""
        if self._exports is not None:
            newer = [export.at for export in list_exports(self._exports) if export.step > self._step]
            return max(0.0, time.time() - newer[0]) if newer else 0.0
        return time.monotonic() - self._behind if self._behind is not None and step > self._step else 0.0

    def _take_newest(self, step: int) -> None:
        found = Manifest.load(self._storage)
        if found is not None and found.version.id != self.database.version:
            self.database = Database.open(self._storage.url)
            self._behind = None
        if self._behind is None and step > self._step:
            self._behind = time.monotonic()
