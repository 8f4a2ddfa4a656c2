"""What open-QA fine-tuning and answering read: questions as wordpieces, and the blocks that a database gives."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from retrodb.database import Database
from retrodb.errors import DamagedError, InputError
from retrodb.evaluation.questions import Question, QuestionSet
from retrodb.learning.realm_batches import check_blocks, texts_of, trimmed
from retrodb.model.realm.config import QUERY_TOKENS
from retrodb.model.realm.open_qa import OpenQa, Retrieved
from retrodb.model.realm.packing import Texts
from retrodb.model.realm.span_reader import LONGEST_ANSWER
from retrodb.neighbours.candidates import CandidateBatch
from retrodb.sizes import count_of
from retrodb.units import unit_of


class Wordpieces:
    """A tokenizer.json as the parts of a model read it: no special tokens, no padding, nothing cut.

    Raises:
        DamagedError: it is none.
    """

    def __init__(self, tokenizer_json: bytes, where: str) -> None:
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer_json.decode("utf-8"))
        except Exception as error:  # the tokenizers package raises plain Exception
            raise DamagedError(f"{where} is no tokenizer.json: {error}.") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text."""
        return [found.ids for found in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def span(self, body: str, start: int, length: int, expected: Sequence[int]) -> str:
        """The characters of ``body`` that its tokens ``start:start + length`` cover.

        Where tokenising the body alone does not give the ``expected`` tokens there (a sentence was split inside a
        word), it is what these decode to.
        """
        self._tokenizer.encode_special_tokens = True  # as blocks were cut: what looks like one is text
        try:
            found = self._tokenizer.encode(body, add_special_tokens=False)
        finally:
            self._tokenizer.encode_special_tokens = False
        if found.ids[start : start + length] != list(expected):
            return str(self._tokenizer.decode(list(expected)))
        return body[found.offsets[start][0] : found.offsets[start + length - 1][1]]


@dataclass(frozen=True)
class Asked:
    """Questions as both parts read them, n of each: ``prompted`` for the query encoder, ``plain`` for the reader."""

    prompted: Texts
    plain: Texts

    @staticmethod
    def of(questions: Sequence[Question], wordpieces: Wordpieces, prompt: str) -> "Asked":
        """Both cut at `QUERY_TOKENS`."""
        plain = wordpieces.ids([question.text for question in questions])
        prompted = wordpieces.ids([prompt + question.text for question in questions]) if prompt else plain
        return Asked(*(Texts.of([ids[:QUERY_TOKENS] for ids in side]) for side in (prompted, plain)))


def check_answerable(db: Database, model: OpenQa) -> None:
    """Refuse a database that the model cannot read from.

    Raises:
        InputError: it is not of blocks, has no block, or one may be longer than the reader takes beside a question.
        MismatchError: it is not of inner products.
    """
    if unit_of(db.manifest.config) != "block":
        raise InputError(f"{db.storage.url} is a database of chunks: answers are read from blocks (--unit block).")
    if not db.manifest.rows("chunks"):
        raise InputError(f"{db.storage.url} has no block to read an answer from.")
    check_blocks(db, model.reader.bert)


def retrieve(db: Database, vectors: np.ndarray, blocks: int) -> tuple[CandidateBatch, Retrieved]:
    """The best blocks of questions by their live vectors; the null document, which answers nothing, is left out.

    Args:
        db: `check_answerable`.
        vectors: float32 [n, d].
        blocks: of each question.

    Returns:
        What the database gave, slot 0 being the null document, and the same without it as tensors.
    """
    found = db.candidates(vectors, blocks + 1, vectors=True, tokens=True)
    assert found.vectors is not None, "asked for"
    assert found.tokens is not None, "asked for"
    assert found.n_tokens is not None, "asked for"
    stored = torch.from_numpy(found.vectors[:, 1:].astype(np.float32))
    bodies = trimmed(texts_of(found.tokens[:, 1:], found.n_tokens[:, 1:]))
    return found, Retrieved(stored, bodies, torch.from_numpy(found.present[:, 1:].copy()))


@dataclass(frozen=True)
class TrainingQuestions:
    """A question set for training: those with an answer that a span of a block could be.

    Attributes:
        questions: in the order of the file.
        answers: token ids of the answers of each that have 1 to `LONGEST_ANSWER` wordpieces.
        sha256: of the file's decompressed bytes.
        left_out: questions without such an answer.
    """

    questions: list[Question]
    answers: list[list[list[int]]]
    sha256: str
    left_out: int

    @staticmethod
    def read(questions: QuestionSet, wordpieces: Wordpieces, criterion: str | None) -> "TrainingQuestions":
        """All of a file.

        Args:
            questions: the file.
            wordpieces: what cut the blocks.
            criterion: the answers to learn, as ``answers`` or ``answers 2016``; None where all questions have one kind.

        Raises:
            InputError: the file cannot be read, has several kinds of answers, or none that could be a span.
        """
        read = list(questions.read())
        kinds = sorted({name for question in read for name in question.answers})
        chosen = criterion or (kinds[0] if len(kinds) == 1 else None)
        if chosen is None or chosen not in kinds:
            there = ", ".join(map(repr, kinds)) or "none"
            wanted = f"no {criterion!r}" if criterion else "answers of several kinds" if kinds else "no answers"
            raise InputError(f"{questions.url} has {wanted}: its kinds of answers are {there}. Name one by --answers.")
        kept, answers = [], []
        for question in read:
            ids = wordpieces.ids(question.answers.get(chosen, ()))
            if short := [answer for answer in ids if 0 < len(answer) <= LONGEST_ANSWER]:
                kept.append(question)
                answers.append(short)
        if not kept:
            raise InputError(
                f"{questions.url} has {count_of(len(read), 'question')}, none with an answer of 1 to 10 wordpieces."
            )
        return TrainingQuestions(kept, answers, questions.sha256, len(read) - len(kept))


def order_of(count: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [count]: the order of a pass over the questions."""
    return np.random.default_rng([seed, epoch]).permutation(count)
