"""The index stage, training and adding, under a limit on its memory: `tests/test_memory.py` runs this.

    python tests/index_under_limit.py FOLDER SHARDS LIMIT_MB GROUP

Makes shards of random vectors, then allows itself LIMIT_MB of memory beyond what it has (RLIMIT_DATA: all private
memory that can be written), trains a quantiser on a sample of all of them, and adds groups of GROUP shards to copies of
it. Prints one JSON object.
"""

import json
import resource
import sys
import threading
from typing import Any

import numpy as np
import pyarrow as pa
from retrodb.pipelines.execute import Executor
from retrodb.pipelines.index import IndexSettings, add_pipeline, add_tasks, sample_tasks, template_pipeline
from retrodb.pipelines.progress import Silent
from retrodb.pipelines.receipts import ReceiptBook
from retrodb.pipelines.runners.local import LocalRunner
from retrodb.pipelines.shards import ShardFiles
from search_under_limit import data_bytes

from retrodb.manifest import TEMPLATE_NUMBER
from retrodb.storage import Storage

DIMENSION, SHARD, DOCUMENT = 256, 4_000, 10
SETTINGS = IndexSettings(key="IVF16,Flat", metric="l2", dimension=DIMENSION, seed=0)
SAMPLE = 16 * 256


def make_shard(storage: Storage, rng: np.random.Generator, number: int) -> ShardFiles:
    ids = (number << 32) + np.arange(SHARD, dtype=np.int64)
    document_ids = (number << 32) + np.arange(SHARD) // DOCUMENT
    names = [f"{table}/{number:05d}" for table in ("documents", "chunks", "embeddings")]
    files = ShardFiles(f"{names[0]}.parquet", f"{names[1]}.parquet", f"{names[2]}.npy")
    own = {"document_id": np.unique(document_ids), "split": ["train"] * (SHARD // DOCUMENT)}
    storage.commit_table(str(files.documents), pa.table(own), SHARD)
    storage.commit_table(str(files.chunks), pa.table({"chunk_id": ids, "document_id": document_ids}), SHARD)
    storage.commit_array(str(files.embeddings), rng.standard_normal((SHARD, DIMENSION), np.float32).astype(np.float16))
    return files


def build(storage: Storage, files: dict[int, ShardFiles], group: int, name: str) -> int:
    """The vectors that were added."""
    executor = Executor(LocalRunner(1), Silent())
    book = ReceiptBook(storage, "index", name)
    sampled = sample_tasks(files, dict.fromkeys(files, SHARD), min(SAMPLE, len(files) * SHARD), 0)

    def train(pipeline: Any, some: Any) -> object:
        return template_pipeline(pipeline, book, some, SETTINGS)

    executor.complete(book, sampled, train, unit="vectors", small=1 << 60)
    receipt = book.read(TEMPLATE_NUMBER)
    assert receipt is not None
    template = receipt.shards["index"]
    numbers = sorted(files)
    groups = [[files[n] for n in numbers[at : at + group]] for at in range(0, len(numbers), group)]
    tasks = add_tasks(groups, [SHARD * len(some) for some in groups])

    def add(pipeline: Any, some: Any) -> object:
        return add_pipeline(pipeline, book, some, SETTINGS, template)

    receipts = executor.complete(book, tasks, add, unit="vectors", small=1 << 60)
    return sum(receipt.counts["indexed"] for receipt in receipts.values())


def main() -> None:
    folder, shards, limit, group = sys.argv[1], *map(int, sys.argv[2:5])
    threading.stack_size(512 << 10)  # Beam's threads reserve far more than they use, and RLIMIT_DATA counts it
    storage, rng = Storage(folder), np.random.default_rng(0)
    files = {number: make_shard(storage, rng, number) for number in range(shards)}
    build(storage, {0: files[0]}, 1, "warm-up")  # what is loaded and started once
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + (limit << 20), resource.RLIM_INFINITY))
    added = build(storage, files, group, "limited")
    print(json.dumps({"added": added, "index_mb": added * DIMENSION * 4 >> 20}))


if __name__ == "__main__":
    main()
