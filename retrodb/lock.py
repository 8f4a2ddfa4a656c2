"""One writer at a time: the lock of a database, or of a checkpoint, whose dead holder is never waited for.

On a local disk the lock is an ``flock`` on a file, which the kernel drops with the process, however it ends.

On an object store it is a small object. It is made on the condition that there is none, renewed every `BEAT_SECONDS`
and taken over on the condition that it is still what was seen (`Storage.exchange`), so that of several writers one
alone has it; a store that ignores conditions is asked again a moment later who has it. A killed holder leaves it
behind: one that ran in the same system and process namespace is known to be dead, and its lock is taken over at once;
one elsewhere is taken for dead if its last beat is older than `STALE_SECONDS`, and does not change while two more beats
would, by our own clock, so that clocks that differ take nobody's lock. A holder that finds another's lock in place of
its own stops.

One that was suspended for so long may be about to write when it wakes up. So whoever took over from it says so in the
manifest (`retrodb.manifest.Manifest.fenced`), which is written only in place of what its writer knew.

A writer that finds the lock held is refused, or waits for as long as it was told to: it looks again, every second on a
local disk, every ten seconds on an object store, where each look is a request.
"""

import _thread
import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, TypeVar

import psutil

from retrodb.errors import InputError, LockedError, UnreachableError
from retrodb.formats import json_bytes
from retrodb.sizes import duration_text
from retrodb.storage import Storage

LOCK_NAME: Final = ".lock"
STALE_SECONDS: Final = 120.0
BEAT_SECONDS: Final = 30.0
WATCH_SECONDS: Final = 2 * BEAT_SECONDS + 5
_SETTLE_SECONDS: Final = 0.2
_ATTEMPTS: Final = 3
_LOOK_SECONDS: Final = 1.0
_REMOTE_LOOK_SECONDS: Final = 10.0

Taken = TypeVar("Taken")


@dataclass(frozen=True)
class Work:
    """What a writer does to a folder, and what another one can do meanwhile, in the words of a refusal."""

    doing: str
    remedy: str


BUILD: Final = Work("being built", "Wait for it, as --wait 10m does, or build into another folder.")
TRAIN: Final = Work("being trained", "Wait for it, or name another --out.")


class _HeldError(Exception):
    """Another writer holds the lock; the text says who."""

    def __init__(self, text: str) -> None:
        try:
            holder = json.loads(text)
            who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
        except (ValueError, KeyError, TypeError):
            who = "another process"
        super().__init__(who)


@contextlib.contextmanager
def writer_lock(
    storage: Storage, work: Work = BUILD, *, wait: float | None = None, tell: Callable[[str], None] | None = None
) -> Iterator[bool]:
    """Hold the lock of a folder; the file is gone afterwards.

    Args:
        storage: the folder.
        work: what is done to it, for a refusal.
        wait: seconds to wait at most for another writer; None or 0: not at all.
        tell: is told once for whom is waited.

    Returns:
        Whether it was taken over from a holder that may wake up again.

    Raises:
        LockedError: another writer holds it, still; says who.
        InputError: the folder cannot be written.
    """
    turn = _Turn(storage, work, wait or 0.0, tell)
    with _local_lock(turn) if storage.is_local else _remote_lock(turn) as taken_over:
        yield taken_over


@dataclass(frozen=True)
class _Turn:
    """A writer that is to hold a folder, and how long it waits for its turn."""

    storage: Storage
    work: Work
    wait: float
    tell: Callable[[str], None] | None

    def take(self, attempt: Callable[[], Taken], every: float) -> Taken:
        """What ``attempt`` returns, tried again ``every`` so many seconds while another writer holds the lock.

        Raises:
            LockedError: it does still when the time is over.
        """
        end, told = time.monotonic() + self.wait, self.tell is None
        while True:
            try:
                return attempt()
            except _HeldError as held:
                left = end - time.monotonic()
                found = f"{self.storage.url} is {self.work.doing} by {held}"
            if left <= 0:
                waited = f" It was waited for, {duration_text(self.wait)}." if self.wait else ""
                raise LockedError(f"{found}.{waited} {self.work.remedy}")
            if not told:
                assert self.tell is not None
                self.tell(f"{found}: waiting for it, {duration_text(self.wait)} at most")
                told = True
            time.sleep(min(every, left))


def _holder() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}


@contextlib.contextmanager
def _local_lock(turn: _Turn) -> Iterator[bool]:
    path = Path(turn.storage.path(LOCK_NAME))
    file = turn.take(lambda: _acquire(turn.storage, path), _LOOK_SECONDS)
    try:
        yield False  # the kernel drops a lock with its process, and not before
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        file.close()


def _acquire(storage: Storage, path: Path) -> IO[str]:
    while True:
        try:
            # No link is followed: what it led to would be overwritten.
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+", errors="replace")
        except OSError as error:
            if path.is_symlink():
                raise InputError(f"{path} is a link: refused. Remove it, and run the same command again.") from error
            raise InputError(f"cannot write into {storage.url}: {error.strerror or error}.") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            text = file.read()
            file.close()
            raise _HeldError(text) from None
        # The holder before us may have unlinked the file between our open and our flock.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    file.truncate(0)
    file.write(json.dumps(_holder()))
    file.flush()
    return file


# -- object stores -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _remote_lock(turn: _Turn) -> Iterator[bool]:
    token = uuid.uuid4().hex
    taken_over = turn.take(lambda: _acquire_object(turn.storage, token), _REMOTE_LOOK_SECONDS)
    heart = _Heart(turn.storage, token)
    heart.start()
    try:
        yield taken_over
    except KeyboardInterrupt:
        if heart.lost_to is not None:
            raise heart.refusal() from None
        raise
    finally:
        heart.stop()
    if heart.lost_to is not None:
        raise heart.refusal()


def _acquire_object(storage: Storage, token: str) -> bool:
    """Make the lock's object, or take over one whose holder is dead.

    Returns:
        Whether it was taken over from a holder that was silent, and is not known to be gone.

    Raises:
        _HeldError: someone holds it, or was quicker.
    """
    beat, silent = _beat(token), False
    for _ in range(_ATTEMPTS):
        held = storage.read_if_there(LOCK_NAME)  # first: a store that knows no conditions would write over it
        if held is not None and not _is_gone(held):
            if not _is_silent(storage, held):
                raise _HeldError(held.decode(errors="replace"))
            silent = True
        if storage.exchange(LOCK_NAME, held, beat):
            break
        if (other := storage.read_if_there(LOCK_NAME)) is not None:  # else its holder has just ended
            raise _HeldError(other.decode(errors="replace"))
    time.sleep(_SETTLE_SECONDS)  # a store that knows no conditions has let everybody write: the last one has it
    found = storage.read_if_there(LOCK_NAME) or b""
    if _parsed(found).get("token") != token:
        raise _HeldError(found.decode(errors="replace"))
    return silent


def _is_gone(held: bytes) -> bool:
    """Whether what lies there holds nothing for certain: a process of this machine that has ended, or no lock."""
    holder = _parsed(held)
    return not _is_running(holder) if holder.get("machine") == _machine() else not holder


def _is_silent(storage: Storage, held: bytes) -> bool:
    """Whether a holder elsewhere gives no sign of life."""
    beat = _parsed(held).get("beat")
    if not isinstance(beat, int | float) or time.time() - beat < STALE_SECONDS:
        return False
    # Clocks differ. By its own clock it has been silent for long; wait for two more beats by ours.
    time.sleep(WATCH_SECONDS)
    return storage.read_if_there(LOCK_NAME) == held


def _parsed(held: bytes) -> dict[str, Any]:
    try:
        holder = json.loads(held)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _machine() -> str:
    """What tells one running system, and one container in it, from another: process ids mean nothing elsewhere."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def _is_running(holder: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(int(holder["pid"]))
        return process.create_time() == holder.get("started") and process.status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return False


def _beat(token: str) -> bytes:
    holder = {
        **_holder(),
        "machine": _machine(),
        "started": psutil.Process().create_time(),
        "token": token,
        "beat": time.time(),
    }
    return json_bytes(holder)


class _Heart(threading.Thread):
    """Says every `BEAT_SECONDS` that the holder lives, and stops it when another one has taken its lock.

    That happens to a process that was suspended for longer than `STALE_SECONDS`: it must not write any more.
    """

    def __init__(self, storage: Storage, token: str) -> None:
        super().__init__(name="retrodb-lock", daemon=True)
        self._storage = storage
        self._token = token
        self._done = threading.Event()
        self.lost_to: bytes | None = None

    def run(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            # A store that does not answer now may do so at the next beat; the build meets it by itself.
            with contextlib.suppress(UnreachableError):
                held = self._storage.read_if_there(LOCK_NAME)
                if not self._is_ours(held) or not self._storage.exchange(LOCK_NAME, held, _beat(self._token)):
                    self.lost_to = self._storage.read_if_there(LOCK_NAME) or b""
                    _thread.interrupt_main()
                    return

    def _is_ours(self, held: bytes | None) -> bool:
        return held is not None and _parsed(held).get("token") == self._token

    def stop(self) -> None:
        """End, and remove the lock if it is still this one's."""
        self._done.set()
        self.join()
        if self.lost_to is None and self._is_ours(self._storage.read_if_there(LOCK_NAME)):
            self._storage.delete(LOCK_NAME)

    def refusal(self) -> LockedError:
        who = _parsed(self.lost_to or b"").get("host", "another process")
        return LockedError(
            f"{self._storage.url} was taken over by {who}: this process had given no sign of life for more than "
            f"{STALE_SECONDS:.0f} s. It has stopped; what was finished before is kept."
        )
