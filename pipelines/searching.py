"""What every way of searching has in common, and the simple one: a query shard visits the whole index on one worker."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.shards import ShardFiles, block_uids, chunk_clusters, chunk_columns, vectors_of
from retrodb.pipelines.tasks import StageDoFn, Task, finish

from retrodb.deletions import Deletions
from retrodb.formats import File
from retrodb.index import GroupedIndex, IndexFile
from retrodb.index.engine import Metric
from retrodb.manifest import Shard, shard_path
from retrodb.neighbours import (
    NO_CLUSTER,
    CandidateSource,
    Exclude,
    Exclusion,
    Neighbours,
    Reranking,
    SameBlock,
    SameCluster,
    SearchedIndex,
    StoredClusters,
    StoredDocuments,
    StoredTokens,
    StoredUids,
    StoredVectors,
    find_neighbours,
    rerank,
    to_table,
)
from retrodb.storage import Storage

NEIGHBOUR_ROW_GROUP: Final = 1 << 14
SEARCHED: Final = "searched"
"""Key of a receipt's details: of a query shard that was there, the queries that were asked anew."""


@dataclass(frozen=True)
class SearchSettings:
    """How chunks are searched, and where everything is.

    ``together``: a query shard visits all index shards on one worker, which pays where the index is small.
    ``fetched``: the vectors of candidates come from their shards by a shuffle, instead of being looked up.
    ``in_memory``: the runner keeps what is shuffled in memory, as the local one does.
    ``blocks``: of equal blocks one is a neighbour, and none of the query's own.
    ``largest_norm``: of the indexed vectors, where the metric is the inner product.
    ``reranking``: of the ``k`` that are searched, which are kept; None keeps them as they are.
    ``deleted``: the shards of the table ``deleted``. What they name is nobody's neighbour, whether the index still has
    its vectors or was made without them.
    """

    index: tuple[IndexFile, ...]
    documents: Mapping[int, File]
    chunks: Mapping[int, File]
    embeddings: Mapping[int, File]
    dimension: int
    metric: Metric
    k: int
    exclude: Exclude
    raw_is_exact: bool
    n_lists: int
    nprobe: int
    together: bool = False
    fetched: bool = False
    in_memory: bool = True
    blocks: bool = False
    largest_norm: float | None = None
    reranking: Reranking | None = None
    deleted: tuple[Shard, ...] = ()

    @property
    def kept(self) -> int:
        """Neighbours that are written for each chunk."""
        return self.k if self.reranking is None else self.reranking.kept

    @property
    def searched(self) -> SearchedIndex:
        """The index as far as asking needs to know it."""
        vectors = sum(file.vectors for file in self.index)
        return SearchedIndex(vectors, self.nprobe, self.n_lists, self.raw_is_exact, self.largest_norm)


@dataclass(frozen=True)
class QueryShard:
    """The files of a query shard, and how many rounds have been over it.

    A round reads what that many rounds left and writes beside it, so that a runner may repeat any part of it.
    """

    files: ShardFiles
    rounds: int = 0


def query_clusters(storage: Storage, files: ShardFiles, document_ids: np.ndarray, exclude: Exclude) -> np.ndarray:
    """int64 [n]: the cluster that each chunk of a shard may have no neighbour of; `NO_CLUSTER` for none."""
    if exclude != "cluster":
        return np.full(len(document_ids), NO_CLUSTER)
    return chunk_clusters(storage, files, document_ids)


def query_uids(storage: Storage, files: ShardFiles, rows: int, blocks: bool) -> np.ndarray:
    """int64 [n]: what tells the equals of each block of a shard; 0 for chunks."""
    return block_uids(storage, files) if blocks else np.zeros(rows, dtype=np.int64)


def search_tasks(files: Mapping[int, ShardFiles], chunks: Sequence[Shard]) -> list[Task]:
    """One task a query shard."""
    return [Task(shard.number, QueryShard(files[shard.number]), weight=shard.rows) for shard in chunks]


class SearchStep(StageDoFn):
    """A step of the search."""

    def __init__(self, book: ReceiptBook, settings: SearchSettings) -> None:
        super().__init__(book)
        self._settings = settings

    def setup(self) -> None:
        super().setup()
        self._gone = Deletions.of_shards(self._storage, self._settings.deleted)

    def _exclusion(self, files: ShardFiles) -> tuple[Exclusion, np.ndarray, np.ndarray]:
        """Of a query shard, with its chunk ids and document ids."""
        chunk_ids, document_ids = chunk_columns(self._storage, files)
        exclusion = Exclusion.of_chunks(chunk_ids, document_ids, self._settings.exclude)
        return self._of_living(exclusion), chunk_ids, document_ids

    def _of_living(self, exclusion: Exclusion) -> Exclusion:
        """With what is deleted excluded, before anything is looked up of it."""
        return exclusion.also(self._gone) if len(self._gone) else exclusion

    def _finish(self, number: int, found: Neighbours, searched: int | None = None) -> None:
        """Write a query shard's neighbours, re-ranked if they are to be, and its receipt (`_account`)."""
        settings = self._settings
        if settings.reranking is not None:
            tokens = StoredTokens(StoredDocuments(self._storage, settings.chunks))
            found = rerank(found, settings.reranking, tokens)
        committed = self._storage.commit_table(shard_path("neighbours", number), to_table(found), NEIGHBOUR_ROW_GROUP)
        self._account(number, found, Shard.of(committed, number, len(found.chunk_ids)), searched)

    def _account(self, number: int, found: Neighbours, shard: Shard, searched: int | None = None) -> None:
        """Write the receipt of a query shard, whose neighbours are in place; ``searched``: queries that were asked, if
        not all of them."""
        rows = len(found.chunk_ids)
        counts = {
            "queries": rows,
            "found": int(found.n_valid.sum()),
            "short": int((found.n_valid < self._settings.kept).sum()),
        }
        details = {} if searched is None else {SEARCHED: searched}
        finish(self._book, Receipt(number, {"neighbours": shard}, counts, details))


class LookingUp(SearchStep):
    """A step that looks up what is known of candidates in their shards."""

    def setup(self) -> None:
        super().setup()
        settings, storage = self._settings, self._storage
        self._documents = StoredDocuments(storage, settings.chunks)
        self._vectors = StoredVectors(storage, settings.embeddings, self._documents.locate)
        self._clusters = StoredClusters(self._documents, settings.documents)
        self._uids = StoredUids(self._documents) if settings.blocks else None


class WholeIndexStep(LookingUp):
    """A step that searches the whole index on one worker: its shards are opened one after the other."""

    def setup(self) -> None:
        super().setup()
        settings = self._settings
        self._index = GroupedIndex(
            self._storage,
            settings.index,
            settings.dimension,
            settings.metric,
            nprobe=settings.nprobe,
            n_lists=settings.n_lists,
            raw_is_exact=settings.raw_is_exact,
            largest_norm=settings.largest_norm,
        )

    @property
    def _source(self) -> CandidateSource:
        """What is asked for candidates."""
        return self._index

    def _find(self, chunk_ids: np.ndarray, vectors: np.ndarray, exclusion: Exclusion) -> Neighbours:
        return find_neighbours(
            chunk_ids,
            vectors,
            exclusion,
            self._source,
            vectors=self._vectors,
            documents=self._documents,
            k=self._settings.k,
            metric=self._settings.metric,
            uids=self._uids,
        )


class SearchShard(WholeIndexStep):
    """Task (a query shard) -> its neighbours, written."""

    def process(self, task: Task) -> Iterator[int]:
        with self._naming(task.number):
            if self._left(task) is not None:
                self._finish(task.number, self._found(task.payload.files))
            yield task.number

    def _found(self, files: ShardFiles, rows: np.ndarray | None = None) -> Neighbours:
        """The neighbours of a query shard, or of the given rows int64 [m] of it."""
        exclusion, chunk_ids, document_ids = self._exclusion(files)
        clusters = query_clusters(self._storage, files, document_ids, self._settings.exclude)
        if (clusters != NO_CLUSTER).any():
            exclusion = exclusion.also(SameCluster(clusters, self._clusters))
        if self._uids is not None:
            own = block_uids(self._storage, files)
            exclusion = exclusion.also(SameBlock(own, np.ones(len(own), dtype=bool), self._uids))
        vectors = vectors_of(self._storage, files, len(chunk_ids))
        if rows is None:
            return self._find(chunk_ids, vectors, exclusion)
        return self._find(chunk_ids[rows], vectors[rows], exclusion.take(rows))
