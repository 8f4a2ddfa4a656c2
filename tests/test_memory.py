"""A worker's peak memory does not grow with the corpus (invariant 7), nor does the driver's, which shuffles."""

import importlib.util
import sys
from pathlib import Path

import pytest
from support import corpus

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "build.py"


@pytest.mark.slow
def test_four_times_the_corpus_takes_no_more_memory(tiny_encoder, tmp_path):
    spec = importlib.util.spec_from_file_location("benchmarks_build", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = benchmark
    spec.loader.exec_module(benchmark)
    settings = ("--encoder", str(tiny_encoder), "--workers", "2")
    small, large = benchmark.measure_memory(corpus("wiki_large"), tmp_path, (5_000, 20_000), *settings)
    assert large.driver < 1.2 * small.driver
    assert large.worker < 1.2 * small.worker
