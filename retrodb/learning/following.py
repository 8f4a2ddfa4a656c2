"""A trainer's dealings with its refresher: exports go one way, versions of the database come the other.

The two share a folder and a database, and others may write the database too: whoever trained on it before, or refreshes
it by hand. So a run trains on what its own exports have embedded, and on nothing else: scores of queries by one encoder
with blocks by another mean nothing, however alike the two encoders look.
"""

import time
from pathlib import Path
from typing import Final

from retrodb.database import Database
from retrodb.encoding import EncoderFiles, identify
from retrodb.errors import InputError, MismatchError
from retrodb.learning.interrupt import Interruptions
from retrodb.learning.run import Progress
from retrodb.model.realm import Realm
from retrodb.refreshing import DONE_MARKER, HOLD_MARKER, Export, Follower, Staleness, StalenessLimit, list_exports
from retrodb.refreshing.exports import check_exports_folder
from retrodb.sizes import count_of

_POLL_SECONDS: Final = 0.5


class FollowedDatabase:
    """A database whose versions a refresher makes from this run's exports.

    Args:
        url: of the database.
        exports: the folder that the refresher watches.
        limit: how stale a version may be at most.
        progress: is told what is waited for, each thing once.

    Raises:
        InputError: there is no database, or the exports' folder is a file or a URL.
    """

    def __init__(self, url: str, exports: str, limit: StalenessLimit, progress: Progress) -> None:
        check_exports_folder(exports)
        self.exports = Path(exports)
        self._limit, self._progress = limit, progress
        self._follower = Follower(url)  # without a limit it never waits: what is waited for is decided here, all of it
        self._own: tuple[int, bool] | None = None
        self._said: set[str] = set()

    def refuse_exports_of_others(self, step: int | None, model: Realm) -> None:
        """Refuse a folder in which another run has left something: the refresher would publish that as this run's.

        A run that begins finds the folder empty. One that goes on has saved each step before it exported it, so that
        nothing there is of a later step, and what is of the very step holds the weights of the checkpoint.

        Args:
            step: of the run's checkpoint; None where the run begins.
            model: as the checkpoint has it.

        Raises:
            MismatchError: names what is there.
        """
        there = list_exports(str(self.exports))
        if step is None:
            foreign = [Path(export.path).name for export in there]
            if (self.exports / DONE_MARKER).exists():
                foreign.append(DONE_MARKER)
            this = "this run begins"
        else:
            foreign = [
                Path(export.path).name
                for export in there
                if export.step > step or (export.step == step and not model.is_exported_as(Path(export.path)))
            ]
            this = f"this run's checkpoint is of step {step:,}"
        if foreign:
            raise MismatchError(
                f"{self.exports} holds {', '.join(foreign[:3])}{', ..' if len(foreign) > 3 else ''} of another run: "
                f"{this}. Name another --exports, or the --out of that run to go on with it."
            )

    @property
    def database(self) -> Database:
        """The version that is open, whoever made it."""
        return self._follower.database

    def staleness(self, step: int) -> Staleness:
        """Of the version that is open, at training step ``step``."""
        return self._follower.staleness(step)

    def newest(self, step: int, interruptions: Interruptions) -> Database | None:
        """The newest version, once it is one to train on at step ``step``; None where an interruption ends the wait.

        It is by an export of this run, no staler than it may be, and the refresher asks for no pause.
        """
        while (reason := self._reason_to_wait(step)) is not None:
            if reason not in self._said:
                self._said.add(reason)
                self._progress.note(reason)
            if interruptions.asked:
                return None
            time.sleep(_POLL_SECONDS)
        return self.database

    def _reason_to_wait(self, step: int) -> str | None:
        refresher = f"retrodb refresh {self.database.storage.url} --watch {self.exports}"
        if (self.exports / HOLD_MARKER).exists():
            return f"waiting while {self.exports / HOLD_MARKER} is there: the refresher asks for it ({refresher})"
        db = self._follower.at(step)
        if not self._is_own(db):
            encoder = db.encoder_identity
            return (
                f"version {db.version} of {db.storage.url} is by {encoder.name!r} ({encoder.fingerprint[:16]}), which "
                f"is no export of this run: waiting for a version by one of {self.exports}: {refresher}"
            )
        if self._limit.is_passed(self.staleness(step)):
            steps = count_of(self._limit.steps or 0, "step")
            return f"the published version is more than {steps} behind: waiting for the next one: {refresher}"
        return None

    def _is_own(self, db: Database) -> bool:
        """Whether an export of this run made the vectors of a version. Judged once a version: exports are large."""
        if self._own is None or self._own[0] != db.version:
            likeliest = sorted(
                list_exports(str(self.exports)), key=lambda one: (one.step != db.manifest.version.step, -one.step)
            )
            self._own = (db.version, any(_made(export, db) for export in likeliest))
        return self._own[1]


def _made(export: Export, db: Database) -> bool:
    recorded = db.encoder_identity
    try:
        found = identify(EncoderFiles(export.path, Path(export.path)), recorded.precision)
    except InputError:  # somebody tidies up, and what is gone tells nothing
        return False
    return found.fingerprint == recorded.fingerprint
