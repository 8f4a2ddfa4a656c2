"""The learning rate of each step: a linear rise, then half a cosine (Loshchilov and Hutter 2017)."""

import math


def learning_rate(step: int, *, steps: int, warmup: int, peak: float, final_share: float) -> float:
    """The rate of ``step``, counted from 0: never 0 before the end, ``peak`` after the warm-up, then down to the rest.

    Args:
        step: below ``steps``.
        steps: of the whole run.
        warmup: steps of the rise.
        peak: the highest rate.
        final_share: of ``peak`` that is left at the end.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (final_share + (1 - final_share) * (1 + math.cos(math.pi * done)) / 2)
