"""The memory-mapped files that ``RETRODataset`` of lucidrains' RETRO-pytorch reads.

The fields, as ``retro_pytorch/data.py`` (version 0.3.9) opens them, all int32 and without a header:

* chunks ``[num_chunks + seq_len / m, m + 1]``: a chunk, and the token that follows it;
* neighbours ``[num_chunks + seq_len / m, k]``: rows of chunks, -1 where there is none;
* sequences ``[num_sequences]``: the row a sequence begins with.

The reader knows a document's end by the token ``eos_id`` in its last row, takes row + 1 for a continuation where there
is none, masks a sequence behind the first ``eos_id``, and takes token 0 for padding. So a document whose last chunk is
full is followed by a row that begins with ``eos_id``, and tokens are shifted by one, since 0 is a real token of most
tokenizers. Validation documents stand behind all rows that a reader of the training documents maps.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from retrodb.chunking.tokenizer import DEFAULT_TOKENIZER
from retrodb.database import Database
from retrodb.errors import InputError
from retrodb.export.rows import (
    GPT2_END,
    MISSING,
    ChunkRows,
    Ints,
    RowNumbers,
    check_built,
    chosen_neighbours,
    chunk_rows,
    neighbour_rows,
    refuse_blocks,
    refuse_token,
)
from retrodb.export.target import Advance, Exported, check_local_target, folder_bytes, new_folder, no_progress
from retrodb.formats import json_bytes
from retrodb.manifest import Shard

FORMAT: Final = "retro-pytorch"
CHUNKS: Final = "chunks.dat"
NEIGHBOURS: Final = "chunks.knn.dat"
MOST_ROWS: Final = np.iinfo(np.int32).max
"""Rows are numbered by int32."""


@dataclass(frozen=True)
class Layout:
    """What the rows look like: m tokens, sequences of ``per_sequence`` rows, k neighbours, ids as they are written."""

    chunk_tokens: int
    per_sequence: int
    neighbours: int
    end: int
    shift: int


@dataclass(frozen=True)
class DocumentRows:
    """Rows ready to be written: ``tokens`` int32 [r, m + 1]; the row of each chunk, and where sequences begin."""

    tokens: npt.NDArray[np.int32]
    rows: Ints
    begins: Ints


def rows_within(chunks: ChunkRows) -> Ints:
    """int64 [c]: the row of each chunk from the first one's on; a last chunk that is full has another row behind it."""
    full_last = chunks.is_last & (chunks.lengths == chunks.tokens.shape[1])
    return np.arange(len(chunks)) + np.cumsum(full_last) - full_last


def document_rows(chunks: ChunkRows, layout: Layout, first: int) -> DocumentRows:
    """Whole documents as rows ``first``, ``first + 1``, ..: each ends with ``layout.end``, in its last row,
    or in a row of its own behind a last chunk that is full."""
    m, end = layout.chunk_tokens, layout.end
    full_last = chunks.is_last & (chunks.lengths == m)
    at = rows_within(chunks)
    tokens = np.zeros((len(chunks) + int(full_last.sum()), m + 1), np.int32)
    shifted = chunks.tokens.astype(np.int32) + layout.shift
    tokens[at, :m] = np.where(chunks.is_valid, shifted, 0)
    goes_on = ~chunks.is_last
    tokens[at[goes_on], m] = shifted[np.flatnonzero(goes_on) + 1, 0]
    tokens[at[chunks.is_last], chunks.lengths[chunks.is_last]] = end
    tokens[at[full_last] + 1, 0] = end
    return DocumentRows(tokens, at + first, at[chunks.positions % layout.per_sequence == 0] + first)


def export_retro_pytorch(
    database: Database,
    out: str,
    *,
    neighbours: int | None = None,
    eos_id: int | None = None,
    keep_ids: bool = False,
    advance: Advance = no_progress,
) -> Exported:
    """Write a database as the files of a ``RETRODataset``, and its arguments as ``train.json``, ``validation.json``.

    Args:
        database: with chunks and neighbours.
        out: a local folder that is missing or empty.
        neighbours: how many a chunk; None takes the number that the training sequences have.
        eos_id: the token that ends documents, an id of the database's tokenizer; None takes ``<|endoftext|>`` of
            GPT-2, of other tokenizers the first id behind their vocabulary.
        keep_ids: write token ids as they are, so that token 0 is read as padding. Else each is written as id + 1.
        advance: told of the chunks that were read.

    Raises:
        InputError: ``out`` will not do; a chunk holds ``eos_id``; there are more rows than int32 counts.
        DamagedError, MismatchError: the database is damaged, or was rebuilt meanwhile.
    """
    final = check_local_target(out, database.storage, FORMAT)
    refuse_blocks(database)
    check_built(database, "documents", "chunks", "neighbours")
    layout = _layout(database, neighbours, eos_id, keep_ids)
    _check_rows(database.manifest.rows("chunks") + 2 * layout.per_sequence)
    with new_folder(final) as folder:
        writer = _Writer(database, folder, layout, advance)
        writer.write_chunks()
        writer.write_neighbours()
        writer.write_arguments(keep_ids)
        size = folder_bytes(folder)
    return Exported(FORMAT, str(final), writer.counts, size, writer.left_out(keep_ids), _notes(layout, keep_ids))


def _layout(database: Database, neighbours: int | None, eos_id: int | None, keep_ids: bool) -> Layout:
    config, tokenizer = database.manifest.config, database.manifest.fingerprints["tokenizer"]
    shift = 0 if keep_ids else 1
    if eos_id is None:
        eos_id = GPT2_END if tokenizer["name"] == DEFAULT_TOKENIZER else int(tokenizer["vocabulary_size"])
    if not 0 <= eos_id < MOST_ROWS or eos_id + shift == 0:
        raise InputError(
            f"--eos-id {eos_id} will not do: it must be a token id, and not 0 with --keep-ids, the padding."
        )
    m = int(config["chunk_tokens"])
    return Layout(
        m,
        int(config["sequence_tokens"]) // m,
        chosen_neighbours(database, neighbours, int(config["training_neighbours"])),
        eos_id + shift,
        shift,
    )


def _check_rows(rows: int) -> None:
    if rows > MOST_ROWS:
        raise InputError(
            f"--to {FORMAT} numbers rows by int32: {rows:,} or more rows do not fit into {MOST_ROWS:,}. "
            "Use retrodb's own training table, or --to megatron."
        )


class _Writer:
    """One export under way: the files, and how many rows there are."""

    def __init__(self, database: Database, folder: Path, layout: Layout, advance: Advance) -> None:
        self._database = database
        self._folder = folder
        self._layout = layout
        self._advance = advance
        self._numbers = RowNumbers(folder / "rows.tmp")
        self._spans: dict[str, dict[int, tuple[int, int]]] = {"train": {}, "validation": {}}
        self._rows: dict[str, int] = {}
        self._zeros = 0
        self.counts = {"chunks": database.manifest.rows("chunks"), "missing_neighbours": 0}

    def write_chunks(self) -> None:
        """The chunk rows of both splits, the padding behind each, and where sequences begin."""
        held_out: set[int] = set()
        with (self._folder / CHUNKS).open("wb") as file:
            for shard, chunks in self._write_split("train", None, file, 0):
                if chunks.is_validation.any():
                    held_out.add(shard.number)
            if not self.counts["train_sequences"]:
                raise InputError(f"{self._database.storage.url} has no training documents: there is nothing to export.")
            for _ in self._write_split("validation", held_out, file, self._rows["train"] + self._layout.per_sequence):
                pass
        self.counts["rows"] = sum(end - first for spans in self._spans.values() for first, end in spans.values())

    def _write_split(
        self, split: str, only: Container[int] | None, file: IO[bytes], next_row: int
    ) -> Iterator[tuple[Shard, ChunkRows]]:
        sequences = documents = 0
        with (self._folder / f"{split}.seq.dat").open("wb") as begins:
            for shard, chunks in chunk_rows(self._database, only):
                mine = chunks.is_validation == (split == "validation")
                ours = chunks.select(mine)
                refuse_token(ours, self._layout.end - self._layout.shift, "Choose another with --eos-id.")
                made = document_rows(ours, self._layout, next_row)
                made.tokens.tofile(file)
                made.begins.astype(np.int32).tofile(begins)
                if split == "train":
                    rows = np.full(len(chunks), MISSING, np.int64)
                    rows[mine] = made.rows
                    self._numbers.append(shard.number, chunks.chunk_ids, rows)
                self._spans[split][shard.number] = (next_row, next_row + len(made.tokens))
                next_row += len(made.tokens)
                _check_rows(next_row + 2 * self._layout.per_sequence)
                sequences += len(made.begins)
                documents += int(ours.is_last.sum())
                self._zeros += int(((ours.tokens == 0) & ours.is_valid).sum())
                self._advance(len(ours))
                yield shard, chunks
        self._rows[split] = next_row
        self.counts |= {f"{split}_documents": documents, f"{split}_sequences": sequences}
        if sequences:
            np.zeros((self._layout.per_sequence, self._layout.chunk_tokens + 1), np.int32).tofile(file)
        else:
            (self._folder / f"{split}.seq.dat").unlink()

    def write_neighbours(self) -> None:
        """The neighbours' rows, beside the chunk rows; -1 beside padding."""
        k = self._layout.neighbours
        with (self._folder / NEIGHBOURS).open("wb") as file:
            for split, spans in self._spans.items():
                for shard, chunks in chunk_rows(self._database, spans):
                    mine = chunks.is_validation == (split == "validation")
                    found = neighbour_rows(self._database, shard, chunks.chunk_ids).ids[mine, :k]
                    first, end = spans[shard.number]
                    block = np.full((end - first, k), MISSING, np.int32)
                    block[rows_within(chunks.select(mine))] = self._numbers.of(found)
                    block.tofile(file)
                    self.counts["missing_neighbours"] += int((found == MISSING).sum())
                    self._advance(int(mine.sum()))
                if self.counts[f"{split}_sequences"]:
                    np.full((self._layout.per_sequence, k), MISSING, np.int32).tofile(file)
        self._numbers.close()

    def write_arguments(self, keep_ids: bool) -> None:
        """The arguments of ``RETRODataset`` for each split, and what a model has to know, as JSON."""
        layout, tokenizer = self._layout, self._database.manifest.fingerprints["tokenizer"]
        for split, rows in self._rows.items():
            sequences = self.counts[f"{split}_sequences"]
            if not sequences:
                continue
            arguments: dict[str, Any] = {
                "num_chunks": rows,
                "chunk_size": layout.chunk_tokens,
                "seq_len": layout.chunk_tokens * layout.per_sequence,
                "num_sequences": sequences,
                "num_neighbors": layout.neighbours,
                "chunk_memmap_path": CHUNKS,
                "chunk_nn_memmap_path": NEIGHBOURS,
                "seq_memmap_path": f"{split}.seq.dat",
                "eos_id": layout.end,
                "pad_id": 0,
                "add_continuations": True,
            }
            (self._folder / f"{split}.json").write_bytes(json_bytes(arguments))
        about = {
            "format": FORMAT,
            "tokenizer": {name: tokenizer[name] for name in ("name", "fingerprint", "vocabulary_size")},
            "token_shift": layout.shift,
            "num_tokens": max(int(tokenizer["vocabulary_size"]) + layout.shift, layout.end + 1),
            "counts": self.counts,
            "left_out": self.left_out(keep_ids),
        }
        (self._folder / "retrodb.json").write_bytes(json_bytes(about))

    def left_out(self, keep_ids: bool) -> dict[str, int]:
        """What the format could not hold."""
        found = {"tokens of id 0, which a reader takes for padding": self._zeros if keep_ids else 0}
        return {what: number for what, number in found.items() if number}


def _notes(layout: Layout, keep_ids: bool) -> tuple[str, ...]:
    read = "token ids are the tokenizer's" if keep_ids else "token ids are the tokenizer's plus 1; 0 is padding"
    return (f"{read}; {layout.end} ends a document", "RETRODataset(**json.load(open('train.json'))), in this folder")
