"""A local worker process: Beam's own SDK worker, started quietly.

    python -m retrodb.pipelines.worker

Beam's worker writes its logging to stderr, which here is the user's screen. What matters reaches the driver over the
logging and control channels.
"""

import logging
import os
import signal
import sys
import threading
import time
from typing import Final

import grpc

DRIVER_VARIABLE: Final = "RETRODB_DRIVER"
"""Process id of the driver, in a worker's environment."""

_WATCH_SECONDS: Final = 1.0


def _end_with_the_driver() -> None:
    """A worker that was starting while its driver was killed would wait for it for ever."""
    driver = os.environ.get(DRIVER_VARIABLE)
    while driver is not None:
        if os.getppid() != int(driver):
            os._exit(1)
        time.sleep(_WATCH_SECONDS)


def _is_quiet(error: BaseException | None) -> bool:
    """Whether an error only says that the driver is gone: interrupted, or finished with this worker."""
    return isinstance(error, grpc.RpcError)


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    if not _is_quiet(failure.exc_value):
        threading.__excepthook__(failure)


def main() -> None:
    """Serve the driver that started this process, until it says so or is gone."""
    threading.excepthook = _thread_failed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle, once
    logging.getLogger().addHandler(logging.NullHandler())
    threading.Thread(target=_end_with_the_driver, name="retrodb-watchdog", daemon=True).start()
    from apache_beam.runners.worker import sdk_worker_main  # noqa: PLC0415 - warns while it is imported

    try:
        sdk_worker_main.main(sys.argv)
    except grpc.RpcError:
        os._exit(1)


if __name__ == "__main__":
    main()
