"""A worker's peak memory does not grow with the corpus (invariant 7), nor does the driver's, which shuffles."""

import importlib.util
import json
import os
import signal
import subprocess
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


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts all private memory on Linux alone")
LIMIT_MB = 96


def under_limit(script, *arguments):
    """Runs a script of this folder, which allows itself only so much memory beyond what the libraries take."""
    return subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        # How many arenas glibc makes for threads, and what each keeps, is a matter of chance.
        env={**os.environ, "OMP_NUM_THREADS": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "MALLOC_ARENA_MAX": "1"},
    )


OUT_OF_MEMORY = ("MemoryError", "malloc", "realloc failed", "memory allocation of")


def ran_out_of_memory(done):
    """Whoever's allocation it is that fails: Python's, Arrow's, Beam's, Rust's; some die of it without a word."""
    return done.returncode == -signal.SIGSEGV or (
        done.returncode and any(word in done.stderr for word in OUT_OF_MEMORY)
    )


def search_under_limit(folder, chunks, wave_mb):
    """A search of so many chunks that is allowed `LIMIT_MB`."""
    return under_limit("search_under_limit.py", folder, chunks, LIMIT_MB, wave_mb)


def stages_under_limit(folder, corpus, documents, limits):
    """Stages from text to vectors, each allowed so many megabytes."""
    named = (f"{name}={mb}" for name, mb in limits.items())
    return under_limit("stages_under_limit.py", folder, corpus, documents, *named)


@pytest.mark.slow
@on_linux
def test_a_search_fits_a_limit_below_the_size_of_what_it_searches(tmp_path):
    done = search_under_limit(tmp_path / "waves", 40_000, wave_mb=2)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["found"] == 20 * found["queries"]
    assert found["data_mb"] > 1.2 * LIMIT_MB, "the limit is no limit"


@pytest.mark.slow
@on_linux
def test_less_than_half_of_it_in_one_wave_does_not_fit(tmp_path):
    """What shows that the limit bites, and that waves are what keeps a search below it."""
    done = search_under_limit(tmp_path / "wave", 20_000, wave_mb=1_000)
    assert ran_out_of_memory(done), (done.returncode, done.stderr[-2000:])


LIMITS_MB = {"corpus": 48, "dedup": 32, "chunk": 48}


@pytest.mark.slow
@on_linux
def test_stages_that_read_text_fit_limits_below_the_size_of_what_they_read(tmp_path):
    done = stages_under_limit(tmp_path, "scans", 1_000, LIMITS_MB)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["stages"] == list(LIMITS_MB)
    assert found["megabytes"]["documents"] > 1.2 * max(LIMITS_MB.values()), "the limits are no limits"


@pytest.mark.slow
@on_linux
def test_a_limit_below_one_shard_does_stop_a_stage(tmp_path):
    done = stages_under_limit(tmp_path, "scans", 120, {"corpus": 2})
    assert ran_out_of_memory(done), (done.returncode, done.stderr[-2000:])


EMBED_LIMIT_MB = 32


@pytest.mark.slow
@on_linux
def test_embedding_fits_a_limit_below_the_size_of_the_text(tmp_path):
    """Without the code that oneDNN keeps for each shape of a batch, up to 100 MB: here for sixteen shapes alone."""
    done = stages_under_limit(tmp_path, "words", 700, {"embed": EMBED_LIMIT_MB})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["stages"][-1] == "embed"
    assert found["text_mb"] > 1.2 * EMBED_LIMIT_MB, "the limit is no limit"


INDEX_LIMIT_MB = 64


@pytest.mark.slow
@on_linux
def test_an_index_is_trained_and_added_to_under_a_limit_below_its_size(tmp_path):
    """Of one index shard a group at a time; all in one group, which shows that the limit bites, do not fit."""
    done = under_limit("index_under_limit.py", tmp_path / "groups", 40, INDEX_LIMIT_MB, 2)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["added"] == 40 * 4_000
    assert found["index_mb"] > 2 * INDEX_LIMIT_MB, "the limit is no limit"
    done = under_limit("index_under_limit.py", tmp_path / "one", 40, INDEX_LIMIT_MB, 40)
    assert ran_out_of_memory(done), (done.returncode, done.stderr[-2000:])


JOIN_LIMIT_MB = 32


@pytest.mark.slow
@on_linux
def test_the_join_and_the_report_fit_a_limit_below_the_size_of_the_neighbours_tokens(tmp_path):
    done = under_limit("join_under_limit.py", tmp_path / "db", 30, JOIN_LIMIT_MB, "lookup")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["pairs"] == {"training": 600_000, "report": 600_000}
    assert found["tokens_mb"] > 4 * JOIN_LIMIT_MB, "the limit is no limit"


@pytest.mark.slow
@on_linux
def test_the_same_tokens_in_a_shuffle_do_not_fit(tmp_path):
    """What shows that the limit bites, and that looking up is what keeps a machine below it."""
    done = under_limit("join_under_limit.py", tmp_path / "db", 30, JOIN_LIMIT_MB, "shuffle")
    assert ran_out_of_memory(done), (done.returncode, done.stderr[-2000:])
