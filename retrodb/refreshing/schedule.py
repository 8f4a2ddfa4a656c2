"""When a refresh is due, and how stale the published vectors are (realm.md, R5).

REALM refreshes its index about every 500 training steps (Guu et al. 2020, section 3.3); thirty times staler vectors
cost it ten points (table 2). Both are told in steps, since steps are what makes vectors stale, and in seconds.
"""

import itertools
import re
from dataclasses import dataclass
from typing import Any, Final, Self

from retrodb.errors import UsageError
from retrodb.sizes import parse_duration

_PART: Final = re.compile(r"(\d+)-(\d*):(\d+)")
_STEPS: Final = re.compile(r"(\d+)(?:steps?)?")


@dataclass(frozen=True)
class Period:
    """From step ``start`` up to, and without, ``end`` (None: for ever), a refresh is due ``every`` so many steps."""

    start: int
    end: int | None
    every: int

    def __contains__(self, step: int) -> bool:
        return self.start <= step and (self.end is None or step < self.end)


@dataclass(frozen=True)
class Schedule:
    """Periods that do not overlap; in a gap between them nothing is due."""

    periods: tuple[Period, ...] = (Period(0, None, 1),)

    @classmethod
    def parse(cls, text: str) -> Self:
        """``0-2000:500,2000-:1000``: ``start-end:every``, the end left out for ever.

        Raises:
            UsageError: it is not that, or periods overlap.
        """
        periods = []
        for part in text.split(","):
            match = _PART.fullmatch(part.strip())
            if match is None:
                raise UsageError(f"--schedule {text!r}: {part!r} is not start-end:every, as 0-2000:500 or 2000-:1000.")
            start, end, every = int(match[1]), int(match[2]) if match[2] else None, int(match[3])
            if every < 1 or (end is not None and end <= start):
                raise UsageError(f"--schedule {text!r}: {part!r} holds no step, or is due every 0 steps.")
            periods.append(Period(start, end, every))
        periods.sort(key=lambda period: period.start)
        for before, after in itertools.pairwise(periods):
            if before.end is None or before.end > after.start:
                raise UsageError(f"--schedule {text!r}: periods overlap at step {after.start}.")
        return cls(tuple(periods))

    def is_due(self, step: int, last: int | None) -> bool:
        """Whether an export of ``step`` is to be published, where the published one is of step ``last``."""
        period = next((period for period in self.periods if step in period), None)
        return period is not None and (last is None or step - last >= period.every)


@dataclass(frozen=True)
class Staleness:
    """How far the published version is behind: in training steps, and in seconds since there was something newer."""

    steps: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return {"steps": self.steps, "seconds": round(self.seconds, 3)}


@dataclass(frozen=True)
class StalenessLimit:
    """The most that is borne; None: any."""

    steps: int | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """``1500`` or ``1500steps``, ``90s``, ``10m``, ``2h``, or one of each: ``1500,10m``.

        Raises:
            UsageError: it is none of them.
        """
        steps: int | None = None
        seconds: float | None = None
        for part in text.split(","):
            match = _STEPS.fullmatch(part.strip())
            try:
                if match is not None:
                    steps = int(match[1])
                else:
                    seconds = parse_duration(part)
            except ValueError as error:
                raise UsageError(
                    f"--max-staleness {text!r}: write steps, as 1500, or a time, as 90s, 10m, 2h."
                ) from error
        return cls(steps, seconds)

    def is_passed(self, staleness: Staleness) -> bool:
        """Whether it is more."""
        return (self.steps is not None and staleness.steps > self.steps) or (
            self.seconds is not None and staleness.seconds > self.seconds
        )
