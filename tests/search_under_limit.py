"""A search under a limit on its memory, in a process of its own: `tests/test_memory.py` runs this.

    python tests/search_under_limit.py FOLDER CHUNKS LIMIT_MB WAVE_MB

Makes a database of random vectors, without an encoder, then allows itself LIMIT_MB of memory beyond what it has
(RLIMIT_DATA: all private memory that can be written), and searches all chunks. Prints one JSON object.
"""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from retrodb.pipelines import search
from retrodb.pipelines.execute import Executor
from retrodb.pipelines.progress import Silent
from retrodb.pipelines.receipts import ReceiptBook
from retrodb.pipelines.runners.local import LocalRunner
from retrodb.pipelines.searching import QueryShard, SearchSettings
from retrodb.pipelines.shards import ShardFiles
from retrodb.pipelines.tasks import Task

from retrodb.index import IndexFile, build_index_shard, commit_index_shard, train_template
from retrodb.storage import Storage

D, SHARD, DOCUMENT, K = 512, 10_000, 10, 20


def data_bytes() -> int:
    """Private writable memory of this process, which RLIMIT_DATA bounds."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData:"))


def make_database(storage: Storage, chunks: int) -> tuple[list[Task], SearchSettings]:
    """Shards of random vectors, and an index shard for each."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((32, D)).astype(np.float32)

    def vectors(n: int) -> np.ndarray:
        return (centres[rng.integers(0, 32, n)] + 0.3 * rng.standard_normal((n, D))).astype(np.float16)

    template = train_template(vectors(3_000).astype(np.float32), "IVF32,Flat", "l2", 0)
    files: dict[int, ShardFiles] = {}
    index = []
    for number in range(chunks // SHARD):
        ids = (number << 32) + np.arange(SHARD, dtype=np.int64)
        own = vectors(SHARD)
        files[number] = ShardFiles("", f"chunks/{number:05d}.parquet", f"embeddings/{number:05d}.npy")
        columns = {"chunk_id": ids, "document_id": (number << 32) + np.arange(SHARD) // DOCUMENT}
        storage.commit_table(files[number].chunks, pa.table(columns), SHARD)
        storage.commit_array(files[number].embeddings, own)
        index.append(IndexFile(f"index/{number:05d}.faiss", SHARD))
        commit_index_shard(storage, index[-1].path, build_index_shard(template, [(ids, own)], D, "l2"))
    settings = SearchSettings(
        index=tuple(index),
        documents={},
        chunks={number: one.chunks for number, one in files.items()},
        embeddings={number: one.embeddings for number, one in files.items()},
        dimension=D,
        metric="l2",
        k=K,
        exclude="document",
        raw_is_exact=True,
        n_lists=32,
        nprobe=1,
    )
    return [Task(number, QueryShard(one), weight=SHARD) for number, one in files.items()], settings


def run(storage: Storage, tasks: list[Task], settings: SearchSettings, name: str) -> dict[int, Any]:
    book = ReceiptBook(storage, "neighbours", name)
    return Executor(LocalRunner(1), Silent()).complete(
        book,
        tasks,
        lambda pipeline, some: search.search_pipeline(pipeline, book, some, settings),
        unit="chunks",
        small=1 << 60,
        waves=search.search_waves(book, settings),
    )


def main() -> None:
    folder, chunks, limit, wave = sys.argv[1], *map(int, sys.argv[2:])
    storage = Storage(folder)
    tasks, settings = make_database(storage, chunks)
    run(storage, tasks[:1], settings, "warm-up")  # what is loaded and started once
    search.WAVE_BYTES = wave << 20  # type: ignore[misc]
    before = data_bytes()
    resource.setrlimit(resource.RLIMIT_DATA, (before + (limit << 20), resource.RLIM_INFINITY))
    receipts = run(storage, tasks, settings, "limited")
    data = sum(
        path.stat().st_size for table in ("embeddings", "index", "chunks") for path in Path(folder, table).iterdir()
    )
    found = sum(receipt.counts["found"] for receipt in receipts.values())
    print(json.dumps({"queries": chunks, "found": found, "data_mb": data >> 20}))


if __name__ == "__main__":
    main()
