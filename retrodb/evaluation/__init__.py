"""What a database is worth to a model: bits per byte with its neighbours, without, and with others in their place.

    evaluated = evaluate(retrodb.open("my-db"), ["ckpt"], EvaluationSettings(), progress)
    write_report(evaluated, "reports")

`conditions` say which neighbours a model gets; `control` draws random ones; `bits` measures chunk by chunk; `intervals`
are means with confidence intervals over documents and checkpoints (one a seed); `run` is the whole, and `report` the
table and the picture.
"""

from retrodb.evaluation.settings import EvaluationSettings, make_settings

__all__ = ["EvaluationSettings", "make_settings"]
