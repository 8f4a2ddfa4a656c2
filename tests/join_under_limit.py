"""The join of sequences and the leakage report under a limit on their memory: `tests/test_memory.py` runs this.

    python tests/join_under_limit.py FOLDER SHARDS LIMIT_MB lookup|shuffle

Makes shards of random chunks, whose neighbours are random, then allows itself LIMIT_MB of memory beyond what it has
(RLIMIT_DATA: all private memory that can be written), and runs both stages over all of them. Prints one JSON object.
"""

import json
import resource
import sys
import threading
from typing import Any

import numpy as np
import pyarrow as pa
from retrodb.pipelines.execute import Executor
from retrodb.pipelines.join import NeighbourSource, join_tasks
from retrodb.pipelines.leakage import leakage_pipeline
from retrodb.pipelines.progress import Silent
from retrodb.pipelines.receipts import ReceiptBook
from retrodb.pipelines.runners.local import LocalRunner
from retrodb.pipelines.shards import ShardFiles
from retrodb.pipelines.tasks import Task
from retrodb.pipelines.training import training_pipeline
from search_under_limit import data_bytes

from retrodb import schemas
from retrodb.manifest import Shard
from retrodb.storage import Storage

M, SHARD, DOCUMENT, K, SLOTS = 64, 2_000, 10, 10, 32
COUNTS = {"training": "joined", "report": "compared"}


def make_shard(storage: Storage, rng: np.random.Generator, number: int, shards: int) -> tuple[Shard, ShardFiles]:
    """A shard's documents, chunks and neighbours, as far as the join reads them."""
    ids = (number << 32) + np.arange(SHARD, dtype=np.int64)
    document_ids = (number << 32) + np.arange(SHARD) // DOCUMENT
    files = ShardFiles(
        f"documents/{number:05d}.parquet", f"chunks/{number:05d}.parquet", "", f"neighbours/{number:05d}.parquet"
    )
    own = {"document_id": np.unique(document_ids), "split": ["train"] * (SHARD // DOCUMENT)}
    storage.commit_table(str(files.documents), pa.table(own), SHARD)
    tokens = pa.array(rng.integers(0, 50_000, SHARD * M, dtype=np.uint16))
    chunks = {
        "chunk_id": ids,
        "document_id": document_ids,
        "tokens": pa.FixedSizeListArray.from_arrays(tokens, type=schemas.chunks(M, "uint16").field("tokens").type),
        "n_tokens": np.full(SHARD, M, np.int16),
    }
    committed = storage.commit_table(str(files.chunks), pa.table(chunks), SHARD)
    found = (rng.integers(0, shards, (SHARD, K)) << 32) + rng.integers(0, SHARD, (SHARD, K))
    column = schemas.neighbours(K).field("neighbour_ids").type
    neighbours = {"chunk_id": ids, "neighbour_ids": pa.FixedSizeListArray.from_arrays(found.ravel(), type=column)}
    storage.commit_table(str(files.neighbours), pa.table(neighbours), SHARD)
    return Shard.of(committed, number, SHARD), files


def run(storage: Storage, stage: str, tasks: list[Task], source: NeighbourSource, name: str) -> dict[int, Any]:
    book = ReceiptBook(storage, stage, name)

    def pipeline(pipeline: Any, some: Any) -> object:
        if stage == "training":
            return training_pipeline(pipeline, book, some, source, SLOTS)
        return leakage_pipeline(pipeline, book, some, source, M)

    return Executor(LocalRunner(1), Silent()).complete(book, tasks, pipeline, unit="chunks", small=1 << 60)


def main() -> None:
    folder, shards, limit, how = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4]
    threading.stack_size(512 << 10)  # Beam's threads reserve far more than they use, and RLIMIT_DATA counts it
    storage, rng = Storage(folder), np.random.default_rng(0)
    made = [make_shard(storage, rng, number, shards) for number in range(shards)]
    source = NeighbourSource({shard.number: shard for shard, _ in made}, K, looked_up=how == "lookup")
    tasks = join_tasks({shard.number: files for shard, files in made}, [shard for shard, _ in made])
    for stage in COUNTS:
        run(storage, stage, tasks[:1], source, "warm-up")  # what is loaded and started once
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + (limit << 20), resource.RLIM_INFINITY))
    pairs = {}
    for stage, count in COUNTS.items():
        receipts = run(storage, stage, tasks, source, "limited")
        pairs[stage] = sum(receipt.counts[count] for receipt in receipts.values())
    print(json.dumps({"pairs": pairs, "tokens_mb": shards * SHARD * K * 2 * M * 2 >> 20}))


if __name__ == "__main__":
    main()
