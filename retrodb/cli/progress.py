"""Progress on stderr: a live bar on a terminal, one line per stage elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

_WIDTH = 11


def make_progress() -> "TerminalProgress | LineProgress":
    """The display that fits stderr."""
    return TerminalProgress() if sys.stderr.isatty() else LineProgress()


def rate_text(done: float, seconds: float, unit: str) -> str:
    """``105 chunks/s`` or ``3.1 MB/s``."""
    rate = done / seconds if seconds > 0 else 0.0
    return f"{rate / 1e6:.1f} MB/s" if unit == "bytes" else f"{rate:,.0f} {unit}/s"


class LineProgress:
    """One line per stage: name, what came of it, rate, seconds."""

    def __init__(self) -> None:
        self._started = 0.0
        self._stage = ""
        self._work = 0
        self._unit = ""

    def begin(self, stage: str, total: int, done: int, unit: str) -> None:
        self._started, self._stage, self._work, self._unit = time.monotonic(), stage, total - done, unit

    def advance(self, done: int) -> None:
        pass

    def end(self, summary: str) -> None:
        seconds = time.monotonic() - self._started
        rate = rate_text(self._work, seconds, self._unit)
        print(f"{self._stage:<{_WIDTH}} {summary} ({rate}, {seconds:.1f} s)", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        # One write: another thread's line may come at the same time.
        print(f"{text}\n", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing is left on the screen."""


class TerminalProgress:
    """A bar with rate and time left for the running stage; finished stages stay as lines."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn(f"{{task.description:<{_WIDTH}}}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._line = LineProgress()
        self._first = 0
        self._started = 0.0
        self._unit = ""

    def begin(self, stage: str, total: int, done: int, unit: str) -> None:
        self._line.begin(stage, total, done, unit)
        self._first, self._started, self._unit = done, time.monotonic(), unit
        self._clear()
        self._bar.start()
        self._task = self._bar.add_task(stage, total=max(total, 1), completed=done, rate="")

    def advance(self, done: int) -> None:
        if self._task is not None:
            rate = rate_text(done - self._first, time.monotonic() - self._started, self._unit)
            self._bar.update(self._task, completed=done, rate=rate if done > self._first else "")

    def end(self, summary: str) -> None:
        self._clear()
        self._line.end(summary)

    def note(self, text: str) -> None:
        self._console.print(Text(text))

    def close(self) -> None:
        """Take the bar off the screen."""
        self._clear()

    def _clear(self) -> None:
        self._bar.stop()
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
