"""Receipts: how a worker tells the driver, through the database folder alone, that a task is done."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

from retrodb.manifest import WORK_FOLDER, Shard
from retrodb.storage import Storage

_READERS: Final = 16


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
        """Where a shard waits until its stage is recorded, if another version of it is what readers still see."""
        return f"{self.folder}/{path}"

    def put_in_place(self, receipts: Iterable[Receipt]) -> None:
        """Move the staged shards of finished tasks to where they belong."""
        for receipt in receipts:
            for shard in receipt.shards.values():
                if self.storage.size(self.staged(shard.path)) is not None:
                    self.storage.move(self.staged(shard.path), shard.path)

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
        intact = all(self._is_intact(shard, whole) for shard in receipt.shards.values())
        return receipt if intact else None

    def _is_intact(self, shard: Shard, whole: bool) -> bool:
        return any(
            self.storage.size(path) == shard.bytes and (not whole or self.storage.sha256(path) == shard.sha256)
            for path in (self.staged(shard.path), shard.path)
        )

    def read_all(self, numbers: Iterable[int], whole: bool = False) -> dict[int, Receipt]:
        """The receipts there are for the given tasks; ``whole`` as in `read`."""
        with ThreadPoolExecutor(_READERS) as pool:
            receipts = pool.map(lambda number: self.read(number, whole), numbers)
            return {receipt.number: receipt for receipt in receipts if receipt is not None}

    def seen(self) -> list[int]:
        """Numbers of the receipts there seem to be: for the progress display, not for truth."""
        names = self.storage.list_files(self.folder)
        return [int(name.removesuffix(".json")) for name in names if name.endswith(".json") and name[0] != "."]
