"""What the workers of a build hold, as the kernel counts it."""

import contextlib
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Final

import psutil
import pytest
from support import Progress, always_use_workers, build_here

SETTLED_SECONDS: Final = 0.5
"""A child that was just forked counts its parent's pages as its own, until it has loaded its program."""


def peaks_of_a_build(source: Path, out: Path) -> dict[str, int]:
    """Build with two workers, and return the most bytes that one of them held in each stage."""
    at = {"stage": ""}
    peaks: Counter[str] = Counter()
    over = threading.Event()

    def watch():
        me = psutil.Process()
        while not over.wait(0.02):
            for child in me.children(recursive=True):
                with contextlib.suppress(psutil.Error, OSError):
                    if time.time() - child.create_time() < SETTLED_SECONDS:
                        continue
                    peaks[at["stage"]] = max(peaks[at["stage"]], child.memory_info().rss)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        with pytest.MonkeyPatch.context() as monkeypatch:
            always_use_workers(monkeypatch)
            monkeypatch.setattr(Progress, "begin", lambda self, stage, *rest: at.update(stage=stage))
            build_here([source], out, shard_bytes="32KB", workers=2)
    finally:
        over.set()
        watching.join()
    return dict(peaks)
