"""The duplicates table: clusters are those of the documents, and nothing is left that was to be removed."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrodb.corpus.near_duplicates import DEDUP_RULES
from retrodb.manifest import MANIFEST_NAME, Shard
from retrodb.neighbours import NO_CLUSTER, clusters_of
from retrodb.quality.content import nulls
from retrodb.quality.scene import Scene
from retrodb.schemas import ID_SHIFT
from retrodb.sizes import count_of
from retrodb.training.columns import scalars


def check_duplicates(scene: Scene) -> None:
    """Every duplicates shard in itself and against its documents; then clusters across shards."""
    if not scene.done("dedup"):
        return
    clusters: list[np.ndarray] = []
    validation: list[np.ndarray] = []
    whole = len(scene.shards("duplicates")) == len(scene.manifest.shards("duplicates"))
    duplicates = {shard.number: shard for shard in scene.shards("duplicates")}
    for documents in scene.shards("documents"):
        shard = duplicates.get(documents.number)
        if shard is not None:
            with scene.examining(shard):
                _check_rows(scene, shard, scene.storage.read_table(shard))
        if scene.done("chunk") and whole:
            with scene.examining(shard or documents):
                table = scene.table(documents, "document_id", "key", "source", "content_hash", "cluster_id", "split")
                _join(scene, shard, documents, table)
                own = clusters_of(table)
                clusters.append(own[own != NO_CLUSTER])
                validation.append((table["split"].to_numpy() == "validation")[own != NO_CLUSTER])
    if whole:
        _check_counts(scene)
        if clusters and len(scene.shards("documents")) == len(scene.manifest.shards("documents")):
            _check_clusters(scene, np.concatenate(clusters), np.concatenate(validation).astype(bool))


def _check_rows(scene: Scene, shard: Shard, table: pa.Table) -> None:
    refuse, path = scene.findings.refuse, shard.path
    row = scalars(table, "row")
    refuse(path, (row < 0) | np.concatenate([[False], np.diff(row) <= 0]), "rows that do not ascend")
    removed = ~nulls(table, "removed")
    known = pc.is_in(table["removed"], pa.array(DEDUP_RULES)).to_numpy(zero_copy_only=False)
    refuse(path, removed & ~known, f"removed by a rule that is not one of {', '.join(DEDUP_RULES)}")
    refuse(path, removed != nulls(table, "document_id"), "a document id of a removed document, or none of a kept one")
    for name in ("cluster_id", "cluster_kept", "key", "source", "content_hash"):
        refuse(path, nulls(table, name), f"null {name}")
    ids = table["document_id"].fill_null(0).to_numpy()
    expected = (shard.number << ID_SHIFT) + row - np.cumsum(removed)
    refuse(path, ~removed & (ids != expected), "document_id is not the row less the rows removed before it")
    scene.findings.count("near-duplicates", table.num_rows)


def _join(scene: Scene, shard: Shard | None, documents: Shard, table: pa.Table) -> None:
    """The kept rows of a duplicates shard, and the clusters of its documents, are the same."""
    found = clusters_of(table)
    if shard is None:
        scene.findings.refuse(documents.path, found != NO_CLUSTER, "a cluster_id that the duplicates table lacks")
        return
    kept = scene.storage.read_table(shard)
    kept = kept.filter(kept["document_id"].is_valid())
    ids = kept["document_id"].to_numpy()
    known = scalars(table, "document_id")
    lost = ~np.isin(ids, known)
    if scene.findings.refuse(shard.path, lost, "documents that do not exist", lambda row: str(ids[row])):
        return
    rows = np.searchsorted(known, ids)
    for name in ("key", "source", "content_hash"):
        differs = pc.not_equal(kept[name], table[name].take(pa.array(rows))).to_numpy(zero_copy_only=False)
        scene.findings.refuse(shard.path, differs.astype(bool), f"{name} is not the document's")
    expected = np.full(len(known), NO_CLUSTER)
    several = kept["cluster_kept"].to_numpy() > 1
    expected[rows[several]] = kept["cluster_id"].to_numpy()[several]
    scene.findings.refuse(documents.path, found != expected, "cluster_id is not that of the duplicates table")


def _check_counts(scene: Scene) -> None:
    counts = scene.manifest.stages["dedup"].counts
    rows = scene.manifest.rows("duplicates")
    if rows != counts.get("clustered"):
        scene.findings.add(
            MANIFEST_NAME, f"duplicates has {count_of(rows, 'row')}, counted were {counts.get('clustered')}"
        )
    for rule in DEDUP_RULES:
        found = 0
        for shard in scene.shards("duplicates"):
            found += pc.sum(pc.equal(scene.table(shard, "removed")["removed"], rule)).as_py() or 0
        if found != counts.get(f"dropped.{rule}"):
            counted = counts.get(f"dropped.{rule}")
            scene.findings.add(
                MANIFEST_NAME,
                f"{count_of(found, 'document was', 'documents were')} removed as {rule}, counted were {counted}",
            )


def _check_clusters(scene: Scene, clusters: np.ndarray, validation: np.ndarray) -> None:
    """What is left of the clusters is what the settings allow. No one shard is to blame for it."""
    training, held_out = clusters[~validation], clusters[validation]
    both = np.intersect1d(training, held_out)
    if scene.facts.decontaminated and len(both):
        scene.findings.add(
            MANIFEST_NAME, f"cluster {both[0]} holds training and validation documents, though it is decontaminated"
        )
    names, sizes = np.unique(training, return_counts=True)
    if scene.facts.drops_duplicates and (sizes > 1).any():
        scene.findings.add(MANIFEST_NAME, f"cluster {names[sizes > 1][0]} has several documents, though one is kept")
    names, sizes = np.unique(clusters, return_counts=True)
    if (sizes == 1).any() and not scene.manifest.stages["corpus"].counts.get("dropped.deleted"):
        scene.findings.add(MANIFEST_NAME, f"cluster {names[sizes == 1][0]} has one document: its id should be null")
