"""Run one pipeline to its end on a runner, watch it, and turn what went wrong into one clear error.

Locally that is Beam's own in-process runner, named explicitly (``DirectRunner`` would try to download Prism), with one
worker process a core. Heavy native libraries are held to one thread in a worker: the runner schedules.
"""

import logging
import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import apache_beam as beam
import psutil
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.transforms.environments import SubprocessSDKEnvironment
from retrodb.pipelines.tasks import original_error
from retrodb.pipelines.worker import DRIVER_VARIABLE

from retrodb.errors import RetrodbError, WorkerError

_POLL_SECONDS: Final = 0.25
_CENSUS_SECONDS: Final = 1.0
_GRACE_SECONDS: Final = 3.0
_WORKER_MODULE: Final = "retrodb.pipelines.worker"
_ONE_THREAD: Final = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}


def run_local(
    build: Callable[[beam.Pipeline], object], processes: int, tick: Callable[[], None] = lambda: None
) -> dict[str, int]:
    """Run a pipeline on this machine and return its counters.

    Args:
        build: applies the transforms to the pipeline.
        processes: worker processes; 1 runs in this one.
        tick: called a few times a second while it runs.

    Raises:
        RetrodbError: what a worker raised, or WorkerError when one died.
    """
    quieten()
    with _environment({**_ONE_THREAD, DRIVER_VARIABLE: str(os.getpid())}):
        outcome = _Outcome(build, processes)
        thread = threading.Thread(target=outcome.run, name="retrodb-pipeline", daemon=True)
        thread.start()
        try:
            _watch(thread, outcome, processes, tick)
        finally:
            if thread.is_alive() or outcome.error is not None:
                kill_workers()
    if outcome.error is not None:
        raise _as_retrodb_error(outcome.error) from outcome.error
    return outcome.counters


class WorkerDiedError(WorkerError):
    """A worker process ended on its own, with its tasks undone: worth another try."""


class _Outcome:
    """A pipeline run in a thread of its own, so that the caller can watch, and be interrupted."""

    def __init__(self, build: Callable[[beam.Pipeline], object], processes: int) -> None:
        self._build = build
        self._processes = processes
        self.counters: dict[str, int] = {}
        self.error: BaseException | None = None

    def run(self) -> None:
        options = PipelineOptions(
            ["--direct_running_mode=in_memory", f"--direct_num_workers={self._processes}"],
            default_sdk_harness_log_level="CRITICAL",
        )
        environment = None
        if self._processes > 1:
            command = f"exec {shlex.quote(sys.executable)} -m {_WORKER_MODULE}"
            environment = SubprocessSDKEnvironment.from_command_string(command)
        try:
            pipeline = beam.Pipeline(runner=FnApiRunner(default_environment=environment), options=options)
            self._build(pipeline)
            result = pipeline.run()
            result.wait_until_finish()
            for counter in result.metrics().query()["counters"]:
                self.counters[counter.key.metric.name] = int(counter.committed)
        except BaseException as error:  # handed to the watching thread
            self.error = error


def _watch(thread: threading.Thread, outcome: _Outcome, processes: int, tick: Callable[[], None]) -> None:
    census = _Census(processes)
    while thread.is_alive():
        thread.join(_POLL_SECONDS)
        tick()
        if processes > 1 and thread.is_alive() and (error := census.casualty()) is not None:
            outcome.error = error
            return


class _Census:
    """Notices a worker process that is gone while its pipeline still runs: the runner itself would wait for ever."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._started = False
        self._missing_since: float | None = None
        self._next = 0.0

    def casualty(self) -> WorkerDiedError | None:
        """An error when a worker has been missing for longer than the end of a pipeline takes."""
        now = time.monotonic()
        if now < self._next:
            return None
        self._next = now + _CENSUS_SECONDS
        alive = len(local_workers())
        self._started = self._started or alive > 0
        missing = self._processes - alive if self._started else 0
        self._missing_since = (self._missing_since or now) if missing > 0 else None
        if self._missing_since is None or now - self._missing_since <= _GRACE_SECONDS:
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


def _as_retrodb_error(error: BaseException) -> RetrodbError:
    if isinstance(error, RetrodbError):
        return error
    text = str(error)
    found = original_error(text)
    if found is not None:
        return found
    last = next((line for line in reversed(re.split(r"\n|\\n", text)) if line.strip()), text)
    return WorkerError(f"the pipeline failed: {type(error).__name__}: {last.strip()[:2000]}")


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def quieten() -> None:
    """Keep Beam's own logging and its threads' tracebacks off the user's screen: the error they lead to is shown."""
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    threading.excepthook = lambda args: None
