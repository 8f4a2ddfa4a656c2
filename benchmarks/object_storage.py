"""Requests and seconds of build, verify, query and the training stream on S3 (moto, on a loopback port), against the
same on a local disk.

    python benchmarks/object_storage.py [CORPUS.jsonl]

The corpus is the quickstart's by default, in small shards; the encoder a random one-layer BERT: what is measured
is storage. An emulator answers in a few milliseconds of processor time: read the requests, and take seconds as ratios.
For the training stream it takes 100 ms for each answer, as a store far away would, and the trainer as long for a shard.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import object_stores
from support import Ran, make_tiny_encoder, retrodb

import retrodb as package
from retrodb.corpus.quickstart import quickstart_lines
from retrodb.storage import Storage

ANSWER_SECONDS = 0.1


def timed(*arguments: object) -> tuple[float, Ran]:
    started = time.perf_counter()
    ran = retrodb(*arguments)
    if ran.code:
        sys.exit(ran.err)
    return time.perf_counter() - started, ran


def steps(corpus: Path, database: str, encoder: Path) -> dict[str, list[object]]:
    build = ["build", corpus, "--out", database, "--encoder", encoder, "--shard-bytes", "64KiB", "--workers", 1]
    query = ["query", database, "how do generators work"]
    return {
        "build": build,
        "build again": build,
        "verify": ["verify", database],
        "query, cold cache": query,
        "query, warm cache": query,
        "info": ["info", database, "--json"],
    }


def epoch(database: str, cache: Path, step_seconds: float, *, ahead: bool = True) -> float:
    """Seconds of one pass over the training stream by a trainer that takes so long for each sequence."""
    os.environ["RETRODB_CACHE"] = str(cache)
    bring = Storage.bring
    if not ahead:
        Storage.bring = lambda self, file: None
    try:
        stream = package.open(database).training()
        started = time.perf_counter()
        for _ in stream:
            time.sleep(step_seconds)
        return time.perf_counter() - started
    finally:
        Storage.bring = bring


def stream(local: str, store: object_stores.ObjectStore, folder: Path, rows: int, shards: int) -> None:
    step = ANSWER_SECONDS * shards / rows
    print(f"\ntraining stream, {rows} sequences in {shards} shards, {step * 1000:.1f} ms a step")
    epoch(local, folder / "unused", 0.0)  # imports
    with store.failing(f"slow {ANSWER_SECONDS}"):
        seconds = {
            "local disk": epoch(local, folder / "unused", step),
            "s3, read ahead": epoch(store.url("db"), folder / "stream", step),
            "s3, cached": epoch(store.url("db"), folder / "stream", step),
            "s3, not read ahead": epoch(store.url("db"), folder / "again", step, ahead=False),
        }
    for name, value in seconds.items():
        print(f"{name:18} {value:8.2f} s   {value / seconds['local disk']:.2f} x")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = Path(sys.argv[1]) if len(sys.argv) > 1 else folder / "corpus.jsonl"
        if len(sys.argv) == 1:
            corpus.write_text("\n".join(quickstart_lines()) + "\n", encoding="utf-8")
        encoder = make_tiny_encoder(folder / "encoder")
        local = {step: timed(*command)[0] for step, command in steps(corpus, str(folder / "db"), encoder).items()}
        with object_stores.running("s3", folder / "requests.log") as store:
            os.environ.update({**store.environment, "RETRODB_CACHE": str(folder / "cache")})
            print(f"{'':18} {'local s':>8} {'s3 s':>8} {'ratio':>6}  requests")
            for step, command in steps(corpus, store.url("db"), encoder).items():
                if step == "query, cold cache":
                    os.environ["RETRODB_CACHE"] = str(folder / "cold")
                with store.counting() as requests:
                    seconds, _ = timed(*command)
                counts = ", ".join(f"{kind} {count}" for kind, count in sorted(requests.items()))
                print(f"{step:18} {local[step]:8.1f} {seconds:8.1f} {seconds / local[step]:6.2f}  {counts}")
            manifest = json.loads((folder / "db" / "manifest.json").read_text(encoding="utf-8"))
            tables = {name: table["shards"] for name, table in manifest["tables"].items()}
            print(f"{sum(map(len, tables.values()))} shards in all tables; of them {len(tables['chunks'])} of chunks")
            rows = sum(shard["rows"] for shard in tables["training"])
            stream(str(folder / "db"), store, folder, rows, len(tables["training"]))


if __name__ == "__main__":
    main()
