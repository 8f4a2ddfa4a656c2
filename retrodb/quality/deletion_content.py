"""The table of deleted documents: each one exists, once, with just the chunks that go with it."""

from collections.abc import Callable

import numpy as np

from retrodb.manifest import Shard
from retrodb.quality.content import nulls
from retrodb.quality.scene import Scene, grouped
from retrodb.training.columns import scalars


def check_deleted(scene: Scene) -> None:
    """Every shard in itself, against the documents and chunks, and against the shards before it."""
    before = np.empty(0, dtype=np.int64)
    for shard in scene.shards("deleted"):
        with scene.examining(shard):
            ids = _check_rows(scene, shard)
            scene.findings.refuse(shard.path, np.isin(ids, before), "documents that were deleted before", _named(ids))
            before = np.concatenate([before, ids])
            scene.findings.count("deleted documents", len(ids))


def _named(ids: np.ndarray) -> Callable[[int], str]:
    return lambda row: str(ids[row])


def _check_rows(scene: Scene, shard: Shard) -> np.ndarray:
    table = scene.table(shard, "document_id", "first_chunk_id", "n_chunks")
    ids, counts = scalars(table, "document_id"), scalars(table, "n_chunks").astype(np.int64)
    first = table["first_chunk_id"].fill_null(-1).to_numpy()
    refuse = scene.findings.refuse
    refuse(shard.path, np.concatenate([[False], np.diff(ids) <= 0])[: len(ids)], "document ids that do not ascend")
    refuse(shard.path, nulls(table, "first_chunk_id") != (counts == 0), "a first chunk of a document that has none")
    for number, rows in grouped(ids):
        found = scene.ids(number)
        if found is None:
            if not scene.recorded("documents", number):
                refuse(shard.path, np.ones(len(rows), bool), f"documents of a shard {number} that does not exist")
            continue
        owners, at, held = np.unique(found.document_ids, return_index=True, return_counts=True)
        place = np.minimum(np.searchsorted(owners, ids[rows]), max(len(owners) - 1, 0))
        known = owners[place] == ids[rows] if len(owners) else np.zeros(len(rows), bool)
        expected = np.where(known, held[place] if len(held) else 0, 0)
        refuse(shard.path, counts[rows] != expected, "n_chunks that are not the document's", _named(ids[rows]))
        starts = np.where(known, found.chunk_ids[at[place]] if len(at) else -1, -1)
        refuse(shard.path, first[rows] != starts, "a first chunk that is not the document's", _named(ids[rows]))
    return ids
