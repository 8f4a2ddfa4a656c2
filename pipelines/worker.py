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

from retrodb.pipelines.threads import DRIVER_VARIABLE

_WATCH_SECONDS: Final = 1.0


def _end_with_the_driver() -> None:
    """A worker that was starting while its driver was killed would wait for it for ever."""
    driver = os.environ.get(DRIVER_VARIABLE)
    while driver is not None:
        if os.getppid() != int(driver):
            os._exit(1)
        time.sleep(_WATCH_SECONDS)


def main() -> None:
    """Serve the driver that started this process, until it says so or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle, once
    logging.getLogger().addHandler(logging.NullHandler())
    threading.Thread(target=_end_with_the_driver, name="retrodb-watchdog", daemon=True).start()
    from apache_beam.runners.worker import sdk_worker_main  # noqa: PLC0415 - warns while it is imported

    # Beam prints tracebacks here, also when the driver is gone. What failed reaches the driver, and it says so.
    sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process
    sdk_worker_main.main(sys.argv)


if __name__ == "__main__":
    main()
