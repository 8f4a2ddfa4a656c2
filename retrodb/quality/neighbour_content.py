"""The neighbours table: no leak, an honest count, nothing that does not exist (invariants 1 and 2)."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrodb.errors import DamagedError
from retrodb.index.engine import ascending
from retrodb.manifest import TEMPLATE_NUMBER, Shard
from retrodb.neighbours import NO_CLUSTER
from retrodb.quality.scene import ChunkIds, Scene, grouped
from retrodb.schemas import ID_SHIFT
from retrodb.sizes import count_of
from retrodb.training.columns import scalars

Members = Mapping[int, int]
"""Chunks that may be neighbours, by near-duplicate cluster."""


@dataclass(frozen=True)
class NeighbourRows:
    """A neighbours shard as arrays [n, k], with where each has a value; the table's nulls are not trusted to agree."""

    ids: np.ndarray
    present: np.ndarray
    documents: np.ndarray
    documents_present: np.ndarray
    distances: np.ndarray
    distances_present: np.ndarray
    n_valid: np.ndarray
    ranks: np.ndarray | None


def present_lists(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of fixed-size lists: its values [rows, size], 0 where null, and bool [rows, size] where not null.

    Raises:
        DamagedError: a list is null; a missing value is a null *element*.
    """
    column = table.column(name).combine_chunks()
    array = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column
    if array.null_count:
        raise DamagedError(
            f"column {name!r} holds {count_of(array.null_count, 'null list')}; missing values are null elements."
        )
    flat, shape = array.flatten(), (len(array), array.type.list_size)
    values = pc.fill_null(flat, pa.scalar(0, flat.type)) if flat.null_count else flat
    present = flat.is_valid().to_numpy(zero_copy_only=False)
    return values.to_numpy(zero_copy_only=False).reshape(shape), present.reshape(shape)


def read_rows(scene: Scene, shard: Shard) -> NeighbourRows:
    """The columns of a neighbours shard."""
    names = ("neighbour_ids", "neighbour_document_ids", "distances")
    table = scene.table(shard, *names, "n_valid", "neighbour_ranks")
    ids, documents, distances = (present_lists(table, name) for name in names)
    ranks = None
    if "neighbour_ranks" in table.column_names:
        values, there = present_lists(table, "neighbour_ranks")
        ranks = np.where(there, values, -1)
    return NeighbourRows(*ids, *documents, *distances, n_valid=scalars(table, "n_valid"), ranks=ranks)


def check_neighbours(scene: Scene) -> None:
    """Every neighbours shard against its own chunks, and against the chunks it names."""
    living = _living_vectors(scene)
    members = _members(scene) if scene.facts.exclude == "cluster" else {}
    for shard in scene.shards("neighbours"):
        with scene.examining(shard):
            own = scene.ids(shard.number)
            if own is None:
                scene.findings.note("chunks or documents are damaged: their neighbours were not looked into")
                continue
            chunk_ids = scalars(scene.table(shard, "chunk_id"), "chunk_id")
            if not np.array_equal(chunk_ids, own.chunk_ids):
                raise DamagedError("its chunk ids are not those of the chunk shard of the same number, in order")
            rows = read_rows(scene, shard)
            if _check_rows(scene, shard, rows):
                _check_joins(scene, shard, rows, own)
                _check_honest_count(scene, shard, rows, own, living, members)
            scene.findings.count("neighbours", int(np.count_nonzero(rows.present)))


def _check_rows(scene: Scene, shard: Shard, rows: NeighbourRows) -> bool:
    """What a row must be in itself; returns whether its ids can be looked up."""
    refuse, path, metric = scene.findings.refuse, shard.path, scene.facts.metric
    counted = rows.present.sum(axis=1)
    n_valid, present = rows.n_valid, rows.present
    refuse(path, n_valid != counted, "n_valid is not the number of neighbours", lambda r: f"{n_valid[r]}, {counted[r]}")
    refuse(path, present[:, 1:] & ~present[:, :-1], "a neighbour behind a missing one")
    unlike = (rows.documents_present != present) | (rows.distances_present != present)
    refuse(path, unlike, "nulls of ids, document ids and distances disagree")
    unreal = present & ~np.isfinite(rows.distances)
    if metric == "l2":
        unreal |= present & (rows.distances < 0)
    refuse(path, unreal, "distances that are negative or not finite")
    keys = ascending(rows.distances, metric)
    both = present[:, 1:] & present[:, :-1]
    behind = both & (keys[:, 1:] < keys[:, :-1])
    refuse(path, behind, "neighbours that are not in the order of their distances")
    tied = both & (keys[:, 1:] == keys[:, :-1]) & (rows.ids[:, 1:] <= rows.ids[:, :-1])
    refuse(path, tied, "neighbours of equal distance that are not in the order of their ids")
    ordered = np.sort(np.where(present, rows.ids, -1 - np.arange(rows.ids.shape[1])), axis=1)
    refuse(path, np.diff(ordered, axis=1) == 0, "a neighbour twice in one row")
    _check_ranks(scene, shard, rows)
    return not refuse(path, present & (rows.ids < 0), "a neighbour with a negative id")


def _check_ranks(scene: Scene, shard: Shard, rows: NeighbourRows) -> None:
    """Ranks are there just where it was re-ranked: each of 0, 1, .. once for the neighbours of a row."""
    if (rows.ranks is None) != (scene.facts.rerank == "none"):
        raise DamagedError("neighbour_ranks are there just where neighbours are re-ranked, and here it is otherwise")
    if rows.ranks is None:
        return
    k = rows.ids.shape[1]
    expected = np.where(np.arange(k) < rows.present.sum(axis=1)[:, None], np.arange(k), k)
    found = np.sort(np.where(rows.ranks == -1, k, rows.ranks), axis=1)
    wrong = (found != expected).any(axis=1) | ((rows.ranks == -1) & rows.present).any(axis=1)
    scene.findings.refuse(shard.path, wrong, "neighbour_ranks that are not 0, 1, .. once each")


def _check_joins(scene: Scene, shard: Shard, rows: NeighbourRows, own: ChunkIds) -> None:
    queries, columns = np.nonzero(rows.present)
    ids, documents = rows.ids[queries, columns], rows.documents[queries, columns]
    facts, path = scene.facts, shard.path

    def refuse(wrong: np.ndarray, some: np.ndarray, what: str) -> None:
        scene.findings.refuse_pairs(path, wrong, what, _pair(own.chunk_ids[queries[some]], ids[some]))

    if facts.unit == "block":
        _check_uids(scene, shard, rows, own)
    everything = np.arange(len(ids))
    refuse(ids == own.chunk_ids[queries], everything, "a chunk that is its own neighbour")
    if facts.exclude != "none":
        same = documents == own.document_ids[queries]
        refuse(same, everything, "a neighbour of the query's own document")
    for number, some in grouped(ids):
        if not scene.recorded("chunks", number):
            refuse(np.ones(len(some), dtype=bool), some, f"neighbours of chunk shard {number}, which does not exist")
            continue
        other = scene.ids(number)
        if other is None:
            scene.findings.note("chunks or documents are damaged: neighbours that are theirs were not looked up")
            continue
        rows_there = other.rows(ids[some])
        refuse(rows_there < 0, some, "a neighbour that does not exist")
        there = some[rows_there >= 0]
        found = rows_there[rows_there >= 0]
        actual = other.document_ids[found]
        refuse(actual != documents[there], there, "neighbour_document_ids is not the neighbour's document")
        if facts.exclude != "none":
            hidden = (actual == own.document_ids[queries[there]]) & (actual != documents[there])
            refuse(hidden, there, "a neighbour of the query's own document")
        refuse(other.validation[found], there, "a neighbour of the validation split")
        gone = ~other.indexed[found] & ~other.validation[found]
        refuse(gone, there, "a neighbour that was deleted before the index was made")
        if facts.exclude == "cluster":
            clusters = other.clusters[found]
            near = (clusters != NO_CLUSTER) & (clusters == own.clusters[queries[there]])
            refuse(near, there, "a neighbour of the query's own near-duplicate cluster")


def _check_uids(scene: Scene, shard: Shard, rows: NeighbourRows, own: ChunkIds) -> None:
    """No neighbour equals the query's own block, or a better neighbour."""
    queries, columns = np.nonzero(rows.present)
    ids = rows.ids[queries, columns]
    uids, known = np.zeros(len(ids), dtype=np.int64), np.zeros(len(ids), dtype=bool)
    for number, some in grouped(ids):
        other = scene.ids(number) if scene.recorded("chunks", number) else None
        if other is not None:
            there = other.rows(ids[some])
            known[some] = there >= 0
            uids[some[there >= 0]] = other.uids[there[there >= 0]]
    scene.findings.refuse_pairs(
        shard.path,
        known & (uids == own.uids[queries]),
        "a neighbour that equals the query's own block",
        _pair(own.chunk_ids[queries], ids),
    )
    order = np.lexsort((uids, queries))
    twice = (np.diff(uids[order]) == 0) & (np.diff(queries[order]) == 0) & known[order][1:] & known[order][:-1]
    scene.findings.refuse_pairs(
        shard.path, twice, "equal blocks in one row", _pair(own.chunk_ids[queries[order[1:]]], ids[order[1:]])
    )


def _pair(queries: np.ndarray, ids: np.ndarray) -> Callable[[int], str]:
    return lambda at: f"chunk {queries[at]} has {ids[at]}"


def _indexed_vectors(scene: Scene) -> int | None:
    """How many chunks may be neighbours at all; None where the index has problems."""
    shards = [shard for shard in scene.shards("index") if shard.number != TEMPLATE_NUMBER]
    whole = len(scene.shards("index")) == len(scene.manifest.shards("index"))
    return sum(shard.rows for shard in shards) if whole and scene.done("index") else None


def _living_vectors(scene: Scene) -> int | None:
    """How many of them are not deleted; None also where a shard that holds something deleted is damaged."""
    living = _indexed_vectors(scene)
    for number in np.unique(scene.deleted.document_ids >> ID_SHIFT).tolist():
        own = scene.ids(number)
        if own is None or living is None:
            return None
        living -= int(np.count_nonzero(own.indexed & ~own.living))
    return living


def _members(scene: Scene) -> Members | None:
    """How many chunks of each cluster may be neighbours; None where a shard of chunks or documents is damaged."""
    counts: Counter[int] = Counter()
    for shard in scene.manifest.shards("chunks"):
        own = scene.ids(shard.number)
        if own is None:
            return None
        clusters, numbers = np.unique(own.clusters[own.living], return_counts=True)
        counts.update(dict(zip(clusters.tolist(), numbers.tolist(), strict=True)))
    return counts


def _check_honest_count(
    scene: Scene, shard: Shard, rows: NeighbourRows, own: ChunkIds, living: int | None, members: Members | None
) -> None:
    """Fewer than k neighbours only where there are no more (invariant 2). What a row names of what is deleted counts
    with what there was when it was written."""
    if living is None or members is None:
        return
    named = (rows.present & scene.deleted.of_chunks(rows.ids)).sum(axis=1)
    if scene.facts.exclude == "none":
        excluded = own.living.astype(np.int64)
    else:
        _, document, sizes = np.unique(own.document_ids, return_inverse=True, return_counts=True)
        excluded = np.where(own.living, sizes[document], 0)
    if scene.facts.exclude == "cluster":
        clusters, place = np.unique(own.clusters, return_inverse=True)
        in_cluster = np.array([members.get(int(cluster), 0) for cluster in clusters], dtype=np.int64)
        excluded = np.where(own.clusters == NO_CLUSTER, excluded, in_cluster[place])
    allowed = np.minimum(rows.ids.shape[1], living - excluded + named)
    least = allowed
    if scene.facts.unit == "block":  # of equal blocks one alone counts, and none of the query's own
        equal = scene.manifest.stages["chunk"].counts.get("duplicate_blocks", 0)
        least = np.minimum(rows.ids.shape[1], np.maximum(0, living - excluded + named - equal))
    scene.findings.refuse(
        shard.path,
        (rows.n_valid > allowed) | (rows.n_valid < least),
        "n_valid is not what there is to be found",
        lambda row: f"chunk {own.chunk_ids[row]} has {rows.n_valid[row]} of {allowed[row]}",
    )
