"""The candidates of queries, for those who train a retriever: `retrodb.neighbours.candidates` over a stored database.

    db = retrodb.open("my-blocks")
    found = db.candidates(vectors, k=8, own_chunks=ids, exclude="document", tokens=True)
    found.ids        # [q, 8], slot 0 the null document
    found.tokens     # [q, 8, 288], what the reader reads

The trainer scores all slots again with its live weights (``found.scores`` are those of the published vectors).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Final

import numpy as np
import pyarrow as pa

from retrodb.errors import InputError
from retrodb.index import MISSING
from retrodb.manifest import Manifest
from retrodb.neighbours import Neighbours, StoredClusters, StoredDocuments, StoredUids, pair_scores
from retrodb.neighbours.candidates import EXCLUDES, NOT_FROM_HERE, CandidateBatch, Exclude, Origin
from retrodb.neighbours.searcher import Searcher
from retrodb.neighbours.sources import by_shard
from retrodb.recent import Recent
from retrodb.schemas import NULL_ID
from retrodb.sizes import count_of
from retrodb.storage import Storage
from retrodb.training.columns import lists, scalars
from retrodb.units import unit_of

__all__ = ["NOT_FROM_HERE", "NULL_ID", "CandidateBatch", "Candidates"]

_TOKEN_CACHE_BYTES: Final = 1 << 30
"""Token columns that a process keeps: a trainer's candidates come from everywhere."""


class Candidates:
    """A database of blocks as a source of candidates.

    Args:
        storage: the database.
        manifest: what is recorded of it.
        searcher: its index.

    Raises:
        InputError: it is a database of chunks.
    """

    def __init__(self, storage: Storage, manifest: Manifest, searcher: Searcher) -> None:
        if unit_of(manifest.config) != "block":
            raise InputError(
                f"{storage.url} is a database of chunks: candidates with a null document are of blocks. "
                "Build one with --unit block, or use search."
            )
        self._storage = storage
        self._manifest = manifest
        self._searcher = searcher
        documents = {shard.number: shard for shard in manifest.shards("documents")}
        self._clusters = StoredClusters(searcher.documents, documents)
        self._uids = StoredUids(searcher.documents)
        self._tokens = _StoredTokens(storage, searcher.documents, manifest)

    @cached_property
    def null_vector(self) -> np.ndarray:
        """float16 [d]: the null document's, as this version's encoder made it."""
        found: np.ndarray = np.array(self._storage.read_array(self._manifest.shards("null")[0])[0])
        return found

    def of(
        self,
        queries: np.ndarray,
        k: int = 8,
        *,
        own_chunks: Sequence[int] | np.ndarray | None = None,
        own_documents: Sequence[int] | np.ndarray | None = None,
        own_keys: Sequence[str | None] | None = None,
        exclude: Exclude = "document",
        metric: str | None = None,
        vectors: bool = False,
        tokens: bool = False,
    ) -> CandidateBatch:
        """The null document and the k - 1 best allowed blocks of each query.

        Whatever ``exclude`` is, a query never has its own block, nor an equal of it elsewhere; and of equal blocks it
        has one. A query of which nothing is said may have any block.

        Args:
            queries: [q, d], from the database's encoder, as it made them: nothing is normalised. Rounded to float16.
            k: slots, 1 or more.
            own_chunks: int64 [q], the block that each query comes from; -1 for none. One that this version does not
                have, as an earlier one had, stands for none, as a document does.
            own_documents: int64 [q], its document, where the query was cut otherwise than the blocks; -1 for none.
            own_keys: its document's key, likewise; None for none. A key that repeats stands for all its documents, one
                that does not occur for none.
            exclude: ``self``: the own block; ``document``: every block of its document as well; ``neardup``: those of
                near-duplicates of its document as well.
            metric: refused if it is not the database's.
            vectors: whether to return the stored vectors.
            tokens: whether to return titles and bodies as token ids.

        Raises:
            InputError: the arguments do not fit each other, or a number that float16 cannot hold.
            MismatchError: another metric, or vectors of another width.
        """
        if exclude not in EXCLUDES:
            raise InputError(f"exclude={exclude!r}: give one of {', '.join(EXCLUDES)}.")
        if k < 1:
            raise InputError(f"k is {k}: the null document alone needs a slot.")
        if np.ndim(queries) != 2:
            raise InputError(f"queries are texts or vectors [q, d], not an array of shape {np.shape(queries)}.")
        asked = self._searcher.checked(np.asarray(queries), metric)
        documents = self._searcher.documents
        of_keys = self._pairs_of_keys(own_keys, len(asked))
        origin = Origin.of(len(asked), own_chunks, own_documents, of_keys, documents)
        exclusion = origin.exclusion(exclude, documents, self._clusters, self._uids)
        wanted = Neighbours.none(np.full(len(asked), -1), 0)
        found = self._searcher.find(asked, exclusion, k - 1, self._uids) if k > 1 else wanted
        return self._batch(asked, found, vectors, tokens)

    def _batch(self, asked: np.ndarray, found: Neighbours, vectors: bool, tokens: bool) -> CandidateBatch:
        count = len(asked)
        null = self.null_vector
        pairs = np.broadcast_to(null.astype(np.float32), asked.shape)
        of_null = pair_scores(asked.astype(np.float32), pairs, self._searcher.metric)

        def with_null(first: Any, rest: np.ndarray) -> np.ndarray:
            return np.concatenate(
                [np.broadcast_to(np.asarray(first, rest.dtype).reshape(-1, 1), (count, 1)), rest], axis=1
            )

        batch = CandidateBatch(
            ids=with_null(NULL_ID, found.neighbour_ids),
            document_ids=with_null(MISSING, found.neighbour_document_ids),
            scores=with_null(of_null, found.distances),
            n_valid=found.n_valid,
        )
        if vectors:
            stored = np.zeros((*batch.ids.shape, len(null)), dtype=np.float16)
            stored[:, 0] = null
            valid = found.neighbour_ids != MISSING
            if valid.any():
                stored[:, 1:][valid] = self._searcher.vectors.rows(found.neighbour_ids[valid])
            batch = replace(batch, vectors=stored)
        return replace(batch, **self._tokens.of(batch.ids)) if tokens else batch

    # -- keys ----------------------------------------------------------------------------------------------------------

    def _pairs_of_keys(self, keys: Sequence[str | None] | None, queries: int) -> np.ndarray:
        """int64 [p, 2]: (query, document id) of the documents that have the queries' keys."""
        if keys is None:
            return np.zeros((0, 2), dtype=np.int64)
        if len(keys) != queries:
            raise InputError(
                f"own_keys has {count_of(len(keys), 'key')} for {count_of(queries, 'query', 'queries')}: give one "
                "each, None for none."
            )
        rows = np.array([row for row, key in enumerate(keys) if key is not None], dtype=np.int64)
        hashes = np.array([_key_hash(key) for key in keys if key is not None], dtype=np.int64)
        known, document_ids = self._documents_by_key
        first, last = (np.searchsorted(known, hashes, side=side) for side in ("left", "right"))
        counts = last - first
        places = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        return np.stack([np.repeat(rows, counts), document_ids[places]], axis=1)

    @cached_property
    def _documents_by_key(self) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of all documents' keys, int64 ascending, and the documents: 16 bytes a document, read once. Should two
        keys share a hash of 64 bits, one document too many is excluded."""
        hashes, ids = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for shard in self._manifest.shards("documents"):
            table = self._storage.read_table(shard, ["document_id", "key"])
            hashes.append(np.array([_key_hash(key) for key in table["key"].to_pylist()], dtype=np.int64))
            ids.append(scalars(table, "document_id"))
        joined, document_ids = np.concatenate(hashes), np.concatenate(ids)
        order = np.lexsort((document_ids, joined))
        return joined[order], document_ids[order]


def _key_hash(key: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest(), "little", signed=True
    )


class _StoredTokens:
    """Titles and bodies by chunk id, keeping the columns of the shards used last."""

    def __init__(self, storage: Storage, documents: StoredDocuments, manifest: Manifest) -> None:
        self._storage = storage
        self._documents = documents
        self._shards = {shard.number: shard for shard in manifest.shards("chunks")}
        self._recent = Recent(self._read, lambda table: table.nbytes, _TOKEN_CACHE_BYTES)

    def of(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """The token columns of a `CandidateBatch` for its ids, int64 [q, k]."""
        real = (ids != MISSING) & (ids != NULL_ID)
        unique, inverse = np.unique(ids[real], return_inverse=True)
        rows = by_shard(unique, self._take, np.zeros(0, dtype=object))
        bodies, titles = [row[0] for row in rows], [row[1] for row in rows]
        dtype, budget = self._kind
        tokens, n_tokens = _padded(bodies, budget, dtype)
        title_tokens, n_titles = _padded(titles, max(map(len, titles), default=0), dtype)
        found = {"tokens": tokens, "n_tokens": n_tokens, "title_tokens": title_tokens, "n_title_tokens": n_titles}
        spread = {}
        for name, values in found.items():
            whole = np.zeros((*ids.shape, *values.shape[1:]), dtype=values.dtype)
            whole[real] = values[inverse]
            spread[name] = whole
        return spread

    @cached_property
    def _kind(self) -> tuple[np.dtype, int]:
        with self._storage.open_parquet(next(iter(self._shards.values()))) as file:
            kind = file.schema_arrow.field("tokens").type
        return np.dtype(kind.value_type.to_pandas_dtype()), int(kind.list_size)

    def _take(self, shard: int, ids: np.ndarray) -> np.ndarray:
        table = self._recent.get(shard).take(self._documents.locate(shard, ids))
        bodies, n_tokens = lists(table, "tokens"), scalars(table, "n_tokens")
        found = np.empty(len(ids), dtype=object)
        titles = table["title_tokens"].to_pylist()
        for row in range(len(ids)):
            found[row] = (bodies[row, : n_tokens[row]], np.array(titles[row], dtype=bodies.dtype))
        return found

    def _read(self, shard: int) -> pa.Table:
        return self._storage.read_table(self._shards[shard], ["tokens", "n_tokens", "title_tokens"])


def _padded(rows: list[np.ndarray], width: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """[n, width] padded with 0, and lengths int16 [n]."""
    lengths = np.array([len(row) for row in rows], dtype=np.int16)
    padded = np.zeros((len(rows), width), dtype=dtype)
    for row, values in enumerate(rows):
        padded[row, : len(values)] = values
    return padded, lengths
