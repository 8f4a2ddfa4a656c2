"""Which documents are meant: by id, by key, by source, or by what their columns and metadata say."""

import fnmatch
import json
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

import numpy as np
import pyarrow as pa

from retrodb import schemas
from retrodb.errors import InputError, UsageError
from retrodb.manifest import Manifest, shard_of
from retrodb.sizes import count_of
from retrodb.storage import Storage

_CONDITION: Final = re.compile(r"\s*([\w.-]+)\s*(!=|<=|>=|=|<|>|~)\s*(.*?)\s*", re.DOTALL)
_COMPARE: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
COLUMNS: Final = tuple(name for name in schemas.documents().names if name not in ("metadata", "sketch"))
_NUMBER: Final = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)


@dataclass(frozen=True)
class Condition:
    """``field op value``: a column of documents, or a field of their metadata."""

    field: str
    sign: str
    value: str

    @staticmethod
    def parse(text: str) -> "Condition":
        """``lang=de``, ``year >= 2020``, ``title ~ ^List of``, ``source != a.jsonl``.

        Raises:
            UsageError: it is none of them.
        """
        match = _CONDITION.fullmatch(text)
        if match is None or not match[3]:
            raise UsageError(
                f"--where {text!r}: write FIELD OP VALUE, with = != < <= > >= or ~ (a regular expression)."
            )
        if match[2] == "~":
            try:
                re.compile(match[3])
            except re.error as error:
                raise UsageError(f"--where {text!r}: {match[3]!r} is no regular expression ({error}).") from error
        return Condition(match[1], match[2], match[3])

    def holds(self, found: Any) -> bool:
        """Of a value.

        What is missing satisfies nothing. A number equals a number, whatever its digits (2020 and 2020.0), and texts
        the very same text ("7" is not "007"); what is larger is told by numbers where both are, else by text.
        """
        if found is None:
            return False
        if self.sign == "~":
            return re.search(self.value, _text(found)) is not None
        equality = self.sign in ("=", "!=")
        numbers = _number(found, texts=not equality), _number(self.value)
        left, right = numbers if None not in numbers else (_text(found), self.value)
        if equality:
            return bool((left == right) == (self.sign == "="))
        return _COMPARE[self.sign](left, right)


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.hex()
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(value: Any, texts: bool = True) -> Decimal | None:
    """Exact: ids of 64 bits are not floats. None for what is no finite number, and for a text unless ``texts``."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or (isinstance(value, str) and not texts):
        return None
    return Decimal(str(value)) if _NUMBER.fullmatch(str(value)) else None


@dataclass(frozen=True)
class Selection:
    """Documents that satisfy any of ``ids``, ``keys``, ``sources`` (globs); or all of ``where``, which stands alone.

    Raises:
        UsageError: conditions beside something else: whether they are to narrow or to widen it cannot be told.
    """

    ids: tuple[int, ...] = ()
    keys: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    where: tuple[Condition, ...] = ()

    def __post_init__(self) -> None:
        if self.where and (self.ids or self.keys or self.sources):
            raise UsageError(
                "--where stands alone: --ids, --keys and --source each add documents, conditions narrow them. Write "
                "the others as conditions, as --where 'source ~ news.*jsonl' --where 'document_id = 7'."
            )

    @property
    def is_empty(self) -> bool:
        """Whether nothing was asked for."""
        return not (self.ids or self.keys or self.sources or self.where)

    def find(self, storage: Storage, manifest: Manifest) -> Iterator[pa.Table]:
        """``document_id`` and ``n_chunks`` of the documents that are meant, one table a shard that holds some.

        By ids alone, only their shards are read.

        Raises:
            InputError: an id or key does not exist, or no document has a field that a condition is about.
        """
        by_rule = bool(self.keys or self.sources or self.where)
        asked = {condition.field for condition in self.where}
        used = {"key", "source", *(asked & set(COLUMNS)), *(["metadata"] if asked - set(COLUMNS) else [])}
        unseen, fields = asked - set(COLUMNS), set[str]()
        shards = {shard_of(number) for number in self.ids}
        found_ids: set[int] = set()
        found_keys: set[str] = set()
        columns = sorted({"document_id", "n_chunks", *(used if by_rule else [])})
        for shard in manifest.shards("documents"):
            if not by_rule and shard.number not in shards:
                continue
            table = storage.read_table(shard, columns)
            own = np.isin(table["document_id"].to_numpy(), np.array(self.ids, dtype=np.int64))
            found_ids |= set(table["document_id"].to_numpy()[own].tolist())
            if by_rule:
                own |= self._by_rule(table, found_keys, unseen, fields)
            if own.any():
                yield table.filter(own).select(["document_id", "n_chunks"])
        missing: Sequence[object] = sorted(set(self.ids) - found_ids) or sorted(set(self.keys) - found_keys)
        if missing:
            more = f" and {count_of(len(missing) - 3, 'other')}" if len(missing) > 3 else ""
            raise InputError(
                f"{storage.url} has no document {', '.join(map(repr, missing[:3]))}{more}: nothing was changed."
            )
        if unseen:
            raise InputError(
                f"no document of {storage.url} has a field {sorted(unseen)[0]!r}: nothing was changed. There are the "
                f"columns {', '.join(COLUMNS)}, and in their metadata {', '.join(sorted(fields)[:20]) or 'nothing'}."
            )

    def _by_rule(self, table: pa.Table, found_keys: set[str], unseen: set[str], fields: set[str]) -> np.ndarray:
        """bool [n]: the rows that are meant. Takes from ``unseen`` what some row has, and adds to ``fields``."""
        keys = set(self.keys)
        own = np.zeros(table.num_rows, dtype=bool)
        for at, row in enumerate(table.to_pylist()):
            if row["key"] in keys:
                found_keys.add(row["key"])
                own[at] = True
            elif any(fnmatch.fnmatchcase(row["source"], pattern) for pattern in self.sources):
                own[at] = True
            elif self.where:
                row["metadata"] = json.loads(row["metadata"]) if row.get("metadata") else {}
                fields |= row["metadata"].keys()
                values = [_value(row, condition.field) for condition in self.where]
                unseen -= {one.field for one, value in zip(self.where, values, strict=True) if value is not None}
                own[at] = all(one.holds(value) for one, value in zip(self.where, values, strict=True))
        return own


def _value(row: dict[str, Any], field: str) -> Any:
    if field in COLUMNS:
        return row[field]
    found: Any = row["metadata"]
    for part in field.removeprefix("metadata.").split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found
