"""Endless rows of a training stream, epoch after epoch, with a position that can be gone on from."""

from collections.abc import Iterator
from typing import Any

from retrodb.database import Database
from retrodb.errors import InputError
from retrodb.model.batch import Batch
from retrodb.training.dataset import Sample


class RowStream:
    """The training split of a database, shuffled anew each epoch; the validation split is never touched.

    A batch that an epoch's end cuts short is filled from the next epoch.

    Raises:
        InputError: the split holds no rows.
    """

    def __init__(self, database: Database, neighbours: int, seed: int) -> None:
        self._neighbours = neighbours
        self._dataset = database.training(split="train", shuffle=True, seed=seed, neighbours=neighbours or None)
        if not len(self._dataset):
            raise InputError(f"{database.storage.url} has no training rows but validation ones: nothing to train on.")
        self._rows = self._endless()

    def __len__(self) -> int:
        """Rows in an epoch."""
        return len(self._dataset)

    def batch(self, rows: int) -> Batch:
        """The next rows."""
        return Batch.of([next(self._rows) for _ in range(rows)], self._neighbours)

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last row, as JSON-able data."""
        return self._dataset.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind that row. Raises MismatchError for the position of another stream."""
        self._dataset.load_state_dict(state)
        self._rows = self._endless()

    def _endless(self) -> Iterator[Sample]:
        while True:
            yield from self._dataset
            self._dataset.set_epoch(self._dataset.epoch + 1)
