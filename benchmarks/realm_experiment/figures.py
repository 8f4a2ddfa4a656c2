"""From finished parts to estimates over seeds: means with 95% intervals by Student's t; differences paired by seed."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import t

from retrodb.evaluation.intervals import Estimate

Part = dict[str, Any]


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean of one value a seed; no interval of fewer than two."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, None)
    half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return Estimate(mean, (mean - half, mean + half))


def seeds_of(parts: Sequence[Part]) -> list[int]:
    """The seeds that are done for every condition that has a part."""
    names = {part["condition"] for part in parts}
    return sorted(
        {part["seed"] for part in parts}
        & set.intersection(*({p["seed"] for p in parts if p["condition"] == name} for name in names))
    )


def of_condition(parts: Sequence[Part], condition: str, value: Callable[[Part], float]) -> list[float]:
    """One value a seed, in the order of the seeds."""
    return [value(part) for part in sorted(parts, key=lambda one: one["seed"]) if part["condition"] == condition]


def compare(parts: Sequence[Part], condition: str, reference: str, value: Callable[[Part], float]) -> Estimate:
    """What ``condition`` has more than ``reference``, paired by seed."""
    own, other = (of_condition(parts, name, value) for name in (condition, reference))
    return over_seeds([a - b for a, b in zip(own, other, strict=True)])


def third(name: str, at: int) -> Callable[[Part], float]:
    """The mean of a logged quantity over the first (0), second or last (2) third of a run's steps that have it."""

    def value(part: Part) -> float:
        entries = np.array_split(np.array(part["log"], dtype=object), 3)[at]
        return float(np.mean([entry[name] for entry in entries if entry[name] is not None]))

    return value


def recall_at(look: dict[str, Any], k: int, criterion: str | None = None, side: str = "exact") -> float:
    """Recall@k of one look, by the documents that questions name unless told otherwise."""
    wanted = criterion or "documents"
    found = next(one for one in look["criteria"] if one["criterion"] == wanted)
    return float(found["recall"][side][str(k)]["value"])


def last_recall(k: int) -> Callable[[Part], float]:
    """Recall@k of the last version of a run."""
    return lambda part: recall_at(part["versions"][-1], k)
