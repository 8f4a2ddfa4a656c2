"""Reading shards of several tables together: what the stages behind embedding share."""

from dataclasses import dataclass

import numpy as np

from retrodb.chunking.duplicates import uid_keys, uid_matrix
from retrodb.errors import DamagedError
from retrodb.formats import File
from retrodb.manifest import WORK_FOLDER, Manifest, Shard
from retrodb.neighbours import clusters_of
from retrodb.sizes import count_of
from retrodb.storage import Storage


@dataclass(frozen=True)
class ShardFiles:
    """The files of one shard number, as far as the stages before have made them."""

    documents: File
    chunks: File
    embeddings: File = ""
    neighbours: File = ""


def shard_files(manifest: Manifest) -> dict[int, ShardFiles]:
    """The files of every chunk shard."""
    found: dict[str, dict[int, File]] = {
        table: {shard.number: shard for shard in manifest.shards(table)}
        for table in ("documents", "embeddings", "neighbours")
    }
    return {
        shard.number: ShardFiles(
            documents=found["documents"][shard.number],
            chunks=shard,
            embeddings=found["embeddings"].get(shard.number, ""),
            neighbours=found["neighbours"].get(shard.number, ""),
        )
        for shard in manifest.shards("chunks")
    }


def as_read(shard: Shard) -> File:
    """A document shard as a stage reads it: one that was read again from its source is not the one recorded."""
    return shard.path if shard.path.startswith(f"{WORK_FOLDER}/") else shard


def chunk_columns(storage: Storage, files: ShardFiles) -> tuple[np.ndarray, np.ndarray]:
    """``chunk_id`` and ``document_id``, int64 [n] each."""
    chunks = storage.read_table(files.chunks, ["chunk_id", "document_id"])
    return chunks["chunk_id"].to_numpy(), chunks["document_id"].to_numpy()


def validation_chunks(storage: Storage, files: ShardFiles, document_ids: np.ndarray) -> np.ndarray:
    """bool [n]: whether each chunk's document is of the validation split."""
    documents = storage.read_table(files.documents, ["document_id", "split"])
    is_validation = np.array(documents["split"].to_pylist(), dtype=object) == "validation"
    return np.isin(document_ids, documents["document_id"].to_numpy()[is_validation])


def chunk_clusters(storage: Storage, files: ShardFiles, document_ids: np.ndarray) -> np.ndarray:
    """int64 [n]: the near-duplicate cluster of each chunk's document, `NO_CLUSTER` where it has none."""
    documents = storage.read_table(files.documents, ["document_id", "cluster_id"])
    return clusters_of(documents)[np.searchsorted(documents["document_id"].to_numpy(), document_ids)]


def block_uids(storage: Storage, files: ShardFiles) -> np.ndarray:
    """int64 [n]: what tells the equal blocks of a shard."""
    return uid_keys(uid_matrix(storage.read_table(files.chunks, ["uid"])))


def vectors_of(storage: Storage, files: ShardFiles, n_chunks: int) -> np.ndarray:
    """float16 [n, d]: the stored vectors of a shard.

    Raises:
        DamagedError: they are not one a chunk.
    """
    vectors = storage.read_array(files.embeddings)
    if vectors.ndim != 2 or len(vectors) != n_chunks:
        raise DamagedError(
            f"{storage.describe(files.embeddings)} has shape {vectors.shape} for {count_of(n_chunks, 'chunk')}. "
            "Run the build again to repair it."
        )
    return vectors
