"""A trainer, its refresher, writers and readers on one database, all of which may die."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_soak_everybody_may_die_and_every_answer_is_true() -> None:
    """What `make soak-test` does for minutes."""
    script = Path(__file__).parents[1] / "benchmarks" / "soak_test.py"
    ran = subprocess.run([sys.executable, script, "--minutes", "0.5"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "answers compared with brute force" in ran.stdout, ran.stdout
