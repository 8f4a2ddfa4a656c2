"""What a verification finds: problems, each naming the file in question; what was counted; what could not be done."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from retrodb.errors import RetrodbError

_MOST: int = 10_000
"""Problems kept: a folder of a million lost files needs no million lines."""


@dataclass(frozen=True)
class Problem:
    """Something that is not as it must be.

    Attributes:
        path: relative path of the file in question: a shard, or ``manifest.json``.
        what: what is wrong with it, with the values.
    """

    path: str
    what: str

    def as_json(self) -> dict[str, str]:
        return {"path": self.path, "what": self.what}


@dataclass(frozen=True)
class VerifyReport:
    """What `retrodb.quality.verify.verify_database` found.

    Attributes:
        problems: empty where everything holds.
        checked: how many of what were looked at.
        notes: what a reader should know besides, such as stages that are not built or a check that could not be made.
        complete: whether all stages of the database are done.
    """

    problems: tuple[Problem, ...]
    checked: dict[str, int]
    notes: tuple[str, ...] = ()
    complete: bool = True

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def paths(self) -> list[str]:
        """The files that have problems, each once, sorted."""
        return sorted({problem.path for problem in self.problems})

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "complete": self.complete,
            "problems": [problem.as_json() for problem in self.problems],
            "checked": self.checked,
            "notes": list(self.notes),
        }


@dataclass
class Findings:
    """A verification under way. One problem is kept for each file and kind of fault: how many rows, and the first."""

    problems: list[Problem] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _faulty: set[str] = field(default_factory=set)

    def add(self, path: str, what: str) -> None:
        """Record a problem of the file ``path``."""
        self._faulty.add(path)
        if len(self.problems) < _MOST:
            self.problems.append(Problem(path, what))

    def has(self, path: str) -> bool:
        """Whether ``path`` has a problem."""
        return path in self._faulty

    def count(self, name: str, number: int) -> None:
        """Add to what was looked at."""
        self.checked[name] = self.checked.get(name, 0) + number

    def note(self, text: str) -> None:
        """Record something worth saying that is no problem; once."""
        if text not in self.notes:
            self.notes.append(text)

    def refuse(self, path: str, wrong: np.ndarray, what: str, example: Callable[[int], str] | None = None) -> bool:
        """Record a problem where any element of ``wrong`` (bool, any shape) is true.

        Args:
            path: the file.
            wrong: which elements (of its rows, mostly) are wrong.
            what: what is wrong with them.
            example: describes one by its first index, its row.

        Returns:
            Whether there was any.
        """
        count = int(np.count_nonzero(wrong))
        if not count:
            return False
        row = int(np.argwhere(wrong)[0][0])
        self.add(path, f"{what}: {count:,}, the first in row {row}{f' ({example(row)})' if example else ''}")
        return True

    def refuse_pairs(self, path: str, wrong: np.ndarray, what: str, example: Callable[[int], str]) -> None:
        """As `refuse`, for elements that are no rows: ``example`` alone tells which they are."""
        if wrong.any():
            self.add(path, f"{what}: {np.count_nonzero(wrong):,}, the first: {example(int(np.argmax(wrong)))}")

    @contextlib.contextmanager
    def blaming(self, path: str) -> Iterator[None]:
        """A file that cannot be read or makes no sense at all is a problem of that file, not the end of it all."""
        try:
            yield
        except (RetrodbError, pa.ArrowException, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
            text = " ".join(str(error).split())
            self.add(path, text if isinstance(error, RetrodbError) else f"cannot be read: {error!r}")

    def report(self, complete: bool) -> VerifyReport:
        """What was found, problems in order of path."""
        ordered = sorted(self.problems, key=lambda problem: problem.path)
        return VerifyReport(tuple(ordered), dict(self.checked), tuple(self.notes), complete)
