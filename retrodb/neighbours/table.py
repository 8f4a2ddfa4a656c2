"""The neighbours of a query shard as arrays, and as rows of the ``neighbours`` table."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from retrodb.errors import DamagedError
from retrodb.index import MISSING
from retrodb.schemas import neighbours


@dataclass(frozen=True)
class Neighbours:
    """The ``k`` best allowed neighbours of each query, best first; what is missing stands last.

    Attributes:
        chunk_ids: int64 [n], the queries.
        neighbour_ids: int64 [n, k], `MISSING` (-1) where there are fewer than k.
        neighbour_document_ids: int64 [n, k], -1 likewise.
        distances: float32 [n, k], NaN likewise: squared L2 ascending, or inner product descending; ties by id.
        n_valid: int16 [n], how many there are.
    """

    chunk_ids: np.ndarray
    neighbour_ids: np.ndarray
    neighbour_document_ids: np.ndarray
    distances: np.ndarray
    n_valid: np.ndarray

    @staticmethod
    def none(chunk_ids: np.ndarray, k: int) -> "Neighbours":
        """No neighbour of any query yet."""
        n = len(chunk_ids)
        return Neighbours(
            np.asarray(chunk_ids, dtype=np.int64),
            np.full((n, k), MISSING, dtype=np.int64),
            np.full((n, k), MISSING, dtype=np.int64),
            np.full((n, k), np.nan, dtype=np.float32),
            np.zeros(n, dtype=np.int16),
        )

    @property
    def k(self) -> int:
        """Neighbours kept for each query."""
        return int(self.neighbour_ids.shape[1])

    def take(self, rows: np.ndarray) -> "Neighbours":
        """Some of the rows: int64 row numbers, or bool [n]."""
        return Neighbours(*(column[rows] for column in vars(self).values()))

    def put(self, rows: np.ndarray, found: "Neighbours") -> "Neighbours":
        """With ``found`` [m] in place of rows int64 [m], whose queries it is of."""
        columns = [column.copy() for column in vars(self).values()]
        for column, values in zip(columns, vars(found).values(), strict=True):
            column[rows] = values
        return Neighbours(*columns)


def to_table(result: Neighbours) -> pa.Table:
    """``result`` with the schema `retrodb.schemas.neighbours`: missing elements are null, lists never are."""
    k = result.k
    schema = neighbours(k)
    missing = (result.neighbour_ids < 0).reshape(-1)
    lists = (result.neighbour_ids, result.neighbour_document_ids, result.distances)
    columns = [
        pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), mask=missing), type=schema.field(name).type)
        for name, values in zip(("neighbour_ids", "neighbour_document_ids", "distances"), lists, strict=True)
    ]
    return pa.Table.from_arrays(
        [pa.array(result.chunk_ids, pa.int64()), *columns, pa.array(result.n_valid, pa.int16())], schema=schema
    )


def from_table(table: pa.Table) -> Neighbours:
    """The arrays of rows that `to_table` made, whole or sliced.

    Raises:
        DamagedError: a list is null, or its elements disagree with ``n_valid``.
    """
    n_valid = table["n_valid"].to_numpy().astype(np.int16, copy=False)
    ids = _matrix(table["neighbour_ids"], MISSING)
    result = Neighbours(
        chunk_ids=table["chunk_id"].to_numpy(),
        neighbour_ids=ids,
        neighbour_document_ids=_matrix(table["neighbour_document_ids"], MISSING),
        distances=_matrix(table["distances"], np.nan).astype(np.float32, copy=False),
        n_valid=n_valid,
    )
    expected = np.arange(ids.shape[1])[None, :] < n_valid[:, None]
    if not (np.array_equal(ids >= 0, expected) and np.array_equal(~np.isnan(result.distances), expected)):
        raise DamagedError("a neighbours shard has rows whose n_valid is not their number of neighbours.")
    return result


def _matrix(column: pa.ChunkedArray, fill: float) -> np.ndarray:
    """A fixed-size list column as [rows, k], nulls replaced by ``fill``."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # what older pyarrow returns for no chunks
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    if array.null_count:
        raise DamagedError("a neighbours shard holds a null list; missing neighbours are null elements.")
    values = array.flatten().fill_null(fill).to_numpy(zero_copy_only=False)
    return values.reshape(len(array), column.type.list_size)
