"""Packing: which chunks make up which training sequence.

The rule: a sequence is n/m *slots*, each one whole chunk; chunks fill them in the order of their shard, documents one
after the other, so that no token is lost and none is repeated. Validation chunks fill sequences of their own, after
the training ones. The last sequence of each split ends in empty slots. Chunk shard s gives training shard s, so that
packing needs nothing but the shard at hand, and no barrier.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrodb.errors import DamagedError
from retrodb.schemas import ID_SHIFT, SPLITS

EMPTY_SLOT = -1


@dataclass(frozen=True)
class Packed:
    """The sequences of one chunk shard.

    Attributes:
        slot_rows: int64 ``[R, slots]``: the row of the slot's chunk in the chunk shard, or -1 for an empty slot.
        training_rows: the first that many sequences are of the split ``train``, the others of ``validation``.
    """

    slot_rows: npt.NDArray[np.int64]
    training_rows: int

    def __len__(self) -> int:
        return len(self.slot_rows)

    @property
    def split(self) -> pa.Array:
        """string ``[R]``: the split of each sequence."""
        codes = (np.arange(len(self)) >= self.training_rows).astype(np.int64)
        return pa.array(SPLITS, pa.string()).take(pa.array(codes))

    def sequence_ids(self, shard: int) -> npt.NDArray[np.int64]:
        """int64 ``[R]``: ``shard << 32 | row``."""
        return np.arange(len(self), dtype=np.int64) | np.int64(shard << ID_SHIFT)


def pack(
    chunk_ids: npt.NDArray[np.int64],
    document_ids: npt.NDArray[np.int64],
    n_tokens: npt.NDArray[np.int16],
    is_validation: npt.NDArray[np.bool_],
    slots: int,
) -> Packed:
    """Pack the chunks of one shard into sequences of ``slots`` chunks, every chunk exactly once.

    Args:
        chunk_ids: int64 ``[N]``, strictly ascending.
        document_ids: int64 ``[N]``.
        n_tokens: int16 ``[N]``, valid tokens of each chunk.
        is_validation: bool ``[N]``, whether the chunk's document is of the validation split.
        slots: chunks in a sequence, n/m.

    Raises:
        DamagedError: ids out of order, a chunk without tokens, or a document that is of both splits.
    """
    assert slots > 0, "configuration is validated before"
    assert len(chunk_ids) == len(document_ids) == len(n_tokens) == len(is_validation)
    _check(chunk_ids, document_ids, n_tokens, is_validation)
    parts = [_fill(np.flatnonzero(wanted), slots) for wanted in (~is_validation, is_validation)]
    return Packed(np.concatenate(parts), training_rows=len(parts[0]))


def _fill(rows: npt.NDArray[np.int64], slots: int) -> npt.NDArray[np.int64]:
    """``rows`` in order, ``slots`` to a sequence, the last one filled up with empty slots."""
    filled = np.full(-(-len(rows) // slots) * slots, EMPTY_SLOT, dtype=np.int64)
    filled[: len(rows)] = rows
    return filled.reshape(-1, slots)


def _check(
    chunk_ids: npt.NDArray[np.int64],
    document_ids: npt.NDArray[np.int64],
    n_tokens: npt.NDArray[np.int16],
    is_validation: npt.NDArray[np.bool_],
) -> None:
    check_ascending(chunk_ids)
    if (n_tokens < 1).any():
        raise DamagedError(f"chunk {chunk_ids[np.argmax(n_tokens < 1)]} holds no token. Run the chunk stage again.")
    mixed = (document_ids[1:] == document_ids[:-1]) & (is_validation[1:] != is_validation[:-1])
    if mixed.any():
        raise DamagedError(
            f"document {document_ids[1:][np.argmax(mixed)]} has chunks in both splits, train and validation."
        )


def check_ascending(chunk_ids: npt.NDArray[np.int64]) -> None:
    """Raise DamagedError unless ``chunk_ids`` (int64 ``[N]``) are strictly ascending: every look-up relies on it."""
    wrong = chunk_ids[1:] <= chunk_ids[:-1]
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DamagedError(
            f"chunk ids are out of order: {chunk_ids[row + 1]} follows {chunk_ids[row]} in row {row + 1}."
            " Run the chunk stage again."
        )
