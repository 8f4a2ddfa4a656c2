"""Packing: every chunk exactly once, in order, training and validation apart."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrodb.errors import DamagedError
from retrodb.training.sequences import Packed, pack

documents = st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=12)


def packed_of(docs: list[tuple[int, bool]], slots: int) -> tuple[Packed, np.ndarray]:
    sizes = [size for size, _ in docs]
    validation = np.repeat(np.array([flag for _, flag in docs], dtype=bool), sizes)
    ids = np.arange(len(validation), dtype=np.int64) + (3 << 32)
    document_ids = np.repeat(np.arange(len(docs), dtype=np.int64), sizes)
    return pack(ids, document_ids, np.ones(len(ids), dtype=np.int16), validation, slots), validation


@given(documents, st.integers(1, 8))
def test_every_chunk_is_in_exactly_one_slot_in_the_order_of_its_shard(docs, slots):
    packed, validation = packed_of(docs, slots)
    flat = packed.slot_rows[packed.slot_rows >= 0]
    expected = [*np.flatnonzero(~validation), *np.flatnonzero(validation)]
    assert flat.tolist() == expected


@given(documents, st.integers(1, 8))
def test_no_sequence_holds_chunks_of_both_splits_and_the_split_column_says_which(docs, slots):
    packed, validation = packed_of(docs, slots)
    assert packed.slot_rows.shape[1] == slots
    for row, split in zip(packed.slot_rows, packed.split.to_pylist(), strict=True):
        assert {bool(validation[slot]) for slot in row if slot >= 0} == {split == "validation"}
    assert packed.split.to_pylist() == sorted(packed.split.to_pylist())  # train < validation


@given(documents, st.integers(1, 8))
def test_only_the_last_sequence_of_a_split_is_padded_and_only_at_its_end(docs, slots):
    packed, validation = packed_of(docs, slots)
    for rows, chunks in (
        (packed.slot_rows[: packed.training_rows], (~validation).sum()),
        (packed.slot_rows[packed.training_rows :], validation.sum()),
    ):
        assert len(rows) == -(-chunks // slots)
        assert (rows.reshape(-1)[:chunks] >= 0).all()
        assert (rows.reshape(-1)[chunks:] == -1).all()


def test_sequence_ids_are_the_shard_and_the_row():
    packed, _ = packed_of([(5, False)], 2)
    assert packed.sequence_ids(7).tolist() == [(7 << 32) + row for row in range(3)]


@pytest.mark.parametrize(
    ("ids", "documents", "lengths", "validation", "message"),
    [
        ([1, 1], [0, 0], [4, 4], [False, False], "out of order: 1 follows 1"),
        ([2, 1], [0, 0], [4, 4], [False, False], "out of order"),
        ([1, 2], [0, 0], [4, 0], [False, False], "chunk 2 holds no token"),
        ([1, 2], [5, 5], [4, 4], [False, True], "document 5 has chunks in both splits"),
    ],
)
def test_damaged_chunks_are_refused(ids, documents, lengths, validation, message):
    with pytest.raises(DamagedError, match=message):
        pack(np.array(ids), np.array(documents), np.array(lengths, dtype=np.int16), np.array(validation), 2)
