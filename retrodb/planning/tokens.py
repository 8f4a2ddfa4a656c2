"""Numbers of tokens as people write them: 1e9, 100B, 1.75T, 2 trillion."""

import re
from typing import Final

from retrodb.errors import UsageError

_UNITS: Final = {
    "": 1,
    "k": 10**3,
    "thousand": 10**3,
    "m": 10**6,
    "million": 10**6,
    "b": 10**9,
    "g": 10**9,
    "billion": 10**9,
    "t": 10**12,
    "trillion": 10**12,
}
_NUMBER: Final = re.compile(
    r"((?:\d{1,3}(?:,\d{3})+|\d+(?:_\d+)*)(?:\.\d+)?(?:e\+?\d{1,2})?)\s*([a-z]*)", re.IGNORECASE
)
"""Commas by threes: ``1,5e9`` is one and a half billion to some, and fifteen to others."""
MAXIMUM_TOKENS: Final = 10**17
"""Beyond this ids, ``shard << 32 | row``, would not be the limit, but sense would."""


def parse_tokens(text: str) -> int:
    """The whole number that ``text`` names.

    Raises:
        UsageError: it names none, or none from 1 to `MAXIMUM_TOKENS`.
    """
    match = _NUMBER.fullmatch(text.strip())
    unit = match[2].lower() if match else ""
    if match is None or unit not in _UNITS:
        raise UsageError(f"--tokens {text!r}: write a number such as 1e9, 100B, 1.75T or '2 trillion'.")
    value = float(match[1].replace(",", "").replace("_", "")) * _UNITS[unit]
    if not 1 <= value <= MAXIMUM_TOKENS:
        raise UsageError(f"--tokens {text!r} is {value:g} tokens; from 1 to {MAXIMUM_TOKENS:g} can be planned.")
    return round(value)
