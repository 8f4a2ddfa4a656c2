"""The documents as an indexed dataset, and the chunk databases over them (``db/merged/*.hdf5``)."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from retrodb.database import Database
from retrodb.errors import InputError
from retrodb.export.megatron.indexed import IndexedWriter
from retrodb.export.rows import MISSING, ChunkRows, RowNumbers, chunk_rows, refuse_token
from retrodb.export.target import Advance
from retrodb.formats import json_bytes

DOCUMENTS: Final = "documents"
_H5_ROWS: Final = 1 << 16
_MOST_DOCUMENTS: Final = np.iinfo(np.uint32).max


@dataclass
class SplitCounts:
    """Of one split: documents, chunks, rows of its chunk database, and slots of m tokens that its text fills."""

    documents: int = 0
    chunks: int = 0
    rows: int = 0
    slots: int = 0


def slots_after(chunks: ChunkRows) -> np.ndarray:
    """bool [c]: whether a slot of EOD alone follows, since the document's end would not show in its last chunk."""
    return chunks.is_last & (chunks.lengths == chunks.tokens.shape[1])


class ChunkDatabaseWriter:
    """Writes ``data/documents`` and ``db/``: the training documents first, the validation documents behind them.

    Args:
        database: with chunks.
        folder: the project's.
        eod: the token that ends documents.
        dtype: of the tokens in the file.
        numbers: learns the row of each training chunk.
        advance: told of the chunks that were read.
    """

    def __init__(
        self, database: Database, folder: Path, eod: int, dtype: np.dtype, numbers: RowNumbers, advance: Advance
    ) -> None:
        self._database = database
        self._folder = folder
        self._eod = eod
        self._dtype = dtype
        self.numbers = numbers
        self._advance = advance
        self._documents = 0
        self.held_out: set[int] = set()
        """The shards that have validation documents."""
        self.counts = {"train": SplitCounts(), "validation": SplitCounts()}

    def write(self, h5py: Any) -> None:
        """All of it. Raises InputError when a chunk holds EOD, or a number does not fit into the format's."""
        merged = self._folder / "db" / "merged"
        for made in (self._folder / "data", merged):
            made.mkdir(parents=True)
        with IndexedWriter(self._folder / "data" / DOCUMENTS, self._dtype) as documents:
            for split, name in (("train", "train"), ("validation", "valid")):
                with h5py.File(merged / f"{name}.hdf5", "w") as file:
                    self._write_split(split, documents, file)
        train, validation = self.counts["train"], self.counts["validation"]
        about = {
            "ratio": 1.0,
            "prefix": DOCUMENTS,
            "n_docs": train.documents + validation.documents,
            "n_docs_train": train.documents,
            "n_chunks": train.rows + validation.rows,
            "n_chunks_train": train.rows,
            "n_chunks_invalid": 0,
            "n_chunks_sampled": 0,
        }
        (self._folder / "db" / "indexed_dataset_infos.json").write_bytes(json_bytes([about]))

    def _write_split(self, split: str, documents: IndexedWriter, file: Any) -> None:
        counts = self.counts[split]
        chunks_h5 = _growing(file, "chunks", 5, np.uint32)
        offsets_h5 = _growing(file, "doc_offsets", 3, np.uint64) if split == "train" else None
        _append(chunks_h5, np.zeros((1, 5), np.uint32))  # the empty chunk that -1 goes on to
        counts.rows = 1
        for shard, every in chunk_rows(self._database, None if split == "train" else self.held_out):
            mine = every.is_validation == (split == "validation")
            if split == "train":
                if not mine.all():
                    self.held_out.add(shard.number)
                rows = np.full(len(every), MISSING, np.int64)
                rows[mine] = counts.rows + _places(every.select(mine))
                self.numbers.append(shard.number, every.chunk_ids, rows)
            chunks = every.select(mine)
            refuse_token(chunks, self._eod, "Choose another with --eos-id.")
            added = self._add_documents(documents, chunks)
            _append(chunks_h5, _database_rows(chunks, self._documents))
            ends = counts.rows + np.cumsum(np.bincount(np.cumsum(chunks.is_last) - chunks.is_last) + 1)
            if offsets_h5 is not None and len(chunks):
                ids = self._documents + np.arange(added)
                _append(offsets_h5, np.stack([np.zeros_like(ids), ids, ends], axis=1).astype(np.uint64))
            self._documents += added
            if self._documents > _MOST_DOCUMENTS:
                raise InputError(f"Megatron-LM numbers documents by uint32: more than {_MOST_DOCUMENTS:,} do not fit.")
            counts.documents += added
            counts.chunks += len(chunks)
            counts.rows += len(chunks) + added
            counts.slots += len(chunks) + int(slots_after(chunks).sum())
            self._advance(len(chunks))
        file.create_dataset("n_written", data=np.array([counts.rows], np.uint64))

    def _add_documents(self, documents: IndexedWriter, chunks: ChunkRows) -> int:
        """Whole documents, EOD behind each; returns how many."""
        flat = chunks.tokens[chunks.is_valid]
        ends = np.cumsum(chunks.lengths)[chunks.is_last]
        documents.add(np.insert(flat.astype(self._dtype), ends, self._eod), np.diff(ends, prepend=0) + 1)
        return len(ends)


def _places(chunks: ChunkRows) -> np.ndarray:
    """int64 [c]: the row of each chunk from the first one's on, an empty chunk behind each document."""
    return np.arange(len(chunks)) + np.cumsum(chunks.is_last) - chunks.is_last


def _database_rows(chunks: ChunkRows, first_document: int) -> np.ndarray:
    """uint32 [c + documents, 5]: dataset 0, document, first token, one past the last, length in the encoder's tokens.

    The last is not known to the database; no reader looks at it, and building Megatron's own index asks only whether it
    is 0. It holds the chunk's own number of tokens.
    """
    m = chunks.tokens.shape[1]
    documents = first_document + np.cumsum(chunks.is_last) - chunks.is_last
    starts = chunks.positions * m
    rows = np.stack([np.zeros_like(starts), documents, starts, starts + chunks.lengths, chunks.lengths], axis=1)
    empty = rows[chunks.is_last].copy()
    empty[:, 2] = empty[:, 3]
    empty[:, 4] = 0
    made = np.zeros((len(rows) + len(empty), 5), np.uint32)
    at = _places(chunks)
    made[at] = rows
    made[at[chunks.is_last] + 1] = empty
    return made


def _growing(file: Any, name: str, width: int, dtype: Any) -> Any:
    return file.create_dataset(name, (0, width), dtype=dtype, maxshape=(None, width), chunks=(_H5_ROWS, width))


def _append(dataset: Any, rows: np.ndarray) -> None:
    first = dataset.shape[0]
    dataset.resize(first + len(rows), axis=0)
    dataset[first:] = rows


def blocks(rows: int, size: int) -> Iterable[tuple[int, int, str]]:
    """The ranges of ``rows`` rows in blocks of ``size``, with Megatron-LM's names of their files (``get_blocks``)."""
    digits = int(np.ceil(np.log(rows) / np.log(10)) + 1)
    for first in range(0, rows, size):
        end = min(rows, first + size)
        yield first, end, f"{first:0{digits}d}-{end:0{digits}d}.hdf5"
