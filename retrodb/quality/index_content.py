"""The index holds every chunk that may be a neighbour exactly once, and nothing else."""

from collections.abc import Iterator
from typing import Any

import faiss
import numpy as np

from retrodb.errors import DamagedError
from retrodb.index import load_index_shard, load_template
from retrodb.index.engine import ivf_of
from retrodb.manifest import TEMPLATE_NUMBER, Shard, shard_path
from retrodb.quality.scene import Scene, grouped
from retrodb.sizes import count_of


def check_index(scene: Scene) -> None:
    """The quantiser and every index shard load, and their ids are those of the chunks that may be neighbours.

    An exact index must hold the stored vectors themselves, to the bit.
    """
    if not scene.done("index"):
        return
    template = scene.shard("index", TEMPLATE_NUMBER)
    if template is not None:
        with scene.examining(template):
            load_template(scene.storage.read_bytes(template), _dimension(scene), scene.facts.metric, template.path)
    home: dict[int, str] = {}
    for shard in scene.shards("index"):
        if shard.number != TEMPLATE_NUMBER:
            with scene.examining(shard):
                _check_shard(scene, shard, home)
    damaged = len(scene.shards("index")) < len(scene.manifest.shards("index"))
    if damaged:
        return  # what is not found may be there
    for shard in scene.shards("chunks"):
        ids = scene.ids(shard.number)
        if shard.number not in home and ids is not None and ids.indexed.any():
            scene.findings.add(_nearest(scene, shard.number), f"no index shard holds the chunks of {shard.path}")


def _dimension(scene: Scene) -> int:
    if scene.facts.dimension is None:
        raise DamagedError("the index is recorded, but not what made the embeddings")
    return scene.facts.dimension


def _nearest(scene: Scene, number: int) -> str:
    """The index shard that most likely should hold a chunk shard: the last one."""
    shards = [shard for shard in scene.manifest.shards("index") if shard.number != TEMPLATE_NUMBER]
    return shards[-1].path if shards else shard_path("index", 0)


def _check_shard(scene: Scene, shard: Shard, home: dict[int, str]) -> None:
    findings, facts = scene.findings, scene.facts
    with scene.storage.local_copy(shard) as path:
        index = load_index_shard(path, _dimension(scene), facts.metric, shard.rows)
    ids = _index_ids(index)
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    findings.count("indexed vectors", len(ids))
    if findings.refuse(shard.path, np.diff(ids) == 0, "chunks indexed twice", lambda row: str(ids[row])):
        return
    for number, part in grouped(ids):
        if not scene.recorded("chunks", number):
            findings.add(shard.path, f"indexes {count_of(len(part), 'chunk')} of shard {number}, which does not exist")
        elif number in home:
            findings.add(shard.path, f"indexes chunks of shard {number}, as {home[number]} does")
        else:
            home[number] = shard.path
            _check_chunks(scene, shard, number, ids[part])
            if ivf_of(index) is None:
                _check_vectors(scene, shard, number, index, ids[part], order[part])


def _check_chunks(scene: Scene, shard: Shard, number: int, found: np.ndarray) -> None:
    """The ids found of one chunk shard are those of its chunks but the validation and the deleted ones."""
    own = scene.ids(number)
    if own is None:
        return
    expected = own.chunk_ids[own.indexed]
    if np.array_equal(found, expected):
        return
    validation = np.isin(found, own.chunk_ids[own.validation])
    strange = ~np.isin(found, own.chunk_ids)
    deleted = np.isin(found, own.chunk_ids[~own.indexed & ~own.validation])
    missing = ~np.isin(expected, found)
    for wrong, ids, what in (
        (validation, found, "indexes validation chunks"),
        (deleted, found, "indexes chunks that were deleted before it was made"),
        (strange, found, "indexes chunks that do not exist"),
        (missing, expected, "does not index chunks that may be neighbours"),
    ):
        if wrong.any():
            scene.findings.add(shard.path, f"{what}: {np.count_nonzero(wrong):,}, the first {ids[np.argmax(wrong)]}")


def _check_vectors(scene: Scene, shard: Shard, number: int, index: Any, ids: np.ndarray, places: np.ndarray) -> None:
    """An exact index (`load_index_shard` gives it as float32) holds the stored vectors."""
    stored, own = scene.shard("embeddings", number), scene.ids(number)
    if stored is None or own is None or scene.findings.has(shard.path):
        return
    vectors = scene.storage.read_array(stored)
    flat: Any = faiss.downcast_index(index.index)
    held = faiss.rev_swig_ptr(flat.get_xb(), int(index.ntotal) * int(index.d)).reshape(-1, int(index.d))
    for rows in np.array_split(np.arange(len(ids)), max(1, len(ids) // 8192)):
        wrong = (held[places[rows]] != np.asarray(vectors[own.rows(ids[rows])]).astype(np.float32)).any(axis=1)
        if wrong.any():
            scene.findings.add(
                shard.path, f"holds other vectors than {stored.path}, as for chunk {ids[rows][np.argmax(wrong)]}"
            )
            return


def _index_ids(index: Any) -> np.ndarray:
    """int64 [ntotal]: the ids an index shard holds, in the order it holds them."""
    ivf = ivf_of(index)
    if ivf is None:
        return faiss.vector_to_array(index.id_map).astype(np.int64)
    parts = list(_list_ids(ivf.invlists, int(ivf.nlist)))
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _list_ids(lists: Any, count: int) -> Iterator[np.ndarray]:
    for number in range(count):
        size = int(lists.list_size(number))
        if size:
            pointer = lists.get_ids(number)
            yield faiss.rev_swig_ptr(pointer, size).astype(np.int64)
            lists.release_ids(number, pointer)
