"""The one way to touch files: a database folder on any fsspec filesystem, and how a shard is committed.

A shard is written to a temporary local file, hashed on the way, and then put in place whole: on a local disk by
``fsync`` and ``rename`` from a temporary name beside it, elsewhere by one whole-object upload. Nobody ever sees half a
file under its final name. Paths inside a database are relative, and are checked: a manifest that names ``../x`` or an
absolute path is refused (invariant 10).
"""

import contextlib
import filecmp
import hashlib
import json
import os
import posixpath
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from retrodb.errors import DamagedError, InputError

TEMPORARY_PREFIX: Final = ".tmp-"
"""Files of this prefix are leftovers of a killed writer; whoever holds the build lock may remove them."""

_COPY_BYTES: Final = 1 << 20
_GROUP_ROWS: Final = 1 << 17
_GROUP_BYTES: Final = 1 << 30
_GROUP_RATIO: Final = 1 << 8
"""What one row group may hold at most: rows, and bytes, or so many times its file's."""


def json_bytes(value: Any) -> bytes:
    """``value`` as indented JSON, keys in the order given. Raises ValueError for what JSON or UTF-8 lacks."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


@dataclass(frozen=True)
class Committed:
    """What was put in place: relative ``path``, size in bytes, and the sha256 of the bytes in hex."""

    path: str
    bytes: int
    sha256: str


class HashingWriter:
    """A binary file opened for sequential writing that hashes and counts what passes through it."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._sha256 = hashlib.sha256()
        self.bytes_written = 0
        self.closed = False

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._sha256.update(view)
        self._raw.write(view)
        self.bytes_written += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        self._raw.flush()

    def tell(self) -> int:
        return self.bytes_written

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        """pyarrow closes its sink; the owner of the raw file closes that one."""

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


def absolute_url(url: str) -> str:
    """``url`` with a protocol, or an absolute local path; trailing slashes removed.

    Raises:
        InputError: no filesystem is installed for the protocol.
    """
    if url.startswith("file://"):
        url = url[len("file://") :]
    if "://" not in url:
        return os.path.abspath(os.path.expanduser(url))
    filesystem_of(url)
    return url.rstrip("/")


def filesystem_of(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec filesystem of ``url`` and the path inside it.

    Raises:
        InputError: no filesystem is installed for the protocol, or its credentials are missing.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise InputError(f"cannot open {url!r}: {error}. Install the fsspec filesystem for it.") from error
    return filesystem, path


def checked_relative(path: str) -> str:
    """``path`` if it stays inside the database folder.

    Raises:
        DamagedError: it is absolute, climbs out with ``..``, or is not in normal form.
    """
    if not path or path.startswith("/") or "\\" in path or ":" in path or posixpath.normpath(path) != path:
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

    def __post_init__(self) -> None:
        if not self.url.strip():
            raise InputError("the database's name is blank; name a folder or a URL.")
        self.url = absolute_url(self.url)
        self._filesystem, self._root = filesystem_of(self.url)

    def __reduce__(self) -> tuple[Any, ...]:
        return Storage, (self.url,)

    @property
    def is_local(self) -> bool:
        """Whether files can be memory-mapped and renamed."""
        return isinstance(self._filesystem, LocalFileSystem)

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

    def _opened(self, relative: str) -> None:
        """Called once a file was opened for reading, or could not be: `retrodb.snapshot` may object."""

    def describe(self, relative: str) -> str:
        """``relative`` as a person would name it, for messages."""
        return posixpath.join(self.url, relative)

    # -- reading ---------------------------------------------------------------------------------------------------

    def size(self, relative: str) -> int | None:
        """Bytes of a file, or None where there is none (a link is none). Never answers from a listing cache."""
        if self.is_local:
            try:
                found = os.lstat(self.path(relative))
            except (FileNotFoundError, NotADirectoryError):
                return None
            return found.st_size if stat.S_ISREG(found.st_mode) else None
        self._filesystem.invalidate_cache()
        try:
            return int(self._filesystem.info(self.path(relative))["size"])
        except FileNotFoundError:
            return None

    def stamp(self, relative: str) -> object:
        """What differs when a file was replaced; None where there is none. Looks at no byte of it."""
        path = self.path(relative)
        try:
            if self.is_local:
                found = os.lstat(path)
                return found.st_ino, found.st_size, found.st_mtime_ns
            self._filesystem.invalidate_cache()
            return self._filesystem.checksum(path)
        except FileNotFoundError:
            return None

    def read_bytes(self, relative: str) -> bytes:
        """The whole file. Raises FileNotFoundError."""
        return bytes(self._filesystem.cat_file(self._readable(relative)))

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
    def open(self, relative: str) -> Iterator[IO[bytes]]:
        """A readable binary file."""
        with self._filesystem.open(self._readable(relative), "rb") as file:
            self._opened(relative)
            yield file

    def open_parquet(self, relative: str) -> pq.ParquetFile:
        """A Parquet file by path where it is local (memory-mapped), else through fsspec.

        Raises:
            DamagedError: it is missing or is not Parquet.
        """
        path = self._readable(relative)
        try:
            if self.is_local:
                file = pq.ParquetFile(path, memory_map=True)
            else:
                file = pq.ParquetFile(self._filesystem.open(path, "rb"), pre_buffer=False)
        except (pa.ArrowException, OSError, ValueError) as error:
            self._opened(relative)
            raise self._unreadable(relative, error) from error
        try:
            self._opened(relative)
            self._refuse_bomb(relative, file.metadata)
        except BaseException:
            file.close()
            raise
        return file

    def _refuse_bomb(self, relative: str, found: pq.FileMetaData) -> None:
        """Refuse what reading a few bytes would swell to any size: no shard of retrodb is so.

        Raises:
            DamagedError: a row group says it has more rows or bytes than any of ours, or values by reference.
        """
        most = max(_GROUP_BYTES, _GROUP_RATIO * (self.size(relative) or 0))
        for number in range(found.num_row_groups):
            group = found.row_group(number)
            columns = [group.column(at) for at in range(group.num_columns)]
            # A value in a dictionary may stand in every row; ours have none.
            referred = max(
                (c.total_uncompressed_size * c.num_values for c in columns if c.has_dictionary_page), default=0
            )
            held = max(group.total_byte_size, referred)
            if held > most or not 0 <= group.num_rows <= _GROUP_ROWS:
                raise DamagedError(
                    f"{self.describe(relative)} was not written by retrodb: its row group {number} may hold "
                    f"{held:,} bytes in {group.num_rows:,} rows. Run the build again to repair it."
                )

    def read_table(self, relative: str, columns: list[str] | None = None) -> pa.Table:
        """A whole Parquet shard, or some of its columns, read on the calling thread.

        Raises:
            DamagedError: it is missing or cannot be decoded.
        """
        with self.open_parquet(relative) as file:
            try:
                return file.read(columns=columns, use_threads=False)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise self._unreadable(relative, error) from error

    def read_array(self, relative: str) -> np.ndarray:
        """A ``.npy`` array: memory-mapped read-only where it is local, else read. Never a pickle.

        Raises:
            DamagedError: it is missing or not an array file.
        """
        path = self._readable(relative)
        try:
            if self.is_local:
                if os.path.getsize(path) == 0:
                    raise ValueError("the file is empty")
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            else:
                with self._filesystem.open(path, "rb") as file:
                    array = np.asarray(np.load(file, allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            self._opened(relative)
            raise self._unreadable(relative, error) from error
        self._opened(relative)
        return array

    def _unreadable(self, relative: str, error: Exception) -> DamagedError:
        return DamagedError(f"cannot read {self.describe(relative)}: {error}. Run the build again to repair it.")

    @contextlib.contextmanager
    def local_copy(self, relative: str) -> Iterator[Path]:
        """A local path with the file's bytes: the file itself, or a copy that is removed afterwards."""
        if self.is_local:
            path = Path(self._readable(relative))
            self._opened(relative)
            yield path
            return
        with tempfile.TemporaryDirectory(prefix="retrodb-") as folder:
            target = Path(folder) / posixpath.basename(relative)
            self._filesystem.get_file(self.path(relative), str(target))
            self._opened(relative)
            yield target

    def sha256(self, relative: str) -> str:
        """sha256 of a file's bytes in hex, streamed. Raises FileNotFoundError."""
        digest = hashlib.sha256()
        with self.open(relative) as file:
            while block := file.read(_COPY_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def list_files(self, relative: str) -> list[str]:
        """Names of the files directly in a folder, sorted; empty where there is none.

        For cleaning up and for finding what should not be there: never for finding out what exists.
        """
        return self._list(relative, "file")

    def list_below(self, relative: str) -> Iterator[str]:
        """Paths of the files in a folder, at any depth."""
        for name in self.list_files(relative):
            yield f"{relative}/{name}"
        for name in self.list_folders(relative):
            yield from self.list_below(f"{relative}/{name}")

    def list_folders(self, relative: str) -> list[str]:
        """Names of the folders directly in a folder, sorted."""
        return self._list(relative, "directory")

    def _list(self, relative: str, kind: str) -> list[str]:
        folder = posixpath.dirname(self.path(f"{relative}/_")) if relative else self._root
        try:
            if self.is_local:  # by lstat: a link is listed as a file, and never followed
                with os.scandir(folder) as found:
                    return sorted(e.name for e in found if e.is_dir(follow_symlinks=False) == (kind == "directory"))
            self._filesystem.invalidate_cache()
            entries = self._filesystem.ls(folder, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(posixpath.basename(entry["name"].rstrip("/")) for entry in entries if entry["type"] == kind)

    def is_empty(self) -> bool:
        """Whether the folder is missing or has nothing in it."""
        self._filesystem.invalidate_cache()
        try:
            return not self._filesystem.ls(self._root, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return True

    def is_a_file(self) -> bool:
        """Whether the URL names a file, where a folder was meant."""
        return bool(self._filesystem.isfile(self._root))

    # -- writing ---------------------------------------------------------------------------------------------------

    def commit(self, relative: str, write: Callable[[HashingWriter], None]) -> Committed:
        """Write a file whole: ``write`` gets a sequential writer, and the name appears only when it has returned."""
        if self.is_local:
            return self._commit_local(relative, write)
        with tempfile.TemporaryDirectory(prefix="retrodb-") as folder:
            staged = Path(folder) / "shard"
            with staged.open("wb") as raw:
                writer = HashingWriter(raw)
                write(writer)
            self._filesystem.put_file(str(staged), self.path(relative))
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

    def move(self, source: str, target: str) -> None:
        """Put a file that was committed under another name in place; one that is the same already stays as it is."""
        if not self.is_local:
            self._filesystem.mv(self.path(source), self.path(target))
            return
        made, final = Path(self._readable(source)), Path(self.path(target))
        final.parent.mkdir(parents=True, exist_ok=True)
        if _is_same_file(made, final):
            made.unlink()
        else:
            os.replace(made, final)

    def commit_bytes(self, relative: str, data: bytes) -> Committed:
        """Write ``data`` as one whole file."""
        return self.commit(relative, lambda writer: _write_all(writer, data))

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
        """Write a table as Parquet: zstd, no dictionaries, so that the same rows give the same bytes."""

        def write(writer: HashingWriter) -> None:
            with pq.ParquetWriter(
                writer,
                table.schema,
                compression="zstd",
                compression_level=1,
                use_dictionary=False,
                write_statistics=False,
                store_schema=True,
            ) as parquet:
                parquet.write_table(table, row_group_size=max(1, row_group_rows))

        return self.commit(relative, write)

    def commit_array(self, relative: str, array: np.ndarray) -> Committed:
        """Write an array as ``.npy`` (C order)."""

        def write(writer: HashingWriter) -> None:
            header = np.lib.format.header_data_from_array_1_0(np.ascontiguousarray(array))
            np.lib.format.write_array_header_1_0(writer, header)  # type: ignore[arg-type]
            writer.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))

        return self.commit(relative, write)

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

    def delete(self, relative: str) -> None:
        """Remove a file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.rm_file(self.path(relative))

    def delete_folder(self, relative: str) -> None:
        """Remove a folder of our own and all in it, if it is there. Of a link in its place, the link."""
        if self.is_local and os.path.islink(self.path(relative)):
            os.unlink(self.path(relative))
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.rm(self.path(relative), recursive=True)


def _is_same_file(made: Path, final: Path) -> bool:
    """Whether ``final`` is a regular file of just the bytes of ``made``."""
    return final.is_file() and not final.is_symlink() and filecmp.cmp(made, final, shallow=False)


def _write_all(writer: HashingWriter, data: bytes) -> None:
    writer.write(data)
