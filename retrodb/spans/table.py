"""The rows of one shard: the ``spans`` that were found, the ``queries`` that were drawn, and what could not be used."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa

from retrodb import schemas
from retrodb.spans.find import RULES, Found, find_spans
from retrodb.spans.imports import quarantined, usable
from retrodb.spans.queries import REJECTIONS, Masked, random_query, salient_query
from retrodb.spans.settings import SpanSettings
from retrodb.spans.taggers import Tagger
from retrodb.spans.wordpieces import Wordpieces

_PENDING_ROWS: Final = 4_096
COUNTS = ("sentences", "spans", "queries", "imported", "quarantined")


@dataclass(frozen=True)
class SpanTables:
    """A shard's tables, and what was counted: `COUNTS`, ``dropped.RULE`` and ``rejected.RULE``."""

    spans: pa.Table
    queries: pa.Table
    quarantine: pa.Table
    counts: dict[str, int]


@dataclass
class _Growing:
    """A table under construction: a million rows are not kept as Python objects."""

    schema: pa.Schema
    shard: int
    made: list[pa.Table] = field(default_factory=list)
    pending: list[dict[str, Any]] = field(default_factory=list)
    rows: int = 0

    @property
    def next_id(self) -> int:
        """The id of the row that is added next."""
        return self.shard << schemas.ID_SHIFT | self.rows

    def add(self, row: dict[str, Any]) -> None:
        self.pending.append(row)
        self.rows += 1
        if len(self.pending) == _PENDING_ROWS:
            self._settle()

    def table(self) -> pa.Table:
        """All rows."""
        self._settle()
        return pa.concat_tables(self.made).combine_chunks()

    def _settle(self) -> None:
        self.made.append(pa.Table.from_pylist(self.pending, schema=self.schema))
        self.pending = []


@dataclass
class _Rows:
    """A shard's rows under construction, and what is counted."""

    spans: _Growing
    queries: _Growing
    bad: list[dict[str, Any]]
    counts: Counter[str] = field(default_factory=Counter)


def span_tables(
    documents: pa.Table,
    chunks: pa.Table,
    imported: Mapping[int, Sequence[Mapping[str, Any]]],
    *,
    taggers: Sequence[Tagger],
    wordpieces: Wordpieces,
    settings: SpanSettings,
    shard: int,
) -> SpanTables:
    """The tables of a shard.

    Args:
        documents: its documents with their text, in order.
        chunks: ``chunk_id``, ``document_id``, ``start``, ``end`` of its chunks or blocks, in order.
        imported: rows of `retrodb.spans.imports.PIECE` by document; under -1 those that have none.
        taggers: who finds spans; not asked where the mask is random.
        wordpieces: what queries are made of.
        settings: how they are drawn.
        shard: its number.
    """
    query_schema = schemas.queries(settings.max_tokens, settings.max_masked, wordpieces.token_type)
    unplaced = [dict(row) for row in imported.get(-1, ())]
    rows = _Rows(_Growing(schemas.spans(), shard), _Growing(query_schema, shard), unplaced)
    owners = chunks["document_id"].to_numpy()
    chunk_ids, starts, ends = (chunks[name].to_numpy() for name in ("chunk_id", "start", "end"))
    columns = (documents[name].to_pylist() for name in ("document_id", "text", "content_hash", "split"))
    for document_id, text, content_hash, split in zip(*columns, strict=True):
        own = slice(*np.searchsorted(owners, [document_id, document_id + 1]))
        given = imported.get(document_id, ())
        spans, bad = usable(given, text.encode())
        rows.bad += [{**given[number], "reason": reason} for number, reason in bad]
        rows.counts["imported"] += len(given)
        found = find_spans(text, taggers, spans)
        document = _Document(document_id, text.encode(), content_hash, split, chunk_ids[own], starts[own], ends[own])
        _add(rows, document, found, wordpieces, settings)
    rows.counts["imported"] += len(imported.get(-1, ()))
    rows.counts["quarantined"] = len(rows.bad)
    rows.counts["spans"], rows.counts["queries"] = rows.spans.rows, rows.queries.rows
    names = [*COUNTS, *(f"dropped.{rule}" for rule in RULES), *(f"rejected.{rule}" for rule in REJECTIONS)]
    return SpanTables(
        rows.spans.table(),
        rows.queries.table(),
        quarantined(rows.bad, schemas.span_quarantine()),
        {name: rows.counts[name] for name in names},
    )


@dataclass(frozen=True)
class _Document:
    document_id: int
    text: bytes
    content_hash: bytes
    split: str
    chunk_ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def chunk_of(self, start: int, end: int) -> int | None:
        """The chunk that holds the larger part of a byte range, the first of equals; None where none has any."""
        shared = np.minimum(self.ends, end) - np.maximum(self.starts, start)
        at = int(np.argmax(shared)) if len(shared) else 0
        return int(self.chunk_ids[at]) if len(shared) and shared[at] > 0 else None


def _add(rows: _Rows, document: _Document, found: Found, wordpieces: Wordpieces, settings: SpanSettings) -> None:
    """Append a document's spans and queries."""
    rows.counts["sentences"] += len(found.sentences)
    rows.counts.update({f"dropped.{rule}": number for rule, number in found.dropped.items()})
    ids = {}
    for span in found.spans:
        start, end = found.sentences[span.sentence].tolist()
        ids[span] = rows.spans.next_id
        chunk_id = document.chunk_of(span.start, span.end)
        cells = {"span_id": ids[span], "document_id": document.document_id, "chunk_id": chunk_id}
        place = {"sentence_start": start, "sentence_end": end, "start": span.start, "end": span.end}
        rows.spans.add({**cells, **place, "label": span.label, "tagger": span.tagger})
    by_sentence: dict[int, list[Any]] = {}
    for span in found.spans:
        by_sentence.setdefault(span.sentence, []).append(span)
    salient = settings.mask == "salient"
    asked = sorted(by_sentence) if salient else range(len(found.sentences))
    ranges = [tuple(found.sentences[number].tolist()) for number in asked]
    texts = [document.text[start:end] for start, end in ranges]
    tokenised = wordpieces.tokenizer.tokenize([text.decode() for text in texts])
    rejected: Counter[str] = Counter()
    for number, sentence, text, tokens in zip(asked, ranges, texts, tokenised, strict=True):
        if salient:
            query = salient_query(tokens, sentence, by_sentence[number], document.content_hash, settings, rejected)
        else:
            query = random_query(tokens, sentence, text, document.content_hash, settings)
        if query is not None:
            span_id = ids[query.span] if query.span is not None else None
            rows.queries.add(_query_row(rows, document, sentence, query, span_id, wordpieces, settings))
    rows.counts.update({f"rejected.{rule}": number for rule, number in rejected.items()})


def _query_row(
    rows: _Rows,
    document: _Document,
    sentence: tuple[int, int],
    query: Masked,
    span_id: int | None,
    wordpieces: Wordpieces,
    settings: SpanSettings,
) -> dict[str, Any]:
    tokens = np.zeros(settings.max_tokens, dtype=np.uint32)
    tokens[: len(query.ids)] = query.ids
    tokens[query.positions] = wordpieces.mask_id
    beyond = [None] * (settings.max_masked - len(query.positions))
    # A sentence may be longer than a block, and its query is but its beginning: the block with most of the sentence
    # may be another than the one that holds what is masked, which is what must not be a candidate.
    masked = (sentence[0], query.read_to) if query.start is None or query.end is None else (query.start, query.end)
    return {
        "query_id": rows.queries.next_id,
        "span_id": span_id,
        "document_id": document.document_id,
        "chunk_id": document.chunk_of(*masked),
        "split": document.split,
        "sentence_start": sentence[0],
        "sentence_end": sentence[1],
        "start": query.start,
        "end": query.end,
        "label": query.span.label if query.span else None,
        "tagger": query.span.tagger if query.span else settings.mask,
        "tokens": tokens,
        "n_tokens": len(query.ids),
        "masked_positions": [*query.positions.tolist(), *beyond],
        "target_ids": [*query.ids[query.positions].tolist(), *beyond],
        "n_masked": len(query.positions),
    }
