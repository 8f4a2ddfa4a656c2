"""Workers of this machine, forked on request: what a local run and a pool of workers start theirs with.

The imports of a worker take two seconds. Forked from a process that has them (`retrodb.pipelines.worker`) it is there
at once, and their pages are in memory once. That process is started by its command line: it knows nothing of the
program that retrodb is used from, which may have threads, and may be a script.
"""

import atexit
import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Final

WORKER_MODULE: Final = "retrodb.pipelines.worker"
NEEDED_BY_ALL: Final = (
    "apache_beam.runners.worker.sdk_worker",
    "retrodb.pipelines.text_stages",
    "retrodb.pipelines.retrieval_stages",
    "retrodb.pipelines.report_stage",
)
"""What workers of any stage import."""

_READ_AT_START: Final = ("OMP_", "MKL_", "OPENBLAS_", "RAYON_", "PYTHON", "LD_", "MALLOC_", "HF_", "GRPC_")
"""Variables that the interpreter or imported libraries look at once: where one changes, there is a new server."""
_END_SECONDS: Final = 1.0
_KILLED: Final = -9


class ForkedWorker:
    """A worker process, until it has ended."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._code = 0

    @property
    def code(self) -> int | None:
        """Its exit code, minus the signal where it was killed; None while it runs."""
        return self._code if self._ended.is_set() else None

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        self._ended.wait()
        return self._code

    def end(self, code: int) -> None:
        """It has ended."""
        self._code = code
        self._ended.set()


class ForkServer:
    """Starts workers, from a process that the first of them starts."""

    def __init__(self, modules: Sequence[str], *, quiet: bool = False) -> None:
        """
        Args:
            modules: what the workers need.
            quiet: whether what they write to stderr is nobody's to read.
        """
        self._command = [sys.executable, "-m", WORKER_MODULE, *(["--quiet"] if quiet else []), *modules]
        self._lock = threading.Lock()
        self._serving: _Serving | None = None

    def start(self, control: str, worker_id: str) -> ForkedWorker:
        """A new worker, with the environment variables and the folder of this process.

        Args:
            control: address of the runner's control service.
            worker_id: what the runner calls it.
        """
        with self._lock:
            return self._served().start(control, worker_id)

    def begin(self) -> None:
        """Start the process already, which takes as long as the imports do."""
        with self._lock:
            self._served()

    def _served(self) -> "_Serving":
        if self._serving is not None and not self._serving.fits(os.environ):
            self._serving.close()
            self._serving = None
        if self._serving is None:
            self._serving = _Serving(self._command)
        return self._serving

    def close(self) -> None:
        """Kill the workers, and end the process they come from. The next one starts another."""
        with self._lock:
            if self._serving is not None:
                self._serving.close()
                self._serving = None


class _Serving:
    """A process that forks."""

    def __init__(self, command: Sequence[str]) -> None:
        self._seen = _seen(os.environ)
        self._numbers = itertools.count()
        self._workers: dict[int, ForkedWorker] = {}
        self._lock = threading.Lock()
        self._over = False
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests = self._process.stdin
        threading.Thread(target=self._hear, args=(self._process.stdout,), name="retrodb-workers", daemon=True).start()
        atexit.register(self.close)

    def fits(self, environment: Mapping[str, str]) -> bool:
        """Whether it is there, and started as it would be now."""
        return not self._over and self._process.poll() is None and self._seen == _seen(environment)

    def start(self, control: str, worker_id: str) -> ForkedWorker:
        worker = ForkedWorker()
        with self._lock:
            number = next(self._numbers)
            self._workers[number] = worker
            given = {"folder": _folder(), "environment": dict(os.environ)}
            line = json.dumps({"number": number, "control": control, "id": worker_id, **given})
            try:
                self._requests.write(line.encode() + b"\n")
                self._requests.flush()
            except OSError:  # it was killed
                worker.end(_KILLED)
        if self._over:
            worker.end(_KILLED)
        return worker

    def close(self) -> None:
        """Kill what it has forked, and end it."""
        atexit.unregister(self.close)
        with self._lock, contextlib.suppress(OSError):
            self._requests.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        self._process.kill()
        self._process.wait()

    def _hear(self, answers: IO[bytes]) -> None:
        """Hear which workers end, until this process closes its end or is gone: then all have."""
        with contextlib.suppress(OSError, ValueError):
            for line in answers:
                answer = json.loads(line)
                self._workers.pop(answer["number"]).end(answer["code"])
        self._over = True
        for worker in list(self._workers.values()):
            worker.end(_KILLED)


def _folder() -> str | None:
    """The working folder; None where it was removed: a fork has what is left of it."""
    with contextlib.suppress(FileNotFoundError):
        return os.getcwd()
    return None


def _seen(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_READ_AT_START)}
