"""Beam's Python workers, forked from a process that has imported what they need: to start one costs little.

    python -m retrodb.pipelines.worker [--quiet] MODULE...

The process imports the modules, and then forks a worker for every line of JSON that it reads:

    {"number": 3, "control": "localhost:1234", "id": "worker_3", "folder": "/work", "environment": {...}}

When that one has ended, it writes ``{"number": 3, "code": 0}``; the code is minus the signal of one that was killed.
Workers live no longer than this process, nor this process than the one that started it. The other end is
`retrodb.pipelines.forking`.
"""

import contextlib
import gc
import importlib
import json
import logging
import os
import selectors
import signal
import sys
import threading
import time
from typing import Any, Final

_WATCH_SECONDS: Final = 1.0
_REQUESTS: Final = 0
_ANSWERS: Final = 1
_SCREEN: Final = 2


class _Server:
    """Forks on request, on one thread: nothing that a fork could leave half done is under way meanwhile."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._parent = os.getppid()
        self._numbers: dict[int, int] = {}
        self._rest = b""
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)

    def serve(self) -> None:
        """Until whoever started this process is gone, or says so by closing the stream of requests."""
        signal.signal(signal.SIGCHLD, _nothing)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        selector = selectors.DefaultSelector()
        selector.register(_REQUESTS, selectors.EVENT_READ)
        selector.register(self._woken, selectors.EVENT_READ)
        while os.getppid() == self._parent:
            ready = {key.fd for key, _ in selector.select(_WATCH_SECONDS)}
            if self._woken in ready:
                os.read(self._woken, 1 << 12)
            self._tell_who_ended()
            if _REQUESTS in ready and not self._read():
                break
        for pid in self._numbers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _read(self) -> bool:
        """Fork for the requests that are there; False: there will be none any more."""
        data = os.read(_REQUESTS, 1 << 16)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            request = json.loads(line)
            pid = os.fork()
            if pid == 0:
                self._become(request)
            self._numbers[pid] = request["number"]
        return bool(data)

    def _tell_who_ended(self) -> None:
        while self._numbers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            answer = {"number": self._numbers.pop(pid), "code": os.waitstatus_to_exitcode(status)}
            os.write(_ANSWERS, json.dumps(answer).encode() + b"\n")

    def _become(self, request: dict[str, Any]) -> None:
        """Be the worker that was asked for, and end with it."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            os.close(self._woken)
            os.close(self._wake)
            with open(os.devnull, "r+b") as nothing:
                os.dup2(nothing.fileno(), _REQUESTS)
                os.dup2(nothing.fileno(), _ANSWERS)
                with contextlib.suppress(OSError):  # there may be no screen
                    os.dup2(_SCREEN, _ANSWERS)
            os.environ.clear()
            os.environ.update(request["environment"])
            if request["folder"] is not None:
                os.chdir(request["folder"])
            threading.Thread(target=_end_with, args=(os.getppid(),), name="retrodb-watchdog", daemon=True).start()
            if self._quiet:
                # Beam prints tracebacks here, also when the driver is gone. What failed reaches the driver, which
                # says so.
                sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process
            from apache_beam.runners.worker.sdk_worker import SdkHarness  # noqa: PLC0415 - loaded already

            SdkHarness(request["control"], worker_id=request["id"]).run()
            code = 0
        finally:
            os._exit(code)


def _nothing(*_: object) -> None:
    """A signal that has a handler wakes who waits."""


def _end_with(parent: int) -> None:
    """A worker whose server was killed would serve on, and nobody would know of it."""
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


def main() -> None:
    """Import what the command line names, and serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle, once
    quiet, modules = "--quiet" in sys.argv[1:], [name for name in sys.argv[1:] if name != "--quiet"]
    if quiet:
        logging.getLogger().addHandler(logging.NullHandler())
    for name in modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a worker would write to, and so copy, every page that they share
    _Server(quiet).serve()


if __name__ == "__main__":
    main()
