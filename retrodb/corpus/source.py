"""Input files as they lie on disk or in a bucket: opened, read forwards, and every failure named.

Input is somebody else's: it may vanish, change or become unreadable while a worker reads it. Whatever the filesystem
raises then becomes an `InputError` that names the file, so that no half-read file is ever taken for a whole one.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import IO, Any, Final, Protocol

from retrodb.errors import InputError
from retrodb.remote import filesystem_of

READ_BYTES: Final = 1 << 18
"""Raw bytes asked for at a time."""

CONTENT_KEYS: Final = (
    "ETag",
    "etag",
    "md5Hash",
    "md5",
    "crc32c",
    "generation",
    "VersionId",
    "version_id",
    "content_md5",
)
"""What filesystems call what they know of an object's content, or of its version."""


class Hasher(Protocol):
    """What `hashlib` objects are."""

    def update(self, data: bytes, /) -> Any: ...


def is_local(url: str) -> bool:
    """Whether ``url``, as listed, is a path on this machine (a path may hold ``::``, which fsspec would misread)."""
    return "://" not in url


def unreadable(url: str, error: BaseException) -> InputError:
    """The error to raise when the filesystem fails on ``url``."""
    return InputError(
        f"cannot read {url}: {type(error).__name__}: {error}. Put it there, or make it readable, and run the same "
        "command again."
    )


class RawInput:
    """A binary file read forwards in pieces; ``hasher``, if any, sees every byte once.

    Every failure of the filesystem is raised as `InputError`.
    """

    def __init__(self, url: str, file: IO[bytes], hasher: Hasher | None = None) -> None:
        self.url = url
        self.bytes_read = 0
        self._file = file
        self._hasher = hasher
        self._ahead = b""

    def read(self, size: int = READ_BYTES) -> bytes:
        """At most ``size`` bytes; empty only at the end of the file."""
        if self._ahead:
            block, self._ahead = self._ahead[:size], self._ahead[size:]
            return block
        return self._read(size)

    def peek(self, size: int) -> bytes:
        """The next ``size`` bytes (fewer at the end of the file), which `read` will give again."""
        while len(self._ahead) < size and (block := self._read(size - len(self._ahead))):
            self._ahead += block
        return self._ahead[:size]

    def seek(self, offset: int) -> None:
        """Go to byte ``offset``; for files that are not hashed."""
        assert self._hasher is None, "a hashed file is read from its first byte to its last"
        self._ahead = b""
        try:
            self._file.seek(offset)
        except Exception as error:  # any filesystem, any exception
            raise unreadable(self.url, error) from error

    def size(self) -> int | None:
        """Bytes of the open file, None where the filesystem does not say."""
        size = getattr(self._file, "size", None)
        if not isinstance(size, int):
            try:
                position = self._file.tell()
                size = self._file.seek(0, 2)
                self._file.seek(position)
            except (OSError, ValueError, NotImplementedError):
                return None
        return size

    def _read(self, size: int) -> bytes:
        try:
            block = self._file.read(size)
        except Exception as error:  # s3fs, gcsfs and http raise their own
            raise unreadable(self.url, error) from error
        self.bytes_read += len(block)
        if self._hasher is not None:
            self._hasher.update(block)
        return block


def local_stamp(path: str) -> tuple[str, int]:
    """The stamp of a file on this machine, and its size: ``size-mtime-ctime-inode``."""
    status = os.stat(path)
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}-{status.st_ino}", status.st_size


def refuse_written(url: str, stamp: str) -> None:
    """After a file was read: is it still the one that was listed? Its checksum is that of an earlier pass over it.

    A local file tells by its time and inode (a change of owner, permissions or links is none of the bytes), an object
    by what its store knows of the content, where it says it.

    Raises:
        InputError: it was written, replaced or removed meanwhile, perhaps by as many bytes.
    """
    try:
        if is_local(url):
            same = not stamp or _without_ctime(local_stamp(url)[0]) == _without_ctime(stamp)
        else:
            same = _same_object(url, stamp)
    except Exception as error:  # any filesystem, any exception
        raise unreadable(url, error) from error
    if not same:
        raise InputError(
            f"{url} was written or replaced while the build was reading it. Run the build again once it is complete."
        )


def _without_ctime(stamp: str) -> tuple[str, ...]:
    size_and_time, _, inode = stamp.rsplit("-", 2)
    return size_and_time, inode


def _same_object(url: str, stamp: str) -> bool:
    """By the keys that listings and single answers of a store write alike; times they do not."""
    known = dict(part.split("=", 1) for part in stamp.split("|") if part.partition("=")[0] in CONTENT_KEYS)
    if not known:
        return True
    filesystem, path = filesystem_of(url)
    filesystem.invalidate_cache()
    info = filesystem.info(path)
    return all(str(info[key]) == value for key, value in known.items() if info.get(key) not in (None, ""))


@contextlib.contextmanager
def open_raw(url: str, hasher: Hasher | None = None, expected_size: int | None = None) -> Iterator[RawInput]:
    """Open an input file for reading forwards.

    Raises:
        InputError: it cannot be opened, or its size is no longer ``expected_size`` bytes.
    """
    try:
        if is_local(url):
            file: IO[bytes] = open(url, "rb")  # noqa: SIM115 closed below
        else:
            filesystem, path = filesystem_of(url)
            file = filesystem.open(path, "rb")
    except InputError:
        raise
    except Exception as error:  # any filesystem, any exception
        raise unreadable(url, error) from error
    with contextlib.closing(file):
        raw = RawInput(url, file, hasher)
        if expected_size is not None and (size := raw.size()) is not None and size != expected_size:
            raise InputError(
                f"{url} had {expected_size} bytes when it was scanned and has {size} now: it changed while the build "
                "was reading it. Run the build again once it is complete."
            )
        yield raw
