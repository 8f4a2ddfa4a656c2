"""What the driver and a runner say to each other: a job, what became of it, and its errors in the user's words."""

import logging
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import apache_beam as beam
from retrodb.pipelines.tasks import original_error

from retrodb.errors import RetrodbError, WorkerError
from retrodb.planning import Cost, Effort

Tick = Callable[[], None]
"""Called a few times a second while a job runs."""


@dataclass(frozen=True)
class Job:
    """One pipeline to run: a step of a ``stage``.

    ``name`` is what the runner shows; ``build`` applies the transforms; ``width`` is how many workers can share it;
    ``light`` says that on one machine worker processes would cost more than they bring. ``submitted`` is called with
    the job server's address (None: there is none) and the job's id as soon as the job may outlive its driver, and
    ``ended`` when it cannot any more.
    """

    stage: str
    name: str
    build: Callable[[beam.Pipeline], object]
    width: int = 1
    light: bool = False
    submitted: Callable[[str | None, str], None] = lambda endpoint, job_id: None
    ended: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class JobRecord:
    """What a runner says of a job that is done: its id there, the state, Beam's counters."""

    stage: str
    runner: str
    id: str
    state: str
    seconds: float
    counters: dict[str, int] = field(default_factory=dict)


class Runner(Protocol):
    """Runs jobs to their end, wherever its workers are."""

    name: str
    is_local: bool
    """Whether the workers are processes of this machine that the runner starts itself."""

    def check_options(self) -> None:
        """Whether the options are enough, and known as far as can be told without asking anyone.

        Raises:
            InputError: no.
        """

    def check(self, locations: Sequence[str]) -> None:
        """Before an input is listed and anything is written: is everything there that it needs?

        Args:
            locations: URLs of the database and the inputs, as they were given: the workers have to reach them.

        Raises:
            InputError: no.
        """

    def hints(self, stage: str) -> dict[str, str]:
        """Beam resource hints for the transforms of a stage that compute; none where the runner knows none."""

    def describe(self, stage: str) -> dict[str, str]:
        """How a stage would run, for ``--dry-run``."""

    def cost(self, effort: Callable[[], Effort]) -> Cost | None:
        """What a build would cost there, for ``--dry-run``; None where nobody is billed.

        Args:
            effort: works out what is to be done, where somebody asks.

        Raises:
            InputError: a price that was given is none.
        """

    def expect(self) -> None:
        """A job that is not light will come: what takes long of starting workers may begin."""

    def run(self, job: Job, tick: Tick) -> JobRecord:
        """Run a job to its end; cancels it when interrupted.

        Raises:
            RetrodbError: what a worker raised.
            WorkerDiedError: the job ended for want of a worker.
        """

    def close(self) -> None:
        """End what the runner started."""


class WorkerDiedError(WorkerError):
    """A worker ended on its own, with its tasks undone: worth another try."""


def as_retrodb_error(error: BaseException) -> RetrodbError:
    """The error of a worker as it was raised there, or the last line of what the runner says."""
    if isinstance(error, RetrodbError):
        return error
    text = str(error)
    found = original_error(text)
    return found or WorkerError(f"the pipeline failed: {type(error).__name__}: {last_line(text)}")


def raised_by_a_worker(messages: Sequence[str]) -> RetrodbError | None:
    """The last of a runner's error messages that holds what a worker raised, as it was raised there; or None."""
    return next((found for text in reversed(messages) if (found := original_error(text)) is not None), None)


def counters_of(result: Any) -> dict[str, int]:
    """Beam's counters of a job, each summed over its steps; none where the runner cannot tell, for nothing depends on
    them, and the job is done."""
    found: dict[str, int] = {}
    try:
        counters = result.metrics().query()["counters"]
    except Exception as error:  # each runner's client has its own
        logging.getLogger(__name__).debug("no counters: %s", error)
        return found
    for one in counters:
        name = one.key.metric.name
        found[name] = found.get(name, 0) + int(one.committed or one.attempted or 0)
    return found


def last_line(text: str) -> str:
    """The last line of a message that has something to say: the cause, in Python's tracebacks."""
    lines = [line.strip() for line in re.split(r"\n|\\n", text) if line.strip()]
    return lines[-1][:2000] if lines else "no reason was given"


def quieten() -> None:
    """Keep Beam's own logging and its threads' tracebacks off the user's screen: the error they lead to is shown."""
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    threading.excepthook = lambda args: None
