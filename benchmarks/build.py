"""How fast is a build, measured against the bare encoder in the same run?

    python benchmarks/build.py CORPUS.jsonl.gz [--chunks 20000] [--memory]

Builds a database of about ``--chunks`` chunks with the command line, and runs the encoder's bare forward pass (tokens
ready, weights loaded) over a sample of the same chunks on all cores, in each of a few configurations, with the code of
transformers and with retrodb's; the best of each is a *bound*. Prints the embed stage and the whole build as ratios to
both. ``--memory`` builds 10,000 and 40,000 chunks instead and prints the peak memory of the driver and of a worker.
"""

import argparse
import contextlib
import gzip
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

import retrodb
from retrodb.encoding import cpu_precision, length_batches, resolve_encoder

CODES = ("transformers", "retrodb")
"""Whose forward pass: the library's, in its best configuration, and the one a build runs, without anything around."""

MEMORY_CHUNKS = (10_000, 40_000)

BYTES_PER_CHUNK = 285
"""English text in 64 GPT-2 tokens, roughly: only to cut the corpus to size."""


def cut_corpus(source: Path, chunks: int, target: Path) -> None:
    """The first documents of a corpus, up to about so many chunks, repeated under new ids if it is too small."""
    left, copy = chunks * BYTES_PER_CHUNK, 0
    with target.open("w", encoding="utf-8") as out:
        while left > 0:
            with gzip.open(source, "rt", encoding="utf-8") as lines:
                for line in lines:
                    record = json.loads(line)
                    out.write(json.dumps({"id": f"{copy}-{record['id']}", "text": record["text"]}) + "\n")
                    left -= len(record["text"].encode())
                    if left <= 0:
                        break
            copy += 1


@dataclass
class Peak:
    """Peak resident bytes: of the process that was started, and of the largest of its children."""

    driver: int = 0
    worker: int = 0

    @property
    def largest(self) -> int:
        return max(self.driver, self.worker)

    def look(self, pid: int) -> None:
        """Called now and then: the kernel keeps each process's own peak."""
        self.driver = max(self.driver, resident_peak(pid))
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(pid).children(recursive=True)
            self.worker = max([self.worker, *(resident_peak(child.pid) for child in children)])


def resident_peak(pid: int) -> int:
    """The most bytes that a process has had in memory so far; 0 where it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:")), 0)


def run_build(corpus: Path, out: Path, *more: str) -> tuple[dict, float, Peak]:
    """``retrodb build --json``: what it said, wall seconds, and the peak memory of its processes."""
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "retrodb", "build", str(corpus), "--out", str(out), "--json", *more],
        stdout=subprocess.PIPE,
        text=True,
    )
    peak = Peak()

    def watch() -> None:
        while process.poll() is None:
            peak.look(process.pid)
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = process.stdout.read() if process.stdout else ""
    process.wait()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"the build failed with exit code {process.returncode}")
    return json.loads(output.strip().splitlines()[-1]), time.monotonic() - started, peak


def sample_texts(database: Path, wanted: int) -> list[str]:
    """Chunk texts of evenly spread shards."""
    db = retrodb.open(str(database))
    shards = [shard.number for shard in db.manifest.shards("chunks")]
    step = max(1, len(shards) * 700 // max(wanted, 1))
    texts: list[str] = []
    for number in shards[::step]:
        rows = db.storage.read_table(db._shard("chunks", number).path, ["chunk_id"])["chunk_id"].to_pylist()
        texts += [db.chunk(chunk_id).text for chunk_id in rows]
        if len(texts) >= wanted:
            break
    return texts[:wanted]


def bare(arguments: tuple[list[list[int]], str, int, int, str, object]) -> float:
    """Seconds of the forward passes alone, in one process."""
    rows, precision, batch_tokens, threads, code, barrier = arguments
    import torch

    from retrodb.encoding import encoder as module
    from retrodb.encoding.encoder import Encoder
    from retrodb.encoding.feeding import Batch

    torch.set_num_threads(threads)
    if code == "transformers":
        module.is_common_bert = lambda folder: False  # type: ignore[assignment]
    encoder = Encoder.load(resolve_encoder("all-MiniLM-L6-v2"), precision, "cpu")
    batches = [
        Batch.padded([rows[i] for i in batch], encoder.featuriser.padding_id)
        for batch in length_batches([len(row) for row in rows], batch_tokens)
    ]
    with torch.inference_mode():
        encoder.network(batches[len(batches) // 2])
        barrier.wait()  # type: ignore[attr-defined]
        started = time.monotonic()
        for batch in batches:
            encoder.network(batch)
        return time.monotonic() - started


def configurations() -> list[tuple[str, int, int, int]]:
    """(whose code, processes, threads of each, tokens in a batch) to try."""
    cores = len(os.sched_getaffinity(0))
    tried = [("transformers", 1, cores, 4096)]
    return tried + [(code, cores, 1, tokens) for code in CODES for tokens in (2048, 4096, 8192)]


def rate(texts: list[str], precision: str, configuration: tuple[str, int, int, int]) -> float:
    """Chunks a second of the bare forward pass on all cores."""
    from retrodb.encoding.featuriser import Featuriser

    rows = Featuriser.load(resolve_encoder("all-MiniLM-L6-v2").folder, 256).tokenize(texts)
    code, processes, threads, batch_tokens = configuration
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(processes) as pool:
        barrier = manager.Barrier(processes)
        parts = [(rows[i::processes], precision, batch_tokens, threads, code, barrier) for i in range(processes)]
        return len(rows) / max(pool.map(bare, parts, chunksize=1))


def measure_speed(source: Path, chunks: int, folder: Path) -> None:
    """The bound is measured just before the embed stage and again after the build: machines' speed drifts."""
    corpus = folder / "corpus.jsonl"
    cut_corpus(source, chunks, corpus)
    _, first, _ = run_build(corpus, folder / "db", "--until", "chunk")
    texts, precision = sample_texts(folder / "db", 2000), cpu_precision()
    tried = {configuration: rate(texts, precision, configuration) for configuration in configurations()}
    facts, second, peak = run_build(corpus, folder / "db")
    best = {code: max((c for c in tried if c[0] == code), key=lambda c: tried[c]) for code in CODES}
    again = {code: rate(texts, precision, configuration) for code, configuration in best.items()}
    n, embed, wall = facts["chunks"], facts["seconds"]["embed"], first + second
    print(f"{n:,} chunks, {facts['embeddings']['precision']}")
    for (code, processes, threads, tokens), value in tried.items():
        print(f"  bare forward, {code}, {processes} x {threads} threads, {tokens} tokens: {value:.1f} chunks/s")
    print(f"  embed stage {embed:.1f} s, whole build {wall:.1f} s")
    for code, configuration in best.items():
        before, after = tried[configuration], again[code]
        seconds = n / ((before + after) / 2)
        print(
            f"  bound of {code}: {before:.1f} chunks/s before, {after:.1f} after, so {seconds:.1f} s: "
            f"embed stage {embed / seconds:.3f} x, whole build {wall / seconds:.3f} x"
        )
    for stage, value in facts["seconds"].items():
        print(f"    {stage:<12} {value:8.1f} s")
    print(f"    until chunk (with start-up) {first:.1f} s, all after it {second:.1f} s")
    print(
        f"  peak memory of a process {peak.largest / 1e6:,.0f} MB; recall@10 {facts['neighbours']['recall_at_10']:.4f}"
    )


def measure_memory(source: Path, folder: Path, sizes: tuple[int, ...] = MEMORY_CHUNKS, *more: str) -> list[Peak]:
    """Builds of several sizes, with the peak memory of each."""
    peaks = []
    for chunks in sizes:
        corpus = folder / f"{chunks}.jsonl"
        cut_corpus(source, chunks, corpus)
        facts, wall, peak = run_build(corpus, folder / str(chunks), *more)
        peaks.append(peak)
        print(
            f"{facts['chunks']:,} chunks in {wall:.0f} s: peak memory of the driver {peak.driver / 1e6:,.0f} MB, "
            f"of a worker {peak.worker / 1e6:,.0f} MB",
            flush=True,
        )
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--chunks", type=int, default=20_000)
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="retrodb-bench-") as folder:
        if arguments.memory:
            measure_memory(arguments.corpus, Path(folder))
        else:
            measure_speed(arguments.corpus, arguments.chunks, Path(folder))


if __name__ == "__main__":
    main()
