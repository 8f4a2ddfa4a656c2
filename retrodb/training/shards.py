"""Training shards on disk: how they are written for streaming, and read row group by row group.

Row groups of `TRAINING_ROW_GROUP` sequences bound what a reader holds. The token columns are stored BYTE_STREAM_SPLIT +
LZ4: ordinary Parquet, a fifth more bytes than zstd, and a third of its time to decode.
"""

import mmap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from retrodb.errors import DamagedError
from retrodb.formats import Committed, HashingWriter
from retrodb.manifest import Shard
from retrodb.schemas import SPLITS
from retrodb.sizes import count_of
from retrodb.storage import Storage
from retrodb.training.columns import lists, scalars
from retrodb.training.join import MISSING, check_neighbours
from retrodb.training.pages import read_values

TRAINING_ROW_GROUP: Final = 64
"""Sequences in a row group: 1.3 MB of 2,048-token sequences with 2 neighbours, decoded."""

VALIDATION_ROWS: Final = "validation_rows"
"""Key of the training stage's details: {shard number as text: rows of the validation split}. With it, opening a stream
reads the first shard's footer alone; without it, the ``split`` column of every shard."""

_TOKEN_COLUMNS: Final = ("tokens", "neighbour_tokens")
_ID_COLUMNS: Final = ("chunk_ids", "document_ids", "neighbour_ids")
_PAGE_BYTES: Final = 1 << 26
"""Larger than any column of a row group: one page each, so that nothing is concatenated on reading."""

Columns = dict[str, npt.NDArray]


def write_training(storage: Storage, relative: str, table: pa.Table) -> Committed:
    """Commit a training shard (a table of `retrodb.schemas.training`). The same rows give the same bytes."""

    def write(writer: HashingWriter) -> None:
        with pq.ParquetWriter(
            writer,
            table.schema,
            compression="lz4",
            use_dictionary=False,
            column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in _TOKEN_COLUMNS},
            data_page_size=_PAGE_BYTES,
            write_statistics=False,
            store_schema=True,
        ) as parquet:
            parquet.write_table(table, row_group_size=TRAINING_ROW_GROUP)

    return storage.commit(relative, write)


@dataclass(frozen=True)
class SequenceShape:
    """n, n/m and k' of a training table; all follow from its list sizes."""

    sequence_tokens: int
    slots: int
    neighbours: int

    @property
    def chunk_tokens(self) -> int:
        """m."""
        return self.sequence_tokens // self.slots

    @staticmethod
    def of(schema: pa.Schema) -> "SequenceShape":
        """Raises KeyError for a missing column, AttributeError for one that is no list, ValueError for odd sizes."""
        n, slots, cells, wide = (
            schema.field(name).type.list_size for name in ("tokens", "chunk_ids", "neighbour_ids", "neighbour_tokens")
        )
        if min(n, slots, cells) < 1 or n % slots or cells % slots or wide != cells * 2 * (n // slots):
            raise ValueError(f"list sizes {n}, {slots}, {cells}, {wide} do not fit each other")
        return SequenceShape(n, slots, cells // slots)


class TrainingShard:
    """One open training shard. Holds its file handles and at most one decoded row group.

    Args:
        storage: the database.
        shard: the shard, as the manifest records it.
        neighbours: k' to hand out, at most what is stored; None for all.

    Raises:
        DamagedError: it is missing, or not the training shard that is recorded.
        InputError: more neighbours are asked for than are stored.
    """

    def __init__(self, storage: Storage, shard: Shard, neighbours: int | None = None) -> None:
        self._where = storage.describe(shard.path)
        self._files = ExitStack()
        try:
            with self._blaming_the_file():
                self._parquet = self._files.enter_context(storage.open_parquet(shard))
                self._raw = self._files.enter_context(storage.open(shard))
            self._setup(shard, neighbours)
        except BaseException:
            self.close()
            raise

    def _setup(self, shard: Shard, neighbours: int | None) -> None:
        self._map: memoryview | None = memoryview(mmap.mmap(self._raw.fileno(), 0, access=mmap.ACCESS_READ))
        metadata = self._parquet.metadata
        with self._blaming_the_file():
            self._schema = self._parquet.schema_arrow
            self.shape = SequenceShape.of(self._schema)
        if metadata.num_rows != shard.rows:
            raise DamagedError(
                f"{self._where} has {count_of(metadata.num_rows, 'row')} where {shard.rows} are recorded."
            )
        if neighbours is not None:
            check_neighbours(neighbours, stored=self.shape.neighbours)
        self._neighbours = neighbours or self.shape.neighbours
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._bounds = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._leaves = {metadata.schema.column(leaf).path: leaf for leaf in range(len(metadata.schema))}
        self._decoded: tuple[int, Columns] | None = None

    def close(self) -> None:
        """Close the files. What was read stays valid."""
        self._map = None  # unmapped when nothing refers to it any more
        self._files.close()

    def _bytes(self, start: int, size: int) -> memoryview:
        """A piece of the file."""
        assert self._map is not None, "read after close"
        return self._map[start : start + size]

    @contextmanager
    def _blaming_the_file(self) -> Iterator[None]:
        try:
            yield
        except DamagedError as error:
            where = "" if self._where in str(error) else f"{self._where}: "
            raise DamagedError(f"{where}{error}") from error
        except (pa.ArrowException, OSError, KeyError, AttributeError, ValueError) as error:
            raise DamagedError(f"cannot read {self._where}: {error}. Run the build again to repair it.") from error

    def read(self, first: int, rows: int) -> Columns:
        """Rows ``first .. first + rows``, of every column of the schema but ``split``.

        Returns:
            ``sequence_id``, ``n_tokens`` [r]; ``tokens`` [r, n]; ``chunk_ids``, ``document_ids`` (-1 where padded),
            ``chunk_lengths``, ``n_valid`` [r, n/m]; ``neighbour_tokens`` [r, n/m, k', 2, m]; ``neighbour_lengths``
            [r, n/m, k', 2]; ``neighbour_ids`` (-1 where missing) [r, n/m, k']. Of the stored types, read-only.

        Raises:
            DamagedError: the file cannot be decoded.
        """
        low = int(np.searchsorted(self._bounds, first, side="right")) - 1
        high = max(low + 1, int(np.searchsorted(self._bounds, first + rows, side="left")))
        parts = []
        for group in range(low, high):
            start = int(self._bounds[group])
            window = slice(max(0, first - start), first + rows - start)
            parts.append({name: values[window] for name, values in self._row_group(group).items()})
        return parts[0] if len(parts) == 1 else concatenated(parts)

    def _row_group(self, group: int) -> Columns:
        if self._decoded is None or self._decoded[0] != group:
            self._decoded = None  # before the next one is decoded: never two at a time
            with self._blaming_the_file():
                self._decoded = (group, self._decode(group))
        return self._decoded[1]

    def _decode(self, group: int) -> Columns:
        rows = int(self._bounds[group + 1] - self._bounds[group])
        columns = {name: self._direct(group, name, rows) for name in _TOKEN_COLUMNS}
        found = {name: values for name, values in columns.items() if values is not None}
        rest = [name for name in self._schema.names if name not in found and name != "split"]
        table = self._parquet.read_row_group(group, columns=rest, use_threads=False)
        for name in rest:
            if pa.types.is_fixed_size_list(self._schema.field(name).type):
                found[name] = lists(table, name, MISSING if name in _ID_COLUMNS else None)
            else:
                found[name] = scalars(table, name)
        return self._shaped(found, rows)

    def _direct(self, group: int, name: str, rows: int) -> npt.NDArray | None:
        """A token column decoded from its pages, where they are simple: see `retrodb.training.pages`."""
        kind = self._schema.field(name).type
        leaf = self._leaves.get(f"{name}.list.element")
        if leaf is None:
            return None
        level = self._parquet.metadata.schema.column(leaf).max_definition_level
        column = self._parquet.metadata.row_group(group).column(leaf)
        if column.num_values != rows * kind.list_size:
            return None
        data = self._bytes(column.data_page_offset, column.total_compressed_size)
        return read_values(data, column, level, kind.value_type.to_pandas_dtype())

    def _shaped(self, columns: Columns, rows: int) -> Columns:
        shape, k = self.shape, self._neighbours
        cells = (rows, shape.slots, shape.neighbours)
        columns["tokens"] = columns["tokens"].reshape(rows, shape.sequence_tokens)
        columns["neighbour_ids"] = columns["neighbour_ids"].reshape(cells)[:, :, :k]
        columns["neighbour_lengths"] = columns["neighbour_lengths"].reshape(*cells, 2)[:, :, :k]
        columns["neighbour_tokens"] = columns["neighbour_tokens"].reshape(*cells, 2, shape.chunk_tokens)[:, :, :k]
        if k < shape.neighbours:
            columns["n_valid"] = (columns["neighbour_ids"] >= 0).sum(axis=2, dtype=np.int8)
        return columns


def concatenated(parts: list[Columns]) -> Columns:
    """Rows of several blocks, one after the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def split_range(storage: Storage, shard: Shard, split: str | None, validation_rows: int | None) -> tuple[int, int]:
    """First row and number of rows of a split in a training shard: training rows come first, validation rows last.

    Args:
        storage: the database.
        shard: the shard, as the manifest records it.
        split: ``train``, ``validation``, or None for both.
        validation_rows: how many of its rows are of the validation split, where that is known; None reads it.

    Raises:
        DamagedError: the shard cannot be read, or its rows are not in that order.
    """
    if split is None:
        return 0, shard.rows
    if validation_rows is None:
        table = storage.read_table(shard, columns=["split"])
        if "split" not in table.column_names:
            raise DamagedError(f"{storage.describe(shard.path)} is no training shard: it has no column 'split'.")
        column = table["split"].to_numpy()
        is_validation = column == SPLITS[1]
        if len(column) != shard.rows or (~is_validation & (column != SPLITS[0])).any():
            raise DamagedError(f"{storage.describe(shard.path)} has other rows or splits than were recorded.")
        if (is_validation[:-1] & ~is_validation[1:]).any():
            raise DamagedError(f"{storage.describe(shard.path)} has training rows behind validation rows.")
        validation_rows = int(np.count_nonzero(is_validation))
    training_rows = shard.rows - validation_rows
    return (0, training_rows) if split == SPLITS[0] else (training_rows, validation_rows)
