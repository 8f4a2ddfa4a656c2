"""Equal blocks: those of one uid, found part by part of the range of uids."""

from typing import Final

import numpy as np
import pyarrow as pa

from retrodb import schemas

PART_BLOCKS: Final = 1 << 20
"""Uids in a part, about: what one worker holds."""


def part_count(blocks: int) -> int:
    """In how many parts the uids of so many blocks are compared."""
    return max(1, -(-blocks // PART_BLOCKS))


def uid_matrix(chunks: pa.Table) -> np.ndarray:
    """uint8 [n, 16]: the ``uid`` column of a table of blocks."""
    column = chunks["uid"].combine_chunks()
    array = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column
    if not len(array):
        return np.zeros((0, schemas.UID_BYTES), dtype=np.uint8)
    data = np.frombuffer(array.buffers()[1], dtype=np.uint8)
    return data.reshape(-1, schemas.UID_BYTES)[array.offset : array.offset + len(array)]


def parts_of(uids: np.ndarray, parts: int) -> np.ndarray:
    """int64 [n]: the part of each uid, uint8 [n, 16]; parts are consecutive ranges of uids."""
    first = np.ascontiguousarray(uids[:, :4]).view(">u4").reshape(-1).astype(np.int64)
    return (first * parts) >> 32


def uid_keys(uids: np.ndarray) -> np.ndarray:
    """int64 [n]: the first half of each uid. Two blocks that differ have the same one by a chance of 2**-64."""
    return np.ascontiguousarray(uids[:, :8]).view("<i8").reshape(-1).astype(np.int64, copy=False)


def repeated(uids: np.ndarray, chunk_ids: np.ndarray) -> pa.Table:
    """The uids that more than one block has, ascending: `schemas.block_duplicates`.

    Args:
        uids: uint8 [n, 16], in any order.
        chunk_ids: int64 [n].
    """
    halves = np.ascontiguousarray(uids).view(">u8").reshape(-1, 2)
    order = np.lexsort((chunk_ids, halves[:, 1], halves[:, 0]))
    uids, chunk_ids = uids[order], chunk_ids[order]
    new = np.ones(len(uids), dtype=bool)
    new[1:] = (uids[1:] != uids[:-1]).any(axis=1)
    starts = np.flatnonzero(new)
    counts = np.diff(np.append(starts, len(uids)))
    kept = np.repeat(counts > 1, counts)
    schema = schemas.block_duplicates()
    offsets = np.concatenate([[0], np.cumsum(counts[counts > 1])]).astype(np.int32)
    names = [uid.tobytes() for uid in uids[starts[counts > 1]]]
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(chunk_ids[kept], pa.int64()))
    return pa.Table.from_arrays([pa.array(names, schema.field("uid").type), lists], schema=schema)
