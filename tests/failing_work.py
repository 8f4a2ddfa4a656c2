"""Work that fails, or tells who does it, in a module that worker processes can import."""

import os
import signal
import time
from pathlib import Path

import apache_beam as beam
from retrodb.pipelines.receipts import Receipt

from retrodb.errors import InputError


def fail(task):
    if task.number == 2:
        raise InputError("shard 2: what, where; the remedy.\nA second line with 'quotes' and \"more\" — and ünïcode")
    if task.number == 3:
        raise OSError(28, "No space left on device", "/full/disk")
    yield Receipt(task.number)


def linger(task):
    time.sleep(60)
    yield Receipt(task.number)


class TellWhere(beam.DoFn):
    """Writes where it runs into a file."""

    def process(self, path: str) -> None:
        told = (os.getpid(), os.getcwd(), os.environ.get("RETRODB_OF_A_TEST"), os.environ["OMP_NUM_THREADS"])
        Path(path).write_text(" ".join(map(str, told)), encoding="utf-8")


class Die(beam.DoFn):
    """Ends its worker, as the kernel does that is out of memory."""

    def process(self, element: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
