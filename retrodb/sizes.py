"""Sizes, times and counts as people write them."""

import re
from typing import Final

_UNITS: Final = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_SECONDS: Final = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*")
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """``"8GB"``, ``"512MiB"`` or a number, in bytes.

    Raises:
        ValueError: it is not a size.
    """
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text)
    if match is None or (unit := match[2].lower()) not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write it as 8GB or 512MiB")
    return int(float(match[1]) * _UNITS[unit])


def parse_duration(text: str | float) -> float:
    """``"90s"``, ``"10m"``, ``"1.5h"``, ``"2d"``, or a number of seconds, in seconds.

    Raises:
        ValueError: it is not a duration.
    """
    if isinstance(text, int | float):
        return float(text)
    match = _DURATION.fullmatch(text)
    if match is None or match[2] not in _SECONDS:
        raise ValueError(f"{text!r} is not a duration; write it as 30s, 10m or 2h")
    return float(match[1]) * _SECONDS[match[2]]


def duration_text(seconds: float) -> str:
    """As `parse_duration` reads it, in the largest unit that needs no more than one decimal: ``10m``, ``1.5h``."""
    for unit in ("d", "h", "m"):
        whole = seconds / _SECONDS[unit]
        if whole >= 1 and round(whole, 1) == whole:
            return f"{whole:g}{unit}"
    return f"{seconds:g}s"


def count_of(number: int, one: str, many: str = "") -> str:
    """``1 shard``, ``1,234 shards``: a number and what it counts; ``many`` where that takes more than an s."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"
