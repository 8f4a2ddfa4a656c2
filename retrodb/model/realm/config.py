"""What a REALM model is, in words that its checkpoint records."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

QUERY_TOKENS = 96
"""Wordpieces of a query at most; with [CLS] and [SEP] besides (realm.md)."""
CANDIDATES = 8
"""Null document included (Guu et al. 2020, section 4.3)."""


class RealmConfig(BaseModel):
    """Sizes. The paper's: BERT-base, 128 dimensions, 8 candidates; the retriever's parts share one BERT here.

    ``bert`` is the config.json of the BERT that both the retriever and the reader start from, each with weights of its
    own (section 3.2 of the paper: the knowledge retriever and the knowledge-augmented encoder).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bert: dict[str, Any]
    dimension: int = Field(default=128, ge=1)
    """Of query and block vectors (section 3.2: Embed_input and Embed_doc, linear projections of [CLS])."""
    pooling: Literal["cls", "mean"] = "cls"
    """What the projection is of: [CLS] as in the paper, or the mean of all positions, where the encoder that it starts
    from was trained so."""
    cls: int = Field(ge=0)
    sep: int = Field(ge=0)
    mask: int = Field(ge=0)
