"""The chunks of a database as exporters take them: one shard at a time, training and validation documents told apart,
and where each chunk's row is in what is being written.
"""

from collections.abc import Container, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from retrodb.database import Database
from retrodb.errors import DamagedError, InputError
from retrodb.manifest import Shard
from retrodb.schemas import ID_SHIFT
from retrodb.sizes import count_of
from retrodb.training.columns import lists, scalars
from retrodb.training.join import in_order
from retrodb.units import refuse_table

Ints = npt.NDArray[np.int64]
GPT2_END: Final = 50_256
"""GPT-2's ``<|endoftext|>``, which its tokenizer never reads out of a text (`retrodb.chunking.tokenizer`)."""
_ROW_MASK: Final = (1 << ID_SHIFT) - 1
MISSING: Final = -1
"""No neighbour, in both memory-mapped formats and on the way there."""


@dataclass(frozen=True)
class ChunkRows:
    """Some chunks of one shard, whole documents, in order: c rows.

    Attributes:
        chunk_ids: int64 [c].
        document_ids: int64 [c].
        positions: int64 [c]: 0, 1, .. in the document.
        tokens: uint16 or uint32 [c, m], valid up to ``lengths``.
        lengths: int64 [c].
        is_last: bool [c]: the last chunk of its document; only these may be shorter than m.
        is_validation: bool [c].
    """

    chunk_ids: Ints
    document_ids: Ints
    positions: Ints
    tokens: npt.NDArray
    lengths: Ints
    is_last: npt.NDArray[np.bool_]
    is_validation: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.chunk_ids)

    def select(self, rows: npt.NDArray[np.bool_]) -> "ChunkRows":
        """The rows of a mask that keeps documents whole."""
        return ChunkRows(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @property
    def is_valid(self) -> npt.NDArray[np.bool_]:
        """bool [c, m]: the slots that hold a token."""
        return np.arange(self.tokens.shape[1])[None, :] < self.lengths[:, None]


@dataclass(frozen=True)
class NeighbourRows:
    """The neighbours of some chunks: ``ids`` and ``document_ids`` int64 [c, k], best first, `MISSING` where none."""

    ids: Ints
    document_ids: Ints


def check_built(database: Database, *tables: str) -> None:
    """Refuse a database that is not built as far as these tables, has nothing in them, or deleted documents.

    Raises:
        InputError: naming the table.
    """
    if len(database.deletions):
        raise InputError(
            f"{database.storage.url} holds {count_of(len(database.deletions), 'deleted document')}, which other "
            "formats cannot mask: run `retrodb compact` first, which leaves them out."
        )
    for table in tables:
        if table not in database.manifest.tables:
            refuse_table(database.manifest, table, database.storage.url)
            raise InputError(f"{database.storage.url} has no {table} yet; run the build to its end.")
        if not database.manifest.rows(table):
            raise InputError(f"{database.storage.url} has no rows in {table}: there is nothing to export.")


def refuse_blocks(database: Database) -> None:
    """Raises InputError: it is of blocks, which formats of consecutive chunks cannot hold."""
    refuse_table(database.manifest, "training", database.storage.url)


def chosen_neighbours(database: Database, wanted: int | None, default: int) -> int:
    """How many neighbours a chunk are exported. Raises InputError for more than the database keeps, or none."""
    kept = int(database.manifest.config["neighbours"])
    k = default if wanted is None else wanted
    if not 1 <= k <= kept:
        raise InputError(
            f"--neighbours {k}: the database keeps {count_of(kept, 'neighbour')} a chunk; ask for 1 to {kept}."
        )
    return k


class SplitReader:
    """The split of each document, from its shard; the last shard is kept."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._shards = {shard.number: shard for shard in database.manifest.shards("documents")}
        self._held = (MISSING, np.zeros(0, np.int64), np.zeros(0, np.bool_))

    def is_validation(self, document_ids: Ints) -> npt.NDArray[np.bool_]:
        """bool, of the shape of ``document_ids``. Raises DamagedError for a document that is not there."""
        answer = np.zeros(document_ids.shape, np.bool_)
        for number in np.unique(document_ids >> ID_SHIFT):
            ids, validation = self._load(int(number))
            rows = document_ids >> ID_SHIFT == number
            at = np.searchsorted(ids, document_ids[rows])
            found = at < len(ids)
            found[found] = ids[at[found]] == document_ids[rows][found]
            if not found.all():
                missing = document_ids[rows][~found][0]
                raise DamagedError(f"chunks name document {missing}, which is not there. Verify the database.")
            answer[rows] = validation[at]
        return answer

    def _load(self, number: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
        if self._held[0] != number:
            if number not in self._shards:
                raise DamagedError(f"chunks name shard {number} of documents, which is not there. Verify the database.")
            table = self._database.storage.read_table(self._shards[number], ["document_id", "split"])
            validation = pc.equal(table["split"], "validation").to_numpy()
            self._held = (number, scalars(table, "document_id"), validation)
        return self._held[1], self._held[2]


def chunk_rows(database: Database, only: Container[int] | None = None) -> Iterator[tuple[Shard, ChunkRows]]:
    """All chunks, shard by shard, or those of the shards whose number is in ``only``.

    Raises:
        DamagedError: a document's chunks are not 0, 1, .. in order, all but the last of m tokens.
    """
    splits = SplitReader(database)
    for shard in database.manifest.shards("chunks"):
        if only is not None and shard.number not in only:
            continue
        table = database.storage.read_table(shard, ["chunk_id", "document_id", "position", "tokens", "n_tokens"])
        document_ids = scalars(table, "document_id")
        tokens = lists(table, "tokens")
        is_last = np.append(document_ids[1:] != document_ids[:-1], True)[: len(table)]
        rows = ChunkRows(
            scalars(table, "chunk_id"),
            document_ids,
            scalars(table, "position").astype(np.int64),
            tokens,
            scalars(table, "n_tokens").astype(np.int64),
            is_last,
            splits.is_validation(document_ids),
        )
        first = np.append(True, is_last[:-1])[: len(table)]
        expected = np.arange(len(rows)) - np.maximum.accumulate(np.where(first, np.arange(len(rows)), 0))
        whole = (rows.lengths == tokens.shape[1]) | (is_last & (rows.lengths > 0) & (rows.lengths < tokens.shape[1]))
        if not (np.array_equal(rows.positions, expected) and whole.all()):
            where = database.storage.describe(shard)
            raise DamagedError(f"{where}: the chunks of a document are not in order and full. Verify the database.")
        yield shard, rows


def neighbour_rows(database: Database, shard: Shard, chunk_ids: Ints) -> NeighbourRows:
    """The neighbours of the chunks of one chunk shard, all k that are kept.

    Raises:
        DamagedError: the neighbours shard of that number is missing or of other chunks.
    """
    found = next((other for other in database.manifest.shards("neighbours") if other.number == shard.number), None)
    if found is None:
        raise DamagedError(f"shard {shard.number} of neighbours is missing. Run the build again to repair it.")
    table = database.storage.read_table(
        found, ["chunk_id", "neighbour_ids", "neighbour_document_ids", "neighbour_ranks"]
    )
    if not np.array_equal(scalars(table, "chunk_id"), chunk_ids):
        raise DamagedError(
            f"{database.storage.describe(found)} is not of the chunks of its shard. Verify the database."
        )
    return NeighbourRows(in_order(table), in_order(table, "neighbour_document_ids"))


def refuse_token(rows: ChunkRows, token: int, remedy: str) -> None:
    """Refuse chunks that hold ``token``, which has another meaning in the export.

    Raises:
        InputError: naming the first such chunk; ``remedy`` says what to do.
    """
    holds = ((rows.tokens == token) & rows.is_valid).any(axis=1)
    if holds.any():
        raise InputError(f"chunk {rows.chunk_ids[holds][0]} holds token {token}, which is to end documents. {remedy}")


class RowNumbers:
    """Where each chunk's row is in an export: 8 bytes a chunk, in a scratch file and never in memory.

    Ids are ``shard << 32 | row`` with gaps where a shard was compacted.

    Args:
        path: the scratch file, made here; `close` removes it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._bases: dict[int, tuple[int, int]] = {}
        self._total = 0
        self._map: np.memmap | None = None

    def append(self, number: int, chunk_ids: Ints, rows: Ints) -> None:
        """The rows of one shard's chunks, `MISSING` where a chunk has none (yet)."""
        size = int(chunk_ids[-1] & _ROW_MASK) + 1 if len(chunk_ids) else 0
        dense = np.full(size, MISSING, np.int64)
        dense[chunk_ids & _ROW_MASK] = rows
        dense.tofile(self._file)
        self._bases[number] = (self._total, size)
        self._total += size

    def of(self, chunk_ids: Ints) -> Ints:
        """The row of each chunk, of the shape of ``chunk_ids``; `MISSING` for `MISSING`.

        Raises:
            DamagedError: there is no such chunk, or it has no row.
        """
        wanted = chunk_ids != MISSING
        asked = chunk_ids[wanted]
        numbers, low = asked >> ID_SHIFT, asked & _ROW_MASK
        known = max(self._bases, default=0) + 1
        bases, sizes = np.zeros(known, np.int64), np.zeros(known, np.int64)
        for number, (base, size) in self._bases.items():
            bases[number], sizes[number] = base, size
        there = (numbers >= 0) & (numbers < known)
        there[there] = low[there] < sizes[numbers[there]]
        found = np.full(len(asked), MISSING, np.int64)
        found[there] = self._mapped()[bases[numbers[there]] + low[there]]
        if (found == MISSING).any():
            raise DamagedError(
                f"a neighbour is chunk {asked[found == MISSING][0]}, which is no training chunk of the database. "
                "Verify the database."
            )
        answer = np.full(chunk_ids.shape, MISSING, np.int64)
        answer[wanted] = found
        return answer

    def _mapped(self) -> npt.NDArray:
        if self._map is None:
            self._file.close()
            self._map = np.memmap(self._path, np.int64, "r", shape=(self._total,))
        return self._map

    def close(self) -> None:
        """Remove the scratch file."""
        self._file.close()
        self._map = None
        self._path.unlink()
