"""The leakage table against the tables it was made from, and its figures in the manifest against the table.

Some rows of every shard are derived from the tokens once more, and differently: not with `retrodb.quality.leakage`, so
that a fault there cannot hide itself. `retrodb.quality.recompute` compares every row of the drawn shards.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from retrodb.errors import DamagedError
from retrodb.manifest import MANIFEST_NAME, Shard
from retrodb.quality.leakage import histograms, leakage_of, longest_overlap, merged_histograms
from retrodb.quality.scene import ChunkIds, ChunkTokens, Scene
from retrodb.quality.training_content import joined
from retrodb.training.columns import scalars
from retrodb.training.join import NEIGHBOUR_COLUMNS, in_order

_DERIVED_ROWS: Final = 128
"""Rows of a shard that are always derived again, at less than a millisecond a row."""
_BLOCK_ROWS: Final = 2048
"""Chunks compared at a time: with ten neighbours, 5 MB of their tokens."""


@dataclass(frozen=True)
class LeakageRows:
    """A leakage shard, and what its rows are made from.

    Attributes:
        overlap: int16 [n].
        neighbour_ids: int64 [n], -1 where null.
        own: tokens of the chunk shard of the same number.
        nearest: int64 [n, k'], the neighbours that were looked at, -1 where missing.
    """

    overlap: np.ndarray
    neighbour_ids: np.ndarray
    own: ChunkTokens
    nearest: np.ndarray


def check_leakage(scene: Scene) -> None:
    """Every leakage shard, then the histograms that the report was made from."""
    found = []
    for shard in scene.shards("leakage"):
        with scene.examining(shard):
            own, tokens = scene.ids(shard.number), scene.tokens(shard.number)
            if own is None or tokens is None:
                scene.findings.note("chunks or documents are damaged: their leakage was not looked into")
                continue
            overlap = _check_shard(scene, shard, own, tokens)
            scene.findings.count("chunks of known leakage", len(overlap))
            if not scene.findings.has(shard.path):
                found.append(histograms(overlap, own.validation, tokens.tokens.shape[1]))
    if scene.done("report") and len(found) == len(scene.manifest.shards("leakage")):
        recorded = scene.manifest.stages["report"].details.get("histograms")
        if recorded != merged_histograms(found):
            scene.findings.add(MANIFEST_NAME, "the histograms of the stage report are not those of the leakage table")


def _check_shard(scene: Scene, shard: Shard, own: ChunkIds, tokens: ChunkTokens) -> np.ndarray:
    """Checks one shard; returns its overlaps."""
    table = scene.table(shard, "chunk_id", "overlap", "leakage", "neighbour_id")
    if not np.array_equal(scalars(table, "chunk_id"), own.chunk_ids):
        raise DamagedError("its chunk ids are not those of the chunk shard of the same number, in order")
    refuse, overlap = scene.findings.refuse, scalars(table, "overlap")
    beyond = (overlap < 0) | (overlap > tokens.n_tokens)
    refuse(shard.path, beyond, "an overlap outside 0 to the chunk's tokens")
    expected = leakage_of(overlap, tokens.tokens.shape[1])
    refuse(shard.path, scalars(table, "leakage") != expected, "a leakage that is not overlap / m")
    absent = table["neighbour_id"].is_null().to_numpy()
    refuse(shard.path, absent != (overlap == 0), "neighbour_id is not null just where overlap is 0")
    rows = _rows(scene, shard)
    if rows is None:
        scene.findings.note("neighbours are damaged: what has its leakage from them was not looked into")
        return overlap
    named = (rows.nearest == rows.neighbour_ids[:, None]).any(axis=1) | absent
    refuse(shard.path, ~named, f"a neighbour_id that is not one of the first {rows.nearest.shape[1]} neighbours")
    if not scene.findings.has(shard.path):
        some = np.linspace(0, len(overlap) - 1, min(len(overlap), _DERIVED_ROWS)).astype(np.int64)
        _derive(scene, shard, rows, some)
    return overlap


def _rows(scene: Scene, shard: Shard) -> LeakageRows | None:
    """A shard with what it is made from; None where that is not trusted."""
    neighbours, own = scene.shard("neighbours", shard.number), scene.tokens(shard.number)
    if neighbours is None or own is None:
        return None
    table = scene.table(shard, "overlap", "neighbour_id")
    nearest = in_order(scene.table(neighbours, *NEIGHBOUR_COLUMNS))[:, : scene.facts.leakage_neighbours]
    ids = table["neighbour_id"].fill_null(-1).to_numpy()
    return LeakageRows(scalars(table, "overlap"), ids, own, nearest)


def _derive(scene: Scene, shard: Shard, rows: LeakageRows, some: np.ndarray) -> None:
    """Rows ``some`` [s] by their definition: a run of so many tokens is shared, just there first, and no longer one."""
    width = rows.own.tokens.shape[1]
    wanted = rows.nearest[some]
    tokens, lengths, known = joined(scene, wanted.reshape(-1), width)
    whole = known.reshape(wanted.shape).all(axis=1)
    wrong = np.zeros(len(rows.overlap), dtype=bool)
    strings = [_string(*cell) for cell in zip(tokens, lengths, strict=True)]
    for at in np.flatnonzero(whole):
        row = some[at]
        query = rows.own.tokens[row, : rows.own.n_tokens[row]]
        others = strings[at * wanted.shape[1] : (at + 1) * wanted.shape[1]]
        wrong[row] = not _is_longest(query, others, wanted[at], int(rows.overlap[row]), int(rows.neighbour_ids[row]))
    scene.findings.refuse(shard.path, wrong, "an overlap or a neighbour_id that the tokens do not give")
    scene.findings.count("overlaps derived again", int(whole.sum()))


def _string(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A neighbour and its continuation, [2, m] and [2], as one string without padding."""
    return np.concatenate([tokens[side, : lengths[side]] for side in (0, 1)])


def _is_longest(query: np.ndarray, others: list[np.ndarray], ids: np.ndarray, overlap: int, neighbour: int) -> bool:
    """Whether ``overlap`` tokens are shared with ``neighbour``, with none before it, and one more with none of them."""
    longer, just = (set(_windows(query, length)) for length in (overlap + 1, overlap))
    if any(not longer.isdisjoint(_windows(other, overlap + 1)) for other in others):
        return False
    if overlap == 0:
        return True
    sharing = (int(some) for some, other in zip(ids, others, strict=True) if just & {*_windows(other, overlap)})
    return next(sharing, None) == neighbour


def _windows(tokens: np.ndarray, length: int) -> list[bytes]:
    """All substrings of so many tokens, as bytes."""
    data, size = tokens.tobytes(), tokens.itemsize
    return [data[at * size : (at + length) * size] for at in range(len(tokens) - length + 1)]


def compare_leakage(scene: Scene, shard: Shard) -> None:
    """Every row of a shard against the whole of its neighbours' tokens."""
    rows = _rows(scene, shard)
    if rows is None:
        scene.findings.note("damaged shards were not recomputed")
        return
    count, k = rows.nearest.shape
    wrong = np.zeros(count, dtype=bool)
    for start in range(0, count, _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        wanted, own = rows.nearest[block], rows.own.tokens[block]
        tokens, lengths, known = joined(scene, wanted.reshape(-1), own.shape[1])
        cells = tokens.reshape(*wanted.shape, 2, -1), lengths.reshape(*wanted.shape, 2)
        overlap, columns = longest_overlap(own, rows.own.n_tokens[block], *cells)
        ids = np.where(columns < 0, -1, wanted[np.arange(len(wanted)), columns])
        differs = (overlap != rows.overlap[block]) | (ids != rows.neighbour_ids[block])
        wrong[block] = differs & known.reshape(-1, k).all(axis=1)
    scene.findings.refuse(shard.path, wrong, "an overlap or a neighbour_id that the tokens do not give")
    scene.findings.count("leakage recomputed", count)
