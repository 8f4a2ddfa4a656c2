"""The folder between a trainer and the refresher: either may die and start again (realm.md, R5).

The trainer writes each export, an encoder's folder, under another name and renames it to ``step-<n>``: what has that
name is whole. When it ends it writes `DONE_MARKER`. The refresher leaves `STATUS_NAME`, what is published and how stale
it is, and, where it is to block, `HOLD_MARKER` for as long as the published version is staler than it may be.
"""

import contextlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from retrodb.errors import InputError
from retrodb.storage import Storage

DONE_MARKER: Final = "done"
HOLD_MARKER: Final = "hold"
STATUS_NAME: Final = "refresher.json"
_NAME: Final = re.compile(r"step-0*(\d+)")


@dataclass(frozen=True, order=True)
class Export:
    """One export: its training step, its folder, and when it got its name (seconds since the epoch)."""

    step: int
    path: str
    at: float


def check_exports_folder(folder: str) -> None:
    """Raises InputError: it is a file, or a URL. (It may be missing: the trainer may not have begun.)"""
    if "://" in folder:
        raise InputError(
            f"{folder} cannot be the exports' folder: an export is handed over by renaming a folder, "
            "which object stores cannot. Name a folder on a disk that trainer and refresher share."
        )
    if Path(folder).exists() and not Path(folder).is_dir():
        raise InputError(f"{folder} is a file; name the folder that a trainer exports to.")


def list_exports(folder: str) -> list[Export]:
    """The whole exports there are, oldest step first; none where the folder is not there yet."""
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            match = _NAME.fullmatch(entry.name)
            with contextlib.suppress(FileNotFoundError):  # a trainer that keeps its newest few has just removed it
                if match and entry.is_dir():
                    found.append(Export(int(match[1]), os.path.abspath(entry.path), entry.stat().st_ctime))
    return sorted(found)


def is_done(folder: str) -> bool:
    """Whether the trainer has said that it is."""
    return (Path(folder) / DONE_MARKER).exists()


def write_status(folder: str, status: dict[str, Any]) -> None:
    """Replace the refresher's status, whole; only where the folder is there."""
    if Path(folder).is_dir():
        Storage(folder).commit_json(STATUS_NAME, {**status, "written": time.time()})


def hold(folder: str, wanted: bool) -> None:
    """Set or remove the mark that asks the trainer to wait."""
    if wanted and Path(folder).is_dir():
        Storage(folder).commit_bytes(HOLD_MARKER, b"")
    elif not wanted:
        Storage(folder).delete(HOLD_MARKER)
