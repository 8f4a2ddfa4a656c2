"""Which recorded shards are not what the manifest says: found before a build, so that it repairs exactly those."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from retrodb.manifest import DAMAGE_REPORT, LEAKAGE_REPORT, REPORT_SHA256, Manifest, Shard
from retrodb.storage import Storage

CHECK_ALL_BYTES: Final = 2 << 30
"""A database up to this size is checked byte by byte at every build (seconds); a larger one by sizes alone."""

_THREADS: Final = 4


def damaged_shards(storage: Storage, manifest: Manifest) -> dict[str, set[int]]:
    """Numbers of damaged shards by table: missing, of another size, or, where bytes are read, of another sha256."""
    entries = [(table, shard) for table, shards in manifest.tables.items() for shard in shards]
    everything = sum(shard.bytes for _, shard in entries) <= CHECK_ALL_BYTES
    suspects = _suspected(storage)

    def check(entry: tuple[str, Shard]) -> bool:
        shard = entry[1]
        return shard.path not in suspects and is_intact(storage, shard, read=everything)

    with ThreadPoolExecutor(_THREADS) as pool:
        results = list(pool.map(check, entries))
    damaged: dict[str, set[int]] = {}
    for (table, shard), intact in zip(entries, results, strict=True):
        if not intact:
            damaged.setdefault(table, set()).add(shard.number)
    return damaged


def is_intact(storage: Storage, shard: Shard, read: bool) -> bool:
    """Whether a shard's file is there with the recorded size and, with ``read``, the recorded bytes."""
    if storage.size(shard.path) != shard.bytes:
        return False
    try:
        return not read or storage.sha256(shard.path) == shard.sha256
    except OSError:
        return False


def report_is_intact(storage: Storage, manifest: Manifest) -> bool:
    """Whether the leakage report is there with the recorded bytes, or there is none to be."""
    if "report" not in manifest.stages:
        return True
    if storage.size(LEAKAGE_REPORT) is None:
        return False
    return storage.sha256(LEAKAGE_REPORT) == manifest.stages["report"].details.get(REPORT_SHA256)


def _suspected(storage: Storage) -> set[str]:
    report: Any = storage.read_json(DAMAGE_REPORT)
    paths: Iterable[Any] = report.get("paths", []) if isinstance(report, dict) else []
    return {str(path) for path in paths}
