"""The text that is trained on (``data/sequences``) and the neighbours of its chunks (``query/*``).

The text is a row of slots of m tokens: the chunks of one document after the other, padded with EOD, and a slot of EOD
alone behind a last chunk that is full. n / m slots are one sequence.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from retrodb.database import Database
from retrodb.export.megatron.chunk_database import blocks, slots_after
from retrodb.export.megatron.order import SampleOrder
from retrodb.export.rows import MISSING, ChunkRows, Ints, NeighbourRows, RowNumbers, chunk_rows, neighbour_rows
from retrodb.export.target import Advance

SEQUENCES: Final = "sequences"
_COMPARED_SEQUENCES: Final = 256
"""Compared at once: each of k n/m neighbours with the n/m + 1 documents of its sequence."""


@dataclass(frozen=True)
class Slots:
    """r slots: tokens [r, m]; the document of each, int64 [r]; its neighbours' ids and documents, int64 [r, k]."""

    tokens: npt.NDArray
    documents: Ints
    ids: Ints
    neighbour_documents: Ints

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, rows: slice) -> "Slots":
        return Slots(*(getattr(self, field.name)[rows] for field in fields(self)))

    def __add__(self, other: "Slots") -> "Slots":
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return Slots(*(np.concatenate(pair) for pair in pairs))

    @staticmethod
    def empty(rows: int, m: int, k: int, eod: int, dtype: np.dtype) -> "Slots":
        """Slots of EOD alone, of no document, without neighbours."""
        none = np.full((rows, k), MISSING, np.int64)
        return Slots(np.full((rows, m), eod, dtype), np.full(rows, MISSING, np.int64), none, none)


def document_slots(chunks: ChunkRows, found: NeighbourRows, eod: int, dtype: np.dtype) -> Slots:
    """Whole documents as slots."""
    after = slots_after(chunks)
    at = np.arange(len(chunks)) + np.cumsum(after) - after
    slots = Slots.empty(len(chunks) + int(after.sum()), chunks.tokens.shape[1], found.ids.shape[1], eod, dtype)
    slots.tokens[at] = np.where(chunks.is_valid, chunks.tokens, eod)
    slots.documents[at] = chunks.document_ids
    slots.documents[at[after] + 1] = chunks.document_ids[after]
    ids, documents = slots.ids.copy(), slots.neighbour_documents.copy()
    ids[at], documents[at] = found.ids, found.document_ids
    return Slots(slots.tokens, slots.documents, ids, documents)


def in_sight(documents: Ints, per_sequence: int) -> Ints:
    """int64 [b, s + 1]: the documents of each sequence's s slots and of the one behind it, out of [b * s + 1] slots."""
    return np.lib.stride_tricks.sliding_window_view(documents, per_sequence + 1)[::per_sequence]


def without_own_documents(documents: Ints, ids: Ints, neighbour_documents: Ints) -> tuple[Ints, int]:
    """The neighbours of sequences, without those whose document is in the sequence or begins behind it.

    In one sequence a chunk sees the neighbours of the chunk before it, of whatever document: a neighbour out of a
    document that comes later in the sequence would show what is to be predicted. Megatron-LM's own search leaves them
    out too (``query_embedding_block``).

    Args:
        documents: int64 [b, s + 1]: of the slots of each sequence, and of the slot behind it.
        ids: int64 [b, s, k], `MISSING` where none.
        neighbour_documents: likewise.

    Returns:
        The ids that stay, best first, `MISSING` behind them; and how many did not stay.
    """
    kept = np.empty_like(ids)
    removed = 0
    for first in range(0, len(ids), _COMPARED_SEQUENCES):
        part = slice(first, first + _COMPARED_SEQUENCES)
        there = ids[part] != MISSING
        own = (neighbour_documents[part][..., None] == documents[part][:, None, None, :]).any(axis=-1) & there
        removed += int(own.sum())
        order = np.argsort(~(there & ~own), axis=-1, kind="stable")
        kept[part] = np.take_along_axis(np.where(own, MISSING, ids[part]), order, axis=-1)
    return kept, removed


class SequenceWriter:
    """Writes one split's sequences and neighbours.

    Args:
        database: with chunks and neighbours.
        split: ``train`` or ``validation``.
        order: where each sequence goes.
        text: [documents, n], ``data/sequences.bin``, writable.
        neighbours: k, how many are written.
        eod: pads.
        numbers: the row of each training chunk in the chunk database.
        advance: told of the chunks that were read.
    """

    def __init__(
        self,
        database: Database,
        split: str,
        order: SampleOrder,
        text: np.memmap,
        neighbours: int,
        eod: int,
        numbers: RowNumbers,
        advance: Advance,
    ) -> None:
        self._database = database
        self._split = split
        self._order = order
        self._text = text
        self._k = neighbours
        self._eod = eod
        self._numbers = numbers
        self._advance = advance
        self._m = int(database.manifest.config["chunk_tokens"])
        self._per_sequence = text.shape[1] // self._m
        self.same_sequence = 0
        """Neighbours left out since their document is in the same sequence."""

    def write(self, folder: Path, only: Container[int] | None, samples: int, block_rows: int, h5py: Any) -> None:
        """The sequences into the text, and the neighbours of the first ``samples`` samples into ``folder``.

        Neighbours wait in a scratch file of their own size, since samples are in another order than sequences.
        """
        folder.mkdir(parents=True)
        scratch = folder / "neighbours.tmp"
        sequences, s = len(self._order.sample_of), self._per_sequence
        waiting = np.memmap(scratch, np.int64, "w+", shape=(sequences, s, self._k))
        done = 0
        for slots in self._whole_sequences(only):
            count = (len(slots) - 1) // s
            inside = slots[: count * s]
            self._text[self._order.documents[done : done + count]] = inside.tokens.reshape(count, -1)
            shape = (count, s, -1)
            kept, removed = without_own_documents(
                in_sight(slots.documents, s), inside.ids.reshape(shape), inside.neighbour_documents.reshape(shape)
            )
            waiting[self._order.sample_of[done : done + count]] = self._numbers.of(kept[..., : self._k])
            self.same_sequence += removed
            done += count
        self._text[self._order.documents[done]] = self._eod
        rows = waiting.reshape(-1, self._k)
        for first, end, name in blocks(samples * s, block_rows):
            with h5py.File(folder / name, "w") as file:
                file.create_dataset("neighbors", data=rows[first:end])
        del waiting, rows
        scratch.unlink()

    def _whole_sequences(self, only: Container[int] | None) -> Iterator[Slots]:
        """Slots of one or more whole sequences, and the slot behind the last of them."""
        s = self._per_sequence
        carried = Slots.empty(
            0, self._m, int(self._database.manifest.config["neighbours"]), self._eod, self._text.dtype
        )
        for shard, every in chunk_rows(self._database, only):
            mine = every.is_validation == (self._split == "validation")
            found = neighbour_rows(self._database, shard, every.chunk_ids)
            mine_found = NeighbourRows(found.ids[mine], found.document_ids[mine])
            carried += document_slots(every.select(mine), mine_found, self._eod, self._text.dtype)
            self._advance(int(mine.sum()))
            if whole := (len(carried) - 1) // s * s:
                yield carried[: whole + 1]
                carried = carried[whole:]
        if len(carried):
            short = -len(carried) % s + 1
            yield carried + Slots.empty(short, self._m, carried.ids.shape[1], self._eod, self._text.dtype)
