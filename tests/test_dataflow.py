"""Dataflow without an account: every job is built to its full proto and its full Job message by Google's own client,
sent to a stand-in on a loopback port, and run there; no call can leave the machine."""

import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability.api import beam_runner_api_pb2
from failing_work import fail
from retrodb.pipelines.receipts import ReceiptBook
from retrodb.pipelines.runners import Job, make_runner
from retrodb.pipelines.runners.dataflow import DataflowRunner
from retrodb.pipelines.runners.options import pipeline_options
from retrodb.pipelines.tasks import DealOut, DoTasks, Task
from support import build_here, manifest_of, retrodb, write_jsonl

from retrodb.config import RunSettings
from retrodb.errors import InputError
from retrodb.manifest import STAGES
from retrodb.planning import PRICES, Effort, Machine, estimate_cost, prices_with
from retrodb.storage import Storage

pytest.importorskip(
    "google.cloud.dataflow", reason="Google's Dataflow client is not installed: pip install 'retrodb[dev]'"
)

HERE = Path(__file__).parent
OPTIONS = ("project=p", "region=europe-west4", "temp_location=gs://b/tmp", "sdk_container_image=r/worker:1")
SETTINGS = {"chunk_tokens": 32, "sequence_tokens": 256, "neighbours": 4, "shard_bytes": "16KiB", "precision": "fp32"}
FLAGS = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in SETTINGS.items())
SAME_ANYWHERE = ("chunks", "embeddings", "index", "neighbours", "training", "leakage")
"""Tables in which the inputs' own URLs do not stand."""

LOCAL_NETWORK = 'ip link set lo up && exec "$@"'


@pytest.fixture(autouse=True)
def no_call_leaves_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks a name up, or connects to any address but loopback, fails the test."""

    def refuse(name: str, original: Any, self: socket.socket, address: Any, *rest: Any) -> Any:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"{name}: a call to {address}")
        return original(self, address, *rest)

    for name in ("connect", "connect_ex"):
        original = getattr(socket.socket, name)
        monkeypatch.setattr(socket.socket, name, functools.partialmethod(_checked, name, original, refuse))
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # which google.auth reads when it is imported
    monkeypatch.setattr("google.auth.compute_engine._metadata._NO_GCE_CHECK", True)


def _checked(self: socket.socket, name: str, original: Any, refuse: Any, address: Any, *rest: Any) -> Any:
    return refuse(name, original, self, address, *rest)


# -- a whole build, launched as a template ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sent:
    """One job as Dataflow was sent it: the Job message, and the pipeline's proto."""

    message: dict[str, Any]
    proto: beam_runner_api_pb2.Pipeline

    @property
    def stage(self) -> str:
        return self.message["labels"].get("retrodb-stage", "driver")

    @property
    def pool(self) -> dict[str, Any]:
        (pool,) = self.message["environment"]["workerPools"]
        return pool

    @property
    def options(self) -> dict[str, Any]:
        return self.message["environment"]["sdkPipelineOptions"]["options"]

    def hints(self) -> dict[str, dict[str, bytes]]:
        """Resource hints by the name of the transform."""
        environments = self.proto.components.environments
        return {
            transform.unique_name: dict(environments[transform.environment_id].resource_hints)
            for transform in self.proto.components.transforms.values()
            if transform.environment_id
        }


@dataclass(frozen=True)
class Launched:
    """A build that was launched as a Flex template: its jobs, the driver's first, and a copy of the database."""

    jobs: list[Sent]
    database: Path
    said: str

    def of(self, stage: str) -> list[Sent]:
        return [job for job in self.jobs if job.stage == stage]


@pytest.fixture(scope="module")
def source(quickstart_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    topics = quickstart_corpus.read_text(encoding="utf-8").splitlines()[:6]
    return write_jsonl(tmp_path_factory.mktemp("source") / "in.jsonl", topics)


@pytest.fixture(scope="module")
def launched(source: Path, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """In a network namespace of its own, where there is no device but loopback; where that is not allowed, without."""
    folder = tmp_path_factory.mktemp("dataflow")
    words = [
        "--inputs=gs://corpora/inputs/in.jsonl",
        "--out=gs://corpora/db",
        f"--flags=--encoder {tiny_encoder} {FLAGS} --workers 7 --runner-option embed.max_num_workers=3",
        "--runner=DataflowRunner",
        "--project=p",
        "--region=europe-west4",
        "--temp_location=gs://corpora/tmp",
        "--job_name=build",
        "--sdk_container_image=r/worker:1",
        "--service_account_email=worker@p.iam.gserviceaccount.com",
        "--subnetwork=regions/europe-west4/subnetworks/s",
        "--network=n",
        "--no_use_public_ips",
        "--labels=team=retrieval",
    ]
    fake = [sys.executable, str(HERE / "fake_dataflow.py"), str(folder)]
    command = [*fake, sys.executable, str(HERE / "launch_template.py"), str(source), str(folder / "db"), *words]
    done = subprocess.run([*_own_network(), *command], capture_output=True, text=True, check=False, timeout=570)
    assert done.returncode == 0, done.stderr
    jobs = [
        Sent(
            json.loads(path.read_text()), beam_runner_api_pb2.Pipeline.FromString(path.with_suffix(".pb").read_bytes())
        )
        for path in sorted((folder / "jobs").glob("*.json"))
    ]
    return Launched(jobs, folder / "db", done.stdout)


def _own_network() -> list[str]:
    """The command that gives another one a network of loopback alone; empty where that is not allowed here."""
    command = ["unshare", "--net", *([] if os.geteuid() == 0 else ["--map-root-user"]), "sh", "-c", LOCAL_NETWORK, "sh"]
    able = shutil.which("unshare") and shutil.which("ip")
    return (
        command if able and subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0 else []
    )


@pytest.mark.slow
def test_a_whole_build_reaches_no_network(launched):
    if "network: none" not in launched.said:
        pytest.skip("no network namespace can be made here: that no call left was not shown for this build")


@pytest.mark.slow
def test_the_tables_are_those_of_a_local_build(launched, source, tiny_encoder, tmp_path):
    build_here([source], tmp_path / "db", encoder=str(tiny_encoder), **SETTINGS)

    def recorded(database: Path) -> dict[str, str]:
        tables = manifest_of(database)["tables"]
        return {shard["path"]: shard["sha256"] for table in SAME_ANYWHERE for shard in tables[table]["shards"]}

    assert recorded(launched.database) == recorded(tmp_path / "db")


@pytest.mark.slow
def test_the_template_launches_one_small_job_that_is_the_driver(launched):
    (driver,) = launched.of("driver")
    assert driver is launched.jobs[0]
    assert (driver.pool["machineType"], driver.pool["numWorkers"]) == ("n2-standard-2", 1)
    assert driver.pool["autoscalingSettings"] == {"algorithm": "AUTOSCALING_ALGORITHM_NONE", "maxNumWorkers": 1}
    assert not any("accelerator" in hint for hints in driver.hints().values() for hint in hints)
    assert "no_use_multiple_sdk_containers" in driver.message["environment"]["experiments"]


@pytest.mark.slow
def test_every_stage_is_a_batch_job_with_the_options_given(launched):
    stages = [job for job in launched.jobs if job.stage != "driver"]
    assert {job.stage for job in stages} == set(STAGES)
    for job in stages:
        message, environment = job.message, job.message["environment"]
        assert re.fullmatch(r"retrodb-[a-z][a-z0-9-]+-[0-9a-f]{6}-[0-9a-f]{8}", message["name"])
        assert message["type"] == 1, "JOB_TYPE_BATCH"
        assert message["labels"] == {"team": "retrieval", "retrodb-stage": job.stage}
        assert environment["version"]["job_type"] == "FNAPI_BATCH"
        assert environment["serviceAccountEmail"] == "worker@p.iam.gserviceaccount.com"
        assert environment["tempStoragePrefix"].startswith("storage.googleapis.com/corpora/tmp/")
        assert "flexResourceSchedulingGoal" not in environment, "FlexRS is off"
        assert {"use_runner_v2", "use_unified_worker"} <= set(environment["experiments"])
        assert job.options["streaming"] is False
        assert job.options["region"] == "europe-west4"
        assert job.options["sdk_location"] == "container"
        assert (job.pool["network"], job.pool["subnetwork"]) == ("n", "regions/europe-west4/subnetworks/s")
        assert job.pool["ipConfiguration"] == 2, "WORKER_IP_PRIVATE"
        assert (job.pool["diskSizeGb"], job.pool["numThreadsPerWorker"]) == (50, 1)
        assert job.pool["autoscalingSettings"] == {"maxNumWorkers": 3 if job.stage == "embed" else 7}
        assert {image["containerImage"] for image in job.pool["sdkHarnessContainerImages"]} == {"r/worker:1"}
        assert job.pool.get("packages", []) == [], "nothing is shipped with a job: the image has it"


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_has_the_machine_and_the_memory_that_suit_it(launched, stage):
    machines = {"embed": "g2-standard-4", "index": "n2-highmem-8", "neighbours": "n2-highmem-8"}
    jobs = launched.of(stage)
    assert {job.pool["machineType"] for job in jobs} == {machines.get(stage, "n2-standard-4")}
    ram = {"embed": b"8000000000", "index": b"16000000000", "neighbours": b"16000000000"}.get(stage, b"4000000000")
    card = {"beam:resources:accelerator:v1": b"type:nvidia-l4;count:1;install-nvidia-driver"}
    for job in jobs:
        on_card = {name for name, hints in job.hints().items() if card.items() <= hints.items()}
        assert {hints["beam:resources:min_ram_bytes:v1"] for hints in job.hints().values()} == {ram}
        assert len({name for name, hints in job.hints().items() if set(card) & set(hints)}) == len(on_card)
        assert {name.split("/")[0] for name in on_card} == ({"embed"} if stage == "embed" else set())
        one_process = "no_use_multiple_sdk_containers" in job.message["environment"]["experiments"]
        assert one_process == (stage == "embed")


# -- one job ----------------------------------------------------------------------------------------------------------


def runner_of(*more: str, **settings: object) -> DataflowRunner:
    runner = make_runner(RunSettings(runner="dataflow", runner_option=(*OPTIONS, *more), **settings))
    assert isinstance(runner, DataflowRunner)
    return runner


def options_of(runner: DataflowRunner, stage: str) -> PipelineOptions:
    return pipeline_options(runner.options_of(stage), f"retrodb-{stage}-1")


def test_embedding_on_the_cpu_asks_for_no_card():
    runner = runner_of(device="cpu")
    assert runner.hints("embed") == {"min_ram": "8GB"}
    assert options_of(runner, "embed").get_all_options()["machine_type"] == "n2-standard-8"


def test_an_option_of_ours_wins_over_the_default_of_its_stage():
    runner = runner_of("embed.machine_type=g2-standard-8", "disk_size_gb=200", "use_public_ips=false")
    options = options_of(runner, "embed").get_all_options()
    assert (options["machine_type"], options["disk_size_gb"], options["use_public_ips"]) == (
        "g2-standard-8",
        200,
        False,
    )
    assert options_of(runner, "chunk").get_all_options()["machine_type"] == "n2-standard-4"


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in, in this process, with an emulated gs://."""
    import fake_dataflow
    from object_stores import running

    with running("gs", tmp_path / "requests.log") as store:
        server = ThreadingHTTPServer(("127.0.0.1", 0), fake_dataflow.Answers)
        port = server.server_address[1]
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(fake_dataflow.key_file(tmp_path, port)))
        fake_dataflow.Answers.service = fake_dataflow.Service(tmp_path, store.environment["STORAGE_EMULATOR_HOST"])
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = (
            *OPTIONS[:2],
            "temp_location=gs://corpora/tmp",
            OPTIONS[3],
            f"dataflow_endpoint=http://localhost:{port}",
        )
        yield make_runner(RunSettings(runner="dataflow", runner_option=options))
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_an_error_on_a_worker_reaches_the_driver_as_it_was_raised(service, tmp_path):
    book = ReceiptBook(Storage(str(tmp_path)), "stage", "f" * 64)
    ended: list[str] = []
    job = Job(
        "chunk",
        "retrodb-test",
        lambda p: p | DealOut([Task(2, None)]) | beam.ParDo(DoTasks(book, fail)),
        submitted=lambda endpoint, job_id: ended.append(job_id),
        ended=lambda: ended.append("ended"),
    )
    service.check(["gs://corpora/db"])
    with pytest.raises(InputError, match="^shard 2: what, where; the remedy"):
        service.run(job, lambda: None)
    assert ended == ["job-00", "ended"]


@pytest.mark.slow
def test_ctrl_c_cancels_the_job(service, tmp_path):
    import fake_dataflow
    from failing_work import linger

    def interrupt() -> None:
        raise KeyboardInterrupt

    book = ReceiptBook(Storage(str(tmp_path)), "stage", "f" * 64)
    job = Job("chunk", "retrodb-test", lambda p: p | DealOut([Task(2, None)]) | beam.ParDo(DoTasks(book, linger)))
    with pytest.raises(KeyboardInterrupt):
        service.run(job, interrupt)
    assert fake_dataflow.Answers.service.jobs["job-00"]["currentState"] in (5, "JOB_STATE_CANCELLED")


# -- what is missing is said, before any call -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "region=... .where the workers run, as europe-west4.; temp_location=.*sdk_container_image="),
        (("temp_location=/tmp/x",), "temp_location=/tmp/x: Dataflow keeps its own files on gs:// alone"),
        (("price_vcpu_hour=free",), "price_vcpu_hour=free: not a price in US dollars"),
    ],
)
def test_what_the_options_lack_is_said(options, said):
    given = OPTIONS if options else ("project=p",)
    runner = make_runner(RunSettings(runner="dataflow", runner_option=(*given, *options)))

    def ask() -> None:
        runner.check_options()
        runner.cost(lambda: Effort({"chunk": 1.0}, 0.0, 0.0))

    with pytest.raises(InputError, match=said):
        ask()


def test_a_local_database_is_refused_before_any_call():
    with pytest.raises(InputError, match="its workers cannot reach /my-db; use gs://"):
        runner_of().check(["/my-db"])


def test_missing_credentials_are_said_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(InputError, match=r"no Google credentials \(File .*none.json was not found.*gcloud auth"):
        runner_of().check(["gs://b/db"])
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    with pytest.raises(InputError, match="no Google credentials .*gcloud auth application-default login"):
        runner_of().check(["gs://b/db"])


def test_missing_clients_are_said_with_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam.runners.dataflow.internal.apiclient", None)
    monkeypatch.setattr("apache_beam.runners.dataflow.internal.apiclient", None, raising=False)
    monkeypatch.delattr("apache_beam.runners.dataflow.internal.apiclient")
    with pytest.raises(InputError, match="needs Google's clients .*pip install 'retrodb.dataflow.'"):
        runner_of().check(["gs://b/db"])


@pytest.mark.slow
def test_the_command_line_says_it_without_a_traceback_and_asks_nobody(tmp_path):
    """Neither inputs nor the database are looked at: there is no store at all behind this environment."""
    options = [word for option in OPTIONS for word in ("--runner-option", option)]
    nobody = {"NO_GCE_CHECK": "true", "CLOUDSDK_CONFIG": str(tmp_path), "HOME": str(tmp_path)}
    nobody |= {"STORAGE_EMULATOR_HOST": "http://127.0.0.1:9", "GOOGLE_APPLICATION_CREDENTIALS": ""}
    ran = retrodb("build", "gs://b/*.gz", "--out", "gs://b/db", "--runner", "dataflow", *options, timeout=60, **nobody)
    assert ran.code == 3, ran.err
    assert "found no Google credentials" in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.slow
def test_a_bucket_that_does_not_exist_is_named(service):
    options = (*OPTIONS[:2], "temp_location=gs://no-such-bucket/tmp", OPTIONS[3])
    runner = make_runner(RunSettings(runner="dataflow", runner_option=options))
    with pytest.raises(Exception, match="gs://no-such-bucket/tmp: there is no such bucket") as raised:
        runner.check(["gs://corpora/db"])
    assert raised.value.exit_code == 3


# -- what it would cost -----------------------------------------------------------------------------------------------


def test_a_cost_is_hours_times_prices():
    machines = {"embed": Machine("g2-standard-4", 4, 16, disk_gb=50, l4=1), "chunk": Machine("n2-standard-4", 4, 16)}
    cost = estimate_cost(Effort({"chunk": 40.0, "embed": 900.0}, 38.782, 1e12), machines, PRICES)
    chunk, embed = cost.parts
    assert chunk.hours == pytest.approx(40 / 4 + 0.1)
    assert chunk.usd == pytest.approx(10.1 * (4 * 0.056 + 16 * 0.003557))
    assert embed.hours == pytest.approx(38.782 * 312 / 121 + 0.1)
    assert embed.usd == pytest.approx(embed.hours * (4 * 0.056 + 16 * 0.003557 + 50 * 0.000054 + 0.672))
    assert cost.shuffle_usd == pytest.approx(11.0)
    assert cost.usd == pytest.approx(chunk.usd + embed.usd + 11.0)


def test_prices_are_data_and_ones_own_replace_them():
    given = prices_with({"l4_hour": 0.4})
    assert (given["l4_hour"].usd, given["l4_hour"].source) == (0.4, "given")
    assert given["vcpu_hour"] == PRICES["vcpu_hour"]
    assert all("2025" in price.source for price in PRICES.values())


@pytest.mark.parametrize(
    ("name", "cores", "memory"), [("n2-highmem-8", 8, 64), ("g2-standard-4", 4, 16), ("n1-standard-4", 4, 15)]
)
def test_a_machine_type_tells_its_size(name, cores, memory):
    machine = Machine.parse(name)
    assert (machine.cores, machine.memory_gb) == (cores, memory)
    assert Machine.parse("a-machine-of-ones-own") is None


@pytest.mark.slow
def test_dry_run_prints_stages_hints_machine_types_and_the_cost(tmp_path, tiny_encoder):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "some words of a document " * 20}])
    options = [word for option in (*OPTIONS, "price_l4_hour=0.5") for word in ("--runner-option", option)]
    flags = ["build", source, "--out", tmp_path / "db", "--encoder", tiny_encoder, "--runner", "dataflow", *options]
    ran = retrodb(*flags, "--dry-run", "--json")
    assert ran.code == 0, ran.err
    runs = {stage["stage"]: stage["runs"] for stage in ran.json["stages"]}
    assert runs["embed"]["machine_type"] == "g2-standard-4"
    assert runs["embed"]["accelerator"].startswith("type:nvidia-l4;count:1")
    assert [stage for stage, facts in runs.items() if "accelerator" in facts] == ["embed"]
    cost = ran.json["cost"]
    assert [part["part"] for part in cost["parts"]] == ["other stages", "embed", "neighbours"]
    assert cost["usd"] == pytest.approx(sum(part["usd"] for part in cost["parts"]) + cost["shuffle"]["usd"], abs=1e-3)
    assert cost["prices"]["l4_hour"] == {"usd": 0.5, "per": "hour of an NVIDIA L4", "source": "given"}
    assert not (tmp_path / "db").exists()
    shown = retrodb(*flags, "--dry-run")
    assert "dataflow: machine_type g2-standard-4" in shown.out
    assert (
        "An estimate from list prices (us-central1, January 2025; prices given: l4_hour), never measured" in shown.out
    )
