"""Parquet input: record batches with the row number of their first row, and Python values of their cells.

Reading is on the calling thread, batch by batch. A page that cannot be decoded ends its row group, not the file.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from retrodb.corpus.compression import Compression, TornStream, read_blocks
from retrodb.corpus.source import RawInput, is_local, open_raw, unreadable
from retrodb.remote import filesystem_of

BATCH_BYTES: Final = 4 << 20
BATCH_ROWS: Final = 8192

Row = dict[str, Any]


class BrokenParquet(Exception):  # noqa: N818
    """The file is not Parquet, or its footer cannot be read; the message says why."""


class RowBatch(NamedTuple):
    """Rows ``position``, ``position + 1``, .. of a file; or, with ``problem``, the news that they cannot be decoded."""

    position: int
    batch: pa.RecordBatch | None
    problem: str | None = None

    def cut(self, at: int) -> tuple["RowBatch | None", "RowBatch | None"]:
        """The rows before row ``at`` and those from it on."""
        if at <= self.position:
            return None, self
        if self.batch is None or at >= self.position + self.batch.num_rows:
            return self, None
        head = at - self.position
        return RowBatch(self.position, self.batch.slice(0, head)), RowBatch(at, self.batch.slice(head))


@contextlib.contextmanager
def open_parquet(url: str, compression: Compression | None, size: int) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file of ``size`` raw bytes; a compressed one is first decompressed to a temporary file.

    Raises:
        BrokenParquet: it is none.
        InputError: the filesystem fails, or the file has changed.
    """
    with contextlib.ExitStack() as stack:
        # Opened here for its checks alone where Arrow opens it itself.
        raw = stack.enter_context(open_raw(url, expected_size=size))
        where: Any = url
        if compression is not None:
            where = stack.enter_context(_decompressed(raw, compression))
        try:
            if compression is None and not is_local(url):
                filesystem, path = filesystem_of(url)
                where = stack.enter_context(filesystem.open(path, "rb"))
            # No memory map: a file cut short under one kills the process (SIGBUS) where a read merely fails.
            file = pq.ParquetFile(where, memory_map=False, pre_buffer=False, page_checksum_verification=True)
            stack.enter_context(file)
            _ = file.schema_arrow.names  # names that are not UTF-8 fail here
        except Exception as error:  # Arrow's, or the remote filesystem's
            raise _as_broken(url, error, "not a readable Parquet file") from error
        yield file


@contextlib.contextmanager
def _decompressed(raw: RawInput, compression: Compression) -> Iterator[str]:
    """The path of a temporary file with the decompressed bytes. Parquet is read from its end: a stream will not do."""
    with tempfile.NamedTemporaryFile(prefix="retrodb-") as target:
        try:
            for block in read_blocks(raw, compression):
                target.write(block)
        except TornStream as torn:
            raise BrokenParquet(torn.reason) from None
        target.flush()
        yield target.name


def read_batches(url: str, file: pq.ParquetFile, start: int) -> Iterator[RowBatch]:
    """The batches of ``file`` from the row group that holds row ``start`` on.

    Where batches begin depends on the file alone. The rest of a damaged row group is one `RowBatch` with a problem.

    Raises:
        InputError: the filesystem fails.
    """
    first = 0
    for number in range(file.num_row_groups):
        rows = file.metadata.row_group(number).num_rows
        if first + rows > start:
            yield from _row_group(url, file, number, first)
        first += rows


def _row_group(url: str, file: pq.ParquetFile, number: int, first: int) -> Iterator[RowBatch]:
    group = file.metadata.row_group(number)
    row, end = first, first + group.num_rows
    row_bytes = max(1, group.total_byte_size // max(1, group.num_rows))
    batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES // row_bytes))
    why = "the row group ends early"
    try:
        for batch in file.iter_batches(batch_size=batch_rows, row_groups=[number], use_threads=False):
            yield RowBatch(row, batch)
            row += batch.num_rows
    except Exception as error:  # Arrow's, or the remote filesystem's
        why = str(_as_broken(url, error, "cannot be decoded"))
    if row < end:
        yield RowBatch(row, None, f"rows {row} to {end - 1} of row group {number}: {why}")


def _as_broken(url: str, error: Exception, what: str) -> BrokenParquet:
    """What a failure means: Arrow's own errors are damage; others come from the filesystem and raise `InputError`."""
    if isinstance(error, MemoryError):
        raise error  # says nothing about the file
    is_arrows = isinstance(error, pa.ArrowException | NotImplementedError | UnicodeDecodeError) or (
        isinstance(error, OSError) and error.errno is None
    )
    if not is_arrows:
        raise unreadable(url, error) from error
    lines = str(error).strip().splitlines()
    return BrokenParquet(f"{what}: {lines[0] if lines else type(error).__name__}")


def rows_of(batch: pa.RecordBatch) -> Iterator[Row]:
    """The rows of ``batch`` as dictionaries. No cell can make it fail: see `_cell`."""
    names = batch.schema.names
    columns = [_values(column) for column in batch.columns]
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))


def _values(column: pa.Array) -> list[Any]:
    try:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pa.types.is_timestamp(column.type):
            # As text by Arrow itself: Python's own types have no nanoseconds, and need a time zone database.
            if column.type.tz is not None:
                column = column.cast(pa.timestamp(column.type.unit, "UTC"))
            column = column.cast(pa.string())
        return list(column.to_pylist())
    except Exception:  # a cell that Python cannot hold: invalid UTF-8, the year 10000
        return [_cell(column[row]) for row in range(len(column))]


def _cell(scalar: pa.Scalar) -> Any:
    """The Python value; else its bytes (a string that is not UTF-8), else its text, else a note of its type."""
    for attempt in (scalar.as_py, lambda: scalar.cast(pa.binary()).as_py(), lambda: scalar.cast(pa.string()).as_py()):
        with contextlib.suppress(Exception):
            return attempt()
    return f"<unrepresentable {scalar.type}>"
