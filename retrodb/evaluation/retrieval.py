"""Zero-shot retrieval: how often what answers a question is among the first k that a database gives for it.

Guu et al. 2020 (table 2) call this zero-shot recall@k: a question is a hit where a gold answer stands in one of the k
bodies; where the set names relevant documents, a body of one of them is a hit as well. Exact search and the database's
own index answer the same vectors, so that what the index loses is told from what the encoder does not know.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrodb.database import Database
from retrodb.errors import InputError
from retrodb.evaluation.answers import normalised, normalised_answers, stands_in
from retrodb.evaluation.bodies import Bodies, read_bodies
from retrodb.evaluation.exact import exact_search
from retrodb.evaluation.intervals import Estimate, mean, wilson
from retrodb.evaluation.questions import DOCUMENTS, Question, QuestionSet
from retrodb.manifest import REPORTS_FOLDER
from retrodb.neighbours.searcher import Searcher
from retrodb.sizes import count_of

if TYPE_CHECKING:
    from retrodb.learning.run import Progress

DEFAULT_KS: Final = (5, 20, 100)
EXACT, INDEX = "exact", "index"
SIDES: Final = (EXACT, INDEX)

_CANDIDATES_AT_ONCE: Final = 4_096 * 100
"""Of the questions that are searched together."""
_BODIES_AT_ONCE: Final = 256 * 100
"""Of the questions whose bodies are in memory together."""


@dataclass
class _Tally:
    """What became of the questions of one criterion: for each side the rank of the first hit, 0 for none, and for
    documents the share of the relevant ones among the first k, [questions, ks]."""

    ranks: dict[str, list[int]] = field(default_factory=lambda: {side: [] for side in SIDES})
    shares: dict[str, list[list[float]]] = field(default_factory=lambda: {side: [] for side in SIDES})
    several: bool = False


@dataclass(frozen=True)
class CriterionResult:
    """One criterion: ``answers``, ``answers 2016``, or ``documents``.

    Attributes:
        name: which.
        questions: that have a gold answer or document of it.
        hits: by side and k, the share of questions with a hit, with its interval.
        found: likewise the mean share of the relevant documents that were found; None where every question has one.
    """

    name: str
    questions: int
    hits: dict[str, dict[int, Estimate]]
    found: dict[str, dict[int, Estimate]] | None

    def as_json(self) -> dict[str, Any]:
        def by_k(estimates: dict[str, dict[int, Estimate]]) -> dict[str, Any]:
            return {s: {str(k): one.as_json() for k, one in found.items()} for s, found in estimates.items()}

        extra = {"documents_found": by_k(self.found)} if self.found is not None else {}
        return {"criterion": self.name, "questions": self.questions, "recall": by_k(self.hits), **extra}


@dataclass(frozen=True)
class RetrievalResult:
    """The figures of a whole question set. ``agreement``: by k, the share of exact search's chunks the index gave."""

    about: dict[str, Any]
    ks: tuple[int, ...]
    criteria: list[CriterionResult]
    agreement: dict[int, float]
    notes: list[str]

    @property
    def report_path(self) -> str:
        """Where in the database the figures are kept: named by the content of the questions."""
        return f"{REPORTS_FOLDER}/retrieval-{self.about['questions']['sha256'][:16]}.json"

    def as_json(self) -> dict[str, Any]:
        return {
            **self.about,
            "k": list(self.ks),
            "criteria": [criterion.as_json() for criterion in self.criteria],
            "index_agreement": {str(k): share for k, share in self.agreement.items()},
            "notes": self.notes,
        }


def evaluate_retrieval(
    database: Database,
    questions: QuestionSet,
    ks: Sequence[int] = DEFAULT_KS,
    *,
    progress: "Progress",
    encoder: str | None = None,
) -> RetrievalResult:
    """Zero-shot recall of a database, by exact search and by its index.

    In memory are some thousand questions with their candidates, the bodies of some hundred, and a few numbers for each.

    Args:
        database: complete up to its index.
        questions: read twice: for what they hold, then to be asked.
        ks: numbers of chunks looked at, each at least 1.
        progress: who is told.
        encoder: where the database's encoder is now, if not where it was.

    Raises:
        InputError: the questions cannot be read, none has a gold answer or a relevant document of this database, the
            database has no index yet, or nothing is left in it.
        MismatchError: what is found under the encoder's name is another.
        DamagedError: a shard is not what was recorded.
    """
    ks = tuple(sorted(set(ks)))
    searcher = Searcher(database.storage, database.manifest)
    asked, notes = _survey(database, questions)
    loaded = database.encoder(encoder)
    run = _Run(database, searcher, loaded.embed_queries, ks, asked.documents_there > 0)
    if not run.chunks:
        raise InputError(
            f"{database.storage.url} has no chunk that could be retrieved: it has none at all, or all are deleted."
        )
    progress.begin("questions", asked.with_gold, 0, "questions")
    asked_here = (question for question in questions.read() if run.is_asked(question))
    for batch in _batches(asked_here, max(1, _CANDIDATES_AT_ONCE // run.most)):
        run.ask(batch)
        progress.advance(run.done)
    results = run.results()
    progress.end(count_of(run.done, "question"))
    if run.blank:
        notes.append(
            f"{count_of(run.blank, 'question has', 'questions have')} answers of nothing but articles and "
            "punctuation: not counted"
        )
    state = database.manifest.stages["index"]
    about = {
        "database": database.storage.url,
        "version": database.version,
        "questions": {
            "file": questions.name,
            "sha256": questions.sha256,
            "read": asked.read,
            "asked": run.done,
            "without_gold": asked.read - asked.with_gold,
            "with_a_document_here": asked.documents_there if asked.documents_named else None,
        },
        "encoder": {
            "name": loaded.identity.name,
            "fingerprint": loaded.identity.fingerprint,
            "query_prompt": loaded.query_prompt,
        },
        "metric": searcher.metric,
        "index": {"key": state.details["key"], "fingerprint": state.fingerprint},
        "chunks": run.chunks,
    }
    return RetrievalResult(about, ks, results, run.agreement(), notes)


@dataclass(frozen=True)
class _Asked:
    """What a question set holds. ``documents_named``, ``documents_there``: questions that name a relevant document, and
    one that can be retrieved here."""

    read: int
    with_gold: int
    documents_named: int
    documents_there: int


def _survey(database: Database, questions: QuestionSet) -> tuple[_Asked, list[str]]:
    """Read a question set once, and look for its relevant documents among those that can be retrieved."""
    read = with_gold = 0
    answered = False
    named: list[tuple[str, ...]] = []
    for question in questions.read():
        read += 1
        with_gold += question.has_gold
        answered = answered or any(question.answers.values())
        if question.documents:
            named.append(question.documents)
    if not with_gold:
        raise InputError(
            f"{questions.url} has {count_of(read, 'question')}, none with a gold answer or a relevant document."
        )
    here = _retrievable_keys(database, {key for keys in named for key in keys})
    there = sum(any(key in here for key in keys) for keys in named)
    notes = []
    if named and not there:
        if not answered:
            raise InputError(
                f"none of the documents that {questions.url} names (as {named[0][0]!r}) is a training document of "
                f"{database.storage.url}: their keys are compared. Was it built from other documents?"
            )
        notes.append("the relevant documents that the questions name are not in this database: answers alone count")
    elif there < len(named):
        notes.append(
            f"{count_of(len(named) - there, 'question names', 'questions name')} no document that is in this "
            "database: misses by documents"
        )
    return _Asked(read, with_gold, len(named), there), notes


def _retrievable_keys(database: Database, wanted: set[str]) -> set[str]:
    """Those of the ``wanted`` keys that training documents have which are not deleted."""
    found: set[str] = set()
    if wanted:
        for table in database.tables("documents", ["document_id", "key", "split"]):
            gone = database.deletions.of_documents(table["document_id"].to_numpy())
            there = pc.and_(pc.equal(table["split"], "train"), pa.array(~gone))
            found.update(wanted.intersection(table["key"].filter(there).to_pylist()))
    return found


def _batches(questions: Iterator[Question], size: int) -> Iterator[list[Question]]:
    while batch := list(islice(questions, size)):
        yield batch


@dataclass
class _Run:
    """An evaluation under way."""

    database: Database
    searcher: Searcher
    embed: Callable[[Sequence[str]], np.ndarray]
    ks: tuple[int, ...]
    by_documents: bool
    done: int = 0
    blank: int = 0
    tallies: dict[str, _Tally] = field(default_factory=dict)
    _common: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self._common = np.zeros((2, len(self.ks)), dtype=np.int64)

    @property
    def most(self) -> int:
        """Chunks looked at for a question: the largest k, as far as there are so many."""
        return min(self.ks[-1], self.chunks)

    @property
    def chunks(self) -> int:
        """All there are, but deleted ones."""
        return self.database.manifest.rows("chunks") - self.database.deletions.chunks

    def is_asked(self, question: Question) -> bool:
        """Whether anything that is retrieved here could be a hit."""
        return any(question.answers.values()) or (self.by_documents and bool(question.documents))

    def ask(self, batch: Sequence[Question]) -> None:
        """Embed and search some thousand questions, and judge what comes."""
        vectors = self.embed([question.text for question in batch])
        exact = exact_search(self.database, vectors, self.most)
        step = max(1, _BODIES_AT_ONCE // self.most)
        for start in range(0, len(batch), step):
            rows = slice(start, start + step)
            found = self.searcher.search(vectors[rows], self.most).neighbour_ids
            self._judge(batch[rows], {EXACT: exact[rows], INDEX: found})
            self._compare(exact[rows], found)
            self.done += len(batch[rows])

    def _judge(self, batch: Sequence[Question], ids: dict[str, np.ndarray]) -> None:
        known = np.unique(np.concatenate([found.reshape(-1) for found in ids.values()]))
        known = known[known >= 0]
        bodies = read_bodies(self.database, known)
        forms = [normalised(text) for text in bodies.texts]
        for row, question in enumerate(batch):
            places = {side: np.searchsorted(known, found[row][found[row] >= 0]).tolist() for side, found in ids.items()}
            counted = self.by_documents and bool(question.documents)
            for name, answers in question.answers.items():
                gold = normalised_answers(answers)
                if gold:
                    counted = True
                    tally = self.tallies.setdefault(name, _Tally())
                    for side in SIDES:
                        first = (rank for rank, at in enumerate(places[side], 1) if stands_in(gold, forms[at]))
                        tally.ranks[side].append(next(first, 0))
            if self.by_documents and question.documents:
                self._judge_documents(set(question.documents), places, bodies)
            self.blank += not counted

    def _judge_documents(self, relevant: set[str], places: dict[str, list[int]], bodies: Bodies) -> None:
        tally = self.tallies.setdefault(DOCUMENTS, _Tally())
        tally.several = tally.several or len(relevant) > 1
        for side in SIDES:
            first: dict[str, int] = {}
            for rank, at in enumerate(places[side], 1):
                if bodies.keys[at] in relevant:
                    first.setdefault(bodies.keys[at], rank)
            tally.ranks[side].append(min(first.values(), default=0))
            tally.shares[side].append([sum(rank <= k for rank in first.values()) / len(relevant) for k in self.ks])

    def _compare(self, exact: np.ndarray, found: np.ndarray) -> None:
        for at, k in enumerate(self.ks):
            for one, other in zip(exact[:, :k], found[:, :k], strict=True):
                wanted = one[one >= 0]
                self._common[:, at] += (len(np.intersect1d(wanted, other)), len(wanted))

    def agreement(self) -> dict[int, float]:
        """By k: the share of exact search's first k chunks that the index gave among its first k."""
        common, wanted = self._common
        return {k: float(common[at] / max(1, wanted[at])) for at, k in enumerate(self.ks)}

    def results(self) -> list[CriterionResult]:
        """By criterion, answers first."""
        return [self._result(name, self.tallies[name]) for name in sorted(self.tallies)]

    def _result(self, name: str, tally: _Tally) -> CriterionResult:
        total = len(tally.ranks[EXACT])
        hits, found = {}, {}
        for side in SIDES:
            ranks, shares = np.array(tally.ranks[side]), np.array(tally.shares[side], dtype=np.float64)
            hits[side] = {k: wilson(int(((ranks > 0) & (ranks <= k)).sum()), total) for k in self.ks}
            if tally.several:
                found[side] = {k: mean(shares[:, at]) for at, k in enumerate(self.ks)}
        return CriterionResult(name, total, hits, found or None)
