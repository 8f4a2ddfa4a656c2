"""Jobs on this machine: Beam's in-process runner with one worker process a core.

The runner is named explicitly (``DirectRunner`` would try to download Prism).
"""

import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, TypeVar

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.runners.portability.fn_api_runner.worker_handlers import GrpcWorkerHandler, WorkerHandler
from apache_beam.transforms.environments import Environment, python_sdk_capabilities
from retrodb.pipelines.forking import NEEDED_BY_ALL, ForkedWorker, ForkServer
from retrodb.pipelines.runners.base import (
    Job,
    JobRecord,
    Tick,
    WorkerDiedError,
    as_retrodb_error,
    counters_of,
    quieten,
)
from retrodb.pipelines.threads import DRIVER_VARIABLE, ONE_THREAD, environment

from retrodb.planning import Cost, Effort

_POLL_SECONDS: Final = 0.25
_GRACE_SECONDS: Final = 3.0
_FORKED_URN: Final = "retrodb:environment:forked:v1"
_View = TypeVar("_View", bound=PipelineOptions)


class LocalRunner:
    """The default: ``workers`` processes of this machine, or this one where a job is light."""

    name = "local"
    is_local = True

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def check_options(self) -> None:
        """It takes none."""

    def check(self, locations: Sequence[str]) -> None:
        """It is always there."""

    def hints(self, stage: str) -> dict[str, str]:
        return {}

    def describe(self, stage: str) -> dict[str, str]:
        return {"workers": str(self._workers)}

    def cost(self, effort: Callable[[], Effort]) -> Cost | None:
        return None

    def expect(self) -> None:
        if self._workers > 1:
            with _worker_environment():
                _SERVER.begin()

    def run(self, job: Job, tick: Tick) -> JobRecord:
        started = time.monotonic()
        processes = 1 if job.light else min(self._workers, job.width)
        counters = run_local(job.build, processes, tick)
        return JobRecord(job.stage, self.name, job.name, "DONE", time.monotonic() - started, counters)

    def close(self) -> None:
        """Each job ends its own workers."""


def run_local(build: Callable[[beam.Pipeline], object], processes: int, tick: Tick = lambda: None) -> dict[str, int]:
    """Run a pipeline on this machine and return its counters.

    Args:
        build: applies the transforms to the pipeline.
        processes: worker processes; 1 runs in this one.
        tick: called a few times a second while it runs.

    Raises:
        RetrodbError: what a worker raised, or WorkerError when one died.
    """
    quieten()
    crew = _Crew()
    _crews[crew.name] = crew
    with _worker_environment():
        outcome = _Outcome(build, processes, crew)
        thread = threading.Thread(target=outcome.run, name="retrodb-pipeline", daemon=True)
        thread.start()
        try:
            _watch(thread, outcome, crew, tick)
        finally:
            if processes > 1 and (thread.is_alive() or outcome.error is not None):
                _SERVER.close()  # what the workers had not committed does not exist
            del _crews[crew.name]
    if outcome.error is not None:
        raise as_retrodb_error(outcome.error) from outcome.error
    return outcome.counters


def _worker_environment() -> AbstractContextManager[None]:
    """What workers are started with."""
    return environment({**ONE_THREAD, "PYTHONWARNINGS": "ignore", DRIVER_VARIABLE: str(os.getpid())})


class _Options(PipelineOptions):
    """Options that are parsed once: Beam looks at some of them for every transform, and makes a parser each time, which
    is a quarter of what a small job costs. Views share what they show, so that one is as good as another."""

    def view_as(self, cls: type[_View]) -> _View:
        views = self.__dict__.setdefault("_views", {})
        if cls not in views:
            views[cls] = super().view_as(cls)
        return views[cls]


class _Outcome:
    """A pipeline run in a thread of its own, so that the caller can watch, and be interrupted."""

    def __init__(self, build: Callable[[beam.Pipeline], object], processes: int, crew: "_Crew") -> None:
        self._build = build
        self._processes = processes
        self._crew = crew
        self.counters: dict[str, int] = {}
        self.error: BaseException | None = None

    def run(self) -> None:
        options = _Options(
            ["--direct_running_mode=in_memory", f"--direct_num_workers={self._processes}"],
            default_sdk_harness_log_level="CRITICAL",
        )
        forked = _Forked(self._crew.name, python_sdk_capabilities()) if self._processes > 1 else None
        try:
            pipeline = beam.Pipeline(runner=FnApiRunner(default_environment=forked), options=options)
            self._build(pipeline)
            result = pipeline.run()
            result.wait_until_finish()
            self.counters = counters_of(result)
        except BaseException as error:  # handed to the watching thread
            self.error = error


def _watch(thread: threading.Thread, outcome: _Outcome, crew: "_Crew", tick: Callable[[], None]) -> None:
    while thread.is_alive():
        thread.join(_POLL_SECONDS)
        tick()
        if thread.is_alive() and (error := crew.casualty()) is not None:
            outcome.error = error
            return


class _Crew:
    """The worker processes of one job, and whether one of them has died.

    The runner itself would wait for a dead one for ever. One that it has told to end leaves with exit code 0.
    """

    def __init__(self) -> None:
        self.name = uuid.uuid4().hex
        self._workers: list[ForkedWorker] = []
        self._died_at: float | None = None

    def start(self, control: str, worker_id: str) -> ForkedWorker:
        worker = _SERVER.start(control, worker_id)
        self._workers.append(worker)
        return worker

    def casualty(self) -> WorkerDiedError | None:
        """An error when a worker has been dead for a while: an error of the job that it died of is the better one."""
        dead = sum(worker.code not in (None, 0) for worker in self._workers)
        if not dead:
            return None
        now = time.monotonic()
        self._died_at = self._died_at or now
        if now - self._died_at <= _GRACE_SECONDS:
            return None
        return WorkerDiedError(f"a worker process died ({dead} of {len(self._workers)}): killed, or out of memory?")


_SERVER: Final = ForkServer(NEEDED_BY_ALL, quiet=True)
"""Without torch, which workers that embed load: it would be in the memory of all."""
_crews: Final[dict[str, _Crew]] = {}


@Environment.register_urn(_FORKED_URN, bytes)
class _Forked(Environment):
    """Beam's description of where the workers of a job run: a crew's name."""

    def __init__(self, crew: str, capabilities: Any = (), artifacts: Any = (), resource_hints: Any = None) -> None:
        super().__init__(capabilities, artifacts, resource_hints)
        self._crew = crew

    def to_runner_api_parameter(self, context: Any) -> tuple[str, bytes]:
        return _FORKED_URN, self._crew.encode()

    @staticmethod
    def from_runner_api_parameter(
        payload: bytes, capabilities: Any, artifacts: Any, resource_hints: Any, context: Any
    ) -> "_Forked":
        return _Forked(payload.decode(), capabilities, artifacts, resource_hints)


@WorkerHandler.register_environment(_FORKED_URN, bytes)
class _ForkedHandler(GrpcWorkerHandler):
    """Beam's hold of one worker of a crew."""

    def __init__(self, crew: bytes, state: Any, provision_info: Any, grpc_server: Any) -> None:
        super().__init__(state, provision_info, grpc_server)
        self._crew = _crews[crew.decode()]

    def start_worker(self) -> None:
        self._worker = self._crew.start(self.control_address, self.worker_id)

    def stop_worker(self) -> None:
        """It ends by itself once its control channel is closed."""
        self._worker.wait()
