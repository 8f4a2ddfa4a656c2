"""Open-domain question answering (section 3.4 and appendix of Guu et al. 2020): a query encoder and a span reader.

    p(y | x) = sum_z p(z | x) p(y | z, x),   p(z | x) = softmax over the retrieved blocks of Embed_input(x)^T v_z

v_z are the vectors that the database holds: the document side is frozen, so that its index stays what it is. The
gradient reaches the query encoder through p(z | x), and the reader.
"""

from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from retrodb.model.realm.bert import blank_bert
from retrodb.model.realm.config import RealmConfig
from retrodb.model.realm.packing import Texts
from retrodb.model.realm.query import QueryConfig, QueryEncoder
from retrodb.model.realm.span_reader import LONGEST_ANSWER, SpanReader, answer_nats


class OpenQaConfig(BaseModel):
    """Sizes of both parts; of ``reader`` the BERT and the special tokens count."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    query: QueryConfig
    reader: RealmConfig


@dataclass(frozen=True)
class Retrieved:
    """What a database gave for n questions, c blocks each.

    Attributes:
        vectors: float [n, c, d], stored ones.
        bodies: n * c texts: those of question 0, then of question 1, ..
        valid: bool [n, c].
    """

    vectors: torch.Tensor
    bodies: Texts
    valid: torch.Tensor


@dataclass(frozen=True)
class BestSpans:
    """Of each question: the ``slot`` of a block, the first token ``start`` of a span of its body, its ``length`` in
    tokens (int64 [n]) and ``log_probability`` (float [n], of block and span; -inf where nothing was retrieved)."""

    slot: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor
    log_probability: torch.Tensor


class OpenQa(nn.Module):
    """The parts that fine-tuning trains. There is no document side here: its vectors come from a database."""

    def __init__(self, config: OpenQaConfig, query: QueryEncoder, reader_bert: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.query = query
        self.reader = SpanReader(reader_bert, config.reader)

    @staticmethod
    def start(query: QueryEncoder, reader_bert: nn.Module, reader: RealmConfig, seed: int) -> "OpenQa":
        """From a query encoder and a BERT; the head of the reader is drawn with ``seed``."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return OpenQa(OpenQaConfig(query=query.config, reader=reader), query, reader_bert).eval()

    @staticmethod
    def blank(config: OpenQaConfig) -> "OpenQa":
        """Of a checkpoint's sizes, with weights to be loaded."""
        return OpenQa(config, QueryEncoder.blank(config.query), blank_bert(config.reader.bert)).eval()

    def forward(self, asked: torch.Tensor, questions: Texts, found: Retrieved) -> tuple[torch.Tensor, torch.Tensor]:
        """The retrieval score of each block, float [n, c], and the scores of its spans, float
        [n, c, L, `LONGEST_ANSWER`] with -inf outside the body.

        Args:
            asked: float [n, d], the questions' vectors by `query`.
            questions: their tokens, for the reader.
            found: what was retrieved with these vectors.
        """
        n, slots = found.valid.shape
        spans, _ = self.reader.spans(questions.repeated(slots), found.bodies)
        return torch.einsum("nd,ncd->nc", asked, found.vectors), spans.view(n, slots, -1, LONGEST_ANSWER)

    def nats(
        self, asked: torch.Tensor, questions: Texts, found: Retrieved, correct: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """float [n], -log p(answer | question), 0 where no retrieved body holds an answer; bool [n], where one does.

        Args:
            correct: bool [n * c, L, `LONGEST_ANSWER`], the spans that are an answer (`span_reader.matches`).
        """
        scores, spans = self(asked, questions, found)
        return answer_nats(scores, spans, correct.view(spans.shape), found.valid)

    def best(self, asked: torch.Tensor, questions: Texts, found: Retrieved) -> BestSpans:
        """The span of largest p(z | x) p(s | z, x)."""
        scores, spans = self(asked, questions, found)
        width, longest = spans.shape[2:]
        if not width:  # no body has a token: nothing was retrieved for any question
            nothing = torch.zeros(len(asked), dtype=torch.int64, device=asked.device)
            return BestSpans(nothing, nothing, nothing, torch.full(nothing.shape, -torch.inf, device=asked.device))
        prior = scores.float().masked_fill(~found.valid, -torch.inf).log_softmax(-1)
        normal = spans.flatten(2).logsumexp(-1)
        joint = prior[:, :, None] + spans.flatten(2) - normal[:, :, None]
        joint = joint.masked_fill(~(found.valid & normal.isfinite())[:, :, None], -torch.inf).flatten(1)
        value, at = joint.max(-1)
        within = at % (width * longest)
        return BestSpans(at // (width * longest), within // longest, within % longest + 1, value)
