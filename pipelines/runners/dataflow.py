"""Jobs on Google Cloud Dataflow: one job a stage, a GPU for the embed stage alone."""

import time
from collections.abc import Sequence
from typing import Any, Final

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineState
from retrodb.pipelines.runners.base import Job, JobRecord, Tick, as_retrodb_error, last_line, quieten
from retrodb.pipelines.runners.options import RunnerOptions, arguments

from retrodb.errors import InputError, WorkerError

EMBED: Final = "embed"
ACCELERATOR: Final = "type:nvidia-l4;count:1;install-nvidia-driver"
"""The smallest card of the current generation that computes in bfloat16."""

_REQUIRED: Final = {
    "project": "the project that is billed",
    "region": "where the workers run, as europe-west4",
    "temp_location": "a gs:// folder for Dataflow's own files",
    "sdk_container_image": "the worker image with retrodb in it (deploy/dataflow/Dockerfile)",
}
_REMOTE: Final = ("gs://", "s3://", "http://", "https://")
_POLL_SECONDS: Final = 10.0
_TICK_SECONDS: Final = 1.0

_MACHINES: Final = {"": "n2-standard-4", "index": "n2-highmem-8", "neighbours": "n2-highmem-8", EMBED: "g2-standard-4"}
"""Machine types by stage: L4 cards come with the g2 family; a search holds a group of index shards."""

_CPU_EMBED_MACHINE: Final = "n2-standard-8"
_MIN_RAM: Final = {"": "4GB", "index": "16GB", "neighbours": "16GB", EMBED: "8GB"}


class DataflowRunner:
    """Submits each job with the options given, and defaults that suit its stage."""

    name = "dataflow"
    is_local = False

    def __init__(self, options: RunnerOptions, max_workers: int | None = None, device: str = "auto") -> None:
        self.options = options
        self._max_workers = max_workers
        self._device = device

    # -- before a build ------------------------------------------------------------------------------------------------

    def check(self, locations: Sequence[str]) -> None:
        self.options.refuse_unknown(self.name)
        missing = [key for key in _REQUIRED if self.options.one(key) is None]
        if missing:
            wants = "; ".join(f"{key}=... ({_REQUIRED[key]})" for key in missing)
            raise InputError(f"--runner dataflow needs --runner-option {wants}.")
        for url in locations:
            if not url.startswith(_REMOTE):
                raise InputError(f"--runner dataflow: its workers cannot reach {url}; use gs:// for inputs and --out.")
        for stage in (None, *self.options.stages()):
            arguments(self.options.of(stage))
        _check_client()

    def has_accelerator(self, stage: str) -> bool:
        """Whether the workers of a stage have a GPU: those of the embed stage, unless ``--device cpu``."""
        return stage == EMBED and self._device != "cpu"

    def hints(self, stage: str) -> dict[str, str]:
        accelerator = {"accelerator": ACCELERATOR} if self.has_accelerator(stage) else {}
        return {"min_ram": _MIN_RAM.get(stage, _MIN_RAM[""]), **accelerator}

    def describe(self, stage: str) -> dict[str, str]:
        options = self.options_of(stage)
        shown = {
            "machine_type": options["worker_machine_type"][-1],
            "max_workers": options.get("max_num_workers", ["Dataflow's default"])[-1],
            "disk": f"{options['disk_size_gb'][-1]} GB",
        }
        return {**shown, **self.hints(stage)}

    # -- a job ---------------------------------------------------------------------------------------------------------

    def options_of(self, stage: str) -> dict[str, list[str]]:
        """What a job of a stage is given: one thread a worker process, and one process where a GPU is."""
        on_gpu = self.has_accelerator(stage)
        machine = _CPU_EMBED_MACHINE if stage == EMBED and not on_gpu else _MACHINES.get(stage, _MACHINES[""])
        options = self.options.of(stage)
        if "machine_type" in options:  # Beam knows both names
            options.setdefault("worker_machine_type", options.pop("machine_type"))
        options.setdefault("worker_machine_type", [machine])
        options.setdefault("number_of_worker_harness_threads", ["1"])
        options.setdefault("disk_size_gb", ["50"])
        if self._max_workers is not None:
            options.setdefault("max_num_workers", [str(self._max_workers)])
        options["experiments"] = [*options.get("experiments", []), "use_runner_v2"]
        if on_gpu:
            options["experiments"].append("no_use_multiple_sdk_containers")
        return options

    def pipeline_options(self, job: Job) -> PipelineOptions:
        """The options of a job, as Beam has them."""
        return PipelineOptions([*arguments(self.options_of(job.stage)), f"--job_name={job.name}"])

    def run(self, job: Job, tick: Tick) -> JobRecord:
        from apache_beam.runners.dataflow.dataflow_runner import DataflowRunner as Beams  # noqa: PLC0415 - an extra

        quieten()
        started = time.monotonic()
        pipeline = beam.Pipeline(runner=Beams(), options=self.pipeline_options(job))
        job.build(pipeline)
        try:
            result: Any = pipeline.run()
        except Exception as error:  # Google's clients raise many kinds
            raise WorkerError(f"{job.stage}: Dataflow did not take the job: {last_line(str(error))}") from error
        job.submitted(None, result.job_id())
        state = _follow(result, tick)
        job.ended()
        if state != PipelineState.DONE:
            raise _error(result, job, state)
        counters = {one.key.metric.name: int(one.committed or 0) for one in result.metrics().query()["counters"]}
        return JobRecord(job.stage, self.name, result.job_id(), state, time.monotonic() - started, counters)

    def close(self) -> None:
        """Nothing here was started."""


def _follow(result: Any, tick: Tick) -> str:
    """The state a job ends in; cancels it when interrupted."""
    try:
        while not PipelineState.is_terminal(state := result.state):
            end = time.monotonic() + _POLL_SECONDS
            while time.monotonic() < end:
                tick()
                time.sleep(_TICK_SECONDS)
    except BaseException:
        result.cancel()
        raise
    return str(state)


def _error(result: Any, job: Job, state: str) -> Exception:
    if state == PipelineState.CANCELLED:
        return WorkerError(f"{job.stage}: job {result.job_id()} was cancelled on Dataflow; run it again.")
    try:
        result.wait_until_finish()  # the job is over: this only fetches the messages, and raises the last error
    except Exception as error:
        return as_retrodb_error(error)
    return WorkerError(f"{job.stage}: Dataflow job {result.job_id()} ended in state {state}.")


def _check_client() -> None:
    """Google's client library and credentials are there."""
    try:
        import google.auth  # noqa: PLC0415 - an extra
        from apache_beam.runners.dataflow.internal import apiclient  # noqa: F401, PLC0415
    except ImportError as error:
        raise InputError(
            f"--runner dataflow needs Google's clients ({error}): pip install 'retrodb[dataflow]'."
        ) from error
    try:
        google.auth.default()
    except google.auth.exceptions.DefaultCredentialsError as error:
        raise InputError(
            "--runner dataflow found no Google credentials: run gcloud auth application-default login, or name a "
            "service account's key file in GOOGLE_APPLICATION_CREDENTIALS."
        ) from error
