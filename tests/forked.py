"""``retrodb`` as a process of its own, without the seconds of processor time that it takes to import torch and Beam.

Processes are forked from one that has imported those libraries (multiprocessing's ``forkserver``; the pool of workers
does the same). Each has its own arguments, environment, working folder, streams, process group, signals and exit code,
and imports retrodb itself anew, as ``python -m retrodb`` does. `tests/support.py` says what to call.
"""

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
import types
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

_READ_AT_IMPORT = ("OMP_", "MKL_", "OPENBLAS_", "PYTHON", "LD_", "MALLOC_")
"""Variables that the imported libraries, or the interpreter, look at once."""


def _libraries_see(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_READ_AT_IMPORT)}


_SEEN = _libraries_see(os.environ)
_context: Any = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["forked_libraries"])
_started: list["Forked"] = []


@atexit.register
def _end_all() -> None:
    """A test that failed may leave a process running, for which multiprocessing would wait for ever."""
    for process in _started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


class Forked:
    """A forked ``retrodb`` with the methods of `subprocess.Popen` that tests use, leader of a process group.

    ``stderr`` is a stream of text where ``err`` was not given.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        out: Path | None = None,
        err: Path | None = None,
    ) -> None:
        receiving, sending = (None, None) if err is not None else _context.Pipe(duplex=False)
        given = (list(arguments), dict(environment), os.getcwd(), out, err or sending)
        self._process = _context.Process(target=_run, args=given)
        with _apart_from_this_one():
            self._process.start()
        self.stderr: IO[str] | None = None
        if sending is not None:
            sending.close()
            self.stderr = os.fdopen(os.dup(receiving.fileno()), encoding="utf-8", errors="replace")
            receiving.close()
        _started.append(self)
        with contextlib.suppress(ProcessLookupError):
            while os.getpgid(self.pid) != self.pid:  # it cannot be told apart from its server yet
                time.sleep(0.001)

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def can_fork(environment: Mapping[str, str]) -> bool:
    """Whether a process with this environment would have imported the libraries as they are imported already."""
    return _libraries_see(environment) == _SEEN


@contextlib.contextmanager
def _apart_from_this_one() -> Any:
    """What a new process is told of this one: where the libraries to import are, beside this file (the server starts
    with the first process), but not the script that runs here, which it would import before anything else."""
    before = os.environ.get("PYTHONPATH")
    script = sys.modules["__main__"]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _run(
    arguments: list[str], environment: dict[str, str], folder: str, out: Path | None, err: Path | Connection
) -> None:
    """What the forked process does: becomes ``python -m retrodb ARGUMENTS``."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in ((1, out or os.devnull), (2, err)):
        with open(stream, "wb") if not isinstance(stream, Connection) else contextlib.nullcontext(stream) as file:
            os.dup2(file.fileno(), number)
    if isinstance(err, Connection):
        err.close()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    assert "torch" in sys.modules, "the server of forked processes has imported nothing"
    assert "retrodb" not in sys.modules
    sys.argv = ["retrodb", *arguments]
    runpy.run_module("retrodb", run_name="__main__", alter_sys=True)
