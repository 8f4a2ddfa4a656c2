"""Bits per byte with 95% confidence intervals: a bootstrap over documents, and over models where there are several.

A chunk's tokens depend on each other, and so do a document's chunks: what is drawn again is whole documents (Efron and
Tibshirani 1993). Differences between conditions are taken within each draw, so that they are paired.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_LOW, _HIGH = 2.5, 97.5
_BLOCK: Final = 100
"""Draws at a time: what holds their weights in memory is draws x documents numbers."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95% interval; None where there are fewer than two documents."""

    value: float
    interval: tuple[float, float] | None

    def as_json(self) -> dict[str, Any]:
        return {"value": self.value, "interval": list(self.interval) if self.interval else None}


@dataclass(frozen=True)
class Estimates:
    """For each condition: bits per byte, and the gain over the first condition (positive: fewer bits)."""

    bits: list[Estimate]
    gains: list[Estimate]


def by_document(
    document_ids: npt.NDArray[np.int64], nats: npt.NDArray[np.float64], lengths: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Sums of chunks ``[.., C]`` and ``[C]`` over documents: ``[.., D]`` and ``[D]``."""
    _, which = np.unique(document_ids, return_inverse=True)
    count = int(which.max()) + 1 if len(which) else 0
    flat = nats.reshape(-1, nats.shape[-1])
    summed = np.stack([np.bincount(which, weights=row, minlength=count) for row in flat])
    by_length = np.bincount(which, weights=lengths, minlength=count).astype(np.float64)
    return summed.reshape(*nats.shape[:-1], count).astype(np.float64), by_length


def estimate(
    nats: npt.NDArray[np.float64], n_bytes: npt.NDArray[np.float64], *, draws: int, seed: int
) -> Estimates | None:
    """Bits per byte of each condition.

    Args:
        nats: ``[models, conditions, D]`` sums of each document.
        n_bytes: ``[D]`` bytes that they are of.
        draws: of the bootstrap.
        seed: of them.

    Returns:
        None where there is not a byte.
    """
    models, _, documents = nats.shape
    if not n_bytes.sum() > 0:
        return None
    bits = nats / np.log(2)
    value = (bits.sum(-1) / n_bytes.sum()).mean(0)
    if documents < 2:
        plain = [Estimate(float(one), None) for one in value]
        return Estimates(plain, [Estimate(float(value[0] - one), None) for one in value])
    random = np.random.default_rng(seed)
    sampled = []
    for start in range(0, draws, _BLOCK):
        size = min(_BLOCK, draws - start)
        weights = random.multinomial(documents, np.full(documents, 1 / documents), size=size).astype(np.float64)
        ratios = np.einsum("rd,mcd->rmc", weights, bits) / np.maximum(weights @ n_bytes, 1.0)[:, None, None]
        chosen = random.integers(models, size=(size, models))
        sampled.append(np.take_along_axis(ratios, chosen[:, :, None], axis=1).mean(1))
    of_draws = np.concatenate(sampled)
    differences = of_draws[:, :1] - of_draws
    return Estimates(
        [Estimate(float(value[c]), _interval(of_draws[:, c])) for c in range(len(value))],
        [Estimate(float(value[0] - value[c]), _interval(differences[:, c])) for c in range(len(value))],
    )


def wilson(hits: int, total: int) -> Estimate:
    """The share of hits and its 95% interval by Wilson's score (1927), which holds near 0 and 1 as well.

    Args:
        hits: how many.
        total: of how many independent ones; at least one.
    """
    share, z = hits / total, 1.959964
    centre, shrink = share + z * z / (2 * total), 1 + z * z / total
    half = z * np.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return Estimate(share, (max(0.0, float(centre - half) / shrink), min(1.0, float(centre + half) / shrink)))


def mean(values: npt.NDArray[np.float64]) -> Estimate:
    """The mean of values in [0, 1] and its 95% interval by the normal approximation; none for fewer than two."""
    value = float(values.mean())
    if len(values) < 2:
        return Estimate(value, None)
    half = 1.959964 * float(values.std(ddof=1)) / float(np.sqrt(len(values)))
    return Estimate(value, (max(0.0, value - half), min(1.0, value + half)))


def _interval(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(values, [_LOW, _HIGH])
    return float(low), float(high)
