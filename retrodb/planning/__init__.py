"""What a build of any size takes, before there is a corpus: pure arithmetic over measured and cited figures.

`Assumed` says what is to be built; `plan_build` answers with figures, each beside its source. `retrodb plan` prints
them, ``docs/scale.md`` is made from them, and the tests hold them against real builds.
"""

from retrodb.planning.encoders import EncoderSize, encoder_size
from retrodb.planning.figures import Figure
from retrodb.planning.markdown import scale_table
from retrodb.planning.scale import Assumed, Scale, plan_build
from retrodb.planning.tokens import parse_tokens

__all__ = [
    "Assumed",
    "EncoderSize",
    "Figure",
    "Scale",
    "encoder_size",
    "parse_tokens",
    "plan_build",
    "scale_table",
]
