"""The one way to touch files: a database folder on any fsspec filesystem, and how a shard is committed.

A shard is written to a temporary local file, hashed on the way, and then put in place whole: on a local disk by
``fsync`` and ``rename`` from a temporary name beside it, elsewhere by one whole-object upload. Nobody ever sees half a
file under its final name. Paths inside a database are relative, and are checked: a manifest that names ``../x`` or an
absolute path is refused (invariant 10).

An object store is asked for whole objects alone: what is read lies on the local disk first, in `retrodb.cache` where
its checksum is recorded, else for as long as it is open.
"""

import contextlib
import errno
import filecmp
import hashlib
import json
import os
import posixpath
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrodb.cache import shard_cache
from retrodb.errors import DamagedError, InputError
from retrodb.formats import (
    Committed,
    File,
    HashingWriter,
    Recorded,
    json_bytes,
    path_of,
    refuse_swelling,
    write_all,
    write_array,
    write_table,
)
from retrodb.remote import ObjectStore, absolute_url, filesystem_of, is_local

TEMPORARY_PREFIX: Final = ".tmp-"
"""Files of this prefix are leftovers of a killed writer; whoever holds the build lock may remove them."""

_COPY_BYTES: Final = 1 << 20
_EXCHANGES: Final = 3
"""So often a conditional write is tried that the store refuses though nothing was written."""


def checked_relative(path: str) -> str:
    """``path`` if it stays inside the database folder.

    Raises:
        DamagedError: it is absolute, climbs out with ``..``, or is not in normal form.
    """
    if not path or path.startswith("/") or any(sign in path for sign in "\\:\0") or posixpath.normpath(path) != path:
        raise DamagedError(f"the manifest names the path {path!r}, which is not a plain relative path: refused.")
    if path.split("/", maxsplit=1)[0] == "..":
        raise DamagedError(f"the manifest names the path {path!r}, which leaves the database: refused.")
    return path


@dataclass
class Storage:
    """A folder on any fsspec filesystem: ``Storage("gs://bucket/db")``, ``Storage("my-db")``.

    Pickles by URL alone, so that it can travel to any worker.
    """

    url: str
    _filesystem: fsspec.AbstractFileSystem = field(init=False, repr=False, compare=False)
    _root: str = field(init=False, repr=False, compare=False)
    _objects: ObjectStore = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.url.strip():
            raise InputError("the database's name is blank; name a folder or a URL.")
        self.url = absolute_url(self.url)
        self._filesystem, self._root = filesystem_of(self.url)
        self._objects = ObjectStore(self._filesystem, self.url)

    def __reduce__(self) -> tuple[Any, ...]:
        return Storage, (self.url,)

    @property
    def is_local(self) -> bool:
        """Whether files can be memory-mapped and renamed."""
        return is_local(self._filesystem)

    def path(self, relative: str) -> str:
        """The full path of ``relative`` inside its filesystem.

        Raises:
            DamagedError: it leaves the database: by its name, or by a link in place of one of its folders.
        """
        full = posixpath.join(self._root, checked_relative(relative))
        if self.is_local:
            folder = posixpath.dirname(full)
            while len(folder) > len(self._root):
                if os.path.islink(folder):
                    raise DamagedError(f"{folder} is a link, which may lead out of the database: refused. Remove it.")
                folder = posixpath.dirname(folder)
        return full

    def _readable(self, relative: str) -> str:
        """The path of a file to read: a regular one where it is local, for a link leads anywhere and a pipe never ends.

        Raises:
            DamagedError: it is there and is no regular file.
        """
        path = self.path(relative)
        if self.is_local and os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
            raise DamagedError(f"{self.describe(relative)} is a link, a folder or a device, not a file: refused.")
        return path

    def placed(self, relative: str) -> str:
        """Where a table's file, or a report, of this relative path is written: here, under that very path."""
        return relative

    def owns(self, relative: str) -> bool:
        """Whether a recorded file is this writer's to delete."""
        return True

    def describe(self, file: File) -> str:
        """A file as a person would name it, for messages."""
        return posixpath.join(self.url, path_of(file))

    # -- reading ---------------------------------------------------------------------------------------------------

    def size(self, relative: str) -> int | None:
        """Bytes of a file, or None where there is none (a link is none). Never answers from a listing."""
        if not self.is_local:
            return self._objects.size(self.path(relative))
        try:
            found = os.lstat(self.path(relative))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def fault(self, file: Recorded, *, read: bool = True) -> str | None:
        """What is wrong with a recorded file as it lies there, or None: ``has 5 bytes, recorded are 6``.

        Args:
            file: what is recorded.
            read: compare its bytes with the checksum; else its size alone. What is read from an object store is in
                the cache then.
        """
        if read and not self.is_local:
            return self._fault_of_original(file)
        size = self.size(file.path)
        if size is None:
            return "is missing"
        if size != file.bytes:
            return f"has {size:,} bytes, recorded are {file.bytes:,}"
        if not read or (found := self.sha256(file.path)) == file.sha256:
            return None
        return f"has sha256 {found[:16]}.., recorded is {file.sha256[:16]}.."

    def _fault_of_original(self, file: Recorded) -> str | None:
        """As `fault`, by one fetch that leaves a sound file in the cache."""
        try:
            with self._cached(file, renew=True):
                return None
        except FileNotFoundError:
            return "is missing"
        except DamagedError as error:
            return str(error).removeprefix(self.describe(file)).strip()

    def read_bytes(self, file: File) -> bytes:
        """The whole file. Raises FileNotFoundError."""
        with self.local_copy(file) as path:
            return path.read_bytes()

    def read_if_there(self, relative: str) -> bytes | None:
        """The whole file, or None where there is none."""
        try:
            return self.read_bytes(relative)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_json(self, relative: str) -> Any:
        """The parsed file, or None where there is none.

        Raises:
            DamagedError: it is not JSON.
        """
        data = self.read_if_there(relative)
        try:
            return None if data is None else json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DamagedError(f"{self.describe(relative)} is not valid JSON ({error}).") from error

    @contextlib.contextmanager
    def open(self, file: File) -> Iterator[IO[bytes]]:
        """A readable binary file on the local disk, which can be memory-mapped. Raises FileNotFoundError."""
        with self.local_copy(file) as path:
            opened = path.open("rb")
        with opened:
            yield opened

    def open_parquet(self, file: File) -> pq.ParquetFile:
        """A Parquet file, memory-mapped.

        Raises:
            DamagedError: it is missing, is not what is recorded, or is not Parquet.
        """
        try:
            with self.local_copy(file) as path:  # what is mapped may be removed
                parquet = pq.ParquetFile(str(path), memory_map=True)
                try:
                    refuse_swelling(parquet.metadata, path.stat().st_size, self.describe(file))
                except BaseException:
                    parquet.close()
                    raise
                return parquet
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._unreadable(file, error) from error

    def read_table(self, file: File, columns: list[str] | None = None) -> pa.Table:
        """A whole Parquet shard, or some of its columns, read on the calling thread.

        Raises:
            DamagedError: it is missing, is not what is recorded, or cannot be decoded.
        """
        with self.open_parquet(file) as parquet:
            try:
                return parquet.read(columns=columns, use_threads=False)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise self._unreadable(file, error) from error

    def read_array(self, file: File) -> np.ndarray:
        """A ``.npy`` array, memory-mapped read-only. Never a pickle.

        Raises:
            DamagedError: it is missing, is not what is recorded, or is not an array file.
        """
        try:
            with self.local_copy(file) as path:
                if os.path.getsize(path) == 0:
                    raise ValueError("the file is empty")
                return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise self._unreadable(file, error) from error

    def _unreadable(self, file: File, error: Exception) -> Exception:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return error  # there is no room for what is to be read: it is not damaged
        return DamagedError(f"cannot read {self.describe(file)}: {error}. Run the build again to repair it.")

    @contextlib.contextmanager
    def local_copy(self, file: File) -> Iterator[Path]:
        """A local path with the file's bytes: the file itself, the cache's, or a copy that is removed afterwards.

        What is opened or mapped meanwhile stays valid.

        Raises:
            FileNotFoundError: there is none.
            DamagedError: it is not what is recorded (where it is not local).
        """
        if self.is_local:
            yield Path(self._readable(path_of(file)))
        elif isinstance(file, str):
            with tempfile.TemporaryDirectory(prefix="retrodb-") as folder:
                target = Path(folder) / posixpath.basename(file)
                self._objects.fetch(self.path(file), target)
                yield target
        else:
            with self._cached(file) as path:
                yield path

    @contextlib.contextmanager
    def _cached(self, file: Recorded, *, renew: bool = False) -> Iterator[Path]:
        full = self.path(file.path)
        with shard_cache().hold(
            self.describe(file), file.sha256, file.bytes, lambda path: self._objects.fetch(full, path), renew=renew
        ) as path:
            yield path

    def bring(self, file: Recorded) -> None:
        """Have a recorded file in the cache when it is wanted. A failure waits until then, too."""
        if not self.is_local:
            with contextlib.suppress(Exception), self._cached(file):
                pass

    def forget_copies(self, files: Iterable[Recorded]) -> None:
        """Remove files from this machine's cache, but those that someone is opening."""
        if not self.is_local:
            for file in files:
                shard_cache().drop(file.sha256)

    def sha256(self, relative: str) -> str:
        """sha256 of a file's bytes in hex, streamed. Raises FileNotFoundError."""
        digest = hashlib.sha256()
        with self.open(relative) as file:
            while block := file.read(_COPY_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def sha256_if_there(self, relative: str) -> str | None:
        """As `sha256`, or None where there is no such file."""
        try:
            return self.sha256(relative)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def list_files(self, relative: str) -> list[str]:
        """Names of the files directly in a folder, sorted; empty where there is none.

        For cleaning up and for finding what should not be there: never for finding out what exists.
        """
        return self._list(relative, "file")

    def list_folders(self, relative: str) -> list[str]:
        """Names of the folders directly in a folder, sorted."""
        return self._list(relative, "directory")

    def _list(self, relative: str, kind: str) -> list[str]:
        folder = posixpath.dirname(self.path(f"{relative}/_")) if relative else self._root
        if not self.is_local:
            return self._objects.names(folder, kind)
        try:  # by lstat: a link is listed as a file, and never followed
            with os.scandir(folder) as found:
                return sorted(e.name for e in found if e.is_dir(follow_symlinks=False) == (kind == "directory"))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def list_below(self, folder: str) -> list[str]:
        """Relative paths of all files below a folder, at any depth, sorted; for the same ends as `list_files`."""
        if not self.is_local:
            return [path.removeprefix(f"{self._root}/") for path in self._objects.below(self.path(folder))]
        found = [f"{folder}/{name}" for name in self.list_files(folder)]
        for name in self.list_folders(folder):
            found += self.list_below(f"{folder}/{name}")
        return sorted(found)

    def is_empty(self) -> bool:
        """Whether the folder is missing or has nothing in it."""
        return not self.list_files("") and not self.list_folders("")

    def is_a_file(self) -> bool:
        """Whether the URL names a file, where a folder was meant."""
        return os.path.isfile(self._root) if self.is_local else self._objects.size(self._root) is not None

    def check_bucket(self) -> None:
        """Tell a bucket that does not exist from one in which there is nothing.

        Raises:
            UnreachableError: there is no such bucket, or the store does not answer.
        """
        if not self.is_local:
            self._objects.check_bucket(self._root)

    # -- writing ---------------------------------------------------------------------------------------------------

    def commit(self, relative: str, write: Callable[[HashingWriter], None]) -> Committed:
        """Write a file whole: ``write`` gets a sequential writer, and the name appears only when it has returned.

        Raises:
            OSError: there is no space left; names where.
            UnreachableError: the store does not take it.
        """
        if self.is_local:
            return self._commit_local(relative, write)
        try:
            with tempfile.TemporaryDirectory(prefix="retrodb-") as folder:
                staged = Path(folder) / "shard"
                with staged.open("wb") as raw:
                    writer = HashingWriter(raw)
                    write(writer)
                self._objects.put(self.path(relative), staged)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            where = f"{tempfile.gettempdir()}, where a file waits to be uploaded (TMPDIR)"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), where) from error
        return Committed(relative, writer.bytes_written, writer.hexdigest())

    def _commit_local(self, relative: str, write: Callable[[HashingWriter], None]) -> Committed:
        final = Path(self.path(relative))
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.parent / f"{TEMPORARY_PREFIX}{final.name}-{uuid.uuid4().hex[:12]}"
        try:
            with temporary.open("wb") as raw:
                writer = HashingWriter(raw)
                write(writer)
                raw.flush()
                os.fsync(raw.fileno())
            if _is_same_file(temporary, final):
                temporary.unlink()  # made again, and the same: it stays as it was
            else:
                os.replace(temporary, final)
        except IsADirectoryError as error:
            temporary.unlink()
            raise DamagedError(f"{final} is a folder where a file belongs: remove it.") from error
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
            raise
        return Committed(relative, writer.bytes_written, writer.hexdigest())

    def put_in_place(self, source: str, target: str) -> None:
        """Put a file that was committed under another name in place, whole; one that is the same already stays.

        On an object store it is copied, and the source goes with its folder: moving it would be two requests more.
        """
        if not self.is_local:
            self._objects.copy(self.path(source), self.path(target))
            return
        made, final = Path(self._readable(source)), Path(self.path(target))
        final.parent.mkdir(parents=True, exist_ok=True)
        if _is_same_file(made, final):
            made.unlink()
        else:
            os.replace(made, final)

    def exchange(self, relative: str, there: bytes | None, data: bytes) -> bool:
        """Write ``data`` as one whole file only in place of a file of the bytes ``there``; None: where there is none.

        On an object store the store itself checks that nobody has written it meanwhile (`retrodb.remote`), so that of
        several who exchange the same file one alone does. On a local disk it is for the holder of the lock.

        Returns:
            Whether the file is ``data`` now.
        """
        if self.is_local:
            if unchanged := self.read_if_there(relative) == there:
                self.commit_bytes(relative, data)
            return unchanged
        for _ in range(_EXCHANGES):
            if self._put_on_condition(relative, there, data):
                return True
            # Refused. By our own write, where the library sent it again since the answer was lost; by a write at the
            # same moment, which may have failed as well; or by another's.
            if (found := self.read_if_there(relative)) != there:
                return found == data
        return False

    def _put_on_condition(self, relative: str, there: bytes | None, data: bytes) -> bool:
        path = self.path(relative)
        if there is None:
            return self._objects.create(path, data)
        stamp = self._objects.stamp(path)  # before the bytes: what is written in between fails the condition
        if stamp is None or self.read_if_there(relative) != there:
            return False
        return self._objects.put_instead(path, data, stamp)

    def commit_bytes(self, relative: str, data: bytes) -> Committed:
        """Write ``data`` as one whole file."""
        return self.commit(relative, lambda writer: write_all(writer, data))

    def commit_json(self, relative: str, value: Any) -> Committed:
        """Write ``value`` as `json_bytes`."""
        return self.commit_bytes(relative, json_bytes(value))

    def commit_file(self, relative: str, source: Path) -> Committed:
        """Write a copy of a local file as one whole file."""

        def write(writer: HashingWriter) -> None:
            with source.open("rb") as file:
                while block := file.read(_COPY_BYTES):
                    writer.write(block)

        return self.commit(relative, write)

    def commit_table(self, relative: str, table: pa.Table, row_group_rows: int) -> Committed:
        """Write a table as Parquet."""
        return self.commit(relative, lambda writer: write_table(writer, table, row_group_rows))

    def commit_array(self, relative: str, array: np.ndarray) -> Committed:
        """Write an array as ``.npy`` (C order)."""
        return self.commit(relative, lambda writer: write_array(writer, array))

    def refuse_inside(self, out: str, name: str = "out") -> None:
        """Refuse to write others' files into this database.

        Raises:
            InputError: ``out``, given as the flag ``name``, is this folder, or lies in it.
        """
        if f"{absolute_url(out)}/".startswith(f"{self.url}/"):
            raise InputError(f"--{name} {out} lies inside the database, which holds only what its manifest names.")

    def make_root(self) -> list[str]:
        """Create the folder where the filesystem has folders.

        Returns:
            The local folders that were made, outermost first: what `unmake` takes back.

        Raises:
            InputError: it cannot be made.
        """
        if not self.is_local:
            return []
        made: list[str] = []
        folder = Path(self._root)
        while not folder.exists() and folder != folder.parent:
            made.insert(0, str(folder))
            folder = folder.parent
        try:
            os.makedirs(self._root, exist_ok=True)
        except OSError as error:
            self.unmake(made)
            raise InputError(f"cannot make the folder {self.url}: {error.strerror or error}.") from error
        return made

    def unmake(self, made: list[str]) -> None:
        """Remove folders that `make_root` made, as far as they are empty."""
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                os.rmdir(folder)

    def delete(self, *relatives: str) -> None:
        """Remove files, those that are there."""
        if not self.is_local:
            self._objects.delete([self.path(relative) for relative in relatives])
            return
        for relative in relatives:
            with contextlib.suppress(FileNotFoundError):
                self._filesystem.rm_file(self.path(relative))

    def delete_folder(self, relative: str) -> None:
        """Remove a folder of our own and all in it, if it is there. Of a link in its place, the link."""
        if not self.is_local:
            self._objects.delete(self._objects.below(self.path(relative)))
            return
        if os.path.islink(self.path(relative)):
            os.unlink(self.path(relative))
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.rm(self.path(relative), recursive=True)


def _is_same_file(made: Path, final: Path) -> bool:
    """Whether ``final`` is a regular file of just the bytes of ``made``."""
    return final.is_file() and not final.is_symlink() and filecmp.cmp(made, final, shallow=False)
