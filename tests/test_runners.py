"""Where a build runs changes none of its bytes: runners, their options, and what they say when something is missing."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import DATA_TABLES, Running, build_here, digests, retrodb, strays, write_jsonl

from retrodb.config import RunSettings, make_config
from retrodb.errors import InputError, UsageError

SETTINGS = {"chunk_tokens": 32, "sequence_tokens": 256, "neighbours": 4, "shard_bytes": "16KiB"}
FLAGS = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def started(*module: object, **environment: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A Python module as a process group of its own, all of which is gone afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, module)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, **environment},
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_port(port: int, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise AssertionError(f"nothing listens at {port}")


@pytest.fixture(scope="module")
def job_server() -> Iterator[list[str]]:
    """Beam's portable job service and a pool of workers, as Flink or Spark have them; the flags that lead there."""
    job_port, pool_port = free_port(), free_port()
    service = started("apache_beam.runners.portability.local_job_service_main", "-p", job_port)
    with service, started("retrodb.pipelines.pool", "--port", pool_port):
        wait_for_port(job_port)
        wait_for_port(pool_port)
        options = [f"job_endpoint=localhost:{job_port}", f"environment_config=localhost:{pool_port}"]
        yield ["--runner", "portable", *(word for option in options for word in ("--runner-option", option))]


@pytest.fixture(scope="module")
def source(quickstart_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    topics = quickstart_corpus.read_text(encoding="utf-8").splitlines()[:6]
    return write_jsonl(tmp_path_factory.mktemp("source") / "in.jsonl", topics)


@pytest.fixture(scope="module")
def local(source: Path, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database as this machine makes it."""
    out = tmp_path_factory.mktemp("local") / "db"
    build_here([source], out, encoder=str(tiny_encoder), **SETTINGS)
    return out


# -- a whole build somewhere else -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_build_on_a_portable_runner_has_the_bytes_of_a_local_one(job_server, source, local, tiny_encoder, tmp_path):
    out = tmp_path / "db"
    ran = retrodb("build", source, "--out", out, "--encoder", tiny_encoder, *FLAGS, "--json", *job_server)
    assert ran.code == 0, ran.err
    assert digests(out) == digests(local)
    assert strays(out) == []
    jobs = ran.json["jobs"]
    print([(j["stage"], j["seconds"]) for j in jobs])
    computed = {job["stage"] for job in jobs if job["runner"] == "portable"}
    assert computed == {"corpus", "dedup", "chunk", "embed", "index", "neighbours", "training", "report"}
    assert [job["stage"] for job in jobs if job["runner"] == "local"] == ["scan"]
    assert {job["state"] for job in jobs} == {"DONE"}
    embedded = next(job for job in jobs if job["stage"] == "embed")
    assert embedded["counters"]["embeddings.rows"] == ran.json["chunks"]

    again = retrodb("build", source, "--out", out, "--encoder", tiny_encoder, *FLAGS, "--json", "--runner", "local")
    assert again.json["done"] == []
