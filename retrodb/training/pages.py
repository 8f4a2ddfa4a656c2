"""A short cut for the two token columns of a training shard: Parquet pages decoded as plain arrays.

Arrow's Parquet reader spends most of its time on repetition and definition levels, which in these columns say nothing:
no element is null and all lists are of one size. For pages that are as `retrodb.training.shards` writes them (data
pages of version 1, PLAIN or BYTE_STREAM_SPLIT, no dictionary, definition levels one single run) the values are taken
from the page directly. Anything else, damage included, answers None: then Arrow reads it, and Arrow reports what is
wrong. Page layout: Apache Parquet format, "Data Pages", and Thrift's compact protocol.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

_CODECS: Final = {"UNCOMPRESSED": None, "LZ4": "lz4_raw", "ZSTD": "zstd", "SNAPPY": "snappy"}
_PLAIN: Final = 0
_BYTE_STREAM_SPLIT: Final = 9
_VALUE_BYTES: Final = 4
"""uint16 and uint32 are both stored as Parquet's INT32."""

_LEVEL_SLACK: Final = 1 << 16


class _UnusualError(Exception):
    """The pages are not the simple ones: Arrow shall read them."""


def read_values(
    data: memoryview, column: pq.ColumnChunkMetaData, max_level: int, dtype: npt.DTypeLike
) -> npt.NDArray[np.unsignedinteger] | None:
    """All values of one column chunk of lists without nulls, flat.

    Args:
        data: the bytes of the column chunk.
        column: the column chunk's metadata.
        max_level: the column's maximal definition level: the level of a value that is there.
        dtype: ``uint16`` or ``uint32``.

    Returns:
        ``[num_values]`` of ``dtype``, or None where Arrow has to read the column.
    """
    try:
        return _read(data, column, max_level, np.dtype(dtype))
    except (_UnusualError, IndexError, KeyError, ValueError, pa.ArrowException, OSError):
        return None


def _read(data: memoryview, column: pq.ColumnChunkMetaData, max_level: int, dtype: np.dtype) -> npt.NDArray:
    if column.physical_type != "INT32" or column.has_dictionary_page:
        raise _UnusualError
    codec_name = _CODECS[column.compression]
    codec = None if codec_name is None else pa.Codec(codec_name)
    parts, position, left = [], 0, column.num_values
    while left > 0:
        header, position = _thrift_struct(data, position)
        raw_size, stored_size, page = header[2], header[3], header[5]
        count = page[1]
        if not 0 < count <= left or not 0 < raw_size <= _VALUE_BYTES * count * 2 + _LEVEL_SLACK or stored_size < 0:
            raise _UnusualError
        body = data[position : position + stored_size]
        if codec is not None:
            body = memoryview(codec.decompress(body, raw_size)).cast("B")  # Arrow says signed
        parts.append(_page_values(body[:raw_size], count, page[2], max_level, dtype))
        position += stored_size
        left -= count
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _page_values(body: memoryview, count: int, encoding: int, max_level: int, dtype: np.dtype) -> npt.NDArray:
    """The values behind the two runs of levels of a data page (version 1)."""
    offset = _VALUE_BYTES + int.from_bytes(body[:4], "little")  # repetition levels: all lists are of one size
    size = int.from_bytes(body[offset : offset + 4], "little")
    levels = body[offset + 4 : offset + 4 + size]
    offset += 4 + size
    run, end = _varint(levels, 0)
    one_run = run == count << 1 and end == size - 1 and levels[end] == max_level
    if not one_run or len(body) != offset + _VALUE_BYTES * count:
        raise _UnusualError
    if encoding == _PLAIN:
        return np.frombuffer(body, "<u4", count, offset).astype(dtype)
    if encoding != _BYTE_STREAM_SPLIT:
        raise _UnusualError
    streams = np.frombuffer(body, np.uint8, _VALUE_BYTES * count, offset).reshape(_VALUE_BYTES, count)
    values = streams[dtype.itemsize - 1].astype(dtype)
    for stream in streams[dtype.itemsize - 2 :: -1]:
        values <<= 8
        values |= stream
    return values


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """An unsigned LEB128 number, and the position behind it."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position
        if shift > 63:
            raise _UnusualError


def _thrift_struct(data: memoryview, position: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """A struct of Thrift's compact protocol as {field id: value}: the integers and structs that page headers hold."""
    if depth > 4:
        raise _UnusualError
    fields: dict[int, Any] = {}
    field_id = 0
    while data[position] != 0:
        kind, delta = data[position] & 0x0F, data[position] >> 4
        position += 1
        if delta == 0:
            raise _UnusualError
        field_id += delta
        if kind in (1, 2):
            fields[field_id] = kind == 1
        elif kind in (4, 5, 6):
            number, position = _varint(data, position)
            fields[field_id] = (number >> 1) ^ -(number & 1)
        elif kind == 8:
            length, position = _varint(data, position)
            position += length
        elif kind == 12:
            fields[field_id], position = _thrift_struct(data, position, depth + 1)
        else:
            raise _UnusualError
    return fields, position + 1
