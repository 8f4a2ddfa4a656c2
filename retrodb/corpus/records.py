"""One record becomes a document, is dropped by a named rule, or is quarantined with a reason.

Every record is judged by itself, so a bad neighbour costs nothing. The three outcomes are all there are; their counts
add up to the number of records read.
"""

import base64
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from retrodb.errors import InputError

TEXT_GUESSES: Final = ("text", "content", "body", "raw_content", "document", "article", "passage")
ID_GUESSES: Final = ("id", "_id", "key", "doc_id", "docid", "document_id", "uid", "uuid")
TITLE_GUESSES: Final = ("title", "headline", "name")
RULES: Final = ("empty",)
"""Names of the rules by which a readable record is dropped."""

RECORD_BYTES: Final = 64 << 10
"""How much of a quarantined record is kept."""

MAX_DEPTH: Final = 256
"""Deepest nesting of a JSON record. Fixed, because what Python's parser can do depends on the caller's stack."""

BOM: Final = b"\xef\xbb\xbf"
_UTF16_BOMS: Final = (b"\xff\xfe", b"\xfe\xff")
_SURROGATES: Final = re.compile("[\ud800-\udfff]")
_SHOWN_FIELDS: Final = 20


@dataclass(frozen=True)
class FieldNames:
    """Names of the fields that hold text, id and title; None: the first of the usual names that the record has.

    A name with dots reaches into nested objects (``data.text``), unless the record has a field of just that name.

    Raises:
        InputError: a name is the empty string.
    """

    text: str | None = None
    id: str | None = None
    title: str | None = None

    def __post_init__(self) -> None:
        for role in ("text", "id", "title"):
            if getattr(self, role) == "":
                raise InputError(f"--{role}-field is the empty string: name a field, or leave the flag out.")


class Document(NamedTuple):
    """A kept document. ``text``, ``title`` and ``metadata`` (compact JSON of the other fields) are UTF-8 bytes."""

    key: str
    title: bytes | None
    text: bytes
    metadata: bytes | None


class Dropped(NamedTuple):
    """A readable record that no one wants, by ``rule``, one of `RULES`."""

    rule: str


class Quarantined(NamedTuple):
    """A record that cannot be read: where it lies, why, and its first `RECORD_BYTES` bytes."""

    position: int
    reason: str
    record: bytes


Outcome = Document | Dropped | Quarantined


class _Unreadable(Exception):  # noqa: N818
    """Why a record is quarantined."""


def parse_line(line: bytes, position: int, source: str, fields: FieldNames) -> Outcome | None:
    """One line of a JSONL file, without its newline; None for a blank line, which is no record.

    ``position`` is the byte offset of the line in the decompressed file. A byte order mark before it is ignored.
    """
    body = line.removeprefix(BOM)
    if not body or body.isspace():
        return None
    try:
        return _judge(_parse_json(body), position, source, fields)
    except _Unreadable as error:
        return Quarantined(position, str(error), line[:RECORD_BYTES])


def parse_row(row: Mapping[str, Any], position: int, source: str, fields: FieldNames) -> Outcome:
    """One row of a Parquet file; ``position`` is its number in the file. The quarantined record is the row as JSON."""
    try:
        return _judge(row, position, source, fields)
    except _Unreadable as error:
        return Quarantined(position, str(error), _as_json(row)[:RECORD_BYTES])


def parse_text(data: bytes, source: str) -> Outcome:
    """A whole plain-text file, which is one document with the key ``source#0``."""
    body = data.removeprefix(BOM)
    try:
        text = _decode(body)
    except _Unreadable as error:
        return Quarantined(0, str(error), data[:RECORD_BYTES])
    return Document(f"{source}#0", None, body, None) if text and not text.isspace() else Dropped("empty")


# -- reading -------------------------------------------------------------------------------------------------------


def _decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if data.startswith(_UTF16_BOMS):
            raise _Unreadable("UTF-16 instead of UTF-8 (by its byte order mark): convert the file") from None
        raise _Unreadable(f"invalid UTF-8 at byte {error.start} of the record ({error.reason})") from None


_DECODER: Final = json.JSONDecoder(parse_constant=lambda _: None)
_TOO_DEEP: Final = f"nested more than {MAX_DEPTH} levels deep"


def _parse_json(body: bytes) -> dict[str, Any]:
    text = _decode(body)
    try:
        record = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _Unreadable(f"not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise _Unreadable(_TOO_DEEP) from None
    except ValueError:  # int() refuses what would take quadratic time
        raise _Unreadable("an integer of too many digits") from None
    if not isinstance(record, dict):
        raise _Unreadable(f"not a JSON object but {_kind(record)}")
    if any(isinstance(value, dict | list) for value in record.values()) and _is_deeper(record, MAX_DEPTH):
        raise _Unreadable(_TOO_DEEP)
    return record


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested more than ``levels`` deep in ``value``."""
    layer = [value]
    for _ in range(levels):
        layer = [
            inner
            for outer in layer
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return bool(layer)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


# -- fields --------------------------------------------------------------------------------------------------------


_MISSING: Final = object()


def _judge(record: Mapping[str, Any], position: int, source: str, fields: FieldNames) -> Outcome:
    """Raises _Unreadable."""
    text_field = fields.text or _first(record, TEXT_GUESSES, ())
    text = _MISSING if text_field is None else _lookup(record, text_field)
    if text_field is None or text is _MISSING:
        raise _Unreadable(_missing_reason(record, text_field))
    if isinstance(text, bytes):  # a Parquet column of plain bytes, or a string column that lied
        text = _decode(text)
    if not isinstance(text, str):
        raise _Unreadable(f"the text field {_show(text_field)} is {_kind(text)}, not a string")
    if not text or text.isspace():
        return Dropped("empty")
    id_field = fields.id or _first(record, ID_GUESSES, (text_field,))
    title_field = fields.title or _first(record, TITLE_GUESSES, (text_field, id_field))
    taken = {text_field}
    key = f"{source}#{position}"
    if id_field is not None and _is_id(value := _lookup(record, id_field)):
        taken.add(id_field)
        key = str(value)
        _encode(key, "id", id_field)
    title: bytes | None = None
    if title_field is not None and isinstance(value := _lookup(record, title_field), str):
        taken.add(title_field)
        title = _encode(value, "title", title_field)
    return Document(key, title, _encode(text, "text", text_field), _metadata(record, taken))


def _first(record: Mapping[str, Any], names: tuple[str, ...], but: tuple[str | None, ...]) -> str | None:
    for name in names:
        if name in record and name not in but:
            return name
    return None


def _lookup(record: Mapping[str, Any], name: str) -> Any:
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _is_id(value: Any) -> bool:
    """A string that says something, or an integer."""
    return (isinstance(value, str) and value != "") or (isinstance(value, int) and not isinstance(value, bool))


def _encode(value: str, role: str, name: str) -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        where = f"the {role} field {_show(name)} at character {error.start}"
        raise _Unreadable(f"a lone surrogate in {where}: not a character") from None


def _show(name: str) -> str:
    return ascii(name[:60])


def _missing_reason(record: Mapping[str, Any], name: str | None) -> str:
    shown = ", ".join(_show(key) for key in list(record)[:_SHOWN_FIELDS])
    more = f" and {len(record) - _SHOWN_FIELDS} more" if len(record) > _SHOWN_FIELDS else ""
    has = f"the record has {shown}{more}" if record else "the record has no fields"
    wanted = f"no text field {_show(name)}" if name else "no text field of a usual name"
    return f"{wanted}: {has}; name it with --text-field"


# -- metadata ------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """What JSON lacks, for values from Parquet: bytes as base64, dates and decimals as text."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


_ENCODER: Final = json.JSONEncoder(
    ensure_ascii=False, check_circular=False, allow_nan=False, separators=(",", ":"), default=_plain
)


def _metadata(record: Mapping[str, Any], taken: set[str]) -> bytes | None:
    """The fields that are not ``taken`` as JSON, null if there are none."""
    rest = {name: value for name, value in record.items() if name not in taken}
    for name in taken:
        if name not in record:
            rest = _without(rest, name.split("."))
    return _as_json(rest) if rest else None


def _without(record: Mapping[str, Any], path: list[str]) -> dict[str, Any]:
    """``record`` without the field at ``path``, and without the objects that this leaves empty."""
    rest = dict(record)
    if len(path) > 1:
        inner = _without(rest[path[0]], path[1:])
        if inner:
            return {**rest, path[0]: inner}
    rest.pop(path[0])
    return rest


def _as_json(value: Mapping[str, Any]) -> bytes:
    """Compact UTF-8 JSON; infinities and NaN as null, lone surrogates as U+FFFD."""
    try:
        text = _ENCODER.encode(value)
    except ValueError:
        text = _ENCODER.encode(_finite(value))
    try:
        return text.encode()
    except UnicodeEncodeError:
        return _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", text).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def is_unicode(text: str) -> bool:
    """Whether ``text`` is free of lone surrogates, which stand for bytes that were not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
