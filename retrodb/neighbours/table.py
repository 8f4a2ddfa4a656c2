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
        ranks: int16 [n, k], where they were re-ranked (`retrodb.neighbours.rerank`): 0 for the best of a row, 1 for the
            next, -1 where missing. Else None, and the nearest is the best.
    """

    chunk_ids: np.ndarray
    neighbour_ids: np.ndarray
    neighbour_document_ids: np.ndarray
    distances: np.ndarray
    n_valid: np.ndarray
    ranks: np.ndarray | None = None

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

    def take(self, rows: np.ndarray | slice) -> "Neighbours":
        """Some of the rows: a slice, int64 row numbers, or bool [n]."""
        return Neighbours(**{name: column[rows] for name, column in vars(self).items() if column is not None})

    def put(self, rows: np.ndarray, found: "Neighbours") -> "Neighbours":
        """With ``found`` [m] in place of rows int64 [m], whose queries it is of; neither is re-ranked."""
        columns = {name: column.copy() for name, column in vars(self).items() if column is not None}
        for name, column in columns.items():
            column[rows] = getattr(found, name)
        return Neighbours(**columns)


def to_table(result: Neighbours) -> pa.Table:
    """``result`` with the schema `retrodb.schemas.neighbours`: missing elements are null, lists never are."""
    k = result.k
    schema = neighbours(k, ranked=result.ranks is not None)
    missing = (result.neighbour_ids < 0).reshape(-1)
    lists = {
        "neighbour_ids": result.neighbour_ids,
        "neighbour_document_ids": result.neighbour_document_ids,
        "distances": result.distances,
    }
    if result.ranks is not None:
        lists["neighbour_ranks"] = result.ranks
    columns = {
        name: pa.FixedSizeListArray.from_arrays(
            pa.array(values.reshape(-1), mask=missing), type=schema.field(name).type
        )
        for name, values in lists.items()
    }
    columns |= {"chunk_id": pa.array(result.chunk_ids, pa.int64()), "n_valid": pa.array(result.n_valid, pa.int16())}
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


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
        ranks=_matrix(table["neighbour_ranks"], MISSING) if "neighbour_ranks" in table.column_names else None,
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
