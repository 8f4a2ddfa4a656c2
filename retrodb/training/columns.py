"""Arrow columns as numpy arrays and back: the fixed-size lists of the tables, without a copy where Arrow allows it."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrodb.errors import DamagedError
from retrodb.sizes import count_of


def _one_array(table: pa.Table, name: str) -> pa.Array:
    """A column as one array; shares memory with the table where the column is one chunk already."""
    column = table.column(name)
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _values(array: pa.Array, name: str, missing: int | None) -> npt.NDArray:
    if array.null_count:
        if missing is None:
            raise DamagedError(f"column {name!r} holds {count_of(array.null_count, 'null')} where none may be.")
        array = pc.fill_null(array, missing)
    return array.to_numpy(zero_copy_only=True)


def scalars(table: pa.Table, name: str) -> npt.NDArray:
    """A column of numbers as an array of ``[rows]``, read-only. Raises DamagedError where it holds a null."""
    return _values(_one_array(table, name), name, None)


def lists(table: pa.Table, name: str, missing: int | None = None) -> npt.NDArray:
    """A column of fixed-size lists as an array of ``[rows, size]``, read-only.

    Slices and chunked columns are honoured: Arrow's ``flatten`` minds the offset, ``values`` does not.

    Args:
        table: any table.
        name: its column.
        missing: what stands for a null element; None where there may be none.

    Raises:
        DamagedError: a list is null (a missing value is a null *element*), or an element is while ``missing`` is None.
    """
    array = _one_array(table, name)
    if array.null_count:
        raise DamagedError(
            f"column {name!r} holds {count_of(array.null_count, 'null list')}; missing values are null elements."
        )
    return _values(array.flatten(), name, missing).reshape(len(array), array.type.list_size)


def as_lists(values: npt.NDArray, field: pa.Field, missing: npt.NDArray[np.bool_] | None = None) -> pa.Array:
    """``values``, of any shape that ends up as ``len(rows) * size`` elements, as a column of ``field``'s list type.

    Args:
        values: C-contiguous; shares its memory with the result where ``missing`` is None.
        field: of a fixed-size list type.
        missing: of the shape of ``values``: the elements that become null.
    """
    mask = None if missing is None else missing.reshape(-1)
    flat = pa.array(values.reshape(-1), type=field.type.value_type, mask=mask)
    return pa.FixedSizeListArray.from_arrays(flat, type=field.type)
