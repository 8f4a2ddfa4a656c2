"""One thread in every native library of a worker: the runner schedules, and sums come out in one order everywhere."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import threadpoolctl

ONE_THREAD: Final = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Read by the libraries when they are loaded; the container files under ``deploy/`` set the same."""

DRIVER_VARIABLE: Final = "RETRODB_DRIVER"
"""Process id of the driver, in the environment of the processes that it starts, and its own while it runs a stage."""


def hold_to_one_thread() -> None:
    """Hold this worker to one thread, whoever started it: what is loaded already, and what will be.

    A local driver has seen to it, and keeps its own process as its user wants it.
    """
    if DRIVER_VARIABLE not in os.environ:
        os.environ.update(ONE_THREAD)
        threadpoolctl.threadpool_limits(1)


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
