"""Where a build runs changes none of its bytes: runners, their options, and what they say when something is missing."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import apache_beam as beam
import pytest
from failing_work import fail, linger
from retrodb.pipelines.receipts import ReceiptBook
from retrodb.pipelines.runners import Job, make_runner
from retrodb.pipelines.runners.options import pipeline_options
from retrodb.pipelines.tasks import DealOut, DoTasks, Task
from support import (
    Running,
    always_use_workers,
    build_here,
    digests,
    live,
    retrodb,
    strays,
    write_jsonl,
)

from retrodb.config import RunSettings, make_config, read_config_file
from retrodb.errors import InputError, UsageError, WorkerError
from retrodb.storage import Storage

SETTINGS = {"chunk_tokens": 32, "sequence_tokens": 256, "neighbours": 4, "shard_bytes": "16KiB"}
FLAGS = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value))]


PRISM = Path(__file__).parents[1] / "deploy" / "prism" / "prism"
"""Beam's runner in Go, where `make prism` puts it."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def started(*module: object, **environment: str) -> "contextlib.AbstractContextManager[subprocess.Popen[bytes]]":
    """A Python module as a process group of its own, all of which is gone afterwards."""
    return started_program(sys.executable, "-m", *module, **environment)


@contextlib.contextmanager
def started_program(*command: object, **environment: str) -> Iterator["subprocess.Popen[bytes]"]:
    """As `started`, of any program."""
    process = subprocess.Popen(
        list(map(str, command)),
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
    here = str(Path(__file__).parent)
    with service, started("retrodb.pipelines.pool", "--port", pool_port, PYTHONPATH=here):
        wait_for_port(job_port)
        wait_for_port(pool_port)
        options = [f"job_endpoint=localhost:{job_port}", f"environment_config=localhost:{pool_port}"]
        yield ["--runner", "portable", *(word for option in options for word in ("--runner-option", option))]


@pytest.fixture(scope="module")
def prism() -> Iterator[list[str]]:
    """Prism and a pool of workers; the flags that lead there."""
    program = shutil.which("prism") or PRISM
    if not Path(program).exists():
        pytest.skip("prism is not here: `make prism` builds it (Go needed, a few minutes)")
    job_port, pool_port = free_port(), free_port()
    served = started_program(program, f"--job_port={job_port}", "--serve_http=false")
    with served, started("retrodb.pipelines.pool", "--port", pool_port):
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


@pytest.fixture(scope="module")
def corpora(quickstart_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What is added to a database, and what takes its place."""
    topics = quickstart_corpus.read_text(encoding="utf-8").splitlines()[6:10]
    folder = tmp_path_factory.mktemp("corpora")
    return [write_jsonl(folder / "more.jsonl", topics[:2]), write_jsonl(folder / "other.jsonl", topics[2:])]


@pytest.fixture(scope="module")
def lived(local: Path, corpora: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The tables after each living command, by one process."""
    return live(shutil.copytree(local, tmp_path_factory.mktemp("lived") / "db"), *corpora, workers=1)


@pytest.mark.slow
def test_living_commands_on_a_portable_runner_give_the_bytes_of_a_local_one(
    job_server, local, corpora, lived, tmp_path
):
    database = shutil.copytree(local, tmp_path / "db")
    assert live(database, *corpora, runner="portable", runner_option=tuple(job_server[3::2])) == lived
    assert not [path for path in database.rglob(".build") if path.is_dir()]


@pytest.mark.slow
def test_living_commands_by_two_workers_give_the_bytes_of_one(local, corpora, lived, tmp_path, monkeypatch):
    always_use_workers(monkeypatch)
    assert live(shutil.copytree(local, tmp_path / "db"), *corpora, workers=2) == lived


@pytest.mark.slow
def test_a_build_on_a_portable_runner_has_the_bytes_of_a_local_one(job_server, source, local, tiny_encoder, tmp_path):
    out = tmp_path / "db"
    ran = retrodb("build", source, "--out", out, "--encoder", tiny_encoder, *FLAGS, "--json", *job_server)
    assert ran.code == 0, ran.err
    assert digests(out) == digests(local)
    assert strays(out) == []
    jobs = ran.json["jobs"]
    computed = {job["stage"] for job in jobs if job["runner"] == "portable"}
    assert computed == {"corpus", "dedup", "chunk", "embed", "index", "neighbours", "training", "report"}
    assert [job["stage"] for job in jobs if job["runner"] == "local"] == ["scan"]
    assert {job["state"] for job in jobs} == {"DONE"}
    embedded = next(job for job in jobs if job["stage"] == "embed")
    assert embedded["counters"]["embeddings.rows"] == ran.json["chunks"]

    again = retrodb("build", source, "--out", out, "--encoder", tiny_encoder, *FLAGS, "--json", "--runner", "local")
    assert again.json["done"] == []


@pytest.mark.slow
def test_a_build_on_prism_has_the_bytes_of_a_local_one(prism, source, local, tiny_encoder, tmp_path):
    out = tmp_path / "db"
    ran = retrodb("build", source, "--out", out, "--encoder", tiny_encoder, *FLAGS, "--json", *prism)
    assert ran.code == 0, ran.err
    assert digests(out) == digests(local)
    assert strays(out) == []
    jobs = [job for job in ran.json["jobs"] if job["runner"] == "portable"]
    assert {job["state"] for job in jobs} == {"DONE"}
    embedded = next(job for job in jobs if job["stage"] == "embed")
    assert embedded["counters"]["embeddings.rows"] == ran.json["chunks"]


@pytest.mark.slow
def test_ctrl_c_cancels_the_job_and_the_next_build_finishes(job_server, source, local, tiny_encoder, tmp_path):
    out = tmp_path / "db"
    flags = ["build", source, "--out", out, "--encoder", tiny_encoder, *FLAGS]
    running = Running.start(*flags, *job_server)
    record = out / ".build" / "job.json"
    assert running.wait_for(record.exists)
    running.process.send_signal(signal.SIGINT)
    assert running.end() == 130, running.err
    assert not record.exists(), "the job is over before the driver is"
    assert retrodb(*flags, "--runner", "local").code == 0
    assert digests(out) == digests(local)


@pytest.mark.slow
def test_a_job_whose_driver_was_killed_is_ended_before_another_one_writes(job_server, source, tiny_encoder, tmp_path):
    out = tmp_path / "db"
    flags = ["build", source, "--out", out, "--encoder", tiny_encoder, *FLAGS, "--until", "corpus"]
    running = Running.start(*flags, *job_server)
    assert running.wait_for((out / ".build" / "job.json").exists)
    running.kill()
    again = retrodb(*flags, "--runner", "local")
    assert again.code == 0, again.err
    assert "of an earlier build was ended" in again.err


def test_a_job_that_cannot_be_ended_stops_the_next_build(source, tmp_path):
    out = Storage(str(tmp_path / "db"))
    build_here([source], tmp_path / "db", until="corpus")
    record = {"runner": "flink", "endpoint": None, "id": "job-1"}
    out.commit_json(".build/job.json", record)
    with pytest.raises(InputError, match="flink job job-1, which may still be writing.*delete .*job.json"):
        build_here([source], tmp_path / "db", until="chunk")


@pytest.mark.slow
def test_an_error_on_a_worker_reaches_the_driver_as_it_was_raised(job_server, tmp_path):
    runner = make_runner(RunSettings(runner="portable", runner_option=tuple(job_server[3::2])))
    book = ReceiptBook(Storage(str(tmp_path)), "stage", "f" * 64)
    job = Job("chunk", "retrodb-test", lambda p: p | DealOut([Task(2, None)]) | beam.ParDo(DoTasks(book, fail)))
    with pytest.raises(InputError, match="^shard 2: what, where; the remedy.\nA second line with 'quotes' and \"more"):
        runner.run(job, lambda: None)


@pytest.mark.slow
def test_a_job_server_that_dies_is_missed(job_server, tmp_path, monkeypatch):
    monkeypatch.setattr("retrodb.pipelines.runners.portable._LOST_SECONDS", 1.0)
    port = free_port()
    with started("apache_beam.runners.portability.local_job_service_main", "-p", port) as service:
        wait_for_port(port)
        options = (f"job_endpoint=localhost:{port}", job_server[-1])
        runner = make_runner(RunSettings(runner="portable", runner_option=options))
        book = ReceiptBook(Storage(str(tmp_path)), "stage", "f" * 64)
        killed: list[int] = []
        job = Job(
            "chunk",
            "retrodb-test",
            lambda p: p | DealOut([Task(0, None)]) | beam.ParDo(DoTasks(book, linger)),
            submitted=lambda endpoint, job_id: (os.killpg(service.pid, signal.SIGKILL), killed.append(1)),
            ended=lambda: killed.append(2),
        )
        with pytest.raises(
            WorkerError, match="chunk: the job server has not answered for 1 s .*What was finished is kept"
        ):
            runner.run(job, lambda: None)
    assert killed == [1], "nobody knows whether the job has ended: the next build must look"


# -- what is missing is said, with what to do -------------------------------------------------------------------------


def checked(runner: str, *options: str, **settings: object) -> None:
    run = RunSettings(runner=runner, runner_option=options, **settings)
    make_runner(run).check(["/database", "/input"])


@pytest.mark.slow
def test_an_unknown_option_is_named_with_what_it_may_have_meant(job_server):
    with pytest.raises(InputError, match="enviroment_config: .*'portable' has no option.*environment_config"):
        checked("portable", *job_server[3::2], "enviroment_config=localhost:1")


@pytest.mark.parametrize(
    ("runner", "options", "said"),
    [
        ("local", ["parallelism=2"], "parallelism=2: the runner 'local' takes none"),
        ("portable", [], "give --runner-option job_endpoint=HOST:PORT"),
        ("portable", ["runner=DirectRunner"], "runner: not an option of yours to set; give --runner"),
        ("flink", [], "needs the cluster's REST address.*make flink-up"),
        ("flink", ["flink_master=127.0.0.1:1"], "needs a job server: .*job_endpoint=HOST:PORT"),
        ("flink", ["flink_master=127.0.0.1:1", "job_endpoint=a:1"], "no Flink cluster answers at 127.0.0.1:1"),
        ("flink", ["flink_master=local host:8081", "job_endpoint=a:1"], "no Flink cluster answers at local host:8081"),
        ("portable", ["job_endpoint=a:1", "environment_type=EXTRENAL"], "Unknown environment type: EXTRENAL. Kinds"),
        (
            "portable",
            ["job_endpoint=a:1", "embed.environment_type=PROCESS", "environment_config={x"],
            "environment_conf",
        ),
        ("dataflow", ["project=p"], "needs --runner-option region=.*temp_location=.*sdk_container_image="),
        ("dataflow", ["projct=p"], "projct: .*Did you mean project"),
    ],
)
def test_what_a_runner_lacks_is_said(runner, options, said):
    with pytest.raises(InputError, match=said):
        checked(runner, *options)


def test_a_job_server_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr("retrodb.pipelines.runners.portable._ANSWER_SECONDS", 0.5)
    with pytest.raises(InputError, match="no job server answers at localhost:1 .job_endpoint."):
        checked("portable", "job_endpoint=localhost:1")


@pytest.fixture
def answering_cluster(monkeypatch):
    """A Flink cluster as far as the checks before a build see one."""
    monkeypatch.setattr("retrodb.pipelines.runners.flink._ask", lambda master, what: {"flink-version": "1.19.3"})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "needs a job server: .*make flink-up"),
        (["flink_job_server_jar=/no/such.jar"], "there is no file /no/such.jar. make flink-jars makes one"),
    ],
)
def test_flink_needs_a_job_server_as_well(answering_cluster, options, said):
    with pytest.raises(InputError, match=said):
        checked("flink", "flink_master=127.0.0.1:1", *options)


def test_a_job_server_jar_needs_java(answering_cluster, tmp_path, monkeypatch):
    (tmp_path / "server.jar").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="no java is on the PATH. Install a JRE"):
        checked("flink", "flink_master=127.0.0.1:1", f"flink_job_server_jar={tmp_path / 'server.jar'}")


@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-OpenSSH_9\r\n", b"HTTP/1.0 200 OK\r\n\r\n[]", b"HTTP/1.0 200 OK\r\n\r\nhi"]
)
def test_what_answers_and_is_no_flink_cluster_is_told(answer):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"

        def once() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(answer)

        threading.Thread(target=once, daemon=True).start()
        with pytest.raises(InputError, match=f"{address} .flink_master."):
            checked("flink", f"flink_master={address}", "job_endpoint=a:1")


def test_an_unknown_option_is_refused_where_the_job_server_is_yet_to_be_started(answering_cluster, tmp_path):
    (tmp_path / "server.jar").touch()
    (tmp_path / "java").touch(mode=0o755)
    jar = f"flink_job_server_jar={tmp_path / 'server.jar'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        checked("flink", "flink_master=127.0.0.1:1", jar, "parallelism=2")
        with pytest.raises(InputError, match="paralelism: .*'flink' has no option.*Did you mean parallelism"):
            checked("flink", "flink_master=127.0.0.1:1", jar, "embed.paralelism=2")


def test_an_option_given_twice_counts_as_it_was_given_last():
    runner = make_runner(RunSettings(runner="flink", runner_option=("job_endpoint=a:1", "job_endpoint=b:1")))
    assert runner.endpoint("embed") == "b:1"
    options = pipeline_options(runner.options_of("embed"), "job").get_all_options()
    assert options["job_endpoint"] == "b:1"


def test_workers_come_from_a_pool_unless_another_kind_is_named():
    def workers(*options: str) -> str:
        run = RunSettings(runner="portable", runner_option=("job_endpoint=a:1", *options))
        return make_runner(run).describe("embed")["workers"]

    assert workers() == workers("environment_type=EXTERNAL") == "localhost:50000"
    assert workers("embed.environment_config=gpu:1") == "gpu:1"
    assert workers("environment_type=DOCKER", "environment_config=an/image:1") == "DOCKER an/image:1"


@pytest.mark.slow
def test_a_pool_that_is_not_there_is_named(job_server, source, tmp_path):
    flags = ["--until", "corpus", *job_server[:4], "--runner-option", f"environment_config=localhost:{free_port()}"]
    ran = retrodb("build", source, "--out", tmp_path / "db", *flags)
    assert ran.code == 1
    assert f"found no workers: does a pool listen at {flags[-1].split('=')[1]} (environment_config)" in ran.err
    assert "Traceback" not in ran.err


def test_a_refused_runner_leaves_nothing_behind(source, tmp_path):
    ran = retrodb("build", source, "--out", tmp_path / "db", "--runner", "flink")
    assert ran.code == 3
    assert "flink_master" in ran.err
    assert "Traceback" not in ran.err
    assert not (tmp_path / "db").exists()


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["parallelism", "=2", "nowhere.parallelism=2"])
def test_an_option_is_key_value_of_all_stages_or_of_one(text):
    with pytest.raises(UsageError, match="runner-option"):
        make_config({}, {"runner": "flink", "runner_option": [text]})


def test_an_option_of_one_stage_replaces_that_of_all():
    from retrodb.pipelines.runners.options import RunnerOptions

    options = RunnerOptions.parse(["environment_config=cpu:1", "embed.environment-config=gpu:1", "experiments=a,b=c"])
    assert options.of("chunk") == {"environment_config": ["cpu:1"], "experiments": ["a,b=c"]}
    assert options.of("embed") == {"environment_config": ["gpu:1"], "experiments": ["a,b=c"]}


def test_options_stand_in_the_config_file_and_flags_win_one_by_one(tmp_path):
    (tmp_path / "flink.toml").write_text(
        'runner = "flink"\n[runner-option]\njob_endpoint = "a:1"\nparallelism = 4\n"embed.parallelism" = 2\n'
    )
    _, run = make_config(read_config_file(tmp_path / "flink.toml"), {"runner_option": ["parallelism=8"]})
    assert run.runner == "flink"
    assert sorted(run.runner_option) == ["embed.parallelism=2", "job_endpoint=a:1", "parallelism=8"]


def test_switches_and_numbers_are_checked_before_a_job_is_submitted():
    from retrodb.pipelines.runners.options import arguments

    assert arguments({"experiments": ["a", "b"], "no_auth": ["true"], "performance_runtime_type_check": ["false"]}) == [
        "--experiments=a",
        "--experiments=b",
        "--no_auth",
    ]
    with pytest.raises(InputError, match="no_auth=maybe: it is a switch"):
        arguments({"no_auth": ["maybe"]})
    with pytest.raises(InputError, match="job_server_timeout.*invalid int value: 'soon'"):
        arguments({"job_server_timeout": ["soon"]})


def test_workers_are_flinks_parallelism_unless_an_option_says_otherwise():
    def parallelism(**settings: object) -> object:
        run = RunSettings(runner="flink", **settings)
        return make_runner(run).options_of("embed").get("parallelism")

    assert parallelism(runner_option=("job_endpoint=a:1",)) is None
    assert parallelism(runner_option=("job_endpoint=a:1",), workers=6) == ["6"]
    assert parallelism(runner_option=("job_endpoint=a:1", "parallelism=3"), workers=6) == ["3"]
