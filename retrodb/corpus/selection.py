"""Which documents are meant: by id, by key, by source, or by what their columns and metadata say."""

import fnmatch
import json
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

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
COLUMNS: Final = ("key", "source", "title", "split", "n_chunks")


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
        """Of a value. What is missing satisfies ``!=`` alone; numbers are compared as numbers."""
        if found is None:
            return self.sign == "!="
        if self.sign == "~":
            return re.search(self.value, _text(found)) is not None
        numbers = _number(found), _number(self.value)
        left, right = numbers if None not in numbers else (_text(found), self.value)
        if self.sign in ("=", "!="):
            return bool((left == right) == (self.sign == "="))
        return _COMPARE[self.sign](left, right)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, str | int | float) else None
    except ValueError:
        return None


@dataclass(frozen=True)
class Selection:
    """Documents that satisfy any of ``ids``, ``keys``, ``sources`` (globs), or all of ``where``."""

    ids: tuple[int, ...] = ()
    keys: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    where: tuple[Condition, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether nothing was asked for."""
        return not (self.ids or self.keys or self.sources or self.where)

    def find(self, storage: Storage, manifest: Manifest) -> Iterator[pa.Table]:
        """``document_id`` and ``n_chunks`` of the documents that are meant, one table a shard that holds some.

        By ids alone, only their shards are read.

        Raises:
            InputError: an id or key does not exist.
        """
        by_rule = bool(self.keys or self.sources or self.where)
        shards = {shard_of(number) for number in self.ids}
        found_ids: set[int] = set()
        found_keys: set[str] = set()
        columns = ["document_id", "n_chunks", *(["key", "source", "title", "split", "metadata"] if by_rule else [])]
        for shard in manifest.shards("documents"):
            if not by_rule and shard.number not in shards:
                continue
            table = storage.read_table(shard, columns)
            own = np.isin(table["document_id"].to_numpy(), np.array(self.ids, dtype=np.int64))
            found_ids |= set(table["document_id"].to_numpy()[own].tolist())
            if by_rule:
                own |= self._by_rule(table, found_keys)
            if own.any():
                yield table.filter(own).select(["document_id", "n_chunks"])
        missing: Sequence[object] = sorted(set(self.ids) - found_ids) or sorted(set(self.keys) - found_keys)
        if missing:
            more = f" and {count_of(len(missing) - 3, 'other')}" if len(missing) > 3 else ""
            raise InputError(
                f"{storage.url} has no document {', '.join(map(repr, missing[:3]))}{more}: nothing was changed."
            )

    def _by_rule(self, table: pa.Table, found_keys: set[str]) -> np.ndarray:
        keys = set(self.keys)
        own = np.zeros(table.num_rows, dtype=bool)
        for at, row in enumerate(table.to_pylist()):
            if row["key"] in keys:
                found_keys.add(row["key"])
                own[at] = True
            elif any(fnmatch.fnmatchcase(row["source"], pattern) for pattern in self.sources):
                own[at] = True
            elif self.where:
                row["metadata"] = json.loads(row["metadata"]) if row["metadata"] else None
                own[at] = all(condition.holds(_value(row, condition.field)) for condition in self.where)
        return own


def _value(row: dict[str, Any], field: str) -> Any:
    if field in COLUMNS:
        return row[field]
    found: Any = row["metadata"]
    for part in field.removeprefix("metadata.").split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found
