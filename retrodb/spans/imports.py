"""Spans that another program found: JSONL or Parquet rows of ``{key or document_id, start, end, label?, source?}``.

``start`` and ``end`` are UTF-8 byte offsets into the document's text. A key addresses all documents that have it. Every
row is judged by itself: what cannot be used is quarantined with file, position and reason. Rows are brought to the
shards of their documents first (`assigned_rows`), a bounded part at a time; whether the offsets decode is known only
where the text is (`usable`).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, TypeGuard

import numpy as np
import pyarrow as pa

from retrodb.corpus import ScannedFile, expand_inputs, scan_file
from retrodb.corpus.compression import TornStream, read_blocks
from retrodb.corpus.lines import read_lines
from retrodb.corpus.parquet import open_parquet, read_batches, rows_of
from retrodb.corpus.records import BOM, RECORD_BYTES, is_unicode
from retrodb.corpus.source import open_raw
from retrodb.errors import InputError
from retrodb.schemas import ID_SHIFT
from retrodb.spans.find import Imported

ROWS_AT_ONCE: Final = 100_000
_MOST_ROW_BYTES: Final = 1 << 20

PIECE: Final = pa.schema(
    [
        ("document_id", pa.int64()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("label", pa.string()),
        ("tagger", pa.string()),
        ("source", pa.string()),
        ("position", pa.int64()),
        ("reason", pa.string()),
        ("record", pa.binary()),
    ]
)
"""Rows on their way to a shard; one that cannot be used has a reason, and no document."""


@dataclass(frozen=True)
class Row:
    """One row of a file; ``reason`` says why it cannot be used, else None."""

    source: str
    position: int
    record: bytes
    reason: str | None = None
    document: str | int | None = None
    start: int = 0
    end: int = 0
    label: str | None = None
    tagger: str = ""


def scan_imports(specs: Sequence[str]) -> list[ScannedFile]:
    """The files of spans that were named, each read once for its checksum.

    Raises:
        InputError: one is missing, damaged, or neither JSONL nor Parquet.
    """
    files = [scan_file(file) for file in expand_inputs(specs).files] if specs else []
    for file in files:
        if file.format == "text" or file.damage:
            why = file.damage or "spans are read from JSONL or Parquet"
            raise InputError(f"--tagger import:{file.url}: {why}.")
    return files


def import_identity(files: Sequence[ScannedFile]) -> dict[str, Any]:
    """What a stage records of imported files: their contents count, not their names."""
    return {"name": "import", "version": "1", "sha256": sorted(file.sha256 for file in files)}


def read_rows(file: ScannedFile) -> Iterator[Row]:
    """The rows of a file in order; blank lines are none."""
    if file.format == "parquet":
        with open_parquet(file.url, file.compression, file.size) as parquet:
            for batch in read_batches(file.url, parquet, 0):
                if batch.batch is None:
                    yield Row(file.url, batch.position, b"", batch.problem)
                    continue
                for at, record in enumerate(rows_of(batch.batch)):
                    data = json.dumps(record, default=str, ensure_ascii=False).encode(errors="replace")
                    yield _judged(record, file.url, batch.position + at, data)
        return
    with open_raw(file.url) as raw:
        try:
            for line in read_lines(read_blocks(raw, file.compression), 0, limit=_MOST_ROW_BYTES):
                body = line.data.removeprefix(BOM)
                if line.problem is not None:
                    yield Row(file.url, line.position, line.data, line.problem)
                elif body.strip():
                    yield _line(body, file.url, line.position)
        except TornStream as error:
            raise InputError(f"{file.url} was damaged while it was read: {error.reason}.") from error


def _line(body: bytes, source: str, position: int) -> Row:
    try:
        record = json.loads(body)
    except (ValueError, RecursionError) as error:
        return Row(source, position, body, f"not JSON: {error}")
    if not isinstance(record, dict):
        return Row(source, position, body, "not a JSON object")
    return _judged(record, source, position, body)


def _judged(record: Mapping[str, Any], source: str, position: int, data: bytes) -> Row:
    """A row whose fields are what they should be, or the reason why not."""
    data = data[:RECORD_BYTES]
    key, document_id = record.get("key"), record.get("document_id")
    start, end = record.get("start"), record.get("end")
    if (key is None) == (document_id is None):
        return Row(source, position, data, "names its document neither by key nor by document_id, or by both")
    if not (isinstance(key, str) or _whole(document_id)):
        return Row(source, position, data, "key is no string" if key is not None else "document_id is no whole number")
    if not _whole(start) or not _whole(end):
        return Row(source, position, data, "start and end are not both whole numbers")
    if not 0 <= start < end:
        return Row(source, position, data, f"start {start} and end {end} bound no byte")
    texts = [record.get(name) for name in ("label", "source")]
    if not all(text is None or (isinstance(text, str) and is_unicode(text)) for text in (key, *texts)):
        return Row(source, position, data, "key, label or source is no string of whole characters")
    document = key if key is not None else document_id
    tagger = f"import:{texts[1] or 'unnamed'}"
    return Row(source, position, data, None, document, start, end, texts[0], tagger)


def _whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63


Resolve = Callable[[set[str | int]], Mapping[str | int, Sequence[int]]]
"""Keys and ids of documents to the ids of all documents that have them; what there is none of is left out."""


def assigned_rows(files: Sequence[ScannedFile], resolve: Resolve, first_shard: int) -> Iterator[dict[int, pa.Table]]:
    """The rows of all files by the shard of their document, some hundred thousand at a time, as tables of `PIECE`.

    Args:
        files: in order.
        resolve: finds documents.
        first_shard: where rows are quarantined that have no document.
    """
    rows = (row for file in files for row in read_rows(file))
    while batch := list(islice(rows, ROWS_AT_ONCE)):
        known = resolve({row.document for row in batch if row.document is not None})
        by_shard: dict[int, list[dict[str, Any]]] = {}
        for row in batch:
            ids = known.get(row.document, ()) if row.document is not None else ()
            if not ids:
                reason = row.reason or f"there is no document {row.document!r} in the database"
                by_shard.setdefault(first_shard, []).append(_cells(row, -1, reason))
            for document_id in ids:
                by_shard.setdefault(document_id >> ID_SHIFT, []).append(_cells(row, document_id, None))
        yield {shard: pa.Table.from_pylist(cells, schema=PIECE) for shard, cells in sorted(by_shard.items())}


def _cells(row: Row, document_id: int, reason: str | None) -> dict[str, Any]:
    return {
        "document_id": document_id,
        "start": row.start,
        "end": row.end,
        "label": row.label,
        "tagger": row.tagger,
        "source": row.source,
        "position": row.position,
        "reason": reason,
        "record": row.record[:RECORD_BYTES],
    }


def named_documents(record: bytes) -> frozenset[str]:
    """The documents that a row of a file names, by key or by id, as texts; empty where it does not say, or cannot be
    read."""
    try:
        row = json.loads(record)
    except (ValueError, RecursionError):
        return frozenset()
    names = [row.get(name) for name in ("key", "document_id")] if isinstance(row, dict) else []
    names = [name for name in names if name is not None]
    return frozenset(map(str, names)) if all(isinstance(name, str) or _whole(name) for name in names) else frozenset()


def usable(rows: Sequence[Mapping[str, Any]], text: bytes) -> tuple[list[Imported], list[tuple[int, str]]]:
    """Of a document's rows (`PIECE`) the spans whose offsets decode, and the numbers of the others with the reason."""
    spans, bad = [], []
    for number, row in enumerate(rows):
        start, end = row["start"], row["end"]
        if end > len(text):
            bad.append((number, f"end {end} lies beyond the text, which has {len(text)} bytes"))
        elif not (is_boundary(text, start) and is_boundary(text, end)):
            bad.append((number, f"bytes {start} to {end} cut a character"))
        elif not text[start:end].strip():
            bad.append((number, f"bytes {start} to {end} are blank"))
        else:
            spans.append(Imported(start, end, row["label"], row["tagger"]))
    return spans, bad


def is_boundary(text: bytes, at: int) -> bool:
    """Whether a character begins at byte ``at``, or the text ends there."""
    return at == len(text) or (text[at] & 0xC0) != 0x80


def quarantined(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows with a reason, in the order of their place in the files, as a ``span_quarantine`` table."""
    ordered = sorted(rows, key=lambda row: (row["source"], row["position"]))
    return pa.Table.from_pylist([{name: row[name] for name in schema.names} for row in ordered], schema=schema)


def document_rows(table: pa.Table) -> dict[int, list[dict[str, Any]]]:
    """The rows of `PIECE` tables by document, in their order."""
    found: dict[int, list[dict[str, Any]]] = {}
    ids = table["document_id"].to_numpy() if table.num_rows else np.empty(0, np.int64)
    for document_id, row in zip(ids.tolist(), table.to_pylist(), strict=True):
        found.setdefault(document_id, []).append(row)
    return found
