"""The stages that read text, each under a limit on its memory: `tests/test_memory.py` runs this.

    python tests/stages_under_limit.py FOLDER DOCUMENTS STAGE=LIMIT_MB...

The documents carry 100 kB of metadata each, which the stages move along. Each stage runs once for a small database, so
that everything is loaded and started, and then for the large one, in this process, which allows itself LIMIT_MB of
memory beyond what it has (RLIMIT_DATA: all private memory that can be written). Prints one JSON object.
"""

import base64
import json
import resource
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
from search_under_limit import data_bytes
from support import build_here, make_tiny_encoder, write_jsonl

SETTINGS: dict[str, Any] = {"chunk_tokens": 32, "sequence_tokens": 512, "shard_bytes": "512KiB", "precision": "fp32"}


def write_corpus(path: Path, documents: int) -> Path:
    """Documents of random words, a few chunks each, with metadata that no codec makes smaller."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), size)) for size in rng.integers(3, 9, 4_000)]
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
    folder, documents = Path(sys.argv[1]), int(sys.argv[2])
    limits = {stage: int(limit) for stage, _, limit in (argument.partition("=") for argument in sys.argv[3:])}
    folder.mkdir(parents=True, exist_ok=True)
    threading.stack_size(512 << 10)  # Beam's threads reserve far more than they use, and RLIMIT_DATA counts it
    SETTINGS["encoder"] = str(make_tiny_encoder(folder / "encoder"))
    small, large = write_corpus(folder / "small.jsonl", 100), write_corpus(folder / "large.jsonl", documents)
    for stage, limit in limits.items():
        build_here([small], folder / "small", until=stage, **SETTINGS)
        resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + (limit << 20), resource.RLIM_INFINITY))
        outcome = build_here([large], folder / "large", until=stage, **SETTINGS)
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    tables = {name: sum(s.bytes for s in outcome.manifest.shards(name)) >> 20 for name in outcome.manifest.tables}
    print(json.dumps({"stages": list(outcome.manifest.stages), "megabytes": tables}))


if __name__ == "__main__":
    main()
