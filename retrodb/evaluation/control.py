"""The control: rows whose neighbours are chunks drawn at random. What they gain is no gain of retrieval."""

import numpy as np
import numpy.typing as npt

from retrodb.training.join import MISSING, ChunkArrays, locate, with_continuations
from retrodb.training.table import Arrays

_TRIES = 16


def with_random_neighbours(
    rows: Arrays, chunks: ChunkArrays, retrievable: npt.NDArray[np.int64], random: np.random.Generator
) -> Arrays:
    """The same rows with as many neighbours a chunk as before, each drawn evenly from the retrievable chunks.

    Never one of the chunk's own document, as with real neighbours; where sixteen draws give none, it is missing.

    Args:
        rows: of `TrainingTable.sequences`.
        chunks: all chunks of the database.
        retrievable: ids of those that may be drawn.
        random: where from.
    """
    there = rows["neighbour_ids"] >= 0
    own = np.broadcast_to(rows["document_ids"][..., None], there.shape)[there]
    drawn = np.full(len(own), MISSING, dtype=np.int64)
    for _ in range(_TRIES):
        left = np.flatnonzero(drawn < 0)
        if not len(left) or not len(retrievable):
            break
        some = retrievable[random.integers(len(retrievable), size=len(left))]
        foreign = chunks.document_ids[locate(chunks.chunk_ids, some)] != own[left]
        drawn[left[foreign]] = some[foreign]
    ids = np.full(there.shape, MISSING, dtype=np.int64)
    ids[there] = drawn
    found = ids >= 0
    tokens, lengths = np.zeros_like(rows["neighbour_tokens"]), np.zeros_like(rows["neighbour_lengths"])
    tokens[found], lengths[found] = with_continuations(chunks, locate(chunks.chunk_ids, ids[found]))
    return {**rows, "neighbour_ids": ids, "neighbour_tokens": tokens, "neighbour_lengths": lengths}
