"""Object stores through fsspec: whole objects in, whole objects out, one request each, and every failure named.

`retrodb.storage` is the only one to use this. An object is read with one GET and written with one PUT (or one upload
in parts, which shows nothing until it is complete); what is asked besides is listed in docs/object-storage.md. Retries
with back-off are the client library's: botocore's *standard* mode below s3fs, gcsfs' own six attempts.
"""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import fsspec
from fsspec.implementations.local import LocalFileSystem

from retrodb.errors import InputError, RetrodbError, UnreachableError

_S3_ATTEMPTS: Final = 8
_IN_ONE_REQUEST: Final = 4 << 30
"""Below so many bytes an S3 object that is written on a condition is one PUT: an upload in parts would lose it."""
_CONDITION_FAILED: Final = ("PreconditionFailed", "ConditionalRequestConflict", "412")
_ONE_STREAM: Final[dict[str, dict[str, int]]] = {"s3": {"max_concurrency": 1}, "gs": {"concurrency": 1}}
"""What makes ``get_file`` one GET: else s3fs and gcsfs ask for the size first and fetch ranges. Shards are fetched side
by side, not their parts."""

_EXTRAS: Final = {"s3": "pip install 'retrodb[s3]'", "s3a": "pip install 'retrodb[s3]'"}

_NO_CREDENTIALS: Final = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "DefaultCredentialsError",
    "RefreshError",
    "Anonymous caller",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "Invalid Credentials",
    "ExpiredToken",
    ", 401",
)
_NO_NETWORK: Final = (
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "ConnectionClosedError",
    "ClientConnectorError",
    "ServerDisconnectedError",
    "TransportError",
    "TimeoutError",
    "ConnectionError",
)


def absolute_url(url: str) -> str:
    """``url`` with a protocol, or an absolute local path; trailing slashes removed.

    Raises:
        InputError: no filesystem is installed for the protocol.
    """
    if not url.partition("://")[2].strip("/") and "://" in url and url != "file:///":
        raise InputError(f"{url!r} names no bucket and no folder; write it as s3://BUCKET/FOLDER.")
    if url.startswith("file://"):
        url = url[len("file://") :]
    if "://" not in url:
        return os.path.abspath(os.path.expanduser(url))
    filesystem_of(url)
    return url.rstrip("/")


def filesystem_of(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec filesystem of ``url`` and the path inside it. It keeps no listings: they would be out of date.

    Raises:
        InputError: no filesystem is installed for the protocol, or its settings are wrong.
    """
    protocol = url.partition("://")[0] if "://" in url else "file"
    options: dict[str, Any] = {} if "::" in url or protocol == "file" else {"use_listings_cache": False}
    if protocol in ("s3", "s3a") and not _retries_are_set():
        options["config_kwargs"] = {"retries": {"mode": "standard", "max_attempts": _S3_ATTEMPTS}}
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        remedy = _EXTRAS.get(protocol, "Install the fsspec filesystem for it.")
        raise InputError(f"cannot open {url!r}: {error}. It needs: {remedy}") from error
    except ValueError as error:
        raise InputError(f"cannot open {url!r}: {error}. Install the fsspec filesystem for it.") from error
    except Exception as error:  # credentials that are looked for at once, as gcsfs does
        raise UnreachableError(_explained(error, "open", url, 0.0)) from error
    return filesystem, path


def _retries_are_set() -> bool:
    """Whether the user says how S3 is retried: then retrodb does not."""
    configured = fsspec.config.conf.get("s3", {})
    return "config_kwargs" in configured or "AWS_RETRY_MODE" in os.environ or "AWS_MAX_ATTEMPTS" in os.environ


class ObjectStore:
    """The objects below one folder's URL. Paths are those of the filesystem, with the bucket.

    Every method raises `UnreachableError` where the store does not answer or refuses.
    """

    def __init__(self, filesystem: fsspec.AbstractFileSystem, url: str) -> None:
        self._filesystem = filesystem
        self._url = url
        self._one_stream = next((_ONE_STREAM[name] for name in _protocols(filesystem) if name in _ONE_STREAM), {})

    def fetch(self, path: str, target: Path) -> None:
        """Write an object to a local file: one request. Raises FileNotFoundError."""
        with self._naming("read", path):
            self._filesystem.get_file(path, str(target), **self._one_stream)

    def put(self, path: str, source: Path) -> None:
        """Write a local file as one object, which is seen when it is complete, and not before."""
        with self._naming("write", path), self._bucket_needed():
            self._filesystem.put_file(str(source), path)

    def create(self, path: str, data: bytes) -> bool:
        """Write an object only where there is none, and say whether it was written.

        By a condition that the store itself checks (S3: ``If-None-Match: *``; GCS: ``ifGenerationMatch=0``). A store
        that ignores it overwrites: read back who has it.
        """
        return self._if_allowed(path, lambda: self._filesystem.pipe_file(path, data, mode="create"), FileExistsError)

    def stamp(self, path: str) -> str | None:
        """What an object has that differs once it is written anew: S3's ETag, GCS' generation. None where there is no
        object, "" where the store has no such thing."""
        with self._naming("look for", path):
            try:
                found = self._filesystem.info(path)
            except FileNotFoundError:
                return None
        return None if found["type"] == "directory" else str(found.get("generation") or found.get("ETag") or "")

    def put_instead(self, path: str, data: bytes, stamp: str) -> bool:
        """Write an object in place of the one that has this `stamp`, and say whether it was written.

        By a condition that the store itself checks (S3: ``If-Match``; GCS: ``ifGenerationMatch``). A store that ignores
        it, or has no stamps, overwrites.
        """
        write = partial(self._write_instead, path, data, stamp)
        return self._if_allowed(path, write, FileExistsError, FileNotFoundError)

    def _if_allowed(self, path: str, write: Callable[[], object], *refusals: type[OSError]) -> bool:
        """Write on a condition that the store checks, and say whether it held; ``refusals`` say that it did not."""
        with self._naming("write", path), self._bucket_needed():
            try:
                write()
            except refusals:
                return False
            except OSError as error:
                if _is_refused(error):
                    return False
                raise
        return True

    def _write_instead(self, path: str, data: bytes, stamp: str) -> None:
        protocols = _protocols(self._filesystem)
        if "s3" in protocols and stamp:
            self._filesystem.pipe_file(path, data, chunksize=_IN_ONE_REQUEST, IfMatch=stamp)
        elif "gs" in protocols and stamp:
            bucket, key, _ = self._filesystem.split_path(path)
            self._filesystem.call(  # its own upload knows the condition that there is no object, and no other
                "POST",
                f"{self._filesystem.base.replace('/storage/', '/upload/storage/', 1)}b/{quote(bucket)}/o",
                uploadType="media",
                name=key,
                ifGenerationMatch=stamp,
                headers={"Content-Type": "application/octet-stream"},
                data=data,
            )
        else:
            self._filesystem.pipe_file(path, data)

    def copy(self, source: str, target: str) -> None:
        """Copy an object inside the store; the target appears whole. Raises FileNotFoundError."""
        with self._naming("write", target):
            self._filesystem.cp_file(source, target)

    def size(self, path: str) -> int | None:
        """Bytes of an object, None where there is none."""
        with self._naming("look for", path):
            try:
                found = self._filesystem.info(path)
            except FileNotFoundError:
                return None
        return None if found["type"] == "directory" else int(found["size"])

    def names(self, folder: str, kind: str) -> list[str]:
        """Names directly in a folder, sorted: of its files (``file``) or folders (``directory``)."""
        with self._naming("list", folder):
            try:
                entries = self._filesystem.ls(folder, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
        own = [entry["name"].rstrip("/") for entry in entries if entry["type"] == kind]
        return sorted(name.rpartition("/")[2] for name in own if name != folder.rstrip("/"))

    def below(self, folder: str) -> list[str]:
        """Full paths of all objects below a folder, sorted."""
        with self._naming("list", folder):
            try:
                return sorted(self._filesystem.find(folder))
            except FileNotFoundError:
                return []

    def delete(self, paths: Sequence[str]) -> None:
        """Remove objects, those that are there, together where the store can."""
        if not paths:
            return
        with self._naming("delete", paths[0]), contextlib.suppress(FileNotFoundError):
            if len(paths) == 1:
                self._filesystem.rm_file(paths[0])
            else:
                self._filesystem.rm(list(paths))

    def check_bucket(self, path: str) -> None:
        """Refuse a bucket that does not exist. One that cannot be looked at is let pass: its objects may well be.

        Raises:
            UnreachableError: there is no such bucket.
        """
        bucket = path.partition("/")[0]
        with self._naming("look for", bucket), self._bucket_needed(), contextlib.suppress(PermissionError):
            self._filesystem.info(bucket)

    @contextlib.contextmanager
    def _bucket_needed(self) -> Iterator[None]:
        """Where something is written, what is not found is the bucket."""
        try:
            yield
        except FileNotFoundError as error:
            raise UnreachableError(f"{self._url}: there is no such bucket. Make it, or correct the name.") from error

    @contextlib.contextmanager
    def _naming(self, action: str, path: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        except (RetrodbError, FileNotFoundError, NotADirectoryError, MemoryError):
            raise
        except Exception as error:  # s3fs, gcsfs and what lies below them raise their own
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise  # of the local disk
            where = self._filesystem.unstrip_protocol(path)
            raise UnreachableError(_explained(error, action, where, time.monotonic() - started)) from error


def _explained(error: BaseException, action: str, where: str, seconds: float) -> str:
    """What failed, why as far as it can be told, what the library has tried, and what to do."""
    chain = _chain(error)
    words = " ".join(f"{' '.join(kind.__name__ for kind in type(one).__mro__)} {one}" for one in chain)
    if any(mark in words for mark in _NO_CREDENTIALS):
        why = "there are no valid credentials"
        remedy = "Give them as the store's own tools take them (docs/object-storage.md)."
    elif isinstance(error, PermissionError) or "Forbidden" in words or "AccessDenied" in words:
        why = "permission is denied"
        remedy = "Reading needs get and list, building also put and delete on the bucket."
    elif any(mark in words for mark in _NO_NETWORK):
        tried = f" after {seconds:.0f} s of retries" if seconds >= 1 else ""
        why = f"the store does not answer{tried}"
        remedy = "Look at the network and the endpoint, and run the same command again: what is finished is kept."
    else:
        why = "the store refuses"
        remedy = "What is finished is kept: run the same command again once it is mended."
    text = " ".join(str(error).split())[:300]
    return f"cannot {action} {where}: {why} ({type(error).__name__}: {text}). {remedy}"


def _is_refused(error: BaseException) -> bool:
    """Whether a store says that the condition of a write does not hold, or that another write came between."""
    responses = [getattr(one, "response", None) for one in _chain(error)]
    codes = [found.get("Error", {}).get("Code") for found in responses if isinstance(found, dict)]
    return any(code in _CONDITION_FAILED for code in codes)


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _protocols(filesystem: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,)


def has_buckets(filesystem: fsspec.AbstractFileSystem) -> bool:
    """Whether paths begin with a bucket, which may not exist."""
    return any(name in _ONE_STREAM for name in _protocols(filesystem))


def is_local(filesystem: fsspec.AbstractFileSystem) -> bool:
    """Whether files can be memory-mapped and renamed."""
    return isinstance(filesystem, LocalFileSystem)
