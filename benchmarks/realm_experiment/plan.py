"""What is compared with what: frozen, and recorded beside the figures."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from gain.plan import Selection


@dataclass(frozen=True)
class Condition:
    """One way of pre-training; all share data, sizes and seeds.

    Attributes:
        name: of files.
        title: how the page calls it.
        mask: of the queries, as ``retrodb spans --mask``.
        rarer: how many times rarer the database is refreshed than in the first condition; None: never after the warm
            start, so that candidates come from the vectors of step 0.
        retriever, reader: which of the two learns after the warm start.
    """

    name: str
    title: str
    mask: str = "salient"
    rarer: int | None = 1
    retriever: bool = True
    reader: bool = True


@dataclass(frozen=True)
class Swap:
    """Fine-tuned on half of the questions with one corpus; the other half is asked of two corpora.

    ``encoder`` of both databases is the package's own, all-MiniLM-L6-v2; the reader starts as the small BERT of the
    experiment.
    """

    old: Selection
    new: Selection
    questions: str = "factbook_swap_questions"
    learnt: str = "answers 2016"
    chunk_tokens: int = 128
    steps: int = 100
    batch: int = 4
    blocks: int = 5
    learning_rate: float = 1e-4
    ks: tuple[int, ...] = (1, 5, 20)


@dataclass(frozen=True)
class ZeroShot:
    """A corpus with questions, for recall without any training."""

    name: str
    title: str
    corpus: Selection
    questions: str
    index_key: str


@dataclass(frozen=True)
class RealmExperiment:
    """The whole plan. ``steps`` of 30 times ``refresh_every`` and more, or 30 x stale is the same as never."""

    name: str
    conditions: tuple[Condition, ...]
    swap: Swap
    zero_shot: tuple[ZeroShot, ...]
    corpus: Selection
    questions: str = "squad_questions_v1.1"
    most_questions: int = 500
    seeds: tuple[int, ...] = (0, 1, 2)
    encoder: str | None = None
    """The BERT that all start from; None: the first ``layers`` of all-MiniLM-L6-v2."""
    layers: int = 2
    chunk_tokens: int = 64
    dimension: int = 128
    cloze_steps: int = 60
    cloze_batch: int = 16
    steps: int = 76
    refresh_every: int = 2
    batch: int = 4
    candidates: int = 8
    learning_rate: float = 5e-5
    ks: tuple[int, ...] = (5, 20)
    looks: int = 3
    """Versions that are asked the questions besides the one of step 0, evenly spaced up to the last."""
    zero_shot_ks: tuple[int, ...] = (5, 20, 100)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


REFRESH: Final = Condition("refresh", "salient, refreshed")
"""What all others are compared with."""

CONDITIONS: Final = (
    REFRESH,
    Condition("stale-30", "refreshed 30 x rarer", rarer=30),
    Condition("never", "never refreshed", rarer=None),
    Condition("random-span", "random spans masked", mask="random-span"),
    Condition("random-token", "random tokens masked", mask="random-token"),
    Condition("retriever-only", "the retriever alone learns", reader=False),
    Condition("reader-only", "the reader alone learns", rarer=None, retriever=False),
)

FULL = RealmExperiment(
    "full",
    CONDITIONS,
    Swap(Selection("factbook_2016"), Selection("factbook_2020")),
    (
        ZeroShot("squad", "SQuAD 1.1, its paragraphs", Selection("squad_docs"), "squad_questions_v1.1", "IVF16,Flat"),
        ZeroShot("scifact", "SciFact, its abstracts", Selection("scifact_docs"), "scifact_queries", "IVF64,Flat"),
        ZeroShot(
            "nq", "NQ-open, a third of a small wiki", Selection("wiki_new_simple2021", every=3), "nq_open", "IVF64,Flat"
        ),
        ZeroShot("factbook-2016", "Factbook 2016", Selection("factbook_2016"), "factbook_swap_questions", "IVF32,Flat"),
        ZeroShot("factbook-2020", "Factbook 2020", Selection("factbook_2020"), "factbook_swap_questions", "IVF32,Flat"),
    ),
    Selection("squad_docs", every=4),
)

QUICK = replace(
    FULL,
    name="quick",
    corpus=Selection("squad_docs", every=40),
    most_questions=60,
    seeds=(0, 1),
    layers=1,
    cloze_steps=4,
    steps=6,
    refresh_every=2,
    looks=1,
    conditions=(REFRESH, CONDITIONS[2], CONDITIONS[6]),
    swap=replace(FULL.swap, old=Selection("factbook_2016", 32), new=Selection("factbook_2020", 32), steps=6),
    zero_shot=(
        ZeroShot("squad", "SQuAD, few paragraphs", Selection("squad_docs", 5), "squad_questions_v1.1", "IVF4,Flat"),
    ),
)
