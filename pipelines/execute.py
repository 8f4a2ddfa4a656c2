"""Run a stage's tasks to the last receipt: resume, watch, retry what a dead worker left, and account for it."""

import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import apache_beam as beam
from retrodb.pipelines.progress import Progress
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.runners import Job, JobRecord, LocalRunner, Runner, WorkerDiedError
from retrodb.pipelines.runners.leftover import forget_job, record_job
from retrodb.pipelines.tasks import Task

from retrodb.errors import WorkerError
from retrodb.manifest import WORK_FOLDER
from retrodb.storage import Storage

_ATTEMPTS: Final = 3
_PROGRESS_SECONDS: Final = 0.5
_REMOTE_PROGRESS_SECONDS: Final = 20.0
"""Each look at an object store is a listing."""

Waves = Callable[[Sequence[Task], bool], Iterable[Sequence[Task]]]
"""Cuts tasks into parts that are run one after the other; told whether a shuffle has to be bounded, for it is kept in
memory (locally). A part is asked for only when the one before it is done."""


def one_wave(tasks: Sequence[Task], bounded: bool) -> Sequence[Sequence[Task]]:
    """All tasks in one pipeline."""
    return [tasks]


PipelineBuilder = Callable[[beam.Pipeline, Sequence[Task]], object]


@dataclass
class Executor:
    """Runs pipelines for one build.

    ``seconds`` collects how long each stage ran, ``jobs`` what the runner said of each job that it finished.
    """

    runner: Runner
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    jobs: list[JobRecord] = field(default_factory=list)

    def complete(
        self,
        book: ReceiptBook,
        tasks: Sequence[Task],
        builder: PipelineBuilder,
        unit: str,
        small: int,
        waves: Waves = one_wave,
        driver_may: bool = False,
        most: int | None = None,
    ) -> dict[int, Receipt]:
        """Do the tasks that have no receipt yet, and return the receipts of all.

        Args:
            book: where receipts are.
            tasks: all tasks of the stage.
            builder: applies the stage's transforms to a pipeline, for some of the tasks.
            unit: what ``Task.weight`` counts, for the display.
            small: below this total weight worker processes cost more than they bring.
            waves: cuts the tasks into parts that are run one after the other.
            driver_may: whether so ``small`` a job may run in the driver even where the runner is another: it makes no
                shard.
            most: processes of this machine that can share the work.

        Raises:
            RetrodbError: what a worker raised; or WorkerError when workers keep dying.
        """
        started = time.monotonic()
        weights = {number: task.weight / len(task.receipts) for task in tasks for number in task.receipts}
        receipts = book.read_all(weights, whole=True)
        tick = _Ticker(book, weights, self.progress)
        self.progress.begin(book.stage, round(sum(weights.values())), tick.done(receipts), unit)
        for attempt in range(1, _ATTEMPTS + 1):
            unfinished = set(weights) - set(receipts)
            pending = [part for task in tasks if (part := task.restricted(unfinished)) is not None]
            if not pending:
                break
            try:
                for wave in waves(pending, self.runner.is_local):
                    self._run_wave(book, wave, builder, small, tick, driver_may, most)
            except WorkerDiedError as error:
                if attempt == _ATTEMPTS:
                    raise
                self.progress.note(f"{book.stage}: {error} Trying what is left again.")
            receipts |= book.read_all(set(weights) - set(receipts))
        missing = sorted(set(weights) - set(receipts))
        if missing:
            raise WorkerError(
                f"{book.stage}: no receipt for shards {missing[:5]} after the job was done; run it again."
            )
        self.seconds[book.stage] = self.seconds.get(book.stage, 0.0) + time.monotonic() - started
        return receipts

    def _run_wave(
        self,
        book: ReceiptBook,
        tasks: Sequence[Task],
        builder: PipelineBuilder,
        small: int,
        tick: "_Ticker",
        driver_may: bool,
        most: int | None,
    ) -> None:
        light = sum(task.weight for task in tasks) < small
        width = sum(task.width for task in tasks)
        width = min(width, most) if most is not None else width
        runner = LocalRunner(1) if driver_may and light else self.runner
        job = Job(
            book.stage,
            _job_name(book),
            lambda pipeline: builder(pipeline, tasks),
            width,
            light,
            lambda endpoint, job_id: record_job(book.storage, runner.name, endpoint, job_id),
            lambda: forget_job(book.storage),
        )
        self.jobs.append(runner.run(job, tick))


def _job_name(book: ReceiptBook) -> str:
    """What a runner shows: the stage, its step, and a tail by which the jobs of one build are told from another's."""
    step = f"-{book.step}" if book.step else ""
    return f"retrodb-{book.stage}{step}-{book.fingerprint[:6]}-{uuid.uuid4().hex[:8]}"


class _Ticker:
    """Turns the receipts seen so far into progress, every now and then."""

    def __init__(self, book: ReceiptBook, weights: Mapping[int, float], progress: Progress) -> None:
        self._book = book
        self._weights = weights
        self._progress = progress
        self._seconds = _PROGRESS_SECONDS if book.storage.is_local else _REMOTE_PROGRESS_SECONDS
        self._next = time.monotonic() + self._seconds

    def done(self, numbers: Mapping[int, Receipt]) -> int:
        return round(sum(self._weights.get(number, 0) for number in numbers))

    def __call__(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._seconds
        self._progress.advance(round(sum(self._weights.get(number, 0) for number in self._book.seen())))


def forget_scans(storage: Storage) -> None:
    """Remove the scans of inputs: a finished build has recorded what it used, a refused one used none."""
    for name in storage.list_folders(WORK_FOLDER):
        if name.startswith("scan-"):
            storage.delete_folder(f"{WORK_FOLDER}/{name}")
    if not storage.list_folders(WORK_FOLDER):
        storage.delete_folder(WORK_FOLDER)


def forget_receipts(storage: Storage, stages: Collection[str], keep: str = "") -> None:
    """Remove receipts of stages whose shards are about to be overwritten, or were made from damaged ones.

    Args:
        storage: the database.
        stages: whose.
        keep: the folder of a book that stays.
    """
    for name in storage.list_folders(WORK_FOLDER):
        if f"{WORK_FOLDER}/{name}" != keep and name.rsplit("-", 1)[0] in stages:
            storage.delete_folder(f"{WORK_FOLDER}/{name}")
