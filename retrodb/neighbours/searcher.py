"""Search a finished database for queries that are no chunks of it: a text someone typed, another model's vector."""

from typing import Final

import numpy as np

from retrodb.errors import InputError, MismatchError
from retrodb.index import GroupedIndex, IndexFile, has_exact_codes
from retrodb.manifest import LARGEST_NORM, Manifest
from retrodb.neighbours.exclusion import Exclusion, UidSource
from retrodb.neighbours.select import find_neighbours
from retrodb.neighbours.sources import StoredDocuments, StoredVectors
from retrodb.neighbours.table import Neighbours
from retrodb.storage import Storage

_CACHE_BYTES: Final = 1 << 30
"""A process that answers queries keeps more of the index than a worker that visits each group once."""


def rounded_queries(queries: np.ndarray) -> np.ndarray:
    """Query vectors [q, d] as float16, which stored vectors are.

    Raises:
        InputError: one holds NaN, or more than float16 can.
    """
    with np.errstate(over="ignore"):
        rounded = queries.astype(np.float16)
    if not np.isfinite(rounded).all():
        row = int(np.argmin(np.isfinite(rounded).all(axis=1)))
        worst = float(np.abs(queries[row].astype(np.float64)).max())
        raise InputError(
            f"query {row} holds NaN, infinity, or a number beyond {np.finfo(np.float16).max:,.0f}, which float16 "
            f"cannot hold (the largest is {worst:,.6g}). Queries are never normalised or scaled: give the encoder's "
            "vectors."
        )
    return rounded


class Searcher:
    """An index opened for queries, with the exact re-score from the stored vectors."""

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        state = manifest.stages.get("index")
        if state is None:
            raise InputError(f"{storage.url} has no index yet; run the build to its end.")
        self.metric = state.details["metric"]
        self.dimension = int(manifest.fingerprints["encoder"]["dimension"])
        tuned = manifest.stages.get("neighbours")
        chunks = {shard.number: shard for shard in manifest.shards("chunks")}
        self.documents = StoredDocuments(storage, chunks)
        embeddings = {shard.number: shard for shard in manifest.shards("embeddings")}
        self.vectors = StoredVectors(storage, embeddings, self.documents.locate)
        self._index = GroupedIndex(
            storage,
            tuple(IndexFile(shard, shard.rows) for shard in manifest.shards("index") if shard.number >= 0),
            self.dimension,
            self.metric,
            nprobe=tuned.details["nprobe"] if tuned else state.details["n_lists"],
            n_lists=state.details["n_lists"],
            raw_is_exact=has_exact_codes(state.details["key"]),
            cache_bytes=_CACHE_BYTES,
            largest_norm=state.details.get(LARGEST_NORM),
        )

    def search(self, queries: np.ndarray, k: int, metric: str | None = None) -> Neighbours:
        """The ``k`` nearest chunks of each query.

        Args:
            queries: [q, d], rounded to the float16 that stored vectors have.
            k: wanted; fewer are found only where the database has no more.
            metric: refused if it is not the index' own.

        Raises:
            MismatchError: another metric or another width.
            InputError: a number that float16 cannot hold.
        """
        rounded = self.checked(queries, metric)
        return self.find(rounded, Exclusion.of_nothing(len(rounded)), k)

    def checked(self, queries: np.ndarray, metric: str | None = None) -> np.ndarray:
        """float16 [q, d]: query vectors as the index can be asked for them.

        Raises:
            MismatchError, InputError: as `search` does.
        """
        if metric is not None and metric != self.metric:
            raise MismatchError(
                f"the database was built with metric {self.metric!r} and cannot be searched with {metric!r}."
            )
        if queries.ndim != 2 or queries.shape[1] != self.dimension:
            raise MismatchError(
                f"a query of shape {queries.shape} does not fit vectors of width {self.dimension}: "
                "it was made by another encoder."
            )
        return rounded_queries(queries)

    def find(self, queries: np.ndarray, exclusion: Exclusion, k: int, uids: UidSource | None = None) -> Neighbours:
        """The ``k`` nearest allowed chunks of `checked` queries; with ``uids``, of equal blocks the best one alone."""
        return find_neighbours(
            np.full(len(queries), -1, dtype=np.int64),
            queries,
            exclusion,
            self._index,
            vectors=self.vectors,
            documents=self.documents,
            k=k,
            metric=self.metric,
            uids=uids,
        )
