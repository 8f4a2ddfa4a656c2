"""Answers to questions by a fine-tuned model and a database: exact match, as SQuAD has it, and candidate recall.

The database need not be the one that the model was fine-tuned on: any of the same encoder will do, with other text
(Guu et al. 2020, section 4.5 and appendix: a newer corpus at test time, without training).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from retrodb.database import Database
from retrodb.errors import InputError
from retrodb.evaluation.answers import exact_match, normalised, normalised_answers, stands_in
from retrodb.evaluation.bodies import Bodies, read_bodies
from retrodb.evaluation.intervals import Estimate, wilson
from retrodb.evaluation.questions import Question, QuestionSet
from retrodb.learning.open_qa_batches import Asked, retrieve
from retrodb.sizes import count_of

if TYPE_CHECKING:
    from retrodb.learning.open_qa import FineTuned
    from retrodb.learning.run import Progress

_QUESTIONS_AT_ONCE: Final = 8


@dataclass(frozen=True)
class Prediction:
    """What was answered to a question.

    Attributes:
        question: its text.
        answer: the characters of the span; empty where nothing was retrieved.
        chunk_id, key: the block that it stands in and its document's key; None where nothing was retrieved.
        log_probability: of block and span together; None likewise.
        exact: by kind of answers, whether it is one of them; only kinds that the question has.
        retrieved: likewise, whether one stands in a retrieved body.
    """

    question: str
    answer: str
    chunk_id: int | None
    key: str | None
    log_probability: float | None
    exact: dict[str, bool]
    retrieved: dict[str, bool]

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class AnswerResult:
    """Of a whole set: ``about`` it; ``exact`` and ``retrieved`` by kind of answers, with 95% intervals."""

    about: dict[str, Any]
    questions: dict[str, int]
    exact: dict[str, Estimate]
    retrieved: dict[str, Estimate]

    def as_json(self) -> dict[str, Any]:
        criteria = [
            {
                "criterion": name,
                "questions": self.questions[name],
                "exact_match": self.exact[name].as_json(),
                "answer_in_blocks": self.retrieved[name].as_json(),
            }
            for name in self.questions
        ]
        return {**self.about, "criteria": criteria}


@dataclass
class Answering:
    """A question set under way: `predictions` are given one after the other, and `result` is what became of them.

    Args:
        db: of the encoder that the model was fine-tuned with.
        tuned: the model.
        questions: those without an answer are passed over.
        progress: is told.
        blocks: read for each question; None: as many as in training.

    Raises:
        InputError, MismatchError: the model cannot ask this database.
    """

    db: Database
    tuned: "FineTuned"
    questions: QuestionSet
    progress: "Progress"
    blocks: int | None = None
    _tallies: dict[str, list[tuple[bool, bool]]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.tuned.check_database(self.db)

    def predictions(self) -> Iterator[Prediction]:
        """In the order of the file.

        Raises:
            InputError: the file cannot be read, or no question has an answer.
        """
        total = sum(any(question.answers.values()) for question in self.questions.read())
        if not total:
            raise InputError(f"{self.questions.url} has no question with an answer.")
        self.progress.begin("answer", total, 0, "questions")
        asked = (question for question in self.questions.read() if any(question.answers.values()))
        done = 0
        while batch := list(islice(asked, _QUESTIONS_AT_ONCE)):
            for prediction in self._answered(batch):
                for name, hit in prediction.exact.items():
                    self._tallies.setdefault(name, []).append((hit, prediction.retrieved[name]))
                yield prediction
            done += len(batch)
            self.progress.advance(done)
        self.progress.end(count_of(done, "question"))

    @property
    def result(self) -> AnswerResult:
        """Of all `predictions`, once they have come."""
        names = sorted(self._tallies)
        columns = {name: np.array(self._tallies[name]) for name in names}
        exact, retrieved = ({n: wilson(int(columns[n][:, at].sum()), len(columns[n])) for n in names} for at in (0, 1))
        about = {
            "database": self.db.storage.url,
            "version": self.db.version,
            "model": self.tuned.url,
            "step": self.tuned.step,
            "blocks": self.blocks or self.tuned.blocks,
            "questions": {"file": self.questions.name, "sha256": self.questions.sha256},
        }
        return AnswerResult(about, {name: len(columns[name]) for name in names}, exact, retrieved)

    def _answered(self, batch: Sequence[Question]) -> Iterator[Prediction]:
        tuned = self.tuned
        asked = Asked.of(batch, tuned.wordpieces, tuned.model.query.config.prompt)
        vectors = tuned.vectors(asked)
        given, found = retrieve(self.db, vectors, self.blocks or tuned.blocks)
        with torch.no_grad():
            best = tuned.model.best(torch.from_numpy(vectors), asked.plain, found)
        ids = np.unique(given.ids[:, 1:][given.present[:, 1:]])
        bodies = read_bodies(self.db, ids)
        forms = [normalised(text) for text in bodies.texts]
        for row, question in enumerate(batch):
            places = np.searchsorted(ids, given.ids[row, 1:][given.present[row, 1:]]).tolist()
            answers = {name: texts for name, texts in question.answers.items() if texts}
            retrieved = {
                name: any(stands_in(normalised_answers(texts), forms[at]) for at in places)
                for name, texts in answers.items()
            }
            text, at = self._span(row, best, given.ids, ids, bodies, found.bodies.ids)
            exact = {name: at is not None and exact_match(text, texts) for name, texts in answers.items()}
            told: tuple[int | None, str | None, float | None] = (None, None, None)
            if at is not None:
                told = (int(ids[at]), bodies.keys[at], float(best.log_probability[row]))
            yield Prediction(question.text, text, *told, exact, retrieved)

    def _span(
        self, row: int, best: Any, given: np.ndarray, ids: np.ndarray, bodies: Bodies, tokens: torch.Tensor
    ) -> tuple[str, int | None]:
        """The characters of a question's best span, and the place of its block in ``ids``; "" and None for none."""
        if not bool(torch.isfinite(best.log_probability[row])):
            return "", None
        slot, start, length = int(best.slot[row]), int(best.start[row]), int(best.length[row])
        at = int(np.searchsorted(ids, given[row, 1 + slot]))
        slots = given.shape[1] - 1
        expected = tokens[row * slots + slot, start : start + length].tolist()
        return self.tuned.wordpieces.span(bodies.texts[at], start, length, expected), at
