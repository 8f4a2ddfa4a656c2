"""The knowledge-augmented encoder: a masked query with a block beside it (section 3.2, equations 5 and 6).

    p(y | z, x) = prod_j p(y_j | z, x),   p(y_j | z, x) ~ exp(w_j^T BERT_MASK(j)(join(x, z_body)))

The join is ``[CLS] x [SEP] body [SEP]``, and the masked-language-model head is BERT's own: a dense layer, gelu, a
normalisation, and the word embeddings with a bias.
"""

import torch
from torch import nn

from retrodb.model.realm.config import RealmConfig
from retrodb.model.realm.packing import Texts, pack


class Reader(nn.Module):
    """log p(y | z, x) for the masked tokens of queries."""

    def __init__(self, bert: nn.Module, config: RealmConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = bert
        width = int(config.bert["hidden_size"])
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=float(config.bert.get("layer_norm_eps", 1e-12)))
        self.bias = nn.Parameter(torch.zeros(int(config.bert["vocab_size"])))

    def log_likelihood(
        self, queries: Texts, bodies: Texts, positions: torch.Tensor, targets: torch.Tensor, wanted: torch.Tensor
    ) -> torch.Tensor:
        """float [n]: the sum over masked tokens of log p(y_j | z, x).

        Args:
            queries: n of them, masked.
            bodies: the block beside each; empty for the null document.
            positions: int64 [n, M], of the masked tokens in the query (0 is its first token).
            targets: int64 [n, M], what stood there.
            wanted: bool [n, M], which of them count: the others are padding.
        """
        packed = pack(queries, bodies, self.config.cls, self.config.sep)
        hidden = self.bert(
            input_ids=packed.ids, token_type_ids=packed.types, attention_mask=packed.mask
        ).last_hidden_state
        rows, columns = wanted.nonzero(as_tuple=True)
        found = self._logits(hidden[rows, positions[rows, columns] + 1]).float().log_softmax(-1)
        picked = found.gather(1, targets[rows, columns][:, None])[:, 0]
        return torch.zeros(len(positions), dtype=picked.dtype, device=picked.device).index_add(0, rows, picked)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        transformed = self.norm(nn.functional.gelu(self.transform(hidden)))
        words = self.bert.get_input_embeddings().weight  # type: ignore[operator,union-attr]
        return nn.functional.linear(transformed, words, self.bias)
