"""What a build of any size takes, before there is a corpus: pure arithmetic over measured and cited figures.

`Assumed` says what is to be built; `plan_build` answers with figures, each beside its source. `retrodb plan` prints
them, ``docs/scale.md`` is made from them, and the tests hold them against real builds.
"""

from retrodb.planning.cost import PRICES, Cost, Effort, Machine, Price, estimate_cost, prices_with
from retrodb.planning.encoders import EncoderSize, encoder_size
from retrodb.planning.figures import Figure
from retrodb.planning.markdown import scale_table
from retrodb.planning.scale import Assumed, Scale, plan_build
from retrodb.planning.tokens import parse_tokens

__all__ = [
    "PRICES",
    "Assumed",
    "Cost",
    "Effort",
    "EncoderSize",
    "Figure",
    "Machine",
    "Price",
    "Scale",
    "encoder_size",
    "estimate_cost",
    "parse_tokens",
    "plan_build",
    "prices_with",
    "scale_table",
]
