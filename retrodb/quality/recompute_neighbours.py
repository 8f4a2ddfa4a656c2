"""The neighbours of a shard once more: distances from the stored vectors; of an exact index, rows by brute force."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from retrodb.deletions import Deletions
from retrodb.index.keys import EXACT_KEY
from retrodb.manifest import Shard
from retrodb.neighbours import (
    Exclusion,
    Neighbours,
    Reranking,
    SameBlock,
    SameCluster,
    Tokens,
    by_shard,
    pair_scores,
    rerank,
)
from retrodb.quality.neighbour_content import NeighbourRows, read_rows
from retrodb.quality.recall import ExactTop, distinct_top, exact_top, merge_exact
from retrodb.quality.scene import ChunkIds, Scene, grouped

_RELATIVE: Final = 1e-5
"""Two sums of the same float32 terms in another order differ by less."""
_ABSOLUTE: Final = 1e-6
_PAIRS: Final = 1 << 15
_EQUAL_BLOCKS: Final = 4
"""Exact neighbours looked at, in multiples of k, until equal blocks are told."""


def compare_neighbours(scene: Scene, shard: Shard) -> None:
    """Distances from the stored vectors; with an exact index, the whole rows by brute force."""
    own, queries = scene.ids(shard.number), _vectors(scene, shard.number)
    if own is None or queries is None:
        scene.findings.note("damaged shards were not recomputed")
        return
    rows = read_rows(scene, shard)
    _compare_distances(scene, shard, own, queries, rows)
    if scene.facts.index_key == EXACT_KEY:
        _compare_with_all(scene, shard, own, queries, rows)
    scene.findings.count("neighbours recomputed", int(np.count_nonzero(rows.present)))


def _vectors(scene: Scene, number: int) -> np.ndarray | None:
    stored = scene.shard("embeddings", number)
    return None if stored is None else scene.storage.read_array(stored)


def _compare_distances(scene: Scene, shard: Shard, own: ChunkIds, queries: np.ndarray, rows: NeighbourRows) -> None:
    at, columns = np.nonzero(rows.present)
    ids, recorded = rows.ids[at, columns], rows.distances[at, columns]
    for number, part in grouped(ids):
        other, vectors = scene.ids(number), _vectors(scene, number)
        if other is None or vectors is None:
            continue
        for start in range(0, len(part), _PAIRS):
            some = part[start : start + _PAIRS]
            mine = np.asarray(queries[at[some]]).astype(np.float32)
            theirs = np.asarray(vectors[other.rows(ids[some])]).astype(np.float32)
            found = pair_scores(mine, theirs, scene.facts.metric)
            scene.findings.count("distances not bit-identical", int((found != recorded[some]).sum()))
            scene.findings.refuse_pairs(
                shard.path,
                _unlike(found, recorded[some]),
                "distances that are not those of the stored vectors",
                lambda i, some=some, found=found: (  # type: ignore[misc]
                    f"chunk {own.chunk_ids[at[some[i]]]} to {ids[some[i]]}: {recorded[some[i]]}, it is {found[i]}"
                ),
            )


def _unlike(found: np.ndarray, recorded: np.ndarray) -> np.ndarray:
    return np.abs(found - recorded) > _ABSOLUTE + _RELATIVE * np.abs(found)


@dataclass(frozen=True)
class _SceneClusters:
    """`retrodb.neighbours.ClusterSource` over the trusted shards of a scene."""

    scene: Scene

    def cluster_ids(self, ids: np.ndarray) -> np.ndarray:
        """int64 [n] for int64 [n] chunk ids that exist."""
        return by_shard(ids, self._take, np.empty(0, np.int64))

    def _take(self, number: int, ids: np.ndarray) -> np.ndarray:
        other = self.scene.ids(number)
        assert other is not None, "compared with trusted shards alone"
        return other.clusters[other.rows(ids)]


@dataclass(frozen=True)
class _SceneUids:
    """`retrodb.neighbours.UidSource` likewise."""

    scene: Scene

    def uid_keys(self, ids: np.ndarray) -> np.ndarray:
        """int64 [n] for int64 [n] chunk ids that exist."""
        return by_shard(ids, self._take, np.empty(0, np.int64))

    def _take(self, number: int, ids: np.ndarray) -> np.ndarray:
        other = self.scene.ids(number)
        assert other is not None, "compared with trusted shards alone"
        return other.uids[other.rows(ids)]


@dataclass(frozen=True)
class _Unnamed:
    """A hook: deleted chunks, but for those that the query's own row names.

    Attributes:
        deleted: what is deleted.
        named: int64 [q, k], the rows; -1 where missing.
    """

    deleted: Deletions
    named: np.ndarray

    def __call__(self, rows: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        unnamed = self.deleted.of_chunks(candidates)
        unnamed[unnamed] = (self.named[rows[unnamed]] != candidates[unnamed, None]).all(axis=1)
        return unnamed


def _compare_with_all(scene: Scene, shard: Shard, own: ChunkIds, queries: np.ndarray, rows: NeighbourRows) -> None:
    """Rows are the k nearest of all chunks that may be neighbours: by distance, for equally near ones are as good. Or,
    re-ranked, the k best of these.

    What is deleted may be named by rows from before, and is then counted with what they were chosen from: nothing else
    that is left may be nearer than the last they name. Re-ranked rows do not name all that they were chosen from, but
    are written all at once: they were chosen from what was not deleted then.
    """
    k, metric = scene.facts.searched or rows.ids.shape[1], scene.facts.metric
    reranked = scene.facts.rerank != "none"
    k += reranked  # one more, to see who is just outside
    hook = SameCluster(own.clusters, _SceneClusters(scene)) if scene.facts.exclude == "cluster" else None
    exclusion = Exclusion.of_chunks(own.chunk_ids, own.document_ids, scene.facts.exclude, hook)
    uids = _SceneUids(scene) if scene.facts.unit == "block" else None
    if uids is not None:
        exclusion = exclusion.also(SameBlock(own.uids, np.ones(len(own.uids), dtype=bool), uids))
    if not reranked and len(scene.deleted):
        exclusion = exclusion.also(_Unnamed(scene.deleted, np.where(rows.present, rows.ids, -1)))
    asked = np.asarray(queries).astype(np.float32)
    kept = k if uids is None else _EQUAL_BLOCKS * k
    best = None
    for chunks in scene.manifest.shards("chunks"):
        other, vectors = scene.ids(chunks.number), _vectors(scene, chunks.number)
        if other is None or vectors is None:
            scene.findings.note("damaged shards: neighbours were not compared with all chunks")
            return
        allowed = other.indexed & ~scene.passed_over.of_chunks(other.chunk_ids) if reranked else other.indexed
        some = vectors if allowed.all() else vectors[allowed]
        found = exact_top(asked, exclusion, other.chunk_ids[allowed], some, k=kept, metric=metric)
        best = found if best is None else merge_exact([best, found], kept, metric)
    if best is None:
        return
    crowded = np.zeros(len(asked), dtype=bool)
    if uids is not None:
        full = (best[1] >= 0).all(axis=1)
        best = distinct_top(best, uids, k)
        crowded = full & (best[1] < 0).any(axis=1)  # by so many equal blocks that others may stand behind them
    if reranked:
        _compare_reranked(scene, shard, own, best, rows, crowded)
        return
    exact = best[0]
    there = np.zeros(rows.present.shape, dtype=bool)
    there[:, : exact.shape[1]] = ~np.isnan(exact)
    distances = np.zeros(rows.present.shape, dtype=np.float32)
    distances[:, : exact.shape[1]] = np.nan_to_num(exact)
    wrong = (there != rows.present) | (there & rows.present & _unlike(distances, rows.distances))
    scene.findings.refuse(
        shard.path,
        wrong.any(axis=1) & ~crowded,
        "rows that are not the nearest of all chunks, though the index is exact",
        lambda row: f"chunk {own.chunk_ids[row]}",
    )


@dataclass(frozen=True)
class _SceneTokens:
    """`retrodb.neighbours.TokenSource` over the trusted shards of a scene."""

    scene: Scene
    chunk_tokens: int

    def take(self, ids: np.ndarray) -> Tokens:
        """Of int64 [n] chunk ids that exist."""
        tokens = by_shard(ids, lambda *own: self._rows(*own).tokens, np.empty((0, self.chunk_tokens), np.uint16))
        return Tokens(tokens, by_shard(ids, lambda *own: self._rows(*own).lengths, np.empty(0, np.int16)))

    def _rows(self, number: int, ids: np.ndarray) -> Tokens:
        other, stored = self.scene.ids(number), self.scene.tokens(number)
        assert other is not None, "compared with trusted shards alone"
        assert stored is not None, "a shard whose ids are trusted is"
        places = other.rows(ids)
        return Tokens(stored.tokens[places], stored.n_tokens[places])


def _compare_reranked(
    scene: Scene, shard: Shard, own: ChunkIds, best: ExactTop, rows: NeighbourRows, crowded: np.ndarray
) -> None:
    """Rows and ranks are those of the nearest candidates, re-ranked once more.

    A row is passed over where the last candidate and the one behind it are as near as float error: which of them a
    processor takes is not told.
    """
    facts, (distances, ids) = scene.facts, best
    assert facts.searched is not None, "it was re-ranked"
    assert facts.chunk_tokens is not None, "it was cut"
    k = facts.searched
    candidates = ids[:, :k]
    found = Neighbours(
        own.chunk_ids,
        candidates,
        np.where(candidates >= 0, 0, -1),
        distances[:, :k],
        (candidates >= 0).sum(axis=1).astype(np.int16),
    )
    how = Reranking("overlap" if facts.rerank == "overlap" else "bm25", rows.ids.shape[1])
    expected = rerank(found, how, _SceneTokens(scene, facts.chunk_tokens))
    assert expected.ranks is not None, "it is re-ranked"
    assert rows.ranks is not None, "they were examined"
    close = np.zeros(len(ids), dtype=bool)
    if ids.shape[1] > k:
        last, behind = distances[:, k - 1], distances[:, k]
        close = (last != behind) & ~_unlike(last, behind) & (ids[:, k] >= 0)
    width = expected.k
    unlike = np.where(rows.present, rows.ids, -1)[:, :width] != expected.neighbour_ids
    unlike |= rows.ranks[:, :width] != expected.ranks
    scene.findings.refuse(
        shard.path,
        unlike.any(axis=1) & ~crowded & ~close,
        f"rows that are not the best by {facts.rerank} of the {k} nearest, though the index is exact",
        lambda row: f"chunk {own.chunk_ids[row]}",
    )
