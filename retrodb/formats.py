"""The files of a database as formats: what is written, hashed on the way, and what is too much to be read.

Parquet without dictionaries and ``.npy``: the same rows give the same bytes.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import IO, Any, Final, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrodb.errors import DamagedError
from retrodb.sizes import count_of

_GROUP_ROWS: Final = 1 << 17
_GROUP_BYTES: Final = 1 << 30
_GROUP_RATIO: Final = 1 << 8
"""What one row group may hold at most: rows, and bytes, or so many times its file's."""


def json_bytes(value: Any) -> bytes:
    """``value`` as indented JSON, keys in the order given. Raises ValueError for what JSON or UTF-8 lacks."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


class Recorded(Protocol):
    """A file whose size and checksum are known: `retrodb.manifest.Shard`, `Committed`."""

    @property
    def path(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def sha256(self) -> str: ...


File = str | Recorded
"""What is read: by its relative path, or by what is recorded of it. Where it is not local, a recorded file is compared
with its checksum when it is fetched, and then comes from the cache."""


def path_of(file: File) -> str:
    """The relative path of a file."""
    return file if isinstance(file, str) else file.path


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


def write_all(writer: HashingWriter, data: bytes) -> None:
    """``data`` at once."""
    writer.write(data)


def write_table(writer: HashingWriter, table: pa.Table, row_group_rows: int) -> None:
    """A table as Parquet: zstd, no dictionaries, so that the same rows give the same bytes."""
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


def write_array(writer: HashingWriter, array: np.ndarray) -> None:
    """An array as ``.npy`` (C order)."""
    whole = np.ascontiguousarray(array)
    header = np.lib.format.header_data_from_array_1_0(whole)
    np.lib.format.write_array_header_1_0(writer, header)  # type: ignore[arg-type]
    writer.write(whole.reshape(-1).view(np.uint8))


def refuse_swelling(found: pq.FileMetaData, size: int, where: str) -> None:
    """Refuse what reading a few bytes would swell to any size: no shard of retrodb is so.

    Raises:
        DamagedError: a row group says it has more rows or bytes than any of ours, or values by reference.
    """
    most = max(_GROUP_BYTES, _GROUP_RATIO * size)
    for number in range(found.num_row_groups):
        group = found.row_group(number)
        columns = [group.column(at) for at in range(group.num_columns)]
        # A value in a dictionary may stand in every row; ours have none.
        referred = max((c.total_uncompressed_size * c.num_values for c in columns if c.has_dictionary_page), default=0)
        held = max(group.total_byte_size, referred)
        if held > most or not 0 <= group.num_rows <= _GROUP_ROWS:
            raise DamagedError(
                f"{where} was not written by retrodb: its row group {number} may hold {held:,} bytes in "
                f"{count_of(group.num_rows, 'row')}. Run the build again to repair it."
            )
