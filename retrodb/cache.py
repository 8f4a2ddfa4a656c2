"""Shards of object stores on the local disk: fetched once, memory-mapped from then on, bounded by least recent use.

An entry is named by the sha256 that the manifest records, so it can never be out of date, and one folder serves all
databases and all processes of a machine. It is put in when its size and checksum are those recorded, and then sealed:
read-only, with a modification time that follows from its name. Whatever writes to it later breaks the seal (or its
size), and it is fetched again.

`RETRODB_CACHE` names the folder (else ``$XDG_CACHE_HOME/retrodb/shards``, ``~/.cache/retrodb/shards``), and
`RETRODB_CACHE_BYTES` the bound (10GB; 0 keeps nothing). A file in use is never removed; what is being fetched counts.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from retrodb.errors import DamagedError, InputError
from retrodb.sizes import parse_size

FOLDER_VARIABLE: Final = "RETRODB_CACHE"
BYTES_VARIABLE: Final = "RETRODB_CACHE_BYTES"
DEFAULT_BYTES: Final = 10 * 10**9

_ENTRY: Final = re.compile(r"[0-9a-f]{64}")
_PART: Final = ".part-"
_GATE: Final = ".lock"
_BLOCK: Final = 1 << 20
_ATTEMPTS: Final = 5

Fetch = Callable[[Path], None]
"""Writes the file to a path that may be there already."""


@dataclass(frozen=True)
class ShardCache:
    """A folder of sealed shards of at most ``limit`` bytes together."""

    folder: Path
    limit: int

    @contextlib.contextmanager
    def hold(self, name: str, sha256: str, size: int, fetch: Fetch, *, renew: bool = False) -> Iterator[Path]:
        """The file of these bytes; it stays until the context ends (and longer for who has opened or mapped it).

        Args:
            name: of the file, for messages.
            sha256: of its bytes, in hex.
            size: in bytes.
            fetch: gets it, where it is not here.
            renew: get it anyway: what is to be proved is the original.

        Raises:
            DamagedError: what was fetched is not that.
            FileNotFoundError: there is nothing to fetch.
        """
        if size > self.limit or not _ENTRY.fullmatch(sha256):
            with tempfile.TemporaryDirectory(prefix="retrodb-") as folder:
                path = Path(folder) / "shard"
                with _naming_a_full_disk(f"{tempfile.gettempdir()} (TMPDIR), for {name} is not kept in the cache"):
                    fetch(path)
                _check(path, name, sha256, size)
                yield path
            return
        held = None if renew else self._open_whole(sha256, size)
        for _ in range(_ATTEMPTS):
            if held is not None:
                break
            self._put_in(name, sha256, size, fetch, renew)
            renew = False
            held = self._open_whole(sha256, size)
        if held is None:
            raise InputError(f"the cache {self.folder} loses what is put in: name another folder in {FOLDER_VARIABLE}.")
        try:
            yield self._entry(sha256)
        finally:
            os.close(held)

    def has(self, sha256: str, size: int) -> bool:
        """Whether the file of these bytes is here, whole."""
        held = self._open_whole(sha256, size)
        if held is not None:
            os.close(held)
        return held is not None

    def drop(self, sha256: str) -> None:
        """Remove the file of these bytes, unless someone holds it."""
        if _ENTRY.fullmatch(sha256):
            _remove_unused(self._entry(sha256))

    def _entry(self, sha256: str) -> Path:
        return self.folder / sha256

    def _open_whole(self, sha256: str, size: int) -> int | None:
        """A descriptor that keeps a sound entry from being removed, marked as used now; None where there is none."""
        path = self._entry(sha256)
        try:
            held = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            return None
        fcntl.flock(held, fcntl.LOCK_SH)
        found = os.fstat(held)
        sound = stat.S_ISREG(found.st_mode) and found.st_size == size and found.st_mtime_ns == _seal(sha256)
        if sound and _is(path, found):
            with contextlib.suppress(PermissionError):  # a folder that users share
                os.utime(held, ns=(time.time_ns(), _seal(sha256)))
            return held
        os.close(held)
        return None

    def _put_in(self, name: str, sha256: str, size: int, fetch: Fetch, renew: bool) -> None:
        """Fetch an entry and put it in place. Who comes second waits for the first, and finds it there."""
        part = self.folder / f"{_PART}{sha256}"
        self._make_folder()
        with _locked(part) as held:
            if not renew and self.has(sha256, size):
                part.unlink()
                return
            try:
                self._make_room(size)
                self._fetch(part, fetch)
                _check(part, name, sha256, size)
                os.fsync(held)
                os.chmod(part, 0o444)
                os.utime(part, ns=(time.time_ns(), _seal(sha256)))
                os.replace(part, self._entry(sha256))
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def _fetch(self, part: Path, fetch: Fetch) -> None:
        try:
            fetch(part)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self._make_room(self.limit)  # all that is not in use gives way
            with _naming_a_full_disk(f"{self.folder} ({FOLDER_VARIABLE})"):
                fetch(part)

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot make the cache folder {self.folder}: {error.strerror}. Name another in {FOLDER_VARIABLE}."
            ) from error

    def _make_room(self, size: int) -> None:
        """Remove what was used longest ago until ``size`` more bytes fit, and what a killed process left behind."""
        with _locked(self.folder / _GATE):
            entries = []
            total = 0
            for file in os.scandir(self.folder):
                with contextlib.suppress(FileNotFoundError):
                    found = file.stat(follow_symlinks=False)
                    if file.name.startswith(_PART):
                        if not _remove_unused(Path(file.path)):
                            total += found.st_size
                    elif _ENTRY.fullmatch(file.name):
                        total += found.st_size
                        entries.append((found.st_atime_ns, file.path, found.st_size))
            for _, path, length in sorted(entries):
                if total + size <= self.limit:
                    break
                if _remove_unused(Path(path)):
                    total -= length


def shard_cache() -> ShardCache:
    """The cache that the environment names.

    Raises:
        InputError: `RETRODB_CACHE_BYTES` is no size.
    """
    given = os.environ.get(BYTES_VARIABLE, "")
    try:
        limit = parse_size(given) if given else DEFAULT_BYTES
    except ValueError as error:
        raise InputError(f"{BYTES_VARIABLE}: {error}.") from error
    return ShardCache(_folder(), limit)


def _folder() -> Path:
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named).expanduser().absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    nearest = next(folder for folder in (base, *base.parents) if folder.exists())
    if os.access(nearest, os.W_OK):
        return base / "retrodb" / "shards"
    return _private_temporary()  # a container whose user has no home


def _private_temporary() -> Path:
    """A folder of this user alone: what lies in another one's was written by that other one."""
    folder = Path(tempfile.gettempdir()) / f"retrodb-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise InputError(f"{folder} belongs to someone else: name a folder for the cache in {FOLDER_VARIABLE}.")
    return folder


def _seal(sha256: str) -> int:
    """The modification time of a sound entry, in ns: within 1970 to 1978, which no write of today leaves."""
    return int(sha256[:7], 16) * 10**9


def _is(path: Path, found: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.lstat(path), found)
    except FileNotFoundError:
        return False


def _check(path: Path, name: str, sha256: str, size: int) -> None:
    digest = hashlib.sha256()
    length = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            length += len(block)
    if (length, digest.hexdigest()) != (size, sha256):
        raise DamagedError(
            f"{name} has {length:,} bytes with sha256 {digest.hexdigest()[:16]}.., recorded are {size:,} bytes with "
            f"{sha256[:16]}..: it is damaged, or was made again. Open the database anew, or run the build to repair it."
        )


@contextlib.contextmanager
def _naming_a_full_disk(where: str) -> Iterator[None]:
    """Whoever reads that no space is left is told where."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), where) from error
        raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """An exclusive lock on a file that is made for it, and still of that name when the lock is had."""
    while True:
        held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            if _is(path, os.fstat(held)):
                yield held
                return
        finally:
            os.close(held)


def _remove_unused(path: Path) -> bool:
    """Remove a file unless someone holds it."""
    try:
        held = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    finally:
        os.close(held)
    return True
