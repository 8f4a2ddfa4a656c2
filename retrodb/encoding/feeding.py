"""From texts to vectors without waiting: tokens are made ahead of the network, and a card is given its batches ahead.

A CPU is busy with the network itself: a shard's texts are tokenised, sorted by length and computed in turn. A card
computes while this process prepares what is next. So texts are tokenised by threads, a slab of rows at a time;
batches go to the card from pinned memory, results come back the same way, and nothing asks the card for a value
before the slab after it is under way. Either way what is computed together depends on the shard and the device alone.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from retrodb.encoding.batches import length_batches
from retrodb.errors import MismatchError, WorkerError

CPU_BATCH_TOKENS: Final = 2048
"""About 32 chunks: small enough for a core's cache, large enough for its matrix units."""
_CARD_BATCH_TOKENS: Final = 65536
_CARD_SLAB_ROWS: Final = 16384
"""Rows sorted by length together: some twenty batches of chunks, so that rows of a batch are of about one length."""
_CARD_MEMORY_SHARE: Final = 4
_FLOATS_A_TOKEN: Final = 40
"""Activations that live at once, in multiples of the width: the feed-forward layer's eight, attention's, and room."""
_PIECE_TEXTS: Final = 512

Rows = list[npt.NDArray[np.int32]]
"""Token ids, an array a row: as lists of numbers, those of a shard would be the largest thing a worker holds."""
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Batch:
    """Token ids int64 [b, l] and attention mask int64 [b, l]; ``full`` where nothing is padded. ``types`` int64 [b, l]
    are token types, None where all are 0.

    ``full`` is said beside the mask because to look for it would make a card's user wait for the card.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    full: bool
    types: torch.Tensor | None = None

    @staticmethod
    def padded(rows: Sequence[npt.ArrayLike], padding_id: int, second: np.ndarray | None = None) -> "Batch":
        """Rows of token ids as one batch; ``second`` int64 [b] is where token type 1 begins in each."""
        lengths = np.array([np.size(row) for row in rows])
        longest = int(lengths.max())
        mask = np.arange(longest)[None, :] < lengths[:, None]
        ids = np.full(mask.shape, padding_id, dtype=np.int64)
        ids[mask] = np.concatenate(rows)
        types = None
        if second is not None:
            types = torch.from_numpy((mask & (np.arange(longest)[None, :] >= second[:, None])).astype(np.int64))
        return Batch(torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64)), bool(mask.all()), types)

    def on(self, device: str) -> "Batch":
        """There, or on its way there."""
        if device == "cpu":
            return self

        def there(part: torch.Tensor) -> torch.Tensor:
            return part.pin_memory().to(device, non_blocking=True)

        types = None if self.types is None else there(self.types)
        return Batch(there(self.ids), there(self.mask), self.full, types)


class Network(Protocol):
    """A loaded network: a batch of token ids to one vector a row."""

    def __call__(self, batch: Batch) -> torch.Tensor:
        """[b, d] float32."""


@dataclass(frozen=True)
class Place:
    """Where a network computes, and in which portions: ``slab_rows`` None takes all rows of a shard together."""

    device: str
    batch_tokens: int = CPU_BATCH_TOKENS
    slab_rows: int | None = None

    @staticmethod
    def of(device: str, dimension: int, element_bytes: int) -> "Place":
        """Batches as large as a quarter of the card's memory holds; all of it, not what happens to be free, so that
        they are the same every time.

        Args:
            device: ``cpu`` or ``cuda:N``.
            dimension: the network's width.
            element_bytes: of its activations.
        """
        if not device.startswith("cuda"):
            return Place(device)
        room = torch.cuda.get_device_properties(device).total_memory // _CARD_MEMORY_SHARE
        tokens = room // (_FLOATS_A_TOKEN * dimension * element_bytes)
        return Place(device, min(_CARD_BATCH_TOKENS, max(CPU_BATCH_TOKENS, tokens)), _CARD_SLAB_ROWS)

    def current(self) -> AbstractContextManager[object]:
        """Pinned memory belongs to the current card: to another than this one it would cost a context there."""
        return torch.cuda.device(self.device) if self.device.startswith("cuda") else nullcontext()


@dataclass(frozen=True)
class Featurised:
    """``count`` rows of token ids with their special tokens, in slabs, which may still be in the making. ``second``
    int64 [count] is where token type 1 begins in each row; None where there is type 0 alone."""

    count: int
    slabs: Iterable[Rows]
    second: np.ndarray | None = None


def tokenised(
    tokenize: Callable[[Sequence[str]], list[list[int]]],
    texts: Sequence[str],
    slab_rows: int | None,
    pool: Executor | None,
) -> Featurised:
    """The token ids of texts: by ``pool`` ahead of their use, which begins at once; else when they are used."""

    def piece(start: int) -> Rows:
        return [np.array(row, dtype=np.int32) for row in tokenize(texts[start : start + _PIECE_TEXTS])]

    starts = range(0, len(texts), _PIECE_TEXTS)
    if slab_rows is None or pool is None:
        return Featurised(len(texts), ([row for start in starts for row in piece(start)] for _ in range(bool(texts))))
    each = max(1, slab_rows // _PIECE_TEXTS)
    pieces = _ahead(piece, starts, pool, 2 * each)

    def slabs() -> Iterator[Rows]:
        while slab := [row for piece in itertools.islice(pieces, each) for row in piece]:
            yield slab

    return Featurised(len(texts), slabs())


def _ahead(work: Callable[[Item], Result], items: Iterable[Item], pool: Executor, most: int) -> Iterator[Result]:
    """Results in order; at most ``most`` are made before they are asked for."""
    left = iter(items)
    futures = deque(pool.submit(work, item) for item in itertools.islice(left, most))

    def results() -> Iterator[Result]:
        while futures:
            result = futures.popleft().result()
            futures.extend(pool.submit(work, item) for item in itertools.islice(left, 1))
            yield result

    return results()


def vectors_of(network: Network, rows: Featurised, place: Place, padding_id: int, dimension: int) -> np.ndarray:
    """float16 [n, d]: one vector a row.

    Raises:
        MismatchError: the network's vectors are of another width.
        WorkerError: the card's memory is taken.
    """
    found = np.zeros((rows.count, dimension), dtype=np.float16)
    waiting: deque[_Underway] = deque()
    begun = at = 0
    with torch.inference_mode(), place.current():
        for slab in itertools.chain(rows.slabs, [None]):
            if slab:
                second = None if rows.second is None else rows.second[begun : begun + len(slab)]
                waiting.append(_begin(network, slab, place, padding_id, second))
                begun += len(slab)
            while waiting and (slab is None or len(waiting) > 1):
                done = waiting.popleft().fetched()
                if done.shape[1] != dimension:
                    raise MismatchError(
                        f"the encoder gives vectors of width {done.shape[1]}, its card says {dimension}."
                    )
                found[at : at + len(done)] = done
                at += len(done)
    return found


@dataclass(frozen=True)
class _Underway:
    """A slab's vectors, perhaps still being computed: ``order[i]`` is the row of ``vectors[i]``."""

    order: np.ndarray
    vectors: torch.Tensor
    event: "torch.cuda.Event | None"

    def fetched(self) -> np.ndarray:
        """float16 [n, d] in the order of the rows; waits for the card."""
        if self.event is not None:
            self.event.synchronize()
        vectors = self.vectors.numpy()
        found = np.empty_like(vectors)
        found[self.order] = vectors
        return found


def _begin(network: Network, rows: Rows, place: Place, padding_id: int, second: np.ndarray | None) -> _Underway:
    batches = list(length_batches([len(row) for row in rows], place.batch_tokens))
    order = np.concatenate(batches)

    def padded(batch: np.ndarray) -> Batch:
        return Batch.padded([rows[i] for i in batch], padding_id, None if second is None else second[batch])

    try:
        vectors = torch.cat([network(padded(batch).on(place.device)).to(torch.float16) for batch in batches])
    except torch.cuda.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(place.device)
        raise WorkerError(
            f"{place.device} has {free >> 20:,} MiB of {total >> 20:,} free, too little for {place.batch_tokens:,} "
            "tokens at a time: does another process use the card? Free it, or choose another by CUDA_VISIBLE_DEVICES."
        ) from error
    if not vectors.is_cuda:
        return _Underway(order, vectors, None)
    host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
    host.copy_(vectors, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return _Underway(order, host, event)
