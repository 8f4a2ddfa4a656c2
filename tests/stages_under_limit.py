"""Stages from text to vectors, each under a limit on its memory: `tests/test_memory.py` runs this.

    python tests/stages_under_limit.py FOLDER CORPUS DOCUMENTS STAGE=LIMIT_MB...

CORPUS is `scans` (documents with 100 kB of metadata each, which the stages move along) or `words` (64 kB of long words,
each one token to the tokenizer and one to the encoder, so that much text is embedded in little time). Each stage runs
once for a small database, so that everything is loaded and started, and then for the large one, in this process, which
allows itself LIMIT_MB of memory beyond what it has (RLIMIT_DATA: all private memory that can be written). Prints one
JSON object.
"""

import base64
import json
import resource
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from search_under_limit import data_bytes
from support import build_here, make_tiny_encoder, write_jsonl

from retrodb.manifest import STAGES

SETTINGS: dict[str, Any] = {"chunk_tokens": 32, "sequence_tokens": 512, "shard_bytes": "512KiB", "precision": "fp32"}


LONG_WORDS: dict[str, Any] = {"tokenizer": "train:3000", "dedup": "off"}


def random_words(rng: np.random.Generator, lengths: Iterable[int]) -> list[str]:
    return ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), length)) for length in lengths]


def write_words(path: Path, documents: int) -> Path:
    """Documents of twenty words of 120 letters: more than WordPiece looks into, so each is one unknown token."""
    rng = np.random.default_rng(0)
    words = random_words(rng, [120] * 20)
    return write_jsonl(path, ({"text": " ".join(words[i] for i in rng.integers(0, 20, 530))} for _ in range(documents)))


def write_scans(path: Path, documents: int) -> Path:
    """Documents of random words, a few chunks each, with metadata that no codec makes smaller."""
    rng = np.random.default_rng(0)
    words = random_words(rng, rng.integers(3, 9, 4_000))
    return write_jsonl(
        path,
        (
            {
                "id": str(n),
                "text": " ".join(words[i] for i in rng.integers(0, len(words), 50)),
                "scan": base64.b64encode(rng.bytes(75_000)).decode(),
            }
            for n in range(documents)
        ),
    )


def main() -> None:
    folder, corpus, documents = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    limits = {stage: int(limit) for stage, _, limit in (argument.partition("=") for argument in sys.argv[4:])}
    folder.mkdir(parents=True, exist_ok=True)
    threading.stack_size(512 << 10)  # Beam's threads reserve far more than they use, and RLIMIT_DATA counts it
    settings = {**SETTINGS, **(LONG_WORDS if corpus == "words" else {})}
    settings["encoder"] = str(make_tiny_encoder(folder / "encoder"))
    write = {"scans": write_scans, "words": write_words}[corpus]
    small, large = write(folder / "small.jsonl", 100), write(folder / "large.jsonl", documents)
    for stage, limit in limits.items():
        build_here([small], folder / "small", until=stage, **settings)
        if stage != STAGES[0]:
            build_here([large], folder / "large", until=STAGES[STAGES.index(stage) - 1], **settings)
        resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + (limit << 20), resource.RLIM_INFINITY))
        outcome = build_here([large], folder / "large", until=stage, **settings)
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert outcome.done == (stage,), outcome.done
    tables = {name: sum(s.bytes for s in outcome.manifest.shards(name)) >> 20 for name in outcome.manifest.tables}
    texts = outcome.manifest.stages["corpus"].counts
    print(
        json.dumps(
            {
                "stages": list(outcome.manifest.stages),
                "megabytes": tables,
                "corpus": texts,
                "text_mb": large.stat().st_size >> 20,
            }
        )
    )


if __name__ == "__main__":
    main()
