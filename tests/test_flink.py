"""The whole build on a real Flink cluster of this machine, with its parts killed: byte for byte the local one.

``make flink-test`` runs this module and shows what it measures. Needs Java and, the first time, Maven.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import Running, build_here, command, digests, live, retrodb, strays, write_jsonl

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "deploy" / "flink" / "cluster.py"
FLAGS = ["--chunk-tokens", "32", "--sequence-tokens", "256", "--neighbours", "4", "--shard-bytes", "8KiB"]


def free_ports(n: int) -> list[int]:
    probes = [socket.socket() for _ in range(n)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@dataclass(frozen=True)
class Cluster:
    """A running cluster, as its folder and its REST interface tell."""

    folder: Path
    rest: int
    flags: list[str]

    def pid(self, name: str) -> int:
        return int((self.folder / "pids" / name).read_text())

    def ask(self, what: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.rest}/{what}", timeout=10) as answer:
            return json.load(answer)

    def state_of(self, prefix: str) -> list[str]:
        return [job["state"] for job in self.ask("jobs/overview")["jobs"] if job["name"].startswith(prefix)]

    def python_workers(self) -> list[psutil.Process]:
        """What the pool's fork server has started: the pool's grandchildren."""
        return [worker for child in psutil.Process(self.pid("pool")).children() for worker in child.children()]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if shutil.which("java") is None:
        pytest.skip("Flink needs Java, and there is no java on the PATH")
    if not (SCRIPT.parent / ".cluster" / "lib.complete").exists() and shutil.which("mvn") is None:
        pytest.skip("Flink's jars are not here, and there is no mvn on the PATH to fetch them")
    folder = tmp_path_factory.mktemp("flink")
    names = ("rest", "rpc", "job", "artifact", "expansion", "pool")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    script = [sys.executable, str(SCRIPT), "--folder", str(folder)]
    given = [word for name, port in ports.items() for word in (f"--{name}-port", str(port))]
    done = subprocess.run([*script, "up", *given], capture_output=True, text=True, check=False)
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        flags = done.stdout.strip().splitlines()[-1].split("retrodb build ... ")[1].split()
        yield Cluster(folder, ports["rest"], flags)
    finally:
        before = psutil.pids()
        subprocess.run([*script, "down"], check=True)
        marked = [pid for pid in before if _belongs(pid, folder)]
        assert marked == [], "down leaves nothing behind"


def _belongs(pid: int, folder: Path) -> bool:
    try:
        return psutil.Process(pid).environ().get("RETRODB_FLINK") == str(folder)
    except psutil.Error:
        return False


@pytest.fixture(scope="module")
def source(quickstart_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    topics = quickstart_corpus.read_text(encoding="utf-8").splitlines()[:9]
    return write_jsonl(tmp_path_factory.mktemp("source") / "in.jsonl", topics)


@dataclass
class Fault:
    """Kills something once, as soon as ``when`` is true."""

    name: str
    when: Callable[[], bool]
    kill: Callable[[], None]
    done: bool = False


def inject(faults: list[Fault], running: Running) -> None:
    while running.process.poll() is None and not all(fault.done for fault in faults):
        for fault in faults:
            if not fault.done and fault.when():
                fault.kill()
                fault.done = True
        time.sleep(0.05)


def kill_one(cluster: Cluster, name: str) -> Callable[[], None]:
    return lambda: os.kill(cluster.pid(name), signal.SIGKILL)


def receipts(out: Path, stage: str) -> int:
    return sum(1 for _ in out.glob(f".build/{stage}-*/*.json"))


def test_a_build_on_flink_whose_parts_are_killed_has_the_bytes_of_a_local_one(cluster, source, tmp_path):
    local = retrodb("build", source, "--out", tmp_path / "local", *FLAGS)
    assert local.code == 0, local.err
    out = tmp_path / "db"

    def kill_a_worker() -> None:
        cluster.python_workers()[0].kill()

    faults = [
        Fault(
            "a Python worker, chunking", lambda: bool(running_in("chunk") and cluster.python_workers()), kill_a_worker
        ),
        Fault("a TaskManager, embedding", lambda: receipts(out, "embed") >= 2, kill_one(cluster, "taskmanager-1")),
        Fault("a TaskManager, joining", lambda: running_in("training"), kill_one(cluster, "taskmanager-2")),
    ]

    def running_in(stage: str) -> bool:
        return "RUNNING" in cluster.state_of(f"retrodb-{stage}-")

    answers = tmp_path / "answers.json"
    with answers.open("w") as stdout:
        process = subprocess.Popen(
            command("build", source, "--out", out, *FLAGS, "--json", *cluster.flags),
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )
        running = Running(process)
        running._reader = threading.Thread(target=running._read, daemon=True)
        running._reader.start()
        inject(faults, running)
        code = running.end(900)
    assert code == 0, running.err
    assert [fault.name for fault in faults if not fault.done] == []
    assert digests(out) == digests(tmp_path / "local")
    assert strays(out) == []

    jobs = json.loads(answers.read_text().splitlines()[-1])["jobs"]
    states = {job["jid"]: job["state"] for job in cluster.ask("jobs/overview")["jobs"]}
    on_flink = [job for job in jobs if job["runner"] == "flink"]
    stages = {job["stage"] for job in on_flink}
    assert stages == {"corpus", "dedup", "chunk", "embed", "index", "neighbours", "training", "report"}
    assert {states[job["id"]] for job in on_flink} == {"FINISHED"}
    for job in on_flink:
        print(f"\n{job['stage']:11} {job['id']} {states[job['id']]} {job['seconds']:6.1f} s", end="")
    print(f"\n{len(digests(out))} files are the same; killed: {'; '.join(fault.name for fault in faults)}")


def test_living_commands_on_flink_give_the_bytes_of_local_ones(
    cluster, source, quickstart_corpus, tiny_encoder, tmp_path
):
    settings = {"chunk_tokens": 32, "sequence_tokens": 256, "neighbours": 4, "shard_bytes": "32KiB"}
    build_here([source], tmp_path / "local", encoder=str(tiny_encoder), **settings)
    topics = quickstart_corpus.read_text(encoding="utf-8").splitlines()[9:]
    corpora = [write_jsonl(tmp_path / "more.jsonl", topics[:2]), write_jsonl(tmp_path / "other.jsonl", topics[2:])]
    database = shutil.copytree(tmp_path / "local", tmp_path / "db")
    before = len(cluster.state_of("retrodb-"))
    on_flink = live(database, *corpora, runner="flink", runner_option=tuple(cluster.flags[3::2]))
    assert on_flink == live(tmp_path / "local", *corpora, workers=1)
    assert len(cluster.state_of("retrodb-")) > before + 15
    assert set(cluster.state_of("retrodb-")) <= {"FINISHED", "CANCELED", "FAILED"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_job_whose_driver_is_interrupted_or_killed_does_not_run_on(cluster, source, tiny_encoder, tmp_path, number):
    """Ctrl-C cancels it; of a killed driver, the next one does."""
    out = tmp_path / "db"
    before = len(cluster.state_of("retrodb-"))
    running = Running.start("build", source, "--out", out, *FLAGS, "--encoder", tiny_encoder, *cluster.flags)
    assert running.wait_for(lambda: len(cluster.state_of("retrodb-")) > before)
    running.process.send_signal(number)
    assert running.end() == (130 if number == signal.SIGINT else -signal.SIGKILL), running.err
    if number == signal.SIGKILL:
        again = retrodb("build", source, "--out", out, *FLAGS, "--until", "corpus")
        assert again.code == 0, again.err
        assert "of an earlier build was ended" in again.err
    assert set(cluster.state_of("retrodb-")) <= {"FINISHED", "CANCELED", "FAILED"}
    assert not (out / ".build" / "job.json").exists()


def test_the_command_of_the_guide_builds_on_a_cluster(cluster, source, tmp_path, monkeypatch):
    """docs/deploy.md names the default ports, and a pool at its default: here they are those of this cluster."""
    guide = (Path(__file__).parents[1] / "docs" / "deploy.md").read_text(encoding="utf-8")
    line = next(line for line in guide.splitlines() if line.startswith("retrodb build") and "--runner flink" in line)
    given = dict(option.split("=") for option in cluster.flags[3::2])
    line = line.replace("localhost:8099", given["job_endpoint"]).replace("127.0.0.1:8081", given["flink_master"])
    words = [str(source) if word == "corpus.jsonl.gz" else word for word in line.split()[1:]]
    monkeypatch.chdir(tmp_path)
    pool = f"environment_config={given['environment_config']}"
    ran = retrodb(*words, "--runner-option", pool, "--until", "corpus", "--json")
    assert ran.code == 0, ran.err
    assert [job["runner"] for job in ran.json["jobs"]] == ["local", "flink"]


def test_a_job_server_is_started_from_its_jar_and_ended_with_the_build(cluster, source, tmp_path):
    jar = SCRIPT.parent / ".cluster" / "job-server.jar"
    given = dict(option.split("=") for option in cluster.flags[3::2])
    options = [f"flink_job_server_jar={jar}", f"flink_master={given['flink_master']}", "parallelism=1"]
    options.append(f"environment_config={given['environment_config']}")
    flags = [word for option in options for word in ("--runner-option", option)]
    ran = retrodb("build", source, "--out", tmp_path / "db", "--runner", "flink", *flags, "--until", "corpus", "--json")
    assert ran.code == 0, ran.err
    assert [job["state"] for job in ran.json["jobs"]] == ["DONE", "DONE"]
    assert ran.json["jobs"][1]["id"] in {job["jid"] for job in cluster.ask("jobs/overview")["jobs"]}
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(jar) in (p.info["cmdline"] or [])]
