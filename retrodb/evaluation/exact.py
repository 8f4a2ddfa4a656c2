"""Exact search over every stored vector: what an index is measured against, whatever the index."""

from collections.abc import Iterator
from typing import Final

import numpy as np
import pyarrow.compute as pc

from retrodb.database import Database
from retrodb.index import MISSING, Metric
from retrodb.neighbours import Exclusion
from retrodb.quality.recall import exact_top, merge_exact

_VECTORS_AT_ONCE: Final = 1 << 16


def exact_search(database: Database, queries: np.ndarray, k: int) -> np.ndarray:
    """The ``k`` nearest chunks of each query, compared with every stored vector that may be retrieved.

    Args:
        database: whose vectors, in the metric of its index.
        queries: float16 [q, d], from the database's own encoder.
        k: wanted.

    Returns:
        int64 [q, k] chunk ids, best first, ties by ascending id; `MISSING` where there are fewer.
    """
    metric: Metric = "ip" if database.metric == "ip" else "l2"
    exclusion = Exclusion.of_nothing(len(queries))
    best = np.full((len(queries), k), np.nan, np.float32), np.full((len(queries), k), MISSING, np.int64)
    for chunk_ids, vectors in _retrievable(database):
        found = exact_top(queries.astype(np.float32), exclusion, chunk_ids, vectors, k, metric)
        best = merge_exact([best, found], k, metric)
    return best[1]


def _retrievable(database: Database) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunk ids int64 [n] and vectors float16 [n, d] of what may be found: no validation chunk, none deleted."""
    manifest, storage = database.manifest, database.storage
    documents = {shard.number: shard for shard in manifest.shards("documents")}
    for shard in manifest.shards("chunks"):
        chunks = storage.read_table(shard, ["chunk_id", "document_id"])
        owners = storage.read_table(documents[shard.number], ["document_id", "split"])
        training = owners["document_id"].filter(pc.equal(owners["split"], "train")).to_numpy()
        chunk_ids = chunks["chunk_id"].to_numpy()
        kept = np.isin(chunks["document_id"].to_numpy(), training) & ~database.deletions.of_chunks(chunk_ids)
        vectors = database.embeddings(shard.number)
        for start in range(0, len(chunk_ids), _VECTORS_AT_ONCE):
            rows = slice(start, start + _VECTORS_AT_ONCE)
            own = kept[rows]
            if own.any():
                yield chunk_ids[rows][own], vectors[rows] if own.all() else vectors[rows][own]
