"""Salient spans and masked queries: what REALM pre-trains a retriever on (Guu et al. 2020, sections 3.1 and 3.4).

    sentences -> spans (taggers, imported ones) -> one span a sentence, drawn -> its wordpieces masked

`settings` says how; `taggers` find spans in a sentence (`dates` by pattern), `imports` brings those of other programs;
`find` keeps what lies in one sentence; `wordpieces` is the encoder's own tokenizer; `queries` draws and masks; `table`
makes the rows of a shard; `reader` gives them to a trainer.
"""

from retrodb.spans.settings import MASKS, Mask, SpanSettings

__all__ = ["MASKS", "Mask", "SpanSettings"]
