"""``refresh --watch``: follow a trainer's exports, publishing a version whenever one is due (realm.md, R5)."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Literal

from retrodb.pipelines.holding import held
from retrodb.pipelines.progress import Progress
from retrodb.pipelines.refresh import refresh

from retrodb.config import RunSettings
from retrodb.errors import EncoderError, InputError, LockedError, RecallError
from retrodb.manifest import Manifest
from retrodb.refreshing import Export, Schedule, Staleness, StalenessLimit, list_exports
from retrodb.refreshing.exports import check_exports_folder, hold, is_done, write_status
from retrodb.retiring import KEPT_VERSIONS, collect
from retrodb.sizes import count_of
from retrodb.storage import Storage

POLL_SECONDS: Final = 2.0


@dataclass(frozen=True)
class WatchSettings:
    """How a trainer is followed."""

    folder: str
    schedule: Schedule = field(default_factory=Schedule)
    limit: StalenessLimit = field(default_factory=StalenessLimit)
    on_stale: Literal["block", "warn"] = "warn"
    poll: float = POLL_SECONDS
    keep: int = KEPT_VERSIONS


@dataclass(frozen=True)
class _Standing:
    """What is published, against what the trainer has exported, at one look.

    Attributes:
        version: the published one; None where there is no database.
        step: that it is of, also of an export that is the same encoder still. None where that is no export of this
            folder: another run's steps say nothing of how far this one is.
        exports: all, by step.
        newer: those behind ``step`` that can be used.
        staleness: against these: who waits for another would wait for ever.
    """

    version: int | None
    step: int | None
    exports: list[Export]
    newer: list[Export]
    staleness: Staleness


@dataclass
class Watch:
    """One refresher: what it publishes, until the trainer is done.

    How stale the published version is, it says every ``poll`` seconds, also while it makes the next one.
    While another writer holds the database it tries again every ``poll`` seconds, for ever, or for the ``wait`` of the
    run settings, and goes on saying how stale the published version is.
    """

    out: Storage
    settings: WatchSettings
    run_settings: RunSettings
    progress: Progress
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        check_exports_folder(self.settings.folder)
        self.published: list[int] = []
        self._refused: dict[int, str] = {}
        self._same: tuple[str, int] | None = None  # an encoder, and the last export that is the same
        self._warned = False
        self._locked_out: float | None = None  # since when

    def run(self) -> None:
        """Publish what is due, newest first, until the trainer is done and its last export is published.

        An export that cannot be used is said, and left: an earlier or the next one may do.

        Raises:
            InputError: the last export of a trainer that is done cannot be used.
            LockedError: another writer held the database for longer than is waited.
            RetrodbError: as `refresh` does, of the database or this machine: no other export would mend that.
        """
        while True:
            done = is_done(self.settings.folder)  # before the exports: what it names last is there by then
            standing = self._look()
            self._tell(standing)
            export = self._due(standing, last=done)
            if export is not None:
                self._publish(export)
            elif done:
                hold(self.settings.folder, False)
                if standing.exports and (refused := self._refused.get(standing.exports[-1].step)) is not None:
                    raise InputError(f"the last export cannot be used: {refused}")
                return
            else:
                self.sleep(self.settings.poll)

    def _look(self) -> _Standing:
        """How it stands now."""
        current, exports = Manifest.load(self.out), list_exports(self.settings.folder)
        own = current.version.step if current is not None and self._is_of_this_folder(current) else None
        same = self._same[1] if current is not None and self._same and self._same[0] == _encoder(current) else None
        step = max((step for step in (own, same) if step is not None), default=None)
        newer = [e for e in exports if (step is None or e.step > step) and e.step not in self._refused]
        behind = [export for export in newer if export.step > (step or 0)]
        staleness = Staleness(
            behind[-1].step - (step or 0) if behind else 0,
            max(0.0, time.time() - behind[0].at) if behind else 0.0,
        )
        return _Standing(None if current is None else current.version.id, step, exports, newer, staleness)

    def _is_of_this_folder(self, manifest: Manifest) -> bool:
        return os.path.dirname(str(manifest.config.get("encoder"))) == os.path.abspath(self.settings.folder)

    def _due(self, standing: _Standing, last: bool) -> Export | None:
        """The newest export that is to be published now.

        Whatever the schedule says, the very last one is; and the newest where the trainer is held until one is.
        """
        held = self.settings.on_stale == "block" and self.settings.limit.is_passed(standing.staleness)
        if standing.newer and (last or held):
            return standing.newer[-1]
        due = (e for e in reversed(standing.newer) if self.settings.schedule.is_due(e.step, standing.step))
        return next(due, None)

    def _publish(self, export: Export) -> None:
        if self._locked_out is None:
            self.progress.note(f"step {export.step}: {export.path}")
        at_once = self.run_settings.model_copy(update={"wait": None})
        try:
            with self._telling():
                outcome = refresh(self.out, export.path, at_once, self.progress, step=export.step)
        except LockedError as error:
            self._wait_for(error)
            return
        except (EncoderError, RecallError) as error:
            self._locked_out = None
            self._refused[export.step] = str(error)
            self.progress.note(f"step {export.step} is left out: {error}")
            return
        self._locked_out = None
        if not outcome.done:
            self._same = (_encoder(outcome.manifest), export.step)
            return
        self.published.append(outcome.version)
        # Where it is another writer's turn: the next time.
        with contextlib.suppress(LockedError), held(self.out, self.progress) as current:
            collect(self.out, current, self.settings.keep)

    def _wait_for(self, error: LockedError) -> None:
        """Another writer's turn: said once, and waited for, but no longer than ``wait``."""
        if self._locked_out is None:
            self._locked_out = time.monotonic()
            self.progress.note(f"{error} Trying again.")
        wait = self.run_settings.wait
        left = self.settings.poll if wait is None else self._locked_out + wait - time.monotonic()
        if left <= 0:
            raise error
        self.sleep(min(self.settings.poll, left))

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Inside, a thread tells every ``poll`` seconds: staleness grows while a version is made, and then alone.

        The caller tells nothing inside, so that one thread at a time does. What ends the telling ends the watch, once
        the version under way is published; unless that fails itself.
        """
        over = threading.Event()
        failed: list[Exception] = []

        def tell() -> None:
            try:
                while not over.wait(self.settings.poll):
                    self._tell(self._look())
            except Exception as error:  # raised by the caller's thread, of whatever kind
                failed.append(error)

        thread = threading.Thread(target=tell, name="retrodb-staleness", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        if failed:
            raise failed[0]

    def _tell(self, standing: _Standing) -> None:
        """Leave word of what is published and how stale it is; ask the trainer to wait where it is too stale."""
        staleness = standing.staleness
        passed = self.settings.limit.is_passed(staleness)
        if passed and not self._warned:
            of = "" if standing.step is None else f" (step {standing.step})"
            self.progress.note(
                f"the published version{of} is {count_of(staleness.steps, 'step')} and "
                f"{staleness.seconds:.0f} s behind the newest export: more than --max-staleness"
            )
        self._warned = passed
        write_status(
            self.settings.folder,
            {
                "version": standing.version,
                "step": standing.step,
                "staleness": staleness.as_json(),
                "stale": passed,
            },
        )
        # After the status: a trainer that is held finds there why.
        hold(self.settings.folder, passed and self.settings.on_stale == "block")


def _encoder(manifest: Manifest) -> str:
    return str(manifest.fingerprints["encoder"]["fingerprint"])
