"""The knowledge retriever: queries and blocks as vectors whose inner product is relevance (section 3.2, equation 4).

    Embed_input(x) = W_input BERT_CLS([CLS] x [SEP])
    Embed_doc(z)   = W_doc   BERT_CLS([CLS] title [SEP] body [SEP])
    f(x, z)        = Embed_input(x)^T Embed_doc(z)

Here W_input = W_doc and one BERT serves both, so that a checkpoint is one encoder and a database embeds its blocks, and
its users their queries, with the same files. The inner product is raw: nothing normalises. W begins with orthonormal
rows, and where the encoder that it starts from takes the mean of all positions for [CLS], so does the retriever: what
that encoder knew of relevance is not thrown away.
"""

from typing import cast

import torch
from torch import nn

from retrodb.model.realm.bert import pooled
from retrodb.model.realm.config import RealmConfig
from retrodb.model.realm.packing import Packed, Texts, pack


class Retriever(nn.Module):
    """Texts to vectors [n, dimension]."""

    def __init__(self, bert: nn.Module, config: RealmConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = bert
        self.projection = nn.Linear(int(config.bert["hidden_size"]), config.dimension, bias=False)
        nn.init.orthogonal_(self.projection.weight)

    def queries(self, texts: Texts) -> torch.Tensor:
        """float [n, dimension] of ``[CLS] x [SEP]``."""
        return self._embed(pack(texts, None, self.config.cls, self.config.sep))

    def blocks(self, titles: Texts, bodies: Texts) -> torch.Tensor:
        """float [n, dimension] of ``[CLS] title [SEP] body [SEP]``; the null document is two empty texts."""
        return self._embed(pack(titles, bodies, self.config.cls, self.config.sep))

    def null(self) -> torch.Tensor:
        """float [1, dimension]: the null document's."""
        device = self.projection.weight.device
        return self.blocks(Texts.empty(1, device), Texts.empty(1, device))

    def _embed(self, packed: Packed) -> torch.Tensor:
        hidden = self.bert(
            input_ids=packed.ids, token_type_ids=packed.types, attention_mask=packed.mask
        ).last_hidden_state
        return cast("torch.Tensor", self.projection(pooled(hidden, packed.mask, self.config.pooling)))
