"""Where an export goes: a folder that is not there yet, or is empty, and that appears whole or not at all."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retrodb.errors import InputError
from retrodb.storage import TEMPORARY_PREFIX, Storage

Advance = Callable[[int], None]
"""Told how many rows of the database have been read since the last time."""


def no_progress(rows: int) -> None:
    """An `Advance` for those who do not look."""


@dataclass(frozen=True)
class Exported:
    """What was written: ``counts`` by name, ``bytes`` of all files, and what the format could not hold.

    ``left_out`` names what is not in the export and how much of it there was, never a zero. ``notes`` is what whoever
    reads the export has to know.
    """

    format: str
    path: str
    counts: dict[str, int]
    bytes: int
    left_out: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "path": self.path,
            "counts": self.counts,
            "bytes": self.bytes,
            "left_out": self.left_out,
            "notes": list(self.notes),
        }


def check_target(out: str, database: Storage) -> Storage:
    """The folder ``out``, missing or empty, and not inside the database.

    Raises:
        InputError: it is a file, holds something, or lies in the database.
    """
    target = Storage(out)
    database.refuse_inside(out)
    if target.is_a_file() or not target.is_empty():
        raise InputError(f"{target.url} is there already and not an empty folder; name another with --out.")
    return target


def check_local_target(out: str, database: Storage, form: str) -> Path:
    """As `check_target`, for formats whose readers map files into memory.

    Raises:
        InputError: likewise; or ``out`` is not a local folder.
    """
    target = check_target(out, database)
    if not target.is_local:
        raise InputError(
            f"--to {form} writes files that are mapped into memory: {out} is no local folder. Export to a local folder "
            "and copy it from there."
        )
    return Path(target.url)


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder under a temporary name beside ``final``, which takes its place once the block is done.

    Whatever ends the block early, Ctrl-C too, leaves nothing behind; ``kill -9`` leaves the temporary name.

    Raises:
        InputError: a folder cannot be made there.
    """
    final = final.resolve()
    parent = Storage(str(final.parent))
    made = parent.make_root()
    temporary = final.parent / f"{TEMPORARY_PREFIX}{final.name}-{uuid.uuid4().hex[:12]}"
    try:
        temporary.mkdir()
    except OSError as error:
        parent.unmake(made)
        raise InputError(f"cannot make a folder in {final.parent}: {error.strerror or error}.") from error
    try:
        yield temporary
        for path in temporary.rglob("*"):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        os.rename(temporary, final)  # over an empty folder, too
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        parent.unmake(made)
        raise


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
