"""Jobs on this machine: Beam's in-process runner with one worker process a core.

The runner is named explicitly (``DirectRunner`` would try to download Prism).
"""

import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import apache_beam as beam
import psutil
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.transforms.environments import SubprocessSDKEnvironment
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
_CENSUS_SECONDS: Final = 1.0
_GRACE_SECONDS: Final = 3.0
_SILENT_SECONDS: Final = 60.0
"""A worker that was told to end is missed as well, for as long as the others take to end after it: on a busy machine,
several seconds each."""
_WAITING_THREAD: Final = "run_worker"
"""Beam's thread that waits for a worker process, and raises where its exit code is not 0."""
_WORKER_MODULE: Final = "retrodb.pipelines.worker"

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
    with environment({**ONE_THREAD, "PYTHONWARNINGS": "ignore", DRIVER_VARIABLE: str(os.getpid())}):
        census = _Census(processes)
        threading.excepthook = census.hear
        outcome = _Outcome(build, processes)
        thread = threading.Thread(target=outcome.run, name="retrodb-pipeline", daemon=True)
        thread.start()
        try:
            _watch(thread, outcome, census, tick)
        finally:
            if thread.is_alive() or outcome.error is not None:
                kill_workers()
    if outcome.error is not None:
        raise as_retrodb_error(outcome.error) from outcome.error
    return outcome.counters


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

    def __init__(self, build: Callable[[beam.Pipeline], object], processes: int) -> None:
        self._build = build
        self._processes = processes
        self.counters: dict[str, int] = {}
        self.error: BaseException | None = None

    def run(self) -> None:
        options = _Options(
            ["--direct_running_mode=in_memory", f"--direct_num_workers={self._processes}"],
            default_sdk_harness_log_level="CRITICAL",
        )
        sdk = None
        if self._processes > 1:
            command = f"exec {shlex.quote(sys.executable)} -m {_WORKER_MODULE}"
            sdk = SubprocessSDKEnvironment.from_command_string(command)
        try:
            pipeline = beam.Pipeline(runner=FnApiRunner(default_environment=sdk), options=options)
            self._build(pipeline)
            result = pipeline.run()
            result.wait_until_finish()
            self.counters = counters_of(result)
        except BaseException as error:  # handed to the watching thread
            self.error = error


def _watch(thread: threading.Thread, outcome: _Outcome, census: "_Census", tick: Callable[[], None]) -> None:
    while thread.is_alive():
        thread.join(_POLL_SECONDS)
        tick()
        if thread.is_alive() and (error := census.casualty()) is not None:
            outcome.error = error
            return


class _Census:
    """Notices a worker process that is gone while its pipeline still runs: the runner itself would wait for ever.

    Workers are told to end one after the other, and the pipeline runs until the last one has. One that was told leaves
    with exit code 0; of any other Beam's thread for it raises, which is heard here.
    """

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._started = False
        self._failed = False
        self._missing_since: float | None = None
        self._next = 0.0

    def hear(self, args: threading.ExceptHookArgs) -> None:
        """The hook for what threads raise: nothing is shown."""
        if args.thread is not None and args.thread.name == _WAITING_THREAD:
            self._failed = True

    def casualty(self) -> WorkerDiedError | None:
        """An error when a worker has been missing for a while, and was not told to end."""
        now = time.monotonic()
        if self._processes == 1 or now < self._next:
            return None
        self._next = now + _CENSUS_SECONDS
        alive = len(local_workers())
        self._started = self._started or alive > 0
        missing = self._processes - alive if self._started else 0
        self._missing_since = (self._missing_since or now) if missing > 0 else None
        grace = _GRACE_SECONDS if self._failed else _SILENT_SECONDS
        if self._missing_since is None or now - self._missing_since <= grace:
            return None
        return WorkerDiedError(f"a worker process died ({missing} of {self._processes}): killed, or out of memory?")


def local_workers() -> list[psutil.Process]:
    """The running worker processes of this driver."""
    workers = []
    for child in psutil.Process().children(recursive=True):
        try:
            if child.status() != psutil.STATUS_ZOMBIE and any(_WORKER_MODULE in part for part in child.cmdline()):
                workers.append(child)
        except psutil.Error:
            continue
    return workers


def kill_workers() -> None:
    """End the worker processes at once: what they had not committed does not exist."""
    for process in psutil.Process().children(recursive=True):
        try:
            if any(_WORKER_MODULE in part for part in process.cmdline()):
                process.kill()
        except psutil.Error:
            continue
