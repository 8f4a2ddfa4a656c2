"""Open-domain answers: a span of a retrieved block (section 3.4; Lee et al. 2019, section 3).

    p(y | z, x) ~ sum over the spans s of z that match y of exp(MLP([h_start(s); h_end(s)]))

Spans are scored by their two ends, and normalised over all spans of their block; p(z | x) weighs the blocks.
"""

import torch
from torch import nn

from retrodb.model.realm.config import RealmConfig
from retrodb.model.realm.packing import Texts, pack

LONGEST_ANSWER = 10
"""Wordpieces of a span at most (Lee et al. 2019, appendix)."""


class SpanReader(nn.Module):
    """Scores of the spans of blocks, given questions."""

    def __init__(self, bert: nn.Module, config: RealmConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = bert
        width = int(config.bert["hidden_size"])
        self.mlp = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.LayerNorm(width), nn.Linear(width, 1))

    def spans(self, questions: Texts, bodies: Texts) -> tuple[torch.Tensor, torch.Tensor]:
        """float [n, L, `LONGEST_ANSWER`]: the score of the span that begins at token l of the body and has 1 + j
        tokens; and bool of the same shape: which of them lie in the body."""
        packed = pack(questions, bodies, self.config.cls, self.config.sep)
        hidden = self.bert(
            input_ids=packed.ids, token_type_ids=packed.types, attention_mask=packed.mask
        ).last_hidden_state
        width, device = bodies.ids.shape[1], hidden.device
        starts = torch.arange(width, device=device)
        ends = starts[:, None] + torch.arange(LONGEST_ANSWER, device=device)
        inside = ends[None] < bodies.lengths[:, None, None]
        # The first layer reads [start; end]: its two halves are applied to each token once, not to each span.
        enter: nn.Linear = self.mlp[0]  # type: ignore[assignment]
        of_start, of_end = enter.weight.chunk(2, dim=1)
        rows = torch.arange(len(hidden), device=device)[:, None]
        body = hidden[rows, (packed.second[:, None] + starts).clamp(max=hidden.shape[1] - 1)]
        # No token that has a gradient is indexed twice: threads would add its parts in any order, and a run would not
        # be what its seed says.
        padded = nn.functional.pad(
            body @ of_end.T, (0, 0, 0, LONGEST_ANSWER)
        )  # one window too many, for no body at all
        ending = padded.unfold(1, LONGEST_ANSWER, 1)[:, :width]
        entered = (body @ of_start.T + enter.bias)[:, :, None] + ending.transpose(2, 3)
        scores = torch.full(inside.shape, -torch.inf, device=device)
        scores[inside] = self.mlp[1:](entered[inside])[:, 0].float()
        return scores, inside


def matches(bodies: Texts, answers: list[list[list[int]]]) -> torch.Tensor:
    """bool [n, L, `LONGEST_ANSWER`]: which spans are one of the row's answers, token for token."""
    n, width = bodies.ids.shape
    found = torch.zeros(n, width, LONGEST_ANSWER, dtype=torch.bool)
    ids, lengths = bodies.ids.cpu(), bodies.lengths.cpu()
    for row, wanted in enumerate(answers):
        for answer in wanted:
            size = len(answer)
            if not 0 < size <= min(LONGEST_ANSWER, int(lengths[row])):
                continue
            windows = ids[row, : int(lengths[row])].unfold(0, size, 1)
            equal = (windows == torch.tensor(answer)).all(-1)
            found[row, : len(equal), size - 1] |= equal
    return found.to(bodies.ids.device)


def answer_nats(
    retrieval: torch.Tensor, scores: torch.Tensor, correct: torch.Tensor, valid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """-log p(answer | question) of the questions whose answer stands in a candidate.

    p(z | x) is a softmax of the retrieval scores over the candidates, p(s | z, x) one over the spans of the block.

    Args:
        retrieval: float [q, c].
        scores: float [q, c, L, J], -inf outside the body.
        correct: bool [q, c, L, J].
        valid: bool [q, c].

    Returns:
        float [q], 0 where no candidate holds the answer; and bool [q], where one does.
    """
    prior = retrieval.float().masked_fill(~valid, -torch.inf).log_softmax(-1)
    flat = scores.float().flatten(2)
    likelihood = flat.log_softmax(-1)
    own = (correct & valid[:, :, None, None]).flatten(2)
    joint = (prior[:, :, None] + likelihood).masked_fill(~own, -torch.inf).flatten(1)
    answered = own.flatten(1).any(-1)
    safe = joint.masked_fill(~answered[:, None], 0.0)  # no gradient of an empty sum
    return torch.where(answered, -torch.logsumexp(safe, -1), 0.0), answered
