"""Dates by pattern: years, months and days as English text writes them, and ISO 8601.

REALM's salient spans are named entities and dates, the latter by a regular expression (Guu et al. 2020, section 3.4).
A bare number is a year from 1000 to 2099 that is no amount: nothing of a number, a currency or a unit stands beside it.
"""

import re
from collections.abc import Iterator
from typing import Final

VERSION: Final = "1"
"""Raised when other dates are found."""

_MONTH: Final = (
    r"(?:January|February|March|April|May|June|July|August|September|October|November|December"
    r"|(?:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept|Sep|Oct|Nov|Dec)\b\.?)"
)
_DAY: Final = r"(?:0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?"
_YEAR: Final = r"(?:1\d{3}|20\d{2})"
_ERA: Final = r"(?:BCE|BC|CE|AD|B\.C\.E\.|B\.C\.|C\.E\.|A\.D\.)"
_UNIT: Final = (
    r"(?:%|°|percent|per\b|people|persons?|men|women|children|inhabitants|residents|soldiers|troops|members|students|"
    r"times|votes|copies|pages|words|species|islands|units|points|years?|days?|hours?|minutes?|seconds?|million|billion|"
    r"trillion|hundred|thousand|dollars|euros|pounds|[kcm]?m\b|km|mi\b|miles?|met(?:er|re)s?|feet|ft|inch(?:es)?|yards?|"
    r"acres|hectares|[kmg]?g\b|kg|lbs?|tons?|tonnes|[kMGT]?Hz|[kMGT]?B\b|[kMG]?W\b|volts|mm\b|cm\b|square|cubic|sq\b)"
)
_DASH: Final = r"[-–—/]"

_DATE: Final = re.compile(
    rf"""(?<![\w.,$€£¥#/:+-])(?:
      {_YEAR}-(?:0[1-9]|1[0-2])(?:-(?:0[1-9]|[12]\d|3[01])(?:T\d\d:\d\d(?::\d\d)?Z?)?)?    # 1998-03-12, 1998-03
    | {_DAY}\s(?:of\s)?{_MONTH}(?:,?\s{_YEAR})?    # 12 March 1998, 12th of March
    | {_MONTH}\s{_DAY}(?!\d)(?:,?\s{_YEAR}(?!\d))?    # March 12, 1998; March 12
    | {_MONTH},?\s(?:of\s)?{_YEAR}    # March 1998
    | (?:0?[1-9]|[12]\d|3[01])(?P<between>[/.])(?:0?[1-9]|[12]\d|3[01])(?P=between){_YEAR}   # 12/03/1998, 12.3.1998
    | (?:[Ss]pring|[Ss]ummer|[Aa]utumn|[Ff]all|[Ww]inter)\s(?:of\s)?{_YEAR}    # summer of 1998
    | (?:AD|A\.D\.)\s\d{{1,4}}    # AD 79
    | \d{{1,4}}\s{_ERA}(?!\w)    # 44 BC
    | (?P<from>{_YEAR}){_DASH}(?P<to>{_YEAR}|\d\d)    # 1939-1945, 1914-18
    | (?:1\d\d|20\d)0'?s    # 1990s
    | (?:[1-9]|1\d|2[01])(?:st|nd|rd|th)\s[Cc]entury(?:\s{_ERA}(?!\w))?    # 19th century
    | {_YEAR}(?!\s?{_UNIT})    # 1998
    )(?![\w$€£¥%]|[.,:/-]\d)""",
    re.VERBOSE,
)


def dates(text: str) -> Iterator[tuple[int, int]]:
    """The character range of each date, ascending, none overlapping another."""
    at = 0
    while (match := _DATE.search(text, at)) is not None:
        start, end = match.span()
        if match["to"] is not None and match["to"] <= match["from"][-len(match["to"]) :]:
            end = match.end("from")  # 1998-13 is no range
        yield start, end
        at = end
