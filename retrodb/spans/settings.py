"""What salient spans and masked queries are made with."""

from dataclasses import dataclass
from typing import Final, Literal, get_args

Mask = Literal["salient", "random-span", "random-token"]
MASKS: Final[tuple[Mask, ...]] = get_args(Mask)

MAX_TOKENS: Final = 96
"""Wordpieces of a query (Guu et al. 2020; `masked span` examples of the released code)."""
MAX_MASKED: Final = 10
"""Masked wordpieces of a query."""


@dataclass(frozen=True)
class SpanSettings:
    """How queries are drawn.

    Attributes:
        taggers: what finds the spans, as `retrodb.spans.taggers.resolve_taggers` takes them; none for a random mask.
        mask: ``salient``; or what salient masks are compared with: a span of whole words drawn at random, or single
            tokens (Guu et al. 2020, section 4.4).
        seed: of what is drawn.
        max_tokens: wordpieces of a query.
        max_masked: masked ones of them.
    """

    taggers: tuple[str, ...] = ()
    mask: Mask = "salient"
    seed: int = 0
    max_tokens: int = MAX_TOKENS
    max_masked: int = MAX_MASKED
