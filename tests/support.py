"""What tests share: real corpora, and ``retrodb`` as a separate process."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CORPORA = Path(os.environ.get("RETRODB_CORPORA", Path(__file__).parents[2] / "shared" / "corpora"))


def corpus(name: str) -> Path:
    """A real corpus; the test is skipped, saying so, where it is absent."""
    path = CORPORA / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"the corpus {path} is not on this machine")
    return path


@dataclass(frozen=True)
class Ran:
    """A finished ``retrodb`` process."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out.strip().splitlines()[-1])


def retrodb(*arguments: object, timeout: float = 600, **environment: str) -> Ran:
    """Run the command line in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "retrodb", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)
