"""The query side of an encoder, with gradients: what fine-tuning trains while the blocks' vectors stay as they are.

It computes what the database's encoder computes for a query (`retrodb.encoding`), whatever its card says of pooling,
projection and normalisation, so that at step 0 a question has the very vector that `Database.search` asks with.
"""

import json
from typing import Any, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from retrodb.encoding import EncoderFiles, EncoderIdentity
from retrodb.encoding.source import query_prompt
from retrodb.errors import InputError
from retrodb.model.realm.bert import bert_card, blank_bert, load_bert, pooled, special_tokens
from retrodb.model.realm.packing import Texts, pack

_CARDS: Final = (
    (),
    ("Transformer", "Pooling"),
    ("Transformer", "Pooling", "Normalize"),
    ("Transformer", "Pooling", "Dense"),
    ("Transformer", "Pooling", "Dense", "Normalize"),
)


class QueryConfig(BaseModel):
    """What an encoder does with a query.

    ``projection`` is the width of a linear layer behind the pooling, None where there is none; ``prompt`` is put before
    every question.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bert: dict[str, Any]
    pooling: Literal["cls", "mean"]
    projection: int | None = Field(ge=1)
    normalise: bool
    prompt: str
    cls: int = Field(ge=0)
    sep: int = Field(ge=0)


class QueryEncoder(nn.Module):
    """Questions to vectors [n, d]."""

    def __init__(self, config: QueryConfig, bert: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.bert = bert
        width = int(config.bert["hidden_size"])
        self.projection = nn.Linear(width, config.projection, bias=False) if config.projection else nn.Identity()

    @staticmethod
    def start(files: EncoderFiles, identity: EncoderIdentity) -> "QueryEncoder":
        """From an encoder's weights.

        Raises:
            InputError: it is no BERT, or does something that cannot be trained here.
        """
        if identity.modules not in _CARDS or identity.pooling not in ("cls", "mean"):
            raise InputError(
                f"the encoder {files.name!r} has the modules {', '.join(identity.modules)} with {identity.pooling} "
                "pooling: fine-tuning takes a BERT with mean or CLS pooling, a linear projection and normalisation."
            )
        weight = _projection(files) if "Dense" in identity.modules else None
        special = special_tokens(files)
        config = QueryConfig(
            bert=bert_card(files),
            pooling="cls" if identity.pooling == "cls" else "mean",
            projection=None if weight is None else len(weight),
            normalise=identity.normalise,
            prompt=query_prompt(files, identity),
            cls=special["cls"],
            sep=special["sep"],
        )
        made = QueryEncoder(config, load_bert(files))
        if weight is not None:
            made.projection.load_state_dict({"weight": weight})
        return made.eval()

    @staticmethod
    def blank(config: QueryConfig) -> "QueryEncoder":
        """Of a checkpoint's sizes, with weights to be loaded."""
        return QueryEncoder(config, blank_bert(config.bert))

    def forward(self, texts: Texts) -> torch.Tensor:
        """float [n, d] of ``[CLS] x [SEP]``."""
        packed = pack(texts, None, self.config.cls, self.config.sep)
        hidden = self.bert(
            input_ids=packed.ids, token_type_ids=packed.types, attention_mask=packed.mask
        ).last_hidden_state
        found: torch.Tensor = self.projection(pooled(hidden, packed.mask, self.config.pooling))
        return nn.functional.normalize(found, dim=1) if self.config.normalise else found


def _projection(files: EncoderFiles) -> torch.Tensor:
    """float [d, width]: the weight of the card's Dense module. Raises InputError: it is more than a matrix."""
    modules = json.loads((files.folder / "modules.json").read_text(encoding="utf-8"))
    folder = files.folder / next(m["path"] for m in modules if str(m["type"]).endswith(".Dense"))
    try:
        card = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"the encoder's {folder} cannot be read: {error}.") from error
    plain = str(card.get("activation_function", "")).endswith(".Identity")
    if not plain or set(tensors) != {"linear.weight"}:
        raise InputError(
            f"the Dense module of the encoder {files.name!r} has an activation or a bias: fine-tuning takes a matrix."
        )
    return tensors["linear.weight"].float()
