"""Jobs on Google Cloud Dataflow: one job a stage, a GPU for the embed stage alone."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import apache_beam as beam
from apache_beam.runners.runner import PipelineState
from retrodb.pipelines.runners.base import (
    Job,
    JobRecord,
    Tick,
    counters_of,
    last_line,
    quieten,
    raised_by_a_worker,
)
from retrodb.pipelines.runners.options import RunnerOptions, pipeline_options

from retrodb.errors import InputError, WorkerError
from retrodb.planning import PRICES, Cost, Effort, Machine, estimate_cost, prices_with
from retrodb.storage import Storage

EMBED: Final = "embed"
ACCELERATOR: Final = "type:nvidia-l4;count:1;install-nvidia-driver"
"""The smallest card of the current generation that computes in bfloat16."""

_REQUIRED: Final = {
    "project": "the project that is billed",
    "region": "where the workers run, as europe-west4",
    "temp_location": "a gs:// folder for Dataflow's own files",
    "sdk_container_image": "the worker image with retrodb in it (deploy/dataflow/Dockerfile)",
}
_PRICES: Final = {f"price_{name}": name for name in PRICES}
"""Options of retrodb's own, which Beam is not given."""

_REMOTE: Final = ("gs://", "s3://", "http://", "https://")
_FIRST_POLL_SECONDS: Final = 0.5
_POLL_SECONDS: Final = 10.0
_TICK_SECONDS: Final = 0.5

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

    def check_options(self) -> None:
        self.options.refuse_unknown(self.name, _PRICES)
        missing = [key for key in _REQUIRED if self.options.one(key) is None]
        if missing:
            wants = "; ".join(f"{key}=... ({_REQUIRED[key]})" for key in missing)
            raise InputError(f"--runner dataflow needs --runner-option {wants}.")
        for key in ("temp_location", "staging_location"):
            if not (self.options.one(key) or "gs://").startswith("gs://"):
                raise InputError(
                    f"--runner-option {key}={self.options.one(key)}: Dataflow keeps its own files on gs:// alone; "
                    "name a folder in a bucket, as gs://BUCKET/dataflow."
                )
        self.options.check_values(_PRICES)

    def check(self, locations: Sequence[str]) -> None:
        """Nothing is asked over the network before all that can be told without it is right."""
        self.check_options()
        for url in locations:
            if not url.startswith(_REMOTE):
                raise InputError(f"--runner dataflow: its workers cannot reach {url}; use gs:// for inputs and --out.")
        _check_client()
        if self.options.one("no_auth") != "true":
            _check_credentials()
        Storage(self.options.one("temp_location") or "").check_bucket()

    def has_accelerator(self, stage: str) -> bool:
        """Whether the workers of a stage have a GPU: those of the embed stage, unless ``--device cpu``."""
        return stage == EMBED and self._device != "cpu"

    def hints(self, stage: str) -> dict[str, str]:
        """Memory for all of a stage, which its jobs are given as an option; the card for what computes alone."""
        accelerator = {"accelerator": ACCELERATOR} if self.has_accelerator(stage) else {}
        return {"min_ram": _min_ram(stage), **accelerator}

    def describe(self, stage: str) -> dict[str, str]:
        options = self.options_of(stage)
        shown = {
            "machine_type": options["worker_machine_type"][-1],
            "max_workers": options.get("max_num_workers", ["Dataflow's default"])[-1],
            "disk": f"{options['disk_size_gb'][-1]} GB",
        }
        return {**shown, **self.hints(stage)}

    def cost(self, effort: Callable[[], Effort]) -> Cost | None:
        """None where a machine type does not tell its cores and memory."""
        work = effort()
        machines = {stage: self._machine(stage) for stage in work.core_hours}
        known = {stage: machine for stage, machine in machines.items() if machine is not None}
        given = {name: self._price(key) for key, name in _PRICES.items() if self.options.one(key) is not None}
        return estimate_cost(work, known, prices_with(given)) if len(known) == len(machines) else None

    def _machine(self, stage: str) -> Machine | None:
        options = self.options_of(stage)
        machine = Machine.parse(options["worker_machine_type"][-1])
        disk = float(options["disk_size_gb"][-1])
        return machine and replace(machine, disk_gb=disk, l4=int(self.has_accelerator(stage)))

    def _price(self, key: str) -> float:
        text = self.options.one(key) or ""
        try:
            price = float(text)
        except ValueError:
            price = -1.0
        if not 0 <= price < float("inf"):
            raise InputError(f"--runner-option {key}={text}: not a price in US dollars; give a number, as 0.056.")
        return price

    # -- a job ---------------------------------------------------------------------------------------------------------

    def options_of(self, stage: str) -> dict[str, list[str]]:
        """What a job of a stage is given: one thread a worker process, and one process where a GPU is."""
        on_gpu = self.has_accelerator(stage)
        machine = _CPU_EMBED_MACHINE if stage == EMBED and not on_gpu else _MACHINES.get(stage, _MACHINES[""])
        options = {key: values for key, values in self.options.of(stage).items() if key not in _PRICES}
        if "machine_type" in options:  # Beam knows both names
            options.setdefault("worker_machine_type", options.pop("machine_type"))
        options.setdefault("worker_machine_type", [machine])
        options.setdefault("number_of_worker_harness_threads", ["1"])
        options.setdefault("disk_size_gb", ["50"])
        options["resource_hint"] = [f"min_ram={_min_ram(stage)}"]
        options.setdefault("sdk_location", ["container"])  # else Beam fetches itself from the package index, to ship it
        if self._max_workers is not None:
            options.setdefault("max_num_workers", [str(self._max_workers)])
        options["labels"] = [*options.get("labels", []), f"retrodb-stage={stage}"]
        options["experiments"] = [*options.get("experiments", []), "use_runner_v2"]
        if on_gpu:
            options["experiments"].append("no_use_multiple_sdk_containers")
        return options

    def run(self, job: Job, tick: Tick) -> JobRecord:
        from apache_beam.runners.dataflow.dataflow_runner import DataflowRunner as Beams  # noqa: PLC0415 - an extra

        quieten()
        started = time.monotonic()
        dataflow = Beams()
        pipeline = beam.Pipeline(runner=dataflow, options=pipeline_options(self.options_of(job.stage), job.name))
        job.build(pipeline)
        try:
            result: Any = pipeline.run()
        except Exception as error:  # Google's clients raise many kinds
            raise WorkerError(f"{job.stage}: Dataflow did not take the job: {last_line(str(error))}") from error
        job.submitted(None, result.job_id())
        state = _follow(result, tick)
        job.ended()
        if state != PipelineState.DONE:
            raise _error(dataflow.dataflow_client, result.job_id(), job, state)
        return JobRecord(job.stage, self.name, result.job_id(), state, time.monotonic() - started, counters_of(result))

    def expect(self) -> None:
        """Each job starts its own workers."""

    def close(self) -> None:
        """Nothing here was started."""


def _min_ram(stage: str) -> str:
    return _MIN_RAM.get(stage, _MIN_RAM[""])


def _follow(result: Any, tick: Tick) -> str:
    """The state a job ends in; cancels it when interrupted."""
    wait = _FIRST_POLL_SECONDS
    try:
        while not PipelineState.is_terminal(state := result.state):
            end = time.monotonic() + wait
            while time.monotonic() < end:
                tick()
                time.sleep(_TICK_SECONDS)
            wait = min(_POLL_SECONDS, 2 * wait)
    except BaseException:
        result.cancel()
        raise
    return str(state)


def _error(client: Any, job_id: str, job: Job, state: str) -> Exception:
    """Why a job did not end well. Beam's own result knows it only of a job that it has followed itself."""
    if state == PipelineState.CANCELLED:
        return WorkerError(f"{job.stage}: job {job_id} was cancelled on Dataflow; run it again.")
    try:
        texts = [message.message_text for message in _error_messages(client, job_id)]
    except Exception as error:  # Google's clients raise many kinds
        texts = [f"its messages cannot be read ({last_line(str(error))})"]
    if (found := raised_by_a_worker(texts)) is not None:
        return found
    return WorkerError(f"{job.stage}: Dataflow job {job_id} ended in state {state}: {last_line(''.join(texts[-1:]))}")


def _error_messages(client: Any, job_id: str) -> Iterator[Any]:
    token = None
    while token != "":
        messages, token = client.list_messages(job_id, page_token=token, minimum_importance="JOB_MESSAGE_ERROR")
        yield from messages


def _check_client() -> None:
    """Google's client library is there."""
    try:
        from apache_beam.runners.dataflow.internal import apiclient  # noqa: F401, PLC0415 - an extra
    except ImportError as error:
        raise InputError(
            f"--runner dataflow needs Google's clients ({error}): pip install 'retrodb[dataflow]'."
        ) from error


def _check_credentials() -> None:
    """There are credentials, and they can be read. Beam itself would go on without."""
    import google.auth  # noqa: PLC0415 - an extra

    try:
        google.auth.default()
    except (google.auth.exceptions.GoogleAuthError, OSError, ValueError) as error:
        raise InputError(
            f"--runner dataflow found no Google credentials ({last_line(str(error))}): run gcloud auth "
            "application-default login, or name a service account's key file in GOOGLE_APPLICATION_CREDENTIALS."
        ) from error
