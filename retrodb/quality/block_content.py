"""What is particular to blocks: their budget, their uids, which of them are equal, and the null document's vector."""

import numpy as np
import pyarrow.compute as pc

from retrodb.chunking.duplicates import parts_of, repeated, uid_matrix
from retrodb.errors import DamagedError
from retrodb.manifest import MANIFEST_NAME, Shard
from retrodb.quality.content import nulls
from retrodb.quality.scene import Scene
from retrodb.sizes import count_of
from retrodb.training.columns import scalars


def check_blocks(scene: Scene) -> None:
    """Of a database of chunks there is nothing to check."""
    if scene.facts.unit != "block":
        return
    for shard in scene.shards("chunks"):
        with scene.examining(shard):
            _check_budget(scene, shard)
    _check_duplicates(scene)
    _check_null(scene)


def _check_budget(scene: Scene, shard: Shard) -> None:
    table = scene.table(shard, "n_tokens", "uid", "title_tokens", "split_sentence", "truncated_title")
    for name in ("uid", "title_tokens", "split_sentence", "truncated_title"):
        if scene.findings.refuse(shard.path, nulls(table, name), f"null {name}"):
            return
    length = scene.facts.special_tokens + scalars(table, "n_tokens").astype(np.int64)
    length += pc.list_value_length(table["title_tokens"]).to_numpy()
    beyond = length > (scene.facts.chunk_tokens or 0)
    scene.findings.refuse(shard.path, beyond, "blocks beyond their budget", lambda row: f"{length[row]} tokens")


def _check_duplicates(scene: Scene) -> None:
    """``block_duplicates`` are the uids that stand more than once in the blocks, part by part of their range."""
    chunks, parts = scene.manifest.shards("chunks"), scene.manifest.shards("block_duplicates")
    if len(scene.shards("chunks")) < len(chunks):
        scene.findings.note("damaged blocks: which of them are equal was not looked into")
        return
    blocks = 0
    for shard in scene.shards("block_duplicates"):
        with scene.examining(shard):
            recorded = scene.table(shard, "uid", "chunk_ids")
            blocks += int(pc.sum(pc.list_value_length(recorded["chunk_ids"])).as_py() or 0) - recorded.num_rows
            uids, ids = [], []
            for own in chunks:
                table = scene.table(own, "chunk_id", "uid")
                found = uid_matrix(table)
                here = parts_of(found, len(parts)) == shard.number
                uids.append(found[here])
                ids.append(scalars(table, "chunk_id")[here])
            if not repeated(np.concatenate(uids), np.concatenate(ids)).equals(recorded.combine_chunks()):
                raise DamagedError("is not which blocks have the same uid")
            scene.findings.count("equal blocks", recorded.num_rows)
    if scene.done("chunk") and len(scene.shards("block_duplicates")) == len(parts):
        counted = scene.manifest.stages["chunk"].counts.get("duplicate_blocks")
        if counted != blocks:
            scene.findings.add(
                MANIFEST_NAME, f"{count_of(blocks, 'block repeats', 'blocks repeat')} another, counted were {counted}"
            )


def _check_null(scene: Scene) -> None:
    for shard in scene.shards("null"):
        with scene.examining(shard):
            vectors = scene.storage.read_array(shard)
            if vectors.dtype != np.float16 or vectors.shape != (1, scene.facts.dimension):
                raise DamagedError(
                    f"holds {vectors.dtype} {list(vectors.shape)}, not float16 [1, {scene.facts.dimension}]"
                )
            if not np.isfinite(vectors).all():
                raise DamagedError("the null document's vector holds NaN or infinity")
            scene.findings.count("null documents", 1)
