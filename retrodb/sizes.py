"""Sizes as people write them."""

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
