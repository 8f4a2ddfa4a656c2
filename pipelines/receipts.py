"""Receipts: how a worker tells the driver, through the database folder alone, that a task is done."""

import contextlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Final

from retrodb.manifest import WORK_FOLDER, Shard
from retrodb.storage import Storage

_THREADS: Final = 16

WAITING: Final[Mapping[str, tuple[str, ...]]] = {"chunk": ("documents",)}
"""By stage: tables whose shards wait until it is recorded, for another version of them is what readers still see."""


@dataclass(frozen=True)
class Receipt:
    """What a worker made for task ``number``: shards by table, counts, and small facts for the driver."""

    number: int
    shards: dict[str, Shard] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "shards": {table: shard.as_json() for table, shard in self.shards.items()},
            "counts": self.counts,
            "details": self.details,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Receipt":
        shards = {table: Shard.parse(entry) for table, entry in data["shards"].items()}
        return Receipt(data["number"], shards, dict(data["counts"]), dict(data["details"]))


@dataclass(frozen=True)
class ReceiptBook:
    """The receipts of one stage under one fingerprint: other settings have other receipts.

    ``step`` names a part of a stage that counts its tasks by itself.
    """

    storage: Storage
    stage: str
    fingerprint: str
    step: str = ""

    @property
    def folder(self) -> str:
        """Where the receipts lie, and what the steps of a stage leave for each other."""
        folder = f"{WORK_FOLDER}/{self.stage}-{self.fingerprint[:16]}"
        return f"{folder}/{self.step}" if self.step else folder

    def staged(self, path: str) -> str:
        """Where a shard of a table that is `WAITING` waits until its stage is recorded."""
        return f"{self.folder}/{path}"

    def put_in_place(self, receipts: Iterable[Receipt]) -> None:
        """Move the staged shards of finished tasks to where they belong."""
        waiting = [r.shards[table].path for r in receipts for table in WAITING.get(self.stage, ()) if table in r.shards]

        def put(path: str) -> None:
            # A run that was killed here has moved some: those are in place, and have nothing staged any more.
            with contextlib.suppress(FileNotFoundError):
                self.storage.put_in_place(self.staged(path), path)

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(put, waiting))

    def path(self, number: int) -> str:
        return f"{self.folder}/{number:05d}.json"

    def write(self, receipt: Receipt) -> None:
        """Record a finished task; its shards must already be in place."""
        self.storage.commit_json(self.path(receipt.number), receipt.as_json())

    def read(self, number: int, whole: bool = False) -> Receipt | None:
        """The receipt of a task if it is done and its shards are still in place, else None.

        ``whole`` reads them and compares checksums, as is due when an earlier run left them.
        """
        data = self.storage.read_json(self.path(number))
        if data is None:
            return None
        receipt = Receipt.from_json(data)
        intact = all(self._is_intact(table, shard, whole) for table, shard in receipt.shards.items())
        return receipt if intact else None

    def _is_intact(self, table: str, shard: Shard, whole: bool) -> bool:
        places = [shard]
        if table in WAITING.get(self.stage, ()):
            places.insert(0, replace(shard, path=self.staged(shard.path)))
        return any(self.storage.fault(place, read=whole) is None for place in places)

    def read_all(self, numbers: Iterable[int], whole: bool = False) -> dict[int, Receipt]:
        """The receipts there are for the given tasks; ``whole`` as in `read`.

        What an earlier run left is looked for by a listing: a receipt that it does not show is a task done twice, where
        asking for each would cost an object store a request for every task that was never begun.
        """
        if whole:
            numbers = set(numbers).intersection(self.seen())
        with ThreadPoolExecutor(_THREADS) as pool:
            receipts = pool.map(lambda number: self.read(number, whole), numbers)
            return {receipt.number: receipt for receipt in receipts if receipt is not None}

    def seen(self) -> list[int]:
        """Numbers of the receipts there seem to be: for the progress display, not for truth."""
        names = self.storage.list_files(self.folder)
        stems = [name.removesuffix(".json") for name in names if name.endswith(".json")]
        return [int(stem) for stem in stems if stem.removeprefix("-").isdigit()]
