"""The PyTorch stream: training sequences in order, one dict of tensors each, with no random access."""

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import IterableDataset, get_worker_info

from retrodb.deletions import Deletions, mask_training
from retrodb.errors import DamagedError, InputError, MismatchError
from retrodb.manifest import Manifest, Shard, fingerprint
from retrodb.schemas import SPLITS
from retrodb.sizes import count_of
from retrodb.storage import Storage
from retrodb.training import order
from retrodb.training.shards import (
    TRAINING_ROW_GROUP,
    VALIDATION_ROWS,
    Columns,
    SequenceShape,
    TrainingShard,
    concatenated,
    split_range,
)

Sample = dict[str, torch.Tensor]

_CONVERT_ROWS: Final = 16
"""Rows turned into int64 tensors at a time: 1.4 MB, so that they are still in the cache when they are used."""


def neighbour_mask(sample: Sample) -> torch.Tensor:
    """bool ``[.., n/m, k']``: which neighbours exist. A missing one must be masked in the model, of a batch as well."""
    return sample["neighbour_ids"] >= 0


def token_mask(sample: Sample) -> torch.Tensor:
    """bool ``[.., n]``: which of ``tokens`` are text and not padding, of a sample or a batch."""
    lengths, tokens = sample["chunk_lengths"], sample["tokens"]
    places = torch.arange(tokens.shape[-1] // lengths.shape[-1])
    return (places < lengths.unsqueeze(-1)).flatten(-2)


class TrainingDataset(IterableDataset[Sample]):
    """Streams the training sequences of a database; each one exactly once over all ranks and loader workers.

    A sample is a dict of int64 tensors (embedding look-ups, ``gather`` and ``cross_entropy`` take nothing smaller
    everywhere; the conversion costs a few microseconds): ``tokens`` [n]; ``n_tokens``, ``sequence_id`` [];
    ``chunk_ids``, ``document_ids`` (-1 where padded), ``chunk_lengths``, ``n_valid`` [n/m]; ``neighbour_tokens``
    [n/m, k', 2, m] (the neighbour, then its continuation); ``neighbour_lengths`` [n/m, k', 2]; ``neighbour_ids``
    [n/m, k'] (-1 where missing). Samples are views into a few rows that were converted together: ``clone`` what is
    kept for long.

    What is deleted is masked (`retrodb.deletions.mask_training`): a row of deleted documents alone has no token, and
    keeps its place.

    Ranks and workers get contiguous parts of the stream whose sizes differ by at most one; some get none where there
    are fewer rows than consumers. `shortest` is what every rank has at least, for those who need equal steps.
    Memory: one row group; with ``shuffle``, ``shuffle_row_groups`` of them. From an object store each shard comes
    whole, once an epoch and consumer, through the cache (`retrodb.cache`), and the next one while one is read.

    Resuming. `state_dict` after any sample is the exact position and goes into `load_state_dict` of a dataset made
    alike. That holds where the dataset is iterated directly, with ``DataLoader(num_workers=0)``, and with torchdata's
    ``StatefulDataLoader``, which asks inside each worker. A plain ``DataLoader`` with workers reads ahead, and its
    workers' positions never come back: there, count batches and use `state_after`.

    Args:
        storage: the database.
        manifest: what it holds; only the shards recorded there are read.
        split: ``train``, ``validation``, or None for both.
        rank: of this process, ``0 .. world_size``.
        world_size: number of processes that share the stream.
        shuffle: a random order (see `retrodb.training.order`), another one each epoch; else as stored.
        seed: of that order.
        epoch: the first epoch; `set_epoch` sets the following ones.
        neighbours: k' to hand out, at most what was joined; None for all.
        shuffle_row_groups: row groups whose rows are mixed.

    Raises:
        InputError: an argument is out of range, more neighbours are asked for than were joined, or nothing was built.
        DamagedError: a recorded shard is missing or damaged.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: Manifest,
        split: str | None = "train",
        rank: int = 0,
        world_size: int = 1,
        *,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        neighbours: int | None = None,
        shuffle_row_groups: int = 16,
    ) -> None:
        if split not in (*SPLITS, None):
            raise InputError(f"split is {split!r}; it may be {', '.join(map(repr, SPLITS))} or None for both.")
        if not 0 <= rank < world_size:
            raise InputError(f"rank is {rank} and world_size {world_size}; ranks are numbered 0 .. world_size - 1.")
        if shuffle_row_groups < 1:
            raise InputError(f"shuffle_row_groups is {shuffle_row_groups}; it must be at least 1.")
        shards = manifest.shards("training")
        if not shards:
            raise InputError(f"{storage.url} has no training shards. Finish it: retrodb build ... --out {storage.url}")
        self._storage, self._shards, self._neighbours = storage, shards, neighbours
        self._deletions = Deletions.of(storage, manifest)
        self._rank, self._world_size = rank, world_size
        self._seed, self._shuffle, self._pool = seed, shuffle, shuffle_row_groups if shuffle else 1
        self.shape = self._probe(shards[0])
        ranges = np.array(_split_ranges(storage, manifest, split), dtype=np.int64).reshape(-1, 2)
        self._blocks = order.blocks_of(ranges[:, 0], ranges[:, 1], TRAINING_ROW_GROUP)
        self._total = int(ranges[:, 1].sum())
        stream = [split, seed if shuffle else None, self._pool, [shard.sha256 for shard in shards]]
        self.fingerprint = fingerprint(stream)
        # Shared memory: workers that live on (persistent_workers) see a later set_epoch.
        self._epoch = torch.tensor(epoch).share_memory_()
        self._resume: dict[str, Any] | None = None
        self._resumed = torch.zeros(1, dtype=torch.bool)
        self._progress: dict[str, Any] = self._state(workers=1, worker=None, turn=0, consumed=[0])

    def _probe(self, shard: Shard) -> SequenceShape:
        opened = TrainingShard(self._storage, shard, self._neighbours)
        opened.close()
        return opened.shape

    def __repr__(self) -> str:
        return (
            f"TrainingDataset({self._storage.url!r}, rows={self._total}, rank={self._rank}/{self._world_size},"
            f" epoch={self.epoch}, fingerprint={self.fingerprint[:12]})"
        )

    def __len__(self) -> int:
        """Rows of this rank in an epoch, over all its workers."""
        start, stop = self._rank_range()
        return stop - start

    @property
    def shortest(self) -> int:
        """Rows that every rank has at least: steps to take where all ranks must take as many."""
        return self._total // self._world_size

    @property
    def epoch(self) -> int:
        """The current epoch, which decides the order of a shuffled stream."""
        return int(self._epoch.item())

    def set_epoch(self, epoch: int) -> None:
        """Start ``epoch`` with the next iteration. A position that was loaded for another epoch is dropped."""
        if epoch != self.epoch:
            self._epoch.fill_(epoch)
            self._resumed.fill_(True)
            self._progress = self._state(workers=1, worker=None, turn=0, consumed=[0])

    # -- positions -------------------------------------------------------------------------------------------------

    def _rank_range(self) -> tuple[int, int]:
        return order.share(self._total, self._world_size, self._rank)

    def _consumer_range(self, workers: int, consumer: int) -> tuple[int, int]:
        start, stop = self._rank_range()
        low, high = order.share(stop - start, workers, consumer)
        return start + low, start + high

    def _state(self, workers: int, worker: int | None, turn: int, consumed: list[int]) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "epoch": self.epoch,
            "rank": self._rank,
            "world_size": self._world_size,
            "workers": workers,
            "worker": worker,
            "turn": turn,
            "consumed": consumed,
        }

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last sample that was handed out, as JSON-able data.

        In the main process of a ``DataLoader`` with workers it says nothing, for the workers iterate there: use
        `state_after`.
        """
        return {**self._progress, "consumed": list(self._progress["consumed"])}

    def state_after(
        self, batches: int, batch_size: int, num_workers: int, *, drop_last: bool = False
    ) -> dict[str, Any]:
        """The position after a plain ``DataLoader`` of this dataset has handed out ``batches`` in this epoch.

        ``batches`` counts from the start of the epoch, also in a run that was itself resumed. Load the result into a
        new dataset, and make a new loader of the same ``batch_size``, ``num_workers`` and ``drop_last`` on it: it goes
        on with the very next batch.

        Raises:
            InputError: an epoch of this rank has fewer batches, or a number is out of range.
        """
        if batches < 0 or batch_size < 1 or num_workers < 0:
            raise InputError(
                f"there is no position after {count_of(batches, 'batch', 'batches')} of {batch_size} by "
                f"{count_of(num_workers, 'worker')}."
            )
        workers = max(1, num_workers)
        consumed, available = [], 0
        for consumer in range(workers):
            start, stop = self._consumer_range(workers, consumer)
            full, part = divmod(stop - start, batch_size)
            has = full + (part > 0 and not drop_last)
            available += has
            # The loader takes turns; shares differ by one row, larger first, so only the last round is incomplete.
            taken = min(has, batches // workers + (consumer < batches % workers))
            consumed.append(min(taken * batch_size, stop - start))
        if batches > available:
            raise InputError(
                f"rank {self._rank} has {count_of(available, 'batch', 'batches')} of {batch_size} an epoch, not "
                f"{batches}."
            )
        return self._state(workers, None, batches % workers, consumed)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position with the next iteration; iterations after that one are whole epochs again.

        Call it before the loader is made.

        Raises:
            MismatchError: the position is of another stream: other data, split, order, rank or number of ranks.
        """
        try:
            position = {name: state[name] for name in self._progress}
        except (KeyError, TypeError) as error:
            raise MismatchError(f"this is no position of a training stream: {error!r} is missing.") from error
        for name in ("fingerprint", "rank", "world_size"):
            if position[name] != self._progress[name]:
                raise MismatchError(
                    f"the position is of a stream with {name} {position[name]!r}; this one has"
                    f" {self._progress[name]!r}. Make the dataset with the arguments it had then."
                )
        self._epoch.fill_(position["epoch"])
        self._resume = position
        # Shared memory: each worker marks its position as used, lest a second pass of a new loader skips rows again.
        self._resumed = torch.zeros(position["workers"], dtype=torch.bool).share_memory_()
        if position["worker"] is not None:
            self._resumed.fill_(True)[position["worker"]] = False
        self._progress = position

    def _take_resume(self, workers: int, worker: int) -> tuple[int, int, int]:
        """(whose share this iteration takes, how much of it is done, the turn)."""
        position = self._resume
        if position is None or bool(self._resumed.all()):
            return worker, 0, 0
        if position["workers"] != workers or position["worker"] not in (None, worker):
            raise MismatchError(
                f"the position is of worker {position['worker']} of {position['workers']}, and this is worker {worker}"
                f" of {workers}. Give the loader as many workers as it had then."
            )
        if bool(self._resumed[worker]):
            return worker, 0, 0
        self._resumed[worker] = True
        consumer = (worker + position["turn"]) % workers
        return consumer, int(position["consumed"][consumer]), position["turn"]

    # -- streaming -------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Sample]:
        """Samples of this rank and loader worker, from the loaded position or the start of the epoch."""
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info is not None else (1, 0)
        consumer, done, turn = self._take_resume(workers, worker)
        start, stop = self._consumer_range(workers, consumer)
        consumed = [0] * workers
        consumed[consumer] = done
        progress = self._state(workers, None if info is None else worker, turn, consumed)
        self._progress = progress
        return self._samples(start + done, stop, progress, consumer)

    def _samples(self, start: int, stop: int, progress: dict[str, Any], consumer: int) -> Iterator[Sample]:
        for columns, rows in self._pools(start, stop):
            for low in range(0, len(rows), _CONVERT_ROWS):
                some = rows[low : low + _CONVERT_ROWS]
                which = some if self._shuffle else slice(int(some[0]), int(some[-1]) + 1)
                for sample in as_samples({name: values[which] for name, values in columns.items()}):
                    progress["consumed"][consumer] += 1
                    yield sample

    def _pools(self, start: int, stop: int) -> Iterator[tuple[Columns, npt.NDArray[np.int64]]]:
        """Decoded rows, and which of them to hand out in which order."""
        blocks, shuffle = self._blocks, None
        if self._shuffle:
            shuffle = (self._seed, self.epoch)
            blocks = order.shuffled(blocks, len(self._shards), *shuffle)
        wanted = order.shards_of(blocks, start, stop)
        with _OpenShards(self._storage, self._shards, self._neighbours, wanted) as opened:
            for pool in order.pools(blocks, start, stop, self._pool, shuffle):
                parts = [
                    opened.get(int(blocks.shard[block])).read(int(blocks.first[block]), int(blocks.rows[block]))
                    for block in range(pool.low, pool.high)
                ]
                columns = parts[0] if len(parts) == 1 else concatenated(parts)
                yield mask_training(columns, self._deletions) if len(self._deletions) else columns, pool.rows


def _split_ranges(storage: Storage, manifest: Manifest, split: str | None) -> list[tuple[int, int]]:
    """First row and number of rows of the split in each shard."""
    stage = manifest.stages.get("training")
    known = stage.details.get(VALIDATION_ROWS) if stage is not None else None
    ranges = []
    for shard in manifest.shards("training"):
        rows = known.get(str(shard.number), 0) if isinstance(known, dict) else None
        if rows is not None and not (isinstance(rows, int) and 0 <= rows <= shard.rows):
            raise DamagedError(
                f"manifest.json says {rows!r} of the {count_of(shard.rows, 'row')} of {shard.path} are validation."
            )
        ranges.append(split_range(storage, shard, split, rows))
    return ranges


def as_samples(columns: Columns) -> Iterator[Sample]:
    """Rows as samples, converted together: a call for each row would cost more than the conversion itself."""
    together = {name: torch.from_numpy(values.astype(np.int64)) for name, values in columns.items()}
    names = list(together)
    for values in zip(*(tensor.unbind(0) for tensor in together.values()), strict=True):
        yield dict(zip(names, values, strict=True))


class _OpenShards:
    """Training shards held open: the `order.SHUFFLE_SHARDS` used last.

    Of an object store, the next one of ``wanted`` (places in the manifest, in the order of their first use) is fetched
    by a thread while one is read.
    """

    def __init__(
        self, storage: Storage, shards: tuple[Shard, ...], neighbours: int | None, wanted: Sequence[int]
    ) -> None:
        self._storage, self._shards, self._neighbours = storage, shards, neighbours
        self._open: OrderedDict[int, TrainingShard] = OrderedDict()
        self._following = dict(itertools.pairwise(wanted))
        self._ahead = None if storage.is_local else ThreadPoolExecutor(1, thread_name_prefix="retrodb-prefetch")

    def __enter__(self) -> "_OpenShards":
        return self

    def __exit__(self, *_: object) -> None:
        if self._ahead is not None:
            self._ahead.shutdown(wait=False, cancel_futures=True)
        while self._open:
            self._open.popitem()[1].close()

    def get(self, number: int) -> TrainingShard:
        """The shard of that place in the manifest, opened where it is not."""
        if number not in self._open:
            if len(self._open) >= order.SHUFFLE_SHARDS:
                self._open.popitem(last=False)[1].close()
            self._open[number] = TrainingShard(self._storage, self._shards[number], self._neighbours)
            if self._ahead is not None and (following := self._following.get(number)) is not None:
                self._ahead.submit(self._storage.bring, self._shards[following])
        self._open.move_to_end(number)
        return self._open[number]
