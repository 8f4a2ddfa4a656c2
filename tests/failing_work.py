"""Work that fails, in a module that worker processes can import."""

import time

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
