"""A local worker process: Beam's own SDK worker, started quietly.

    python -m retrodb.pipelines.worker

Beam's worker writes its logging to stderr, which here is the user's screen. What matters reaches the driver over the
logging and control channels.
"""

import logging
import signal
import sys


def main() -> None:
    """Serve the driver that started this process, until it says so or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle, once
    logging.getLogger().addHandler(logging.NullHandler())
    from apache_beam.runners.worker import sdk_worker_main  # noqa: PLC0415 - warns while it is imported

    sdk_worker_main.main(sys.argv)


if __name__ == "__main__":
    main()
