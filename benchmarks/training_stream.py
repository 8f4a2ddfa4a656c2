"""What a training sample costs: the stream against Arrow's bare reading of the same shard, the join, and the model.

python benchmarks/training_stream.py [ROWS]

Sequences of 2,048 tokens, 64-token chunks, 2 neighbours; token ids with the skew of text; one core, data in the page
cache. Prints milliseconds a sample, best of `REPEATS`; and how many times faster the stream gives rows, as batches,
than the smallest reference model (``--preset tiny``, with and without retrieval) takes them in training.
"""

import collections
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch
from retrodb.schemas import ID_SHIFT

from retrodb import schemas
from retrodb.manifest import Manifest, Shard
from retrodb.model import Batch, ModelConfig, Retro
from retrodb.storage import Storage
from retrodb.training import ChunkArrays, TrainingDataset, TrainingTable, answer, assemble, pack, requests
from retrodb.training.columns import as_lists
from retrodb.training.shards import write_training

N, M, K, STORED = 2048, 64, 2, 20
REPEATS = 5
VOCABULARY = 50_257
MODEL_ROWS, STEPS = 2, 3
"""Of a training step of the model, and how many are timed."""


def chunk_shard(rows: int, rng: np.random.Generator) -> ChunkArrays:
    """Chunks for ``rows`` sequences, of documents of 1 to 60 chunks."""
    n_chunks = rows * (N // M)
    document_ids = np.repeat(np.arange(n_chunks), rng.integers(1, 61, n_chunks))[:n_chunks]
    n_tokens = np.full(n_chunks, M, dtype=np.int16)
    last = np.append(document_ids[1:] != document_ids[:-1], True)
    n_tokens[last] = rng.integers(1, M + 1, last.sum())
    tokens = np.minimum(rng.zipf(1.2, (n_chunks, M)), VOCABULARY - 1).astype(np.uint16)
    tokens[np.arange(M) >= n_tokens[:, None]] = 0
    return ChunkArrays(np.arange(n_chunks, dtype=np.int64), document_ids, tokens, n_tokens)


def write_database(storage: Storage, rows: int) -> tuple[Manifest, dict[str, float]]:
    """A database of one shard a table; and what the steps of the join cost, ms a sample."""
    rng = np.random.default_rng(0)
    chunks = chunk_shard(rows, rng)
    count = len(chunks)
    ids = rng.integers(0, count, (count, STORED))
    wanted = np.ascontiguousarray(ids[:, :K])
    marks = [time.perf_counter()]

    def mark() -> None:
        marks.append(time.perf_counter())

    packed = pack(chunks.chunk_ids, chunks.document_ids, chunks.n_tokens, np.zeros(count, dtype=bool), N // M)
    mark()
    asked = requests(wanted, 0)
    mark()
    replies = [answer(request, chunks) for request in asked.values()]
    mark()
    table = assemble(packed, chunks, wanted, replies, 0)
    mark()
    shards = {"training": Shard.of(write_training(storage, "training/00000.parquet", table), 0, table.num_rows)}
    mark()
    names = ("pack", "requests", "answer", "assemble", "write")
    costs = {name: (b - a) / rows * 1e3 for name, a, b in zip(names, marks[:-1], marks[1:], strict=True)}

    schema = schemas.chunks(M, "uint16")
    zeros = np.zeros(count, dtype=np.int64)
    columns = [
        pa.array(chunks.chunk_ids),
        pa.array(chunks.document_ids),
        pa.array(zeros.astype(np.int32)),
        as_lists(chunks.tokens, schema.field("tokens")),
        pa.array(chunks.n_tokens),
        pa.array(zeros),
        pa.array(zeros),
    ]
    committed = storage.commit_table("chunks/00000.parquet", pa.table(columns, schema=schema), 8192)
    shards["chunks"] = Shard.of(committed, 0, count)
    neighbours = pa.table(
        {"chunk_id": chunks.chunk_ids, "neighbour_ids": as_lists(ids, schemas.neighbours(STORED).field(1))}
    )
    shards["neighbours"] = Shard.of(storage.commit_table("neighbours/00000.parquet", neighbours, 8192), 0, count)
    assert count < 1 << ID_SHIFT
    return Manifest(tables={name: (shard,) for name, shard in shards.items()}), costs


def best(work: Callable[[], None], samples: int) -> float:
    """ms a sample."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds) / samples * 1e3


def read_with_arrow(storage: Storage, path: str) -> None:
    with storage.open_parquet(path) as file:
        for group in range(file.num_row_groups):
            file.read_row_group(group, use_threads=False)


def drain(stream: TrainingDataset) -> None:
    for sample in stream:
        assert sample["tokens"].shape == (N,)


def of_the_loader(stream: TrainingDataset, rows: int, neighbours: int) -> float:
    """Tokens a second that the stream gives as batches, as the trainer asks for them, over a whole epoch."""

    def epoch() -> None:
        samples = iter(stream)
        for _ in range(rows // MODEL_ROWS):
            Batch.of([next(samples) for _ in range(MODEL_ROWS)], neighbours)

    return N / best(epoch, rows) * 1e3


def of_the_model(stream: TrainingDataset, neighbours: int) -> float:
    """Tokens a second that a training step of the smallest model takes, its rows ready: best of `STEPS`."""
    samples = iter(stream)
    batch = Batch.of([next(samples) for _ in range(MODEL_ROWS)], neighbours)
    config = ModelConfig.preset("tiny", vocabulary=VOCABULARY, chunk_tokens=M, retrieval=neighbours > 0)
    model = Retro(config)
    optimizer = torch.optim.AdamW(model.parameters())
    seconds = []
    for _ in range(STEPS):
        started = time.perf_counter()
        optimizer.zero_grad()
        model.loss(batch[:]).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    return MODEL_ROWS * N / min(seconds)


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="retrodb-bench-") as folder:
        storage = Storage(f"{folder}/db")
        manifest, costs = write_database(storage, rows)
        shard = manifest.shards("training")[0]
        arrow = best(lambda: read_with_arrow(storage, shard.path), rows)
        stream = TrainingDataset(storage, manifest)
        ours = best(lambda: drain(stream), rows)
        mixed = TrainingDataset(storage, manifest, shuffle=True)
        shuffled = best(lambda: drain(mixed), rows)
        table = TrainingTable(storage, manifest, f"{folder}/cache", neighbours=K)
        order = np.random.default_rng(1).permutation(rows).tolist()
        batches = [order[low : low + 16] for low in range(0, rows, 16)]
        single = best(lambda: collections.deque((table.sequences([i]) for i in order), maxlen=0).clear(), rows)
        batched = best(lambda: collections.deque((table.sequences(b) for b in batches), maxlen=0).clear(), rows)
        needs = [(of_the_loader(mixed, rows, k), of_the_model(mixed, k)) for k in (K, 0)]
    print(f"{rows} sequences of {N} tokens with {K} neighbours, {shard.bytes / rows / 1e3:.1f} kB each on disk")
    print(f"{'Arrow, row groups only':34}{arrow:8.4f} ms/sample")
    print(f"{'stream':34}{ours:8.4f} ms/sample   {ours / arrow:.2f} x Arrow")
    print(f"{'stream, shuffled':34}{shuffled:8.4f} ms/sample   {shuffled / arrow:.2f} x Arrow")
    print(f"{'joined on the fly, one by one':34}{single:8.4f} ms/sample   {batched:.4f} in batches of 16")
    for k, (given, taken) in zip((K, 0), needs, strict=True):
        title = f"batches, {k} neighbours a chunk"
        print(f"{title:34}{given:10,.0f} tokens/s; the model takes {taken:,.0f}: {given / taken:,.0f} x its need")
    for name, cost in costs.items():
        print(f"{'build: ' + name:34}{cost:8.4f} ms/sample")


if __name__ == "__main__":
    main()
