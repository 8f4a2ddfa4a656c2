"""How much of a chunk its neighbours give away: r(C) of RETRO (Borgeaud et al. 2022, section 2.6).

r(C) is the length of the longest token substring that a chunk C has in common with one of its ten nearest neighbours,
each taken with its continuation (N and F, 2m tokens in one string), divided by m. A model's loss on chunks with
r(C) <= alpha tells how much of its gain is no copying; what the report tells is how many such chunks there are.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrodb import schemas
from retrodb.errors import DamagedError
from retrodb.schemas import SPLITS
from retrodb.training.columns import scalars
from retrodb.training.join import ChunkArrays, checked_answers, locate
from retrodb.training.messages import Answer

NEAREST: Final = 10
"""Neighbours that r(C) looks at, where as many are kept."""

THRESHOLDS: Final = (0.125, 0.25, 0.5, 0.75, 1.0)
"""The alphas of the paper's figures."""

DEFINITION: Final = (
    "r(C) is the longest token substring that chunk C has in common with one of its {neighbours} nearest neighbours,"
    " each with its continuation, divided by {chunk_tokens} (Borgeaud et al. 2022, section 2.6)"
)

_BLOCK_CELLS: Final = 1 << 15
"""Query tokens in a block: with m = 64, 512 pairs, whose 360 kB of tokens and run lengths stay in a core's cache."""
_GATHERED_PAIRS: Final = 1 << 12
"""Pairs compared together where answers are small: 1 MB of their tokens."""
_QUERY_PADDING: Final = 0
_NEIGHBOUR_PADDING: Final = 1
_PADDINGS: Final = 2


# -- the longest common substring --------------------------------------------------------------------------------------


def overlaps(
    tokens: npt.NDArray[np.unsignedinteger],
    n_tokens: npt.NDArray[np.int16],
    rows: npt.NDArray[np.int64],
    neighbour_tokens: npt.NDArray[np.unsignedinteger],
    neighbour_lengths: npt.NDArray[np.int16],
) -> npt.NDArray[np.int16]:
    """Tokens of the longest common substring of each pair of a query and a neighbour with its continuation.

    Dynamic programming over the diagonals of the equality matrix, one query token of a whole block of pairs at a time.
    Padding matches nothing. A continuation lies directly behind a full neighbour, so a substring may cross from N to F.

    Args:
        tokens: uint16 or uint32 ``[N, m]``, the queries.
        n_tokens: int16 ``[N]``, their valid tokens.
        rows: int64 ``[P]``, the query of each pair.
        neighbour_tokens: uint16 or uint32 ``[P, 2, m]``, N then F.
        neighbour_lengths: int16 ``[P, 2]``, valid tokens of both; 0 for what is missing.

    Returns:
        int16 ``[P]``, from 0 to the query's ``n_tokens``.
    """
    pairs, m = len(rows), tokens.shape[1]
    size = max(1, _BLOCK_CELLS // m)
    # Shifted by two, so that padding can be told from every token; the narrowest type that holds that is the fastest.
    largest = max((int(some.max()) for some in (tokens, neighbour_tokens) if some.size), default=0)
    kind = np.min_scalar_type(largest + _PADDINGS)
    result = np.zeros(pairs, dtype=np.int16)
    for start in range(0, pairs, size):
        block = slice(start, min(start + size, pairs))
        some = rows[block]
        queries = _told_apart(tokens[some], n_tokens[some], _QUERY_PADDING, kind)
        pieces = neighbour_tokens[block].reshape(-1, m)
        others = _told_apart(pieces, neighbour_lengths[block].reshape(-1), _NEIGHBOUR_PADDING, kind)
        result[block] = _longest_runs(queries.T, others.reshape(-1, 2 * m).T)
    return result


def _told_apart(values: npt.NDArray, lengths: npt.NDArray, padding: int, kind: np.dtype) -> npt.NDArray:
    """``values`` [n, m] as ``kind``, each + 2, and ``padding`` (0 or 1) from ``lengths`` [n] on."""
    shifted = values.astype(kind)
    shifted += kind.type(_PADDINGS)
    shifted[np.arange(values.shape[1]) >= lengths[:, None]] = padding
    return shifted


def _longest_runs(queries: npt.NDArray, others: npt.NDArray) -> npt.NDArray:
    """The longest run of equals on any diagonal: ``queries`` [m, B], ``others`` [2m, B] -> [B].

    After token i of the queries, row ``m - 1 - i + j`` of ``runs`` holds the length of the run that ends at (i, j). It
    is the row that held (i - 1, j - 1) before, so that the runs of a diagonal are counted in place.
    """
    (m, pairs), width = queries.shape, len(others)
    queries, others = np.ascontiguousarray(queries), np.ascontiguousarray(others)
    runs = np.zeros((m - 1 + width, pairs), dtype=np.min_scalar_type(m))
    longest = np.zeros((width, pairs), dtype=runs.dtype)
    equal = np.empty((width, pairs), dtype=bool)
    for i in range(m):
        ending = runs[m - 1 - i : m - 1 - i + width]
        np.equal(others, queries[i], out=equal)
        ending += 1
        np.multiply(ending, equal.view(np.uint8), out=ending)
        np.maximum(longest, ending, out=longest)
    return longest.max(axis=0)


def best_neighbours(found: npt.NDArray[np.int16]) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
    """From the overlaps ``[N, k]`` with each neighbour: the largest, int16 ``[N]``, and its column, int64 ``[N]``.

    The column is the first, that is the nearest, of equals; -1 where the overlap is 0.
    """
    columns = found.argmax(axis=1)
    overlap = np.take_along_axis(found, columns[:, None], axis=1)[:, 0]
    return overlap, np.where(overlap > 0, columns, -1)


def longest_overlap(
    tokens: npt.NDArray[np.unsignedinteger],
    n_tokens: npt.NDArray[np.int16],
    neighbour_tokens: npt.NDArray[np.unsignedinteger],
    neighbour_lengths: npt.NDArray[np.int16],
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
    """Each chunk's longest common substring with its neighbours: m * r(C) of RETRO, section 2.6.

    Args:
        tokens: uint16 or uint32 ``[N, m]``.
        n_tokens: int16 ``[N]``, valid tokens.
        neighbour_tokens: ``[N, k, 2, m]``, each neighbour and its continuation, k at least 1.
        neighbour_lengths: int16 ``[N, k, 2]``, valid tokens of both; 0 for what is missing.

    Returns:
        The overlap in tokens, int16 ``[N]``, and the column of the neighbour it is shared with, int64 ``[N]``: the
        nearest of equals, -1 where the overlap is 0.
    """
    count, k = neighbour_lengths.shape[:2]
    rows = np.repeat(np.arange(count), k)
    cells = neighbour_tokens.reshape(count * k, 2, tokens.shape[1]), neighbour_lengths.reshape(count * k, 2)
    return best_neighbours(overlaps(tokens, n_tokens, rows, *cells).reshape(count, k))


def shared_run(tokens: Sequence[int], other: Sequence[int], length: int) -> Sequence[int]:
    """The first ``length`` consecutive ``tokens`` that also stand in ``other``, consecutive there.

    Raises:
        DamagedError: there are none.
    """
    there = {tuple(other[at : at + length]) for at in range(len(other) - length + 1)}
    for at in range(len(tokens) - length + 1):
        if tuple(tokens[at : at + length]) in there:
            return tokens[at : at + length]
    raise DamagedError(f"{length} consecutive tokens were to be in common, and are not. Verify the database.")


# -- the table ---------------------------------------------------------------------------------------------------------


def leakage_table(
    chunks: ChunkArrays, neighbour_ids: npt.NDArray[np.int64], answers: Iterable[Answer], shard: int
) -> pa.Table:
    """The leakage shard of a chunk shard. Answers may come in any order; the result is the same.

    Args:
        chunks: the chunk shard.
        neighbour_ids: int64 ``[N, k']``, what `retrodb.training.join.requests` was given.
        answers: one for each request; taken one at a time, so they need not be in memory together.
        shard: the number of the chunk shard.

    Returns:
        A table of `retrodb.schemas.leakage`.

    Raises:
        DamagedError: a neighbour was not answered, answered twice, or answered though nobody asked.
    """
    count, k = neighbour_ids.shape
    found = np.zeros(count * k, dtype=np.int16)
    for replies in _several(checked_answers(answers, neighbour_ids, chunks, shard)):
        cells = np.concatenate([reply.cells for reply in replies])
        tokens = np.concatenate([reply.tokens for reply in replies])
        lengths = np.concatenate([reply.lengths for reply in replies])
        found[cells] = overlaps(chunks.tokens, chunks.n_tokens, cells // k, tokens, lengths)
    overlap, columns = best_neighbours(found.reshape(count, k))
    shared_with = neighbour_ids[np.arange(count), columns]
    values = {
        "chunk_id": pa.array(chunks.chunk_ids),
        "overlap": pa.array(overlap),
        "leakage": pa.array(leakage_of(overlap, chunks.chunk_tokens)),
        "neighbour_id": pa.array(shared_with, mask=columns < 0),
    }
    schema = schemas.leakage()
    return pa.table([values[name] for name in schema.names], schema=schema)


def with_earlier(table: pa.Table, before: pa.Table, fresh: npt.NDArray[np.bool_]) -> pa.Table:
    """A leakage shard of which only some rows were compared, with the other rows as they were before.

    Args:
        table: the shard, of which the rows ``fresh`` bool ``[N]`` mean something.
        before: the shard of the version before, which has the others.

    Raises:
        DamagedError: it has not.
    """
    at = np.arange(table.num_rows)
    at[~fresh] = table.num_rows + locate(scalars(before, "chunk_id"), scalars(table, "chunk_id")[~fresh])
    return pa.concat_tables([table, before.select(table.column_names).cast(table.schema)]).take(pa.array(at))


def _several(answers: Iterable[Answer]) -> Iterator[list[Answer]]:
    """Answers in groups that fill blocks: where there are many shards, each answers a few pairs only."""
    group: list[Answer] = []
    for reply in answers:
        group.append(reply)
        if sum(len(some.cells) for some in group) >= _GATHERED_PAIRS:
            yield group
            group = []
    if group:
        yield group


def leakage_of(overlap: npt.NDArray[np.int16], chunk_tokens: int) -> npt.NDArray[np.float32]:
    """r(C), float32 ``[N]``: the nearest to overlap / m."""
    return (overlap / np.float64(chunk_tokens)).astype(np.float32)


# -- figures -----------------------------------------------------------------------------------------------------------


def histograms(
    overlap: npt.NDArray[np.int16], validation: npt.NDArray[np.bool_], chunk_tokens: int
) -> dict[str, list[int]]:
    """How many chunks have an overlap of 0, 1, .. m tokens, by split: m + 1 counts each."""
    parts = zip(SPLITS, (~validation, validation), strict=True)
    return {split: np.bincount(overlap[own], minlength=chunk_tokens + 1).tolist() for split, own in parts}


def merged_histograms(some: Iterable[Mapping[str, Sequence[int]]]) -> dict[str, list[int]]:
    """The histograms of several shards together; validation only where there are such chunks."""
    total: dict[str, list[int]] = {}
    for part in some:
        for split, counts in part.items():
            total[split] = [a + b for a, b in zip(total.get(split, [0] * len(counts)), counts, strict=True)]
    return {split: counts for split, counts in total.items() if split == SPLITS[0] or any(counts)}


def distribution(histogram: Sequence[int]) -> dict[str, Any]:
    """What a histogram of overlaps comes to: ``chunks``, ``mean`` of r, ``share_above`` each alpha, ``share_whole``.

    Shares and mean are None where there are no chunks. They follow from whole numbers alone, so they are the same on
    every machine.
    """
    chunks, m = sum(histogram), len(histogram) - 1
    if not chunks:
        return {"chunks": 0, "mean": None, "share_above": dict.fromkeys(map(str, THRESHOLDS)), "share_whole": None}
    tokens = sum(overlap * count for overlap, count in enumerate(histogram))
    above = {
        str(alpha): sum(count for overlap, count in enumerate(histogram) if overlap > alpha * m) / chunks
        for alpha in THRESHOLDS
    }
    return {"chunks": chunks, "mean": tokens / (chunks * m), "share_above": above, "share_whole": histogram[m] / chunks}


def in_words(distributions: Mapping[str, Mapping[str, Any]]) -> str:
    """``r > 0.5 for 3.1% of training chunks, mean 0.08``, of each split that has chunks."""
    names = {"train": "training", "validation": "validation"}
    parts = [
        f"r > 0.5 for {found['share_above']['0.5']:.1%} of {names[split]} chunks, mean {found['mean']:.2f}"
        for split, found in distributions.items()
        if found["chunks"]
    ]
    return "; ".join(parts) or "no chunks"


def worst_rows(
    overlap: npt.NDArray[np.int16],
    chunk_ids: npt.NDArray[np.int64],
    document_ids: npt.NDArray[np.int64],
    most: int,
) -> npt.NDArray[np.int64]:
    """Rows of the chunks that leak most, int64 ``[at most `most`]``: the worst of each document, ties by chunk id."""
    order = np.lexsort((chunk_ids, -overlap.astype(np.int64)))
    order = order[overlap[order] > 0]
    _, firsts = np.unique(document_ids[order], return_index=True)
    return order[np.sort(firsts)][:most]
