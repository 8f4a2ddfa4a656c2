"""From raw sums to estimates: which models and conditions are compared, paired by document and seed."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gain.plan import OFF
from retrodb.evaluation.intervals import Estimate, Estimates, estimate

DRAWS = 1000

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """A model under a condition."""

    model: str
    condition: str = OFF


@dataclass(frozen=True)
class Bucket:
    """The chunks of a setting with r(C) <= alpha, with one of its databases.

    Attributes:
        chunks: how many.
        n_bytes: float64 ``[D]``, of predicted tokens of each document.
        nats: float64 ``[seeds, D]`` of each series.
    """

    chunks: int
    n_bytes: Floats
    nats: dict[Series, Floats]

    def compare(self, reference: Series, *others: Series) -> Estimates | None:
        """Bits per byte of ``reference`` and ``others``, and what each of these gains over it.

        None where there is no such series yet, or not a byte.
        """
        wanted = (reference, *others)
        if any(series not in self.nats for series in wanted) or not self.n_bytes.sum() > 0:
            return None
        stacked = np.stack([self.nats[series] for series in wanted], axis=1)
        return estimate(stacked, self.n_bytes, draws=DRAWS, seed=0)

    def bits(self, series: Series) -> Estimate | None:
        """Bits per byte."""
        found = self.compare(series)
        return found.bits[0] if found else None

    def gain(self, reference: Series, other: Series) -> Estimate | None:
        """Bits per byte that ``other`` takes less than ``reference``."""
        found = self.compare(reference, other)
        return found.gains[1] if found else None


def seeds_done(parts: list[dict[str, Any]], setting: str, models: tuple[str, ...]) -> list[int]:
    """The seeds of which every model of a setting is measured."""
    own = [(part["seed"], part["model"]) for part in parts if part["setting"] == setting]
    return sorted({seed for seed, _ in own if all((seed, model) in own for model in models)})


def bucket(parts: list[dict[str, Any]], setting: str, database: str, alpha: str, seeds: list[int]) -> Bucket:
    """Everything measured of a bucket with those seeds.

    Raises:
        ValueError: two models were measured on other documents or bytes: nothing could be compared.
    """
    gathered: dict[Series, list[Floats]] = {}
    n_bytes: Floats | None = None
    documents: list[str] | None = None
    chunks = 0
    for part in sorted(parts, key=lambda one: one["seed"]):
        if part["setting"] != setting or part["seed"] not in seeds:
            continue
        measured = part["measured"][database]
        found = measured["buckets"][alpha]
        own = np.array(found["bytes"], dtype=np.float64)
        if documents is None:
            documents, n_bytes, chunks = measured["documents"], own, found["chunks"]
        elif documents != measured["documents"] or not np.array_equal(n_bytes, own):
            raise ValueError(f"{setting}, {database}, {alpha}: the models were measured on other documents or bytes")
        for condition, nats in zip(measured["conditions"], found["nats"], strict=True):
            gathered.setdefault(Series(part["model"], condition), []).append(np.array(nats, dtype=np.float64))
    if n_bytes is None:
        raise ValueError(f"{setting}: nothing was measured with the seeds {seeds}")
    return Bucket(chunks, n_bytes, {series: np.stack(rows) for series, rows in gathered.items()})
