"""One writer at a time: the lock of a database, whose dead holder is never waited for.

On a local disk the lock is an ``flock`` on a file, which the kernel drops with the process, however it ends. On an
object store it is a small object with a heartbeat; one that has not beaten for `STALE_SECONDS` is taken over.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

from retrodb.errors import InputError, LockedError
from retrodb.storage import Storage

LOCK_NAME: Final = ".lock"
STALE_SECONDS: Final = 120.0
_BEAT_SECONDS: Final = 30.0


@contextlib.contextmanager
def build_lock(storage: Storage) -> Iterator[None]:
    """Hold the database's lock; the file is gone afterwards.

    Raises:
        LockedError: another build holds it; says who.
        InputError: the folder cannot be written.
    """
    with _local_lock(storage) if storage.is_local else _remote_lock(storage):
        yield


def _holder() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}


def _refusal(storage: Storage, text: str) -> LockedError:
    try:
        holder = json.loads(text)
        who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    return LockedError(f"{storage.url} is being built by {who}. Wait for it, or build into another folder.")


@contextlib.contextmanager
def _local_lock(storage: Storage) -> Iterator[None]:
    path = Path(storage.path(LOCK_NAME))
    file = _acquire(storage, path)
    try:
        yield
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
            raise _refusal(storage, text) from None
        # The holder before us may have unlinked the file between our open and our flock.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    file.truncate(0)
    file.write(json.dumps(_holder()))
    file.flush()
    return file


@contextlib.contextmanager
def _remote_lock(storage: Storage) -> Iterator[None]:
    token = uuid.uuid4().hex
    _refuse_if_alive(storage, token)
    _beat(storage, token)
    # Object stores without a conditional write: whoever wrote last has it; the other sees that and gives way.
    time.sleep(0.2)
    _refuse_if_alive(storage, token)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(_BEAT_SECONDS):
            _beat(storage, token)

    thread = threading.Thread(target=beat, name="retrodb-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        storage.delete(LOCK_NAME)


def _beat(storage: Storage, token: str) -> None:
    storage.commit_json(LOCK_NAME, {**_holder(), "token": token, "beat": time.time()})


def _refuse_if_alive(storage: Storage, token: str) -> None:
    holder = storage.read_json(LOCK_NAME)
    if holder is not None and holder.get("token") != token and time.time() - holder.get("beat", 0) < STALE_SECONDS:
        raise _refusal(storage, json.dumps(holder))
