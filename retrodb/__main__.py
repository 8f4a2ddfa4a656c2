"""The program ``retrodb``, also as ``python -m retrodb``: the command line, once it can be interrupted in words."""

import os
import signal
import sys
from types import FrameType

from retrodb.errors import INTERRUPTED


def _interrupted_at_once(signum: int, frame: FrameType | None) -> None:
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"\ninterrupted before anything was begun.\n")
    os._exit(INTERRUPTED)


def main() -> None:
    """Import the command line, which takes a moment, and run it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupted_at_once)
    from retrodb.cli import main as run  # noqa: PLC0415 - after the handlers

    run()


if __name__ == "__main__":
    main()
