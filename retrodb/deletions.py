"""Deleted documents: gone for every reader at once, though their rows stay in the tables.

A deletion writes one small shard of the table ``deleted``, whatever the size of the database, and publishes it with a
new version. Searches, neighbours, documents and the training stream pass over what it names; other programs that read
the tables do so themselves: a chunk is gone where its document is named.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from retrodb.errors import DamagedError
from retrodb.manifest import Manifest, Shard
from retrodb.storage import Storage

Ints = npt.NDArray[np.int64]
Columns = dict[str, npt.NDArray]


@dataclass(frozen=True)
class Deletions:
    """The deleted documents of a version, sorted by id.

    Attributes:
        document_ids: int64 [n].
        first: int64 [n], first chunk id; 0 where the document has no chunk.
        last: int64 [n], one past its last chunk id; ``first`` where it has none.
    """

    document_ids: Ints
    first: Ints
    last: Ints

    @staticmethod
    def of(storage: Storage, manifest: Manifest) -> "Deletions":
        """Raises DamagedError: a shard of the table cannot be read."""
        return Deletions.of_shards(storage, manifest.shards("deleted"))

    @staticmethod
    def of_shards(storage: Storage, shards: Iterable[Shard]) -> "Deletions":
        """What some shards of the table name. Raises DamagedError: one of them cannot be read."""
        tables = [storage.read_table(shard) for shard in shards]
        try:
            ids = [table["document_id"].to_numpy().astype(np.int64) for table in tables]
            first = [table["first_chunk_id"].fill_null(0).to_numpy().astype(np.int64) for table in tables]
            counts = [table["n_chunks"].to_numpy().astype(np.int64) for table in tables]
        except (KeyError, ValueError, TypeError) as error:
            raise DamagedError(f"the table of deleted documents of {storage.url} cannot be read: {error}.") from error
        if not tables:
            nothing = np.empty(0, np.int64)
            return Deletions(nothing, nothing, nothing)
        together, unique = np.unique(np.concatenate(ids), return_index=True)
        starts = np.concatenate(first)[unique]
        return Deletions(together, starts, starts + np.concatenate(counts)[unique])

    def __len__(self) -> int:
        return len(self.document_ids)

    @property
    def chunks(self) -> int:
        """How many chunks they have."""
        return int((self.last - self.first).sum())

    @cached_property
    def _intervals(self) -> tuple[Ints, Ints]:
        """First chunk ids and ends of the documents that have chunks, ascending."""
        some = self.last > self.first
        order = np.argsort(self.first[some], kind="stable")
        return self.first[some][order], self.last[some][order]

    def of_documents(self, document_ids: npt.NDArray) -> npt.NDArray[np.bool_]:
        """bool, of the shape of ``document_ids``: which are deleted."""
        return _within(np.asarray(document_ids), self.document_ids, self.document_ids + 1)

    def of_chunks(self, chunk_ids: npt.NDArray) -> npt.NDArray[np.bool_]:
        """bool, of the shape of ``chunk_ids``: which belong to a deleted document. Negative ids do not."""
        return _within(np.asarray(chunk_ids), *self._intervals)

    def __call__(self, rows: npt.NDArray, candidates: npt.NDArray) -> npt.NDArray[np.bool_]:
        """As the hook of an `retrodb.neighbours.exclusion.Exclusion`: bool [p], which candidates are deleted."""
        return self.of_chunks(candidates)


def _within(ids: npt.NDArray, first: Ints, last: Ints) -> npt.NDArray[np.bool_]:
    """Whether each id lies in one of the intervals, which ascend and do not overlap."""
    if not len(first):
        return np.zeros(ids.shape, dtype=bool)
    place = np.searchsorted(first, ids, side="right") - 1
    return (place >= 0) & (ids < last[np.maximum(place, 0)])


def mask_training(columns: Columns, deletions: Deletions) -> Columns:
    """Rows of the training table as `retrodb.training.shards.TrainingShard.read` gives them, without what is deleted.

    The chunks of a row that are left move to its front, and the neighbours of a chunk likewise; what becomes free is
    padding. A row of deleted documents alone has no token; rows keep their number, so positions in the stream hold.

    Returns:
        The columns, copied where something of them is deleted.
    """
    own = deletions.of_chunks(columns["chunk_ids"])
    others = deletions.of_chunks(columns["neighbour_ids"])
    rows = np.flatnonzero(own.any(axis=1) | others.any(axis=(1, 2)))
    if not len(rows):
        return columns
    found = {name: values.copy() for name, values in columns.items()}
    part = {name: values[rows] for name, values in columns.items()}
    for name, values in _masked(part, own[rows], others[rows]).items():
        found[name][rows] = values
    return found


def _masked(columns: Columns, own: npt.NDArray[np.bool_], others: npt.NDArray[np.bool_]) -> Columns:
    r, slots = own.shape
    gone = others | own[:, :, None] | (columns["neighbour_ids"] < 0)
    columns = {
        **columns,
        "neighbour_ids": np.where(gone, -1, columns["neighbour_ids"]),
        "neighbour_lengths": np.where(gone[..., None], 0, columns["neighbour_lengths"]),
        "neighbour_tokens": np.where(gone[..., None, None], 0, columns["neighbour_tokens"]),
        "n_valid": (~gone).sum(axis=2).astype(columns["n_valid"].dtype),
        "chunk_ids": np.where(own, -1, columns["chunk_ids"]),
        "document_ids": np.where(own, -1, columns["document_ids"]),
        "chunk_lengths": np.where(own, 0, columns["chunk_lengths"]),
        "tokens": np.where(own[:, :, None], 0, columns["tokens"].reshape(r, slots, -1)),
    }
    near = np.argsort(gone, axis=2, kind="stable")
    for name in ("neighbour_ids", "neighbour_lengths", "neighbour_tokens"):
        values = columns[name]
        columns[name] = np.take_along_axis(values, near.reshape(near.shape + (1,) * (values.ndim - 3)), axis=2)
    order = np.argsort(own, axis=1, kind="stable")
    for name in ("chunk_ids", "document_ids", "chunk_lengths", "tokens", "n_valid", *_OF_NEIGHBOURS):
        values = columns[name]
        columns[name] = np.take_along_axis(values, order.reshape(order.shape + (1,) * (values.ndim - 2)), axis=1)
    columns["tokens"] = columns["tokens"].reshape(r, -1)
    columns["n_tokens"] = columns["chunk_lengths"].sum(axis=1).astype(columns["n_tokens"].dtype)
    return columns


_OF_NEIGHBOURS = ("neighbour_ids", "neighbour_lengths", "neighbour_tokens")
