"""Masked queries for a trainer: batches of arrays, streamed shard by shard."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa

from retrodb.deletions import Deletions
from retrodb.errors import InputError
from retrodb.manifest import SPANS_STAGE, Manifest, Shard
from retrodb.storage import Storage
from retrodb.training.columns import lists, scalars

MISSING = -1


@dataclass(frozen=True)
class QueryBatch:
    """Some masked queries.

    Attributes:
        query_ids, document_ids: int64 [b].
        chunk_ids: int64 [b], the chunk or block that holds the sentence, which is no candidate for it; -1 where none.
        span_ids: int64 [b]; -1 where the mask is random.
        tokens: [b, 96] wordpieces without special tokens, the mask token in place, padded with 0.
        n_tokens: int16 [b].
        masked_positions: int16 [b, 10], -1 beyond ``n_masked``.
        target_ids: [b, 10], 0 likewise.
        n_masked: int16 [b].
    """

    query_ids: np.ndarray
    document_ids: np.ndarray
    chunk_ids: np.ndarray
    span_ids: np.ndarray
    tokens: np.ndarray
    n_tokens: np.ndarray
    masked_positions: np.ndarray
    target_ids: np.ndarray
    n_masked: np.ndarray

    def __len__(self) -> int:
        return len(self.query_ids)

    def take(self, rows: np.ndarray) -> "QueryBatch":
        """Some rows, in their order."""
        return QueryBatch(*(getattr(self, column.name)[rows] for column in fields(self)))


def read_queries(
    storage: Storage,
    manifest: Manifest,
    *,
    split: str | None = "train",
    batch: int = 32,
    shuffle: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[QueryBatch]:
    """The masked queries once, in batches, but those of deleted documents; only a shard's last batch is smaller.

    Args:
        storage: the database.
        manifest: of it.
        split: ``train``, ``validation``, or None for both.
        batch: rows of a batch.
        shuffle: a seed for the order of shards and of rows inside each, another one for each epoch; None for the
            stored order.
        rank: which of the ``world_size`` readers this is: each row goes to exactly one.
        world_size: how many there are.

    Raises:
        InputError: the database has no queries, or an argument is out of range.
    """
    if SPANS_STAGE not in manifest.stages:
        raise InputError(f"{storage.url} has no masked queries yet; make them by retrodb spans.")
    if split not in ("train", "validation", None) or batch < 1 or not 0 <= rank < world_size:
        raise InputError(f"there are no batches of {batch} of the split {split!r} for rank {rank} of {world_size}.")
    shards: Sequence[Shard] = manifest.shards("queries")
    if shuffle is not None:
        shards = [shards[at] for at in np.random.default_rng([shuffle, 0]).permutation(len(shards))]
    deletions = Deletions.of(storage, manifest)
    return _batches(storage, shards, split, batch, shuffle, slice(rank, None, world_size), deletions)


def _batches(
    storage: Storage,
    shards: Sequence[Shard],
    split: str | None,
    batch: int,
    shuffle: int | None,
    own: slice,
    deletions: Deletions,
) -> Iterator[QueryBatch]:
    for shard in shards:
        table = storage.read_table(shard)
        rows = np.flatnonzero(~deletions.of_documents(scalars(table, "document_id")))
        if split is not None:
            rows = rows[table["split"].to_numpy()[rows] == split]
        if shuffle is not None:
            rows = np.random.default_rng([shuffle, 1, shard.number]).permutation(rows)
        rows = rows[own]
        queries = as_arrays(table)
        for start in range(0, len(rows), batch):
            yield queries.take(rows[start : start + batch])


def as_arrays(table: pa.Table) -> QueryBatch:
    """Rows of the ``queries`` table."""
    return QueryBatch(
        scalars(table, "query_id"),
        scalars(table, "document_id"),
        table["chunk_id"].fill_null(MISSING).to_numpy(),
        table["span_id"].fill_null(MISSING).to_numpy(),
        lists(table, "tokens"),
        scalars(table, "n_tokens"),
        lists(table, "masked_positions", MISSING),
        lists(table, "target_ids", 0),
        scalars(table, "n_masked"),
    )
