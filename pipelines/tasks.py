"""The worker's side of every stage: do one task, account for it, and report failures by name."""

import ctypes
import errno
import json
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import DirectOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.transforms.window import GlobalWindows
from apache_beam.utils.windowed_value import WindowedValue
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.threads import hold_to_one_thread

from retrodb import errors

_MARK: Final = "retrodb-error:"
_END: Final = ":retrodb-error"
NAMESPACE: Final = "retrodb"
_C_LIBRARY: Final = ctypes.CDLL(None)


class TaskFailedError(Exception):
    """Carries a retrodb error through any runner, which keep only the text of an exception."""

    def __init__(self, stage: str, number: int, error: BaseException) -> None:
        kind, message = _describe(stage, number, error)
        super().__init__(f"{_MARK}{json.dumps([kind, message])}{_END}")


def _describe(stage: str, number: int, error: BaseException) -> tuple[str, str]:
    if isinstance(error, errors.RetrodbError):
        return type(error).__name__, str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = error.filename or "the database's disk"
        return "WorkerError", (
            f"no space left on the device while writing {stage} shard {number} ({where}). "
            "Finished shards are kept: free some space and run the same command again."
        )
    return "WorkerError", f"{stage} shard {number}: {type(error).__name__}: {error}"


def original_error(text: str) -> errors.RetrodbError | None:
    """The retrodb error inside what a runner made of it, or None."""
    start = text.find(_MARK)
    end = text.find(_END, start)
    if start < 0 or end < 0:
        return None
    payload = text[start + len(_MARK) : end]
    for candidate in (payload, payload.encode().decode("unicode_escape", errors="replace")):
        try:
            kind, message = json.loads(candidate)
        except ValueError:
            continue
        return getattr(errors, kind, errors.WorkerError)(message)
    return errors.WorkerError(payload)


@dataclass(frozen=True)
class Task:
    """One shard's worth of work: ``number`` names it, ``payload`` is a small frozen dataclass the stage knows.

    ``numbers`` are the shards whose receipts the task writes; more than one where a stream gives several. ``width`` is
    how many workers can share it, where the pipeline cuts it further.
    """

    number: int
    payload: Any
    numbers: tuple[int, ...] = ()
    weight: int = 1
    width: int = 1

    @property
    def receipts(self) -> tuple[int, ...]:
        return self.numbers or (self.number,)

    def restricted(self, wanted: Container[int]) -> "Task | None":
        """This task for the wanted receipts alone, or None where it gives none of them."""
        numbers = tuple(number for number in self.receipts if number in wanted)
        weight = max(1, self.weight * len(numbers) // len(self.receipts))
        return Task(self.number, self.payload, numbers, weight, self.width) if numbers else None


class StageDoFn(beam.DoFn):
    """A step of a stage: knows its receipts and the database, and names the shard in hand when something fails."""

    def __init__(self, book: ReceiptBook) -> None:
        self._book = book
        self._storage = book.storage

    def setup(self) -> None:
        hold_to_one_thread()

    @contextmanager
    def _naming(self, number: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise TaskFailedError(self._book.stage, number, error) from error

    def _left(self, task: Task) -> Task | None:
        """What a task still lacks: a runner that lost a worker starts a job over, also with what was finished."""
        return task.restricted(set(task.receipts) - set(self._book.read_all(task.receipts, whole=True)))


class DoTasks(StageDoFn):
    """Runs ``work(task)``, which yields receipts once their shards are in place; writes them, counts them."""

    def __init__(self, book: ReceiptBook, work: Callable[[Task], Iterable[Receipt]]) -> None:
        super().__init__(book)
        self._work = work

    def process(self, task: Task) -> Iterator[int]:
        with self._naming(task.number):
            left = self._left(task)
            for receipt in self._work(left) if left is not None else ():
                finish(self._book, receipt)
                yield receipt.number


class DoTasksAhead(StageDoFn):
    """`DoTasks` for work that something else than this process does, such as a card: the next task is read meanwhile.

    ``read(task)`` runs in a thread of its own, ``work(task, what was read)`` yields receipts once their shards are in
    place. A bundle's last task is done when the bundle ends.
    """

    def __init__(
        self, book: ReceiptBook, read: Callable[[Task], Any], work: Callable[[Task, Any], Iterable[Receipt]]
    ) -> None:
        super().__init__(book)
        self._read = read
        self._work = work

    def start_bundle(self) -> None:
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._waiting: tuple[Task, Future[Any]] | None = None

    def process(self, task: Task) -> Iterator[int]:
        with self._naming(task.number):
            left = self._left(task)
        before, self._waiting = self._waiting, (left, self._reader.submit(self._read, left)) if left else None
        yield from self._finished(before)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        for number in self._finished(self._waiting):
            yield GlobalWindows.windowed_value(number)
        self._reader.shutdown(wait=False)

    def _finished(self, waiting: tuple[Task, Future[Any]] | None) -> Iterator[int]:
        if waiting is None:
            return
        task, read = waiting
        with self._naming(task.number):
            for receipt in self._work(task, read.result()):
                finish(self._book, receipt)
                yield receipt.number


def finish(book: ReceiptBook, receipt: Receipt) -> None:
    """A task is done, its shards are in place: write its receipt, and add its numbers to Beam's counters."""
    book.write(receipt)
    for name, value in receipt.counts.items():
        Metrics.counter(NAMESPACE, name).inc(int(value))
    for table, shard in receipt.shards.items():
        Metrics.counter(NAMESPACE, f"{table}.rows").inc(shard.rows)
        Metrics.counter(NAMESPACE, f"{table}.bytes").inc(shard.bytes)
    give_memory_back()


def give_memory_back() -> None:
    """Return freed memory to the system: tensors of ever different sizes otherwise fragment a worker's heap, which
    then grows with the number of shards it has seen (measured: 1.0 to 1.3 GB over 12 shards; flat with this)."""
    trim = getattr(_C_LIBRARY, "malloc_trim", None)
    if trim is not None:
        trim(0)


def balanced(tasks: Iterable[Task]) -> list[Task]:
    """Heaviest first, so that dealing the tasks out in turn gives every worker about the same."""
    return sorted(tasks, key=lambda task: (-task.weight, task.number))


@beam.ptransform_fn
def DealOut(pipeline: beam.Pipeline, tasks: Iterable[Task]) -> beam.PCollection:  # noqa: N802 - a PTransform
    """The tasks as a collection that any runner spreads over its workers."""
    dealt = pipeline | "tasks" >> beam.Create(balanced(tasks), reshuffle=False)
    return dealt if _is_one_process(dealt.pipeline) else dealt | "deal out" >> beam.Reshuffle()


def _is_one_process(pipeline: beam.Pipeline) -> bool:
    """Whether this process runs all of a pipeline: dealing out would take more time than a small job itself."""
    return isinstance(pipeline.runner, FnApiRunner) and pipeline.options.view_as(DirectOptions).direct_num_workers == 1
