"""What is compared with what: the settings of the experiment, frozen, and recorded beside its figures."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Final

SMALLER, LARGER = "smaller", "larger"
"""The two databases of a setting."""

BASE, RETRO, FITTED, MIDDLE, LONGER = "base", "retro", "retrofit", "base-middle", "base-longer"
MODELS: Final = (BASE, RETRO, FITTED, MIDDLE, LONGER)
"""In the order in which they are trained: RETROfit needs the base."""

OFF: Final = "off"
"""The condition without neighbours."""


@dataclass(frozen=True)
class Selection:
    """Documents of a corpus file: those whose id hashes (first byte of sha256) to a multiple of ``every``.

    Two versions of a document have the same id, so that a selection holds both or neither. ``but`` leaves out the
    multiples of another number, which is how documents are held out.
    """

    corpus: str
    every: int = 1
    but: int | None = None


@dataclass(frozen=True)
class Setting:
    """A validation text, the corpus that models train on, and two databases to evaluate with.

    Attributes:
        name: of the folders.
        title: of the page's section.
        database_names: how the page calls the two, smaller first.
        smaller: documents of the smaller database.
        larger: what the larger one holds more.
        trained_on: ``smaller`` or ``larger``: the database whose training rows the models are trained on, which is the
            database made of the training corpus.
        validation: what is predicted.
        steps: of the base and of RETRO from scratch; those of the other models follow from the compute.
        decontaminate: whether training documents that repeat a validation document are removed.
        about: a paragraph for the page.
    """

    name: str
    title: str
    database_names: tuple[str, str]
    smaller: tuple[Selection, ...]
    larger: tuple[Selection, ...]
    trained_on: str
    validation: tuple[Selection, ...]
    steps: int
    decontaminate: bool
    about: str


@dataclass(frozen=True)
class Experiment:
    """All settings, and what they have in common."""

    name: str
    settings: tuple[Setting, ...]
    encoder: str | None = None
    vocabulary: int = 1024
    chunk_tokens: int = 64
    sequence_tokens: int = 512
    kept_neighbours: int = 10
    training_neighbours: int = 1
    width: int = 64
    layers: int = 2
    heads: int = 2
    batch: int = 2
    learning_rate: float = 0.003
    seeds: tuple[int, ...] = (0, 1, 2)
    rows: int = 60
    """Validation rows that are predicted, evenly spaced."""
    neighbours: tuple[int, ...] = (0, 1, 2, 4, 8)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


_DOCS = Setting(
    name="docs",
    title="New documentation, with a database of the old",
    database_names=("old version", "old and new versions"),
    smaller=(Selection("docs_old", every=3),),
    larger=(Selection("docs_new", every=3, but=30),),
    trained_on="larger",
    validation=(Selection("docs_new", every=30),),
    steps=2000,
    decontaminate=False,
    about=(
        "Pages of technical documentation of 2026 that were held out, predicted with databases of the same"
        " documentation as it was in 2018 (`docs_old`), and of that with the other pages of 2026 (`docs_new`). Ids of"
        " the two versions align: nearly every held-out page has its own old version in both databases, and nearly"
        " every training page has its other version. Documents are different by id, so that a page's other version may"
        " be its neighbour; nothing was decontaminated, since that is the use: pages that change a little. The models"
        " train on the rows of the larger database, which hold the old versions of the held-out pages too."
    ),
)

_WIKI = Setting(
    name="wiki",
    title="WikiText-103 validation, with databases of Wikipedia",
    database_names=("training corpus", "training corpus and more"),
    smaller=(Selection("wiki_featured", every=4),),
    larger=(Selection("wiki_large", every=8),),
    trained_on="smaller",
    validation=(Selection("wikitext103", every=2),),
    steps=1000,
    decontaminate=True,
    about=(
        "Articles of the validation split of WikiText-103, predicted with a database of Featured and Good articles of"
        " Wikipedia (`wiki_featured`), which is the training corpus, and with a larger one that holds ordinary articles"
        " (`wiki_large`) as well. Training articles that repeat a validation article are removed."
    ),
)

FULL = Experiment("full", (_DOCS, _WIKI))

_FEW = replace(
    _DOCS,
    smaller=(Selection("docs_old", every=30),),
    larger=(Selection("docs_new", every=30, but=60),),
    validation=(Selection("docs_new", every=60),),
    steps=60,
)

QUICK = Experiment("quick", (_FEW,), seeds=(0, 1), rows=12)
