"""How busy does the embed stage keep a card, against the bare encoder in the same run?

    python benchmarks/gpu.py [CORPUS.jsonl.gz] [--chunks 200000] [--encoders minilm,bert-base] [--device cuda]

For each encoder, in chunks a second and, on a card whose peak is known, in model FLOPs utilisation (MFU):

- the forward pass of transformers and of retrodb, over batches that lie on the card already: the bounds;
- ``embed``: texts in, float16 vectors out, with tokenising, padding and transfers;
- ``stage``: the embed stage of ``retrodb build`` over the shards of a database, with the start of its workers.

BERT-base and BERT-large are made here with random weights, which cost the same to multiply as trained ones. MiniLM's
vectors are compared with the CPU's in float32: recall@10 by distance. Without a card all of it is computed on the CPU,
which proves the script and measures the machine, and no MFU is given.
"""

import argparse
import gzip
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from build import run_build

from retrodb.corpus.quickstart import quickstart_lines
from retrodb.encoding import choose_device, cpu_precision, cuda_precision, length_batches, resolve_encoder
from retrodb.encoding import encoder as encoder_module
from retrodb.encoding.encoder import Encoder
from retrodb.encoding.feeding import Batch
from retrodb.planning.encoders import encoder_size

PEAK_TFLOPS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "V100": 125,
    "T4": 65,
}
"""Dense 16-bit products, by the makers' data sheets; the first name that the card's own contains."""

SHAPES = {"minilm": None, "bert-base": (12, 768, 12, 3072), "bert-large": (24, 1024, 16, 4096)}
"""Layers, width, heads, inner width."""

CHUNK_BYTES = 290
CHECKED = 4000


def make_encoder(name: str, folder: Path) -> Path:
    """An encoder's folder: the embedded one, or one of BERT's shapes with random weights and the same tokenizer."""
    embedded = resolve_encoder("all-MiniLM-L6-v2").folder
    shape = SHAPES[name]
    if shape is None:
        return embedded
    from transformers import BertConfig, BertModel

    layers, width, heads, inner = shape
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, intermediate_size=inner)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    for path in embedded.glob("*token*"):
        shutil.copy(path, folder)
    shutil.copy(embedded / "vocab.txt", folder)
    return folder


def chunk_texts(source: Path | None, wanted: int) -> list[str]:
    """Texts of a chunk's size from a corpus, or from the embedded one; over again where it is too small."""
    texts: list[str] = []
    with gzip.open(source, "rt", encoding="utf-8") if source else nullcontext(quickstart_lines()) as lines:
        for line in lines:
            text = json.loads(line)["text"]
            texts += [text[at : at + CHUNK_BYTES] for at in range(0, len(text), CHUNK_BYTES)]
            if len(texts) >= wanted:
                break
    return (texts * (wanted // len(texts) + 1))[:wanted]


@dataclass(frozen=True)
class Work:
    """One encoder over some texts: its FLOPs and, where the card's peak is known, the share of it that was used."""

    chunks: int
    tokens: int
    squares: int
    parameters: float
    layers: int
    width: int
    peak: float | None

    @property
    def flops(self) -> float:
        """Two for each parameter and token, and what attention multiplies: every token with every one of its row."""
        return 2 * self.parameters * self.tokens + 4.0 * self.layers * self.width * self.squares

    def line(self, what: str, seconds: float, bound: float | None) -> str:
        mfu = f", MFU {self.flops / seconds / self.peak:.1%}" if self.peak else ""
        ratio = f", {bound / seconds:.3f} x the bare forward pass" if bound else ""
        return f"  {what:<24} {self.chunks / seconds:>10,.0f} chunks/s{mfu}{ratio}"


def seconds_of(work: Callable[[], Any], device: str) -> float:
    """Wall seconds, the card's queue empty before and after."""
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.monotonic()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.monotonic() - started


def bare(folder: Path, precision: str, device: str, rows: list[list[int]], code: str) -> float:
    """Seconds of the forward pass alone over batches that lie where it computes."""
    common = encoder_module.is_common_bert
    if code == "transformers":
        encoder_module.is_common_bert = lambda folder: False  # type: ignore[assignment]
    try:
        encoder = Encoder.load(resolve_encoder(str(folder)), precision, device)
    finally:
        encoder_module.is_common_bert = common  # type: ignore[assignment]
    batches = [
        Batch.padded([rows[i] for i in batch], encoder.featuriser.padding_id).on(encoder.place.device)
        for batch in length_batches([len(row) for row in rows], encoder.place.batch_tokens)
    ]

    def forward() -> None:
        with torch.inference_mode():
            for batch in batches:
                encoder.network(batch)

    with torch.inference_mode():
        for batch in batches[:3]:
            encoder.network(batch)
    return seconds_of(forward, device)


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Share of the ten nearest by ``found`` that are as near as the tenth nearest by ``exact``; vectors of length 1."""
    hits = 0
    for start in range(0, len(exact), 500):
        own = np.arange(start, min(start + 500, len(exact)))
        true, seen = (-(v[own].astype(np.float32) @ v.astype(np.float32).T) for v in (exact, found))
        true[np.arange(len(own)), own] = seen[np.arange(len(own)), own] = np.inf
        limit = np.sort(true, axis=1)[:, 9:10]
        nearest = np.argsort(seen, axis=1)[:, :10]
        hits += int((np.take_along_axis(true, nearest, axis=1) <= limit + 1e-6).sum())
    return hits / (10 * len(exact))


def measure(name: str, source: Path | None, chunks: int, device: str, folder: Path) -> None:
    files = make_encoder(name, folder / name)
    precision = cuda_precision() if device == "cuda" else cpu_precision()
    texts = chunk_texts(source, chunks)
    encoder = Encoder.load(resolve_encoder(str(files)), precision, device)
    rows = encoder.featuriser.tokenize(texts)
    config = json.loads((files / "config.json").read_text())
    card = torch.cuda.get_device_name(0) if device == "cuda" else ""
    peak = next((1e12 * value for key, value in PEAK_TFLOPS.items() if key in card), None)
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    work = Work(
        len(rows),
        int(lengths.sum()),
        int((lengths**2).sum()),
        encoder_size(str(files)).parameters,
        config["num_hidden_layers"],
        config["hidden_size"],
        peak,
    )
    print(f"{name}, {len(rows):,} chunks of {lengths.mean():.0f} wordpieces, {precision}, {card or 'CPU'}")
    bounds = {code: bare(files, precision, device, rows, code) for code in ("transformers", "retrodb")}
    for code, seconds in bounds.items():
        print(work.line(f"bare, {code}", seconds, None), flush=True)
    bound = min(bounds.values())
    encoder.embed(texts[:1000])
    print(work.line("embed, from texts", seconds_of(lambda: encoder.embed(texts), device), bound), flush=True)
    corpus = folder / f"{name}.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": " ".join(texts[at : at + 50])}) for at in range(0, chunks, 50)))
    flags = ("--encoder", str(files), "--device", device, "--until")
    run_build(corpus, folder / f"{name}-db", *flags, "chunk")
    facts, _, _ = run_build(corpus, folder / f"{name}-db", *flags, "embed")
    stage = facts["seconds"]["embed"] * len(rows) / facts["chunks"]
    print(work.line("stage, with its start", stage, bound), flush=True)
    if name == "minilm":
        checked = texts[:CHECKED]
        exact = Encoder.load(resolve_encoder(str(files)), "fp32", "cpu").embed(checked)
        print(f"  recall@10 of its neighbours by the CPU's in float32: {recall(encoder.embed(checked), exact):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, nargs="?")
    parser.add_argument("--chunks", type=int, default=200_000)
    parser.add_argument("--encoders", default=",".join(SHAPES))
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    if device == "cpu":
        print("no card is used: this measures the CPU, and no MFU")
    with tempfile.TemporaryDirectory(prefix="retrodb-gpu-") as folder:
        for name in arguments.encoders.split(","):
            measure(name, arguments.corpus, arguments.chunks, device, Path(folder))


if __name__ == "__main__":
    main()
