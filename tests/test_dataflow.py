"""Dataflow without an account: every job is built to its full proto, and no call leaves the machine."""

import json

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    WorkerOptions,
)
from retrodb.pipelines.chunk import ChunkSettings
from retrodb.pipelines.embed import EmbedInput, EmbedSettings, embed_pipeline
from retrodb.pipelines.neighbours import truth_pipeline
from retrodb.pipelines.receipts import ReceiptBook
from retrodb.pipelines.runners import Job, make_runner
from retrodb.pipelines.runners.dataflow import DataflowRunner
from retrodb.pipelines.tasks import Task
from support import retrodb, write_jsonl

from retrodb.config import RunSettings
from retrodb.errors import InputError
from retrodb.storage import Storage

OPTIONS = ("project=p", "region=europe-west4", "temp_location=gs://b/tmp", "sdk_container_image=r/worker:1")


def runner_of(*more: str, **settings: object) -> DataflowRunner:
    runner = make_runner(RunSettings(runner="dataflow", runner_option=(*OPTIONS, *more), **settings))
    assert isinstance(runner, DataflowRunner)
    return runner


def options_of(runner: DataflowRunner, stage: str) -> PipelineOptions:
    return runner.pipeline_options(Job(stage, f"retrodb-{stage}-1", lambda pipeline: None))


def hints_of(pipeline: beam.Pipeline) -> dict[str, dict[str, bytes]]:
    """Resource hints by the name of the transform that computes, as the proto has them."""
    proto = pipeline.to_runner_api()
    return {
        transform.unique_name: dict(proto.components.environments[transform.environment_id].resource_hints)
        for transform in proto.components.transforms.values()
        if transform.environment_id
    }


def embedding(runner: DataflowRunner) -> beam.Pipeline:
    book = ReceiptBook(Storage("memory://dataflow-test/db"), "embed", "f" * 64)
    chunking = ChunkSettings(tokenizer="gpt2", stored=False, chunk_tokens=64, keep_text=True)
    settings = EmbedSettings("e", "s", "bf16", "auto", False, chunking)
    pipeline = beam.Pipeline(options=options_of(runner, "embed"))
    embed_pipeline(pipeline, book, [Task(0, EmbedInput("c", "d"))], settings, runner.hints("embed"))
    return pipeline


def test_embedding_asks_for_one_l4_and_its_driver():
    hints = hints_of(embedding(runner_of()))
    embed = next(found for name, found in hints.items() if name == "embed")
    assert embed == {
        "beam:resources:accelerator:v1": b"type:nvidia-l4;count:1;install-nvidia-driver",
        "beam:resources:min_ram_bytes:v1": b"8000000000",
    }
    options = options_of(runner_of(), "embed")
    assert options.view_as(WorkerOptions).machine_type == "g2-standard-4"
    assert options.view_as(DebugOptions).experiments == ["use_runner_v2", "no_use_multiple_sdk_containers"]


def test_embedding_on_the_cpu_asks_for_no_card():
    runner = runner_of(device="cpu")
    assert all("beam:resources:accelerator:v1" not in found for found in hints_of(embedding(runner)).values())
    assert options_of(runner, "embed").view_as(WorkerOptions).machine_type == "n2-standard-8"


@pytest.mark.parametrize("stage", ["corpus", "dedup", "chunk", "index", "neighbours", "training", "report"])
def test_no_other_stage_asks_for_a_card(stage):
    runner = runner_of()
    assert set(runner.hints(stage)) == {"min_ram"}
    options = options_of(runner, stage)
    assert options.view_as(WorkerOptions).machine_type.startswith("n2-")
    assert options.view_as(DebugOptions).experiments == ["use_runner_v2"]


def test_a_search_has_no_accelerator_in_its_proto():
    book = ReceiptBook(Storage("memory://dataflow-test/db"), "neighbours", "f" * 64)
    pipeline = beam.Pipeline(options=options_of(runner_of(), "neighbours"))
    truth_pipeline(pipeline, book, [Task(0, None)], "l2")
    assert all(not found for found in hints_of(pipeline).values())


def test_every_option_reaches_the_job():
    runner = runner_of(
        "service_account_email=w@p", "use_public_ips=false", "embed.machine_type=g2-standard-8", workers=40
    )
    options = options_of(runner, "embed")
    cloud, workers = options.view_as(GoogleCloudOptions), options.view_as(WorkerOptions)
    assert (cloud.project, cloud.region, cloud.temp_location) == ("p", "europe-west4", "gs://b/tmp")
    assert (cloud.job_name, cloud.service_account_email) == ("retrodb-embed-1", "w@p")
    assert workers.sdk_container_image == "r/worker:1"
    assert workers.use_public_ips is False
    assert (workers.machine_type, workers.max_num_workers, workers.disk_size_gb) == ("g2-standard-8", 40, 50)
    assert options_of(runner, "chunk").view_as(WorkerOptions).machine_type == "n2-standard-4"
    assert options.get_all_options()["number_of_worker_harness_threads"] == 1


def test_a_local_database_is_refused_before_any_call():
    with pytest.raises(InputError, match="its workers cannot reach /my-db; use gs://"):
        runner_of().check(["/my-db"])


def test_missing_clients_or_credentials_are_said(monkeypatch):
    """Whichever of the two this machine lacks, the message says what to do; nothing is asked over the network."""
    pytest.importorskip("google.auth")
    import google.auth

    def none() -> None:
        raise google.auth.exceptions.DefaultCredentialsError

    monkeypatch.setattr(google.auth, "default", none)
    with pytest.raises(InputError, match="gcloud auth application-default login|pip install 'retrodb.dataflow.'"):
        runner_of().check(["gs://b/db"])


@pytest.mark.slow
def test_dry_run_prints_stages_hints_and_machine_types(tmp_path, tiny_encoder):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "some words of a document " * 20}])
    flags = ["--encoder", tiny_encoder, "--runner", "dataflow"]
    options = [word for option in OPTIONS for word in ("--runner-option", option)]
    ran = retrodb("build", source, "--out", tmp_path / "db", *flags, *options, "--dry-run", "--json")
    assert ran.code == 0, ran.err
    runs = {stage["stage"]: stage["runs"] for stage in json.loads(ran.out.splitlines()[-1])["stages"]}
    assert runs["embed"]["machine_type"] == "g2-standard-4"
    assert runs["embed"]["accelerator"].startswith("type:nvidia-l4;count:1")
    assert [stage for stage, facts in runs.items() if "accelerator" in facts] == ["embed"]
    assert not (tmp_path / "db").exists()
    shown = retrodb("build", source, "--out", tmp_path / "db", *flags, *options, "--dry-run")
    assert "dataflow: machine_type g2-standard-4" in shown.out
