"""Random access to training sequences with any number of neighbours: for those who want to change k'.

The training shards hold the k' neighbours they were built with. Here the join is done at run time instead, with the
functions of `retrodb.training.join`, from arrays that are memory-mapped: the database's chunk, neighbour and training
tables are unpacked once into a local *cache* folder (plain ``.npy`` files, about 2m + 8k + 20 bytes a chunk), under a
name made of the shards' checksums, so that a cache is never used for other data than it was made from.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from retrodb.deletions import Deletions, mask_training
from retrodb.errors import DamagedError, InputError
from retrodb.formats import HashingWriter
from retrodb.manifest import Manifest, fingerprint
from retrodb.schemas import SPLITS
from retrodb.sizes import count_of
from retrodb.storage import Storage
from retrodb.training.columns import lists, scalars
from retrodb.training.dataset import Sample, as_samples
from retrodb.training.join import MISSING, ChunkArrays, check_neighbours, in_order, locate, with_continuations
from retrodb.training.sequences import EMPTY_SLOT, check_ascending

_FORMAT: Final = 1
"""Raised when the files of a cache change their meaning."""

Arrays = dict[str, npt.NDArray]


@dataclass(frozen=True)
class _Column:
    """One file of the cache: a column of a table, of all its shards one after the other."""

    table: str
    column: str


_COLUMNS: Final = {
    "chunk_ids": _Column("chunks", "chunk_id"),
    "document_ids": _Column("chunks", "document_id"),
    "tokens": _Column("chunks", "tokens"),
    "n_tokens": _Column("chunks", "n_tokens"),
    "neighbour_ids": _Column("neighbours", "neighbour_ids"),
    "query_ids": _Column("neighbours", "chunk_id"),
    "sequences": _Column("training", "chunk_ids"),
    "sequence_ids": _Column("training", "sequence_id"),
    "validation": _Column("training", "split"),
}


def join_on_the_fly(
    chunks: ChunkArrays, neighbour_ids: npt.NDArray[np.int64], sequences: npt.NDArray[np.int64], k: int
) -> Arrays:
    """Sequences joined with the first ``k`` neighbours of their chunks; many at a time cost a quarter each of one.

    Args:
        chunks: all chunks of the database, in order of id; memory-mapped.
        neighbour_ids: int64 ``[N, stored k]``, row by row those of ``chunks``; -1 where missing.
        sequences: int64 ``[B, n/m]`` chunk ids; -1 for an empty slot.
        k: neighbours to join.

    Returns:
        What training rows hold, as arrays of ``[B, ..]``: the keys and shapes of a batch of `TrainingDataset`'s samples
        but ``sequence_id``, of the stored types.

    Raises:
        InputError: ``k`` is more than is stored.
        DamagedError: a chunk or a neighbour does not exist.
    """
    check_neighbours(k, stored=neighbour_ids.shape[1])
    count, slots = sequences.shape
    flat = sequences.reshape(-1)
    used = np.flatnonzero(flat >= 0)
    rows = locate(chunks.chunk_ids, flat[used])

    def spread(values: npt.NDArray, empty: int) -> npt.NDArray:
        out = np.full((flat.size, *values.shape[1:]), empty, dtype=values.dtype)
        out[used] = values[rows]
        return out

    wanted = spread(neighbour_ids[:, :k], MISSING)
    there = wanted >= 0
    tokens = np.zeros((flat.size, k, 2, chunks.chunk_tokens), dtype=chunks.tokens.dtype)
    lengths = np.zeros((flat.size, k, 2), dtype=np.int16)
    tokens[there], lengths[there] = with_continuations(chunks, locate(chunks.chunk_ids, wanted[there]))
    chunk_lengths = spread(chunks.n_tokens, 0).reshape(count, slots)
    return {
        "tokens": spread(chunks.tokens, 0).reshape(count, -1),
        "n_tokens": chunk_lengths.sum(axis=1, dtype=np.int32),
        "chunk_ids": sequences,
        "document_ids": spread(chunks.document_ids, EMPTY_SLOT).reshape(count, slots),
        "chunk_lengths": chunk_lengths,
        "neighbour_tokens": tokens.reshape(count, slots, *tokens.shape[1:]),
        "neighbour_lengths": lengths.reshape(count, slots, *lengths.shape[1:]),
        "neighbour_ids": wanted.reshape(count, slots, k),
        "n_valid": there.sum(axis=1, dtype=np.int8).reshape(count, slots),
    }


class TrainingTable(Dataset[Sample]):
    """The training sequences of a split by number, each joined when it is asked for, with any k' up to the stored k.

    ``table[i]`` is the same sequence as the i-th of the unshuffled `TrainingDataset`, as the same dict of tensors; with
    the k' of the build it is equal to it. Memory: none but the page cache's. Works with any sampler and any number of
    loader workers.

    Args:
        storage: the database.
        manifest: what it holds.
        cache: a local folder for the unpacked arrays; made on first use, may be shared by databases and processes.
        neighbours: k', at most the neighbours the database keeps.
        split: ``train``, ``validation``, or None for both.

    Raises:
        InputError: an argument is out of range, the cache is not local, or nothing was built.
        DamagedError: a recorded shard is missing or damaged, or the tables do not belong together.
    """

    def __init__(
        self, storage: Storage, manifest: Manifest, cache: str, neighbours: int = 2, split: str | None = "train"
    ) -> None:
        if split not in (*SPLITS, None):
            raise InputError(f"split is {split!r}; it may be {', '.join(map(repr, SPLITS))} or None for both.")
        if not manifest.shards("training"):
            raise InputError(f"{storage.url} has no training shards. Finish it: retrodb build ... --out {storage.url}")
        folder = Storage(cache)
        if not folder.is_local:
            raise InputError(f"the cache {cache!r} is not a local folder; memory-mapping needs one.")
        arrays = _cached(storage, manifest, folder)
        self._chunks = ChunkArrays(*(arrays[name] for name in ("chunk_ids", "document_ids", "tokens", "n_tokens")))
        self._neighbour_ids = arrays["neighbour_ids"]
        check_neighbours(neighbours, stored=self._neighbour_ids.shape[1])
        self._neighbours = neighbours
        self._deletions = Deletions.of(storage, manifest)
        self._sequences, self._sequence_ids = arrays["sequences"], arrays["sequence_ids"]
        self._validation = arrays["validation"]
        wanted = np.ones(len(self._sequences), dtype=bool) if split is None else self._validation
        self._rows = np.flatnonzero(~wanted if split == SPLITS[0] else wanted)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def chunks(self) -> ChunkArrays:
        """All chunks of the database, memory-mapped."""
        return self._chunks

    def retrievable(self) -> npt.NDArray[np.int64]:
        """int64: the ids of all chunks that may be a neighbour of something: training ones that are not deleted."""
        ids = self._sequences[~self._validation].reshape(-1)
        return ids[(ids >= 0) & ~self._deletions.of_chunks(ids)]

    def sequences(self, numbers: Sequence[int]) -> Arrays:
        """Sequences by number as arrays of ``[len(numbers), ..]`` of the stored types. Raises IndexError."""
        rows = self._rows[np.asarray(numbers, dtype=np.int64)]
        joined = join_on_the_fly(self._chunks, self._neighbour_ids, self._sequences[rows], self._neighbours)
        return {"sequence_id": self._sequence_ids[rows], **mask_training(joined, self._deletions)}

    def __getitem__(self, number: int) -> Sample:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[Sample]:
        """The samples of a batch, joined together: what a ``DataLoader`` asks for where it can."""
        return list(as_samples(self.sequences(numbers)))


def _cached(storage: Storage, manifest: Manifest, cache: Storage) -> Arrays:
    """The arrays of `_COLUMNS`, memory-mapped; unpacked where they are not yet."""
    shards = {name: [shard.sha256 for shard in manifest.shards(name)] for name in ("chunks", "neighbours", "training")}
    folder = fingerprint([_FORMAT, shards])
    arrays = {}
    for name, column in _COLUMNS.items():
        relative = f"{folder}/{name}.npy"
        if cache.size(relative) is None:
            cache.commit(relative, _unpacker(storage, manifest, column))
        arrays[name] = np.asarray(cache.read_array(relative))  # a plain view: np.memmap is slow to index
    if not np.array_equal(arrays["chunk_ids"], arrays["query_ids"]):
        raise DamagedError(f"{storage.url}: the neighbour table is not of the chunk table; their ids differ.")
    check_ascending(arrays["chunk_ids"])
    return arrays


def _unpacker(storage: Storage, manifest: Manifest, column: _Column) -> Callable[[HashingWriter], None]:
    """A writer of one column of all shards as one ``.npy``, one shard in memory at a time."""

    def pieces() -> Iterator[npt.NDArray]:
        for shard in manifest.shards(column.table):
            more = ["neighbour_ranks"] if column.column == "neighbour_ids" else []
            table = storage.read_table(shard, columns=[column.column, *more])
            if table.num_rows != shard.rows or column.column not in table.column_names:
                raise DamagedError(
                    f"{storage.describe(shard.path)} has {count_of(table.num_rows, 'row')} of {table.column_names}; "
                    f"recorded are {count_of(shard.rows, 'row')}, with {column.column!r}."
                )
            if column.column == "split":
                yield table["split"].to_numpy() == SPLITS[1]
            elif column.column == "neighbour_ids":
                yield in_order(table)
            elif column.column in ("chunk_id", "document_id", "n_tokens", "sequence_id"):
                yield scalars(table, column.column)
            else:
                yield lists(table, column.column, None if column.column == "tokens" else MISSING)

    def write(writer: HashingWriter) -> None:
        written = False
        for piece in pieces():
            if not written:
                header = np.lib.format.header_data_from_array_1_0(piece)
                header |= {"shape": (manifest.rows(column.table), *piece.shape[1:]), "fortran_order": False}
                np.lib.format.write_array_header_1_0(writer, header)  # type: ignore[arg-type]
                written = True
            writer.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))

    return write
