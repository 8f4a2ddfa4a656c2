"""The join of sequences with their neighbours' tokens: a shuffle of arrays in three pure steps.

    requests(...)   at the query's shard: which rows of which neighbour's shard are wanted, one `Request` a pair
    answer(...)     at the neighbour's shard, read once: those rows and their continuations, one `Answer` a request
    assemble(...)   at the query's shard again: the finished training rows

What crosses a runner is arrays (`Request.to_bytes`, `Answer.to_bytes`), never single tokens. A *cell* is a flat index
into the query shard's ``[N, k']`` neighbour ids: the address an answer is sent back to. A missing neighbour has no
request; an answer that never comes is an error, never zeros (see `assemble`).
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrodb import schemas
from retrodb.errors import DamagedError, InputError
from retrodb.schemas import ID_SHIFT
from retrodb.sizes import count_of
from retrodb.training.columns import as_lists, lists, scalars
from retrodb.training.messages import Answer, Request
from retrodb.training.sequences import Packed, check_ascending

CHUNK_COLUMNS: Final = ["chunk_id", "document_id", "tokens", "n_tokens"]
"""What the join reads of a chunk shard."""

NEIGHBOUR_COLUMNS: Final = ["chunk_id", "neighbour_ids", "neighbour_ranks"]
"""What the join reads of a neighbour shard; the ranks only where it was re-ranked."""

MISSING: Final = -1
"""Stands for a null neighbour id in arrays. It is masked before every look-up: it never indexes anything."""

_ROW_MASK: Final = (1 << ID_SHIFT) - 1
_MAX_NEIGHBOURS: Final = int(np.iinfo(np.int8).max)
_FORGET: Final = "Run the build again from the neighbours stage."


@dataclass(frozen=True)
class ChunkArrays:
    """The columns of chunks that the join needs; of one shard, or of several one after the other.

    Attributes:
        chunk_ids: int64 ``[N]``, strictly ascending; not row numbers once the shard has been compacted.
        document_ids: int64 ``[N]``.
        tokens: uint16 or uint32 ``[N, m]``, padded with 0.
        n_tokens: int16 ``[N]``.
    """

    chunk_ids: npt.NDArray[np.int64]
    document_ids: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.unsignedinteger]
    n_tokens: npt.NDArray[np.int16]

    @staticmethod
    def from_table(table: pa.Table) -> "ChunkArrays":
        """From a table that has `CHUNK_COLUMNS`; shares its memory where a column is in one piece.

        Raises:
            DamagedError: a value is null, or the ids are not strictly ascending.
        """
        arrays = ChunkArrays(
            scalars(table, "chunk_id"),
            scalars(table, "document_id"),
            lists(table, "tokens"),
            scalars(table, "n_tokens"),
        )
        check_ascending(arrays.chunk_ids)
        return arrays

    def __len__(self) -> int:
        return len(self.chunk_ids)

    @property
    def nbytes(self) -> int:
        """Of the arrays together."""
        return sum(array.nbytes for array in (self.chunk_ids, self.document_ids, self.tokens, self.n_tokens))

    @property
    def chunk_tokens(self) -> int:
        """m."""
        return int(self.tokens.shape[1])


def in_order(table: pa.Table, name: str = "neighbour_ids") -> npt.NDArray[np.int64]:
    """A list column of all stored neighbours, in the order in which models take them: int64 ``[N, k]``, `MISSING` last.

    That is the order of the rows, by distance; of a re-ranked database that of ``neighbour_ranks``.

    Args:
        table: of a neighbour shard: the column, and ``neighbour_ranks`` where it has them.
        name: ``neighbour_ids`` or ``neighbour_document_ids``.

    Raises:
        DamagedError: a list is null.
    """
    values = lists(table, name, missing=MISSING)
    if "neighbour_ranks" not in table.column_names:
        return values
    ranks = lists(table, "neighbour_ranks", missing=MISSING)
    order = np.argsort(np.where(ranks == MISSING, ranks.shape[1], ranks), axis=1, kind="stable")
    return np.take_along_axis(values, order, axis=1)


def neighbour_ids(table: pa.Table, chunk_ids: npt.NDArray[np.int64], k: int) -> npt.NDArray[np.int64]:
    """The first ``k`` neighbours of each chunk: int64 ``[N, k]``, `MISSING` where there is none.

    Args:
        table: a neighbour shard with `NEIGHBOUR_COLUMNS`.
        chunk_ids: int64 ``[N]`` of the chunk shard of the same number.
        k: neighbours to join, at most as many as are stored.

    Raises:
        InputError: more neighbours are asked for than are stored.
        DamagedError: the rows are not those of the chunk shard.
    """
    ids = in_order(table)
    check_neighbours(k, stored=ids.shape[1])
    if not np.array_equal(scalars(table, "chunk_id"), chunk_ids):
        raise DamagedError(
            f"the neighbour shard ({count_of(table.num_rows, 'row')}) is not of the chunk shard "
            f"({count_of(len(chunk_ids), 'row')}): their chunk ids differ. {_FORGET}"
        )
    return np.ascontiguousarray(ids[:, :k])


def check_neighbours(k: int, stored: int) -> None:
    """Raise InputError unless ``k`` neighbours a chunk can be joined where ``stored`` are kept."""
    if not 1 <= k <= min(stored, _MAX_NEIGHBOURS):
        raise InputError(
            f"cannot join {count_of(k, 'neighbour')} a chunk: the database keeps {stored} (and at most "
            f"{_MAX_NEIGHBOURS} can be joined). Ask for fewer, or build with more --neighbours."
        )


def requests(neighbour_ids: npt.NDArray[np.int64], query_shard: int) -> dict[int, Request]:
    """What the query shard wants of each neighbour's shard, in order of shard and then of row.

    Args:
        neighbour_ids: int64 ``[N, k']`` of the query shard, `MISSING` where there is none.
        query_shard: its number, where the answers go.

    Returns:
        One request for each neighbour's shard that is wanted at all, rows ascending, so that it is read in order.

    Raises:
        DamagedError: an id is negative and not `MISSING`.
    """
    flat = neighbour_ids.reshape(-1)
    assert flat.size <= _ROW_MASK, "a cell is a uint32 on its way"
    if (flat < MISSING).any():
        raise DamagedError(f"the neighbours of shard {query_shard} name the chunk {flat.min()}. {_FORGET}")
    cells = np.flatnonzero(flat >= 0)
    cells = cells[np.argsort(flat[cells], kind="stable")]
    ids = flat[cells]
    shards = ids >> ID_SHIFT
    starts = np.flatnonzero(np.diff(shards, prepend=-1))
    bounds = [*starts.tolist(), len(ids)]
    return {
        int(shards[low]): Request(query_shard, int(shards[low]), cells[low:high], ids[low:high] & _ROW_MASK)
        for low, high in itertools.pairwise(bounds)
    }


def locate(chunk_ids: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The positions of ``wanted`` ids (int64, any shape) in strictly ascending ``chunk_ids`` (int64 ``[N]``).

    Raises:
        DamagedError: a wanted id does not exist.
    """
    count = len(chunk_ids)
    if not wanted.size:
        return np.zeros(wanted.shape, dtype=np.int64)
    if count and int(chunk_ids[-1]) - int(chunk_ids[0]) == count - 1:  # dense: ids are row numbers
        positions = wanted - chunk_ids[0]
        found = (positions >= 0) & (positions < count)
    else:
        positions = np.searchsorted(chunk_ids, wanted)
        found = positions < count
        found[found] = chunk_ids[positions[found]] == wanted[found]
    if not found.all():
        lost = np.unique(wanted[~found])
        raise DamagedError(
            f"{count_of(len(lost), 'chunk that is wanted does', 'chunks that are wanted do')} not exist, such as "
            f"chunk {lost[0]} (row {lost[0] & _ROW_MASK} of chunk shard {lost[0] >> ID_SHIFT}). {_FORGET}"
        )
    return positions


def with_continuations(
    chunks: ChunkArrays, positions: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.int16]]:
    """The chunks at ``positions`` (int64 ``[n]``), each with its continuation.

    The continuation of chunk c is chunk c + 1 if and only if that exists *and* is of the same document (invariant 3);
    else its tokens are 0 and its length is 0.

    Returns:
        tokens ``[n, 2, m]`` of the chunks' type, N then F (RETRO's terms), and lengths int16 ``[n, 2]``.
    """
    tokens = np.zeros((len(positions), 2, chunks.chunk_tokens), dtype=chunks.tokens.dtype)
    lengths = np.zeros((len(positions), 2), dtype=np.int16)
    tokens[:, 0] = chunks.tokens[positions]
    lengths[:, 0] = chunks.n_tokens[positions]
    some = np.flatnonzero(positions + 1 < len(chunks))
    here = positions[some]
    follows = (chunks.chunk_ids[here + 1] == chunks.chunk_ids[here] + 1) & (
        chunks.document_ids[here + 1] == chunks.document_ids[here]
    )
    some, following = some[follows], here[follows] + 1
    tokens[some, 1] = chunks.tokens[following]
    lengths[some, 1] = chunks.n_tokens[following]
    return tokens, lengths


def answer(request: Request, chunks: ChunkArrays) -> Answer:
    """The chunks a request names, with their continuations, from the neighbour's shard.

    Raises:
        DamagedError: a row that is asked for does not exist (any more).
    """
    wanted = request.rows | np.int64(request.neighbour_shard << ID_SHIFT)
    try:
        positions = locate(chunks.chunk_ids, wanted)
    except DamagedError as error:
        raise DamagedError(f"neighbours of chunk shard {request.query_shard}: {error}") from error
    tokens, lengths = with_continuations(chunks, positions)
    return Answer(request.query_shard, request.neighbour_shard, request.cells, tokens, lengths)


@dataclass(frozen=True)
class Joined:
    """Chunks of a training shard as it was, with their neighbours' tokens.

    Attributes:
        chunk_ids: int64 ``[s]``.
        tokens: ``[s, k', 2, m]``; ``lengths`` int16 ``[s, k', 2]``.
    """

    chunk_ids: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.unsignedinteger]
    lengths: npt.NDArray[np.int16]


@dataclass(frozen=True)
class Earlier:
    """A training shard as it was before some chunks got other neighbours.

    Attributes:
        fresh: bool ``[N]``, the chunks that did: only theirs were asked for.
        parts: what the shard holds, piece by piece.
    """

    fresh: npt.NDArray[np.bool_]
    parts: Iterable[Joined]


def assemble(
    packed: Packed,
    chunks: ChunkArrays,
    neighbour_ids: npt.NDArray[np.int64],
    answers: Iterable[Answer],
    shard: int,
    earlier: Earlier | None = None,
) -> pa.Table:
    """The finished training shard of a chunk shard. Answers may come in any order; the result is the same.

    Args:
        packed: the sequences of the chunk shard.
        chunks: the chunk shard.
        neighbour_ids: int64 ``[N, k']``: of the chunks that are fresh, what `requests` was given.
        answers: one for each request; taken one at a time, so they need not be in memory together.
        shard: the number of the chunk shard, and of the training shard.
        earlier: where the other chunks' neighbours are taken from; None where all chunks are fresh.

    Returns:
        A table of `retrodb.schemas.training`.

    Raises:
        DamagedError: a neighbour was not answered, answered twice, or answered though nobody asked; or the earlier
            shard lacks a chunk.
    """
    k = neighbour_ids.shape[1]
    check_neighbours(k, stored=k)
    assert len(chunks) == len(neighbour_ids)
    used, rows = _used_slots(packed)
    slot_ids = np.full((packed.slot_rows.size, k), MISSING, dtype=np.int64)
    slot_ids[used] = neighbour_ids[rows]
    tokens, lengths = _scatter(packed, chunks, neighbour_ids, answers, shard, earlier)
    slots = packed.slot_rows.shape[1]
    schema = schemas.training(slots * chunks.chunk_tokens, chunks.chunk_tokens, k, chunks.tokens.dtype.name)
    columns = {
        "sequence_id": pa.array(packed.sequence_ids(shard)),
        "split": packed.split,
        **_own_columns(packed, chunks, schema),
        "neighbour_tokens": as_lists(tokens, schema.field("neighbour_tokens")),
        "neighbour_lengths": as_lists(lengths, schema.field("neighbour_lengths")),
        "neighbour_ids": as_lists(slot_ids, schema.field("neighbour_ids"), slot_ids < 0),
        "n_valid": as_lists((slot_ids >= 0).sum(axis=1, dtype=np.int8), schema.field("n_valid")),
    }
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _used_slots(packed: Packed) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Flat indices of the slots that hold a chunk, and the chunks' rows."""
    flat = packed.slot_rows.reshape(-1)
    used = np.flatnonzero(flat >= 0)
    return used, flat[used]


def _own_columns(packed: Packed, chunks: ChunkArrays, schema: pa.Schema) -> dict[str, pa.Array]:
    """The columns of the sequences' own chunks."""
    used, rows = _used_slots(packed)
    empty = packed.slot_rows < 0

    def spread(values: npt.NDArray) -> npt.NDArray:
        out = np.zeros((packed.slot_rows.size, *values.shape[1:]), dtype=values.dtype)
        out[used] = values[rows]
        return out

    lengths = spread(chunks.n_tokens)
    return {
        "tokens": as_lists(spread(chunks.tokens), schema.field("tokens")),
        "n_tokens": pa.array(lengths.reshape(packed.slot_rows.shape).sum(axis=1, dtype=np.int32)),
        "chunk_ids": as_lists(spread(chunks.chunk_ids), schema.field("chunk_ids"), empty),
        "document_ids": as_lists(spread(chunks.document_ids), schema.field("document_ids"), empty),
        "chunk_lengths": as_lists(lengths, schema.field("chunk_lengths")),
    }


def _scatter(
    packed: Packed,
    chunks: ChunkArrays,
    neighbour_ids: npt.NDArray[np.int64],
    answers: Iterable[Answer],
    shard: int,
    earlier: Earlier | None,
) -> tuple[npt.NDArray, npt.NDArray[np.int16]]:
    """Answers put where they belong: tokens ``[slots * k', 2, m]`` and lengths int16 ``[slots * k', 2]``."""
    k = neighbour_ids.shape[1]
    n_slots = packed.slot_rows.size
    used, rows = _used_slots(packed)
    slot_of_row = np.full(len(chunks), MISSING, dtype=np.int64)
    slot_of_row[rows] = used
    assert (slot_of_row >= 0).all(), "a chunk is in no sequence"
    tokens = np.zeros((n_slots * k, 2, chunks.chunk_tokens), dtype=chunks.tokens.dtype)
    lengths = np.zeros((n_slots * k, 2), dtype=np.int16)
    asked = neighbour_ids if earlier is None else np.where(earlier.fresh[:, None], neighbour_ids, MISSING)
    for reply in checked_answers(answers, asked, chunks, shard):
        places = slot_of_row[reply.cells // k] * k + reply.cells % k
        tokens[places] = reply.tokens
        lengths[places] = reply.lengths
    if earlier is not None:
        by_slot = tokens.reshape(n_slots, k, 2, chunks.chunk_tokens), lengths.reshape(n_slots, k, 2)
        _put_earlier(earlier, chunks, slot_of_row, by_slot, shard)
    return tokens, lengths


def _put_earlier(
    earlier: Earlier,
    chunks: ChunkArrays,
    slot_of_row: npt.NDArray[np.int64],
    by_slot: tuple[npt.NDArray, npt.NDArray[np.int16]],
    shard: int,
) -> None:
    """The neighbours of the chunks that have those they had."""
    tokens, lengths = by_slot
    missing = ~earlier.fresh
    for part in earlier.parts if missing.any() else ():
        rows = np.searchsorted(chunks.chunk_ids, part.chunk_ids)
        rows[rows == len(chunks)] = 0
        known = np.flatnonzero((chunks.chunk_ids[rows] == part.chunk_ids) & missing[rows])
        places = slot_of_row[rows[known]]
        tokens[places], lengths[places] = part.tokens[known], part.lengths[known]
        missing[rows[known]] = False
    if missing.any():
        lost = chunks.chunk_ids[missing]
        raise DamagedError(
            f"the training shard {shard} of the version before lacks {count_of(len(lost), 'chunk')}, such as {lost[0]}."
            " Verify the database."
        )


def checked_answers(
    answers: Iterable[Answer], neighbour_ids: npt.NDArray[np.int64], chunks: ChunkArrays, shard: int
) -> Iterator[Answer]:
    """The answers to a shard's requests, one at a time, each proved to be one; at the end, that there were all.

    Args:
        answers: in any order.
        neighbour_ids: int64 ``[N, k']``, what `requests` was given.
        chunks: the chunk shard that asked.
        shard: its number.

    Raises:
        DamagedError: a neighbour was not answered, answered twice, or answered though nobody asked.
    """
    flat = neighbour_ids.reshape(-1)
    open_cells = flat >= 0
    for reply in answers:
        _check_answer(reply, chunks.tokens, flat, open_cells, shard)
        open_cells[reply.cells] = False
        yield reply
    if open_cells.any():
        lost = np.unique(flat[open_cells] >> ID_SHIFT)
        raise DamagedError(
            f"chunk shard {shard}: {np.count_nonzero(open_cells)} of its neighbours were not answered, of chunk shards"
            f" {lost[:8].tolist()}. Run the build again."
        )


def _check_answer(
    reply: Answer, tokens: npt.NDArray, flat: npt.NDArray[np.int64], open_cells: npt.NDArray[np.bool_], shard: int
) -> None:
    """Raise DamagedError unless this is an answer to what this shard asked, and the first one."""
    where = f"chunk shard {shard}: the answer of chunk shard {reply.neighbour_shard}"
    if reply.query_shard != shard:
        raise DamagedError(f"{where} is for shard {reply.query_shard}.")
    shape = (2, tokens.shape[1])
    if reply.tokens.shape[1:] != shape or reply.tokens.dtype != tokens.dtype:
        raise DamagedError(
            f"{where} holds {reply.tokens.dtype} tokens {reply.tokens.shape[1:]}, not {tokens.dtype} {shape}."
        )
    if not reply.cells.size:
        return
    if reply.cells.min() < 0 or reply.cells.max() >= flat.size:
        raise DamagedError(f"{where} is for cell {reply.cells.max()} of {flat.size}.")
    unasked = ~open_cells[reply.cells] | (flat[reply.cells] >> ID_SHIFT != reply.neighbour_shard)
    if unasked.any() or len(np.unique(reply.cells)) != len(reply.cells):
        raise DamagedError(f"{where} holds neighbours that nobody asked for, or a second time.")
    if (reply.lengths[:, 0] < 1).any():
        raise DamagedError(f"{where} holds a chunk without tokens.")
