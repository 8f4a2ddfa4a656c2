"""The training table, re-joined: every chunk once, its neighbours' tokens and their continuations (invariant 3).

The join is done here once more and differently: not as a shuffle and not with `retrodb.training.join`, so that a fault
there cannot hide itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa

from retrodb.errors import DamagedError
from retrodb.manifest import Shard
from retrodb.quality.neighbour_content import present_lists
from retrodb.quality.scene import ChunkIds, ChunkTokens, Scene, grouped
from retrodb.schemas import ID_SHIFT, SPLITS
from retrodb.sizes import count_of
from retrodb.training.columns import lists, scalars
from retrodb.training.join import NEIGHBOUR_COLUMNS, in_order

_BLOCK_ROWS: Final = 512
"""Sequences looked into at a time: some 20 MB with 2,048 tokens and 2 neighbours."""


@dataclass(frozen=True)
class OwnShard:
    """What the rows of one training shard are made from.

    Attributes:
        ids: of the chunk shard of the same number.
        tokens: likewise.
        neighbours: int64 [N, k'], -1 where missing; None where the neighbours shard is damaged.
    """

    ids: ChunkIds
    tokens: ChunkTokens
    neighbours: np.ndarray | None


def check_training(scene: Scene) -> None:
    """Every training shard against the chunks, documents and neighbours it was joined from."""
    for shard in scene.shards("training"):
        with scene.examining(shard):
            own = _own_shard(scene, shard.number)
            if own is None:
                scene.findings.note("chunks or documents are damaged: their training rows were not looked into")
                continue
            layout = _check_layout(scene, shard, own.ids)
            if layout is None:
                continue
            for start, table in _blocks(scene, shard):
                _check_block(scene, shard, own, table, start, layout[start : start + table.num_rows])
            scene.findings.count("sequences", len(layout))


def _own_shard(scene: Scene, number: int) -> OwnShard | None:
    ids, tokens = scene.ids(number), scene.tokens(number)
    if ids is None or tokens is None:
        return None
    neighbours, k = scene.shard("neighbours", number), scene.facts.training_neighbours
    if neighbours is None:
        return OwnShard(ids, tokens, None)
    return OwnShard(ids, tokens, in_order(scene.table(neighbours, *NEIGHBOUR_COLUMNS))[:, :k])


def _blocks(scene: Scene, shard: Shard) -> Iterator[tuple[int, pa.Table]]:
    """(first row, rows) of a shard, whole row groups of about `_BLOCK_ROWS`."""
    with scene.storage.open_parquet(shard) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        group = row = 0
        while group < len(sizes):
            end = group + 1
            while end < len(sizes) and sum(sizes[group : end + 1]) <= _BLOCK_ROWS:
                end += 1
            table = file.read_row_groups(list(range(group, end)), use_threads=False)
            yield row, table
            row, group = row + table.num_rows, end


# -- which chunk is where ----------------------------------------------------------------------------------------------


def _check_layout(scene: Scene, shard: Shard, ids: ChunkIds) -> np.ndarray | None:
    """Every chunk once, in order, splits apart; int64 [R, slots]: the row of each slot's chunk, -1 where empty.

    None where that does not hold: the rows cannot be compared with anything then.
    """
    findings, path = scene.findings, shard.path
    table = scene.table(shard, "sequence_id", "split", "chunk_ids")
    rows = np.arange(table.num_rows, dtype=np.int64)
    findings.refuse(path, scalars(table, "sequence_id") != (shard.number << ID_SHIFT) + rows, "sequence_id is another")
    values, present = present_lists(table, "chunk_ids")
    found = np.where(present, values, -1)
    splits = np.array(table["split"].to_pylist(), dtype=object)
    expected, expected_splits = _packed(ids, found.shape[1])
    expected_ids = np.where(expected >= 0, ids.chunk_ids[np.maximum(expected, 0)], -1) if len(expected) else expected
    if np.array_equal(found, expected_ids):
        if findings.refuse(path, splits != expected_splits, "a split that is not that of the sequence's documents"):
            return None
        return expected
    _explain(scene, shard, found, ids)
    return None


def _packed(ids: ChunkIds, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of chunks, int64 [R, slots], -1 in empty slots, and splits [R]: the packing rule of `training.sequences`."""
    parts, splits = [], []
    for split, wanted in zip(SPLITS, (~ids.validation, ids.validation), strict=True):
        rows = np.flatnonzero(wanted)
        count = -(-len(rows) // slots)
        parts.append(np.concatenate([rows, np.full(count * slots - len(rows), -1)]).reshape(count, slots))
        splits += [split] * count
    return np.concatenate(parts).astype(np.int64), np.array(splits, dtype=object)


def _explain(scene: Scene, shard: Shard, found: np.ndarray, ids: ChunkIds) -> None:
    """Say how the chunks of a training shard are not those of its chunk shard."""
    flat = found[found >= 0]
    unique, counts = np.unique(flat, return_counts=True)
    faults = {
        "chunks that are in no sequence": ids.chunk_ids[~np.isin(ids.chunk_ids, unique)],
        "chunks that are in sequences more than once": unique[counts > 1],
        "chunks that do not exist": unique[ids.rows(unique) < 0],
    }
    for what, some in faults.items():
        if len(some):
            scene.findings.add(shard.path, f"{what}: {len(some):,}, the first {some[0]}")
    if not scene.findings.has(shard.path):
        scene.findings.add(shard.path, "its chunks are not in their order, or splits are mixed in a sequence")


# -- what a row holds --------------------------------------------------------------------------------------------------


def _check_block(scene: Scene, shard: Shard, own: OwnShard, table: pa.Table, start: int, layout: np.ndarray) -> None:
    if not len(layout):  # a shard whose documents were all quarantined or dropped
        return
    used = layout >= 0
    rows = np.maximum(layout, 0)

    def refuse(wrong: np.ndarray, what: str) -> None:
        bad = wrong.reshape(len(layout), -1).any(axis=1)
        if bad.any():
            row = start + int(np.argmax(bad))
            scene.findings.add(
                shard.path, f"{what}: in {count_of(np.count_nonzero(bad), 'sequence')}, the first in row {row}"
            )

    documents, present = present_lists(table, "document_ids")
    refuse(present != used, "document_ids that are null where chunk_ids are not")
    refuse(used & (documents != own.ids.document_ids[rows]), "document_ids that are not those of the chunks")
    lengths = lists(table, "chunk_lengths")
    expected = np.where(used, own.tokens.n_tokens[rows], 0)
    refuse(lengths != expected, "chunk_lengths that are not those of the chunks")
    refuse(scalars(table, "n_tokens") != expected.sum(axis=1), "n_tokens that is not the sum of the chunks' lengths")
    tokens = lists(table, "tokens").reshape(*layout.shape, -1)
    refuse(tokens != np.where(used[..., None], own.tokens.tokens[rows], 0), "tokens that are not those of the chunks")

    ids, present = present_lists(table, "neighbour_ids")
    wanted = np.where(present, ids, -1).reshape(*layout.shape, -1)
    refuse(lists(table, "n_valid") != (wanted >= 0).sum(axis=2), "n_valid that is not the number of neighbours")
    if own.neighbours is not None:
        kept = np.where(used[..., None], own.neighbours[rows], -1)
        refuse(wanted != kept, "neighbour_ids that are not the first ones of the neighbours table")
    width = own.tokens.tokens.shape[1]
    expected_tokens, expected_lengths, known = joined(scene, wanted.reshape(-1), width)
    found_tokens = lists(table, "neighbour_tokens").reshape(-1, 2, width)
    found_lengths = lists(table, "neighbour_lengths").reshape(-1, 2)
    for side, what in enumerate(("neighbour", "continuation")):
        wrong = known & (found_lengths[:, side] != expected_lengths[:, side])
        refuse(wrong, f"neighbour_lengths that are not those of the {what}")
        wrong = known & (found_tokens[:, side] != expected_tokens[:, side]).any(axis=1)
        refuse(wrong, f"neighbour_tokens that are not those of the {what}")


def joined(scene: Scene, wanted: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What must stand in each cell: tokens [c, 2, m] and lengths int16 [c, 2] of a neighbour and its continuation.

    The continuation of chunk c is the chunk with the next id, if there is one and it is of the same document.

    Args:
        scene: the database.
        wanted: int64 [c] neighbour ids, -1 where missing: all 0 there.
        width: m.

    Returns:
        Also bool [c]: which cells are known, for the chunk shard of the neighbour is not damaged.

    Raises:
        DamagedError: a neighbour does not exist.
    """
    tokens = np.zeros((len(wanted), 2, width), dtype=scene.facts.token_type)
    lengths = np.zeros((len(wanted), 2), dtype=np.int16)
    known = np.ones(len(wanted), dtype=bool)
    cells = np.flatnonzero(wanted >= 0)
    for number, part in grouped(wanted[cells]):
        some = cells[part]
        if not scene.recorded("chunks", number):
            raise DamagedError(f"names neighbours of chunk shard {number}, which does not exist")
        ids, content = scene.ids(number), scene.tokens(number)
        if ids is None or content is None:
            known[some] = False
            continue
        rows = ids.rows(wanted[some])
        if (rows < 0).any():
            raise DamagedError(f"names the neighbour {wanted[some][np.argmin(rows)]}, which does not exist")
        following = ids.rows(wanted[some] + 1)
        goes_on = (following >= 0) & (ids.document_ids[following] == ids.document_ids[rows])
        tokens[some, 0], lengths[some, 0] = content.tokens[rows], content.n_tokens[rows]
        some, following = some[goes_on], following[goes_on]
        tokens[some, 1], lengths[some, 1] = content.tokens[following], content.n_tokens[following]
    return tokens, lengths, known
