"""Question sets as they are published: JSONL, plain, gzip or zstd, from any fsspec URL. Fields are found by name.

A record has a question and says what a good answer is: the answers themselves (``answers``: a list, a string, or
SQuAD's ``{"text": [..]}``), the answers at several dates (``answers_by_version``: an object), or the keys of relevant
documents (``gold_id``, ``gold_ids``, and the names that other sets use). It may say several of these.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from retrodb.corpus.compression import MAGIC_BYTES, TornStream, detect, read_blocks
from retrodb.corpus.lines import read_lines
from retrodb.corpus.records import BOM, is_unicode
from retrodb.corpus.source import open_raw
from retrodb.errors import InputError
from retrodb.remote import absolute_url

QUESTION_FIELDS: Final = ("question", "query", "claim", "question_text", "text")
ANSWER_FIELDS: Final = ("answers", "answer", "short_answers")
VERSIONED_FIELD: Final = "answers_by_version"
DOCUMENT_FIELDS: Final = ("gold_ids", "gold_id", "document_ids", "document_id", "doc_ids", "doc_id", "cited_doc_ids")

ANSWERS: Final = "answers"
DOCUMENTS: Final = "documents"
"""Criteria: an answer stands in a retrieved body; a retrieved body is of a relevant document."""

_MOST_QUESTION_BYTES: Final = 64 << 20
_SHOWN_FIELDS: Final = 20


@dataclass(frozen=True)
class Question:
    """One question. ``answers`` by criterion: `ANSWERS`, or ``answers 2016`` where there are several versions."""

    text: str
    answers: Mapping[str, tuple[str, ...]]
    documents: tuple[str, ...]

    @property
    def has_gold(self) -> bool:
        """Whether anything would be a hit: SQuAD 2.0 has questions without an answer."""
        return bool(self.documents) or any(self.answers.values())


@dataclass
class QuestionSet:
    """A file of questions, read as a stream each time it is asked for.

    Attributes:
        url: where it is.
        sha256: of its decompressed bytes, in hex; known once `read` has come to its end.
    """

    url: str
    sha256: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self.url = absolute_url(self.url)

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rstrip("/").rpartition("/")[2]

    def read(self) -> Iterator[Question]:
        """The questions in order; blank lines are none.

        Raises:
            InputError: the file cannot be read to its end, is another than at the last reading, or a line is no
                question with a gold answer or document; names the line and its fields.
        """
        digest = hashlib.sha256()
        with open_raw(self.url) as raw:

            def blocks() -> Iterator[bytes]:
                for block in read_blocks(raw, detect(raw.peek(MAGIC_BYTES))):
                    digest.update(block)
                    yield block

            try:
                for number, line in enumerate(read_lines(blocks(), 0, limit=_MOST_QUESTION_BYTES), 1):
                    where = f"{self.url}, line {number}"
                    if line.problem is not None:
                        raise InputError(f"{where}: {line.problem}.")
                    if (body := line.data.removeprefix(BOM)).strip():
                        yield parse_question(body, where)
            except TornStream as error:
                raise InputError(f"{self.url}: {error.reason}.") from error
        found = digest.hexdigest()
        if self.sha256 not in ("", found):
            raise InputError(f"{self.url} was written while it was read. Run it again once it is complete.")
        self.sha256 = found


def parse_question(line: bytes, where: str) -> Question:
    """One line of a question set.

    Raises:
        InputError: it is none; names ``where`` and the fields that were found.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}); a question set is JSONL, one question a line.") from error
    if not isinstance(record, dict):
        raise InputError(f"{where} is not a JSON object.")
    if not is_unicode(json.dumps(record, ensure_ascii=False)):
        raise InputError(f"{where} holds half a surrogate pair (as \\ud800), which is no character.")
    text = next((record[name] for name in QUESTION_FIELDS if name in record), None)
    if not isinstance(text, str) or not text.strip():
        raise InputError(
            f"{where} has no question: none of {', '.join(QUESTION_FIELDS)} holds text. {_found_fields(record)}"
        )
    named = [name for name in (*ANSWER_FIELDS, VERSIONED_FIELD, *DOCUMENT_FIELDS) if name in record]
    if not named:
        raise InputError(
            f"{where} says neither answers ({', '.join((*ANSWER_FIELDS, VERSIONED_FIELD))}) nor relevant documents "
            f"({', '.join(DOCUMENT_FIELDS)}). {_found_fields(record)}"
        )
    return Question(text, _answers(record, where), _documents(record, where))


def _answers(record: Mapping[str, Any], where: str) -> dict[str, tuple[str, ...]]:
    found = {}
    if VERSIONED_FIELD in record:
        versions = record[VERSIONED_FIELD]
        if not isinstance(versions, dict):
            raise InputError(f"{where}: {VERSIONED_FIELD} is no object of versions. {_found_fields(record)}")
        found = {f"{ANSWERS} {version}": _texts(value, where, VERSIONED_FIELD) for version, value in versions.items()}
    name = next((name for name in ANSWER_FIELDS if name in record), None)
    if name is not None:
        found[ANSWERS] = _texts(record[name], where, name)
    return found


def _texts(value: Any, where: str, name: str) -> tuple[str, ...]:
    if isinstance(value, dict) and "text" in value:  # SQuAD's {"text": [..], "answer_start": [..]}
        value = value["text"]
    values = value if isinstance(value, list) else [] if value is None else [value]
    texts = [one["text"] if isinstance(one, dict) and "text" in one else one for one in values]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where}: {name} holds something else than text.")
    return tuple(texts)


def _documents(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    name = next((name for name in DOCUMENT_FIELDS if name in record), None)
    value = record.get(name) if name else None
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(one, str | int) and not isinstance(one, bool) for one in values):
        raise InputError(f"{where}: {name} holds something else than keys of documents.")
    return tuple(dict.fromkeys(str(one) for one in values))


def _found_fields(record: Mapping[str, Any]) -> str:
    shown = ", ".join(ascii(name[:60]) for name in list(record)[:_SHOWN_FIELDS])
    return f"The fields are {shown}." if record else "It has no fields."
