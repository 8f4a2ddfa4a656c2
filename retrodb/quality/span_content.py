"""Spans and masked queries against the documents and chunks they were made from.

Every offset decodes and lies where it should; every query is its sentence in wordpieces with just those masked that
lie fully inside its span. The latter needs the encoder's tokenizer: where that is not here, or another, a note says so,
and what a query says in itself is checked alone.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from retrodb import schemas
from retrodb.encoding import DEFAULT_ENCODER
from retrodb.errors import RetrodbError
from retrodb.manifest import MANIFEST_NAME, SPANS_STAGE, Manifest, Shard
from retrodb.quality.scene import Scene, check_ids
from retrodb.spans.imports import is_boundary
from retrodb.spans.queries import inside
from retrodb.spans.taggers import IMPORT
from retrodb.spans.wordpieces import Wordpieces, load_wordpieces
from retrodb.training.columns import lists, scalars

_MOST: int = 1 << 12
_NONE = -1


def span_schemas(manifest: Manifest) -> dict[str, pa.Schema]:
    """The schemas of the stage's tables, where it is done.

    Raises:
        KeyError, TypeError, ValueError: the manifest does not say what it was made from.
    """
    if SPANS_STAGE not in manifest.stages:
        return {}
    state = manifest.stages[SPANS_STAGE]
    max_tokens, max_masked = (int(state.made_from[name]) for name in ("max_tokens", "max_masked"))
    if not (1 <= max_tokens <= _MOST and 1 <= max_masked <= max_tokens):
        raise ValueError(f"queries of {max_tokens} tokens, {max_masked} of them masked")
    queries = schemas.queries(max_tokens, max_masked, str(state.details["token_type"]))
    return {"spans": schemas.spans(), "queries": queries, "span_quarantine": schemas.span_quarantine()}


@dataclass
class _Texts:
    """The documents and chunks of one shard."""

    document_ids: np.ndarray
    texts: Sequence[str]
    splits: np.ndarray
    chunk_ids: np.ndarray
    owners: np.ndarray

    @cached_property
    def data(self) -> list[bytes]:
        """The documents' bytes."""
        return [text.encode() for text in self.texts]

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """int64 [n]: the row of each document, -1 for one that is not of this shard."""
        return _rows(self.document_ids, ids)


def check_spans(scene: Scene) -> None:
    """Every shard of spans, and of the queries that were drawn from them."""
    if not scene.done(SPANS_STAGE):
        return
    _check_counts(scene)
    wordpieces = _wordpieces(scene)
    for shard in scene.shards("spans"):
        with scene.examining(shard):
            texts = _read(scene, shard.number)
            if texts is None:
                scene.findings.note("chunks or documents are damaged: spans in them were not looked into")
                continue
            spans = scene.storage.read_table(shard)
            _check_place(scene, shard, spans, "span_id", texts)
            queries = scene.shard("queries", shard.number)
            scene.findings.count("spans", spans.num_rows)
            if queries is not None and not scene.findings.has(shard.path):
                with scene.examining(queries):
                    _check_queries(scene, queries, spans, texts, wordpieces)


def _check_counts(scene: Scene) -> None:
    """As many rows as counted; of imported spans, where nothing else is tagged, each is one, dropped or quarantined."""
    manifest = scene.manifest
    state = manifest.stages[SPANS_STAGE]
    counted = {name: state.counts.get(name, 0) for name in ("spans", "queries", "quarantined")}
    for (name, number), table in zip(counted.items(), ("spans", "queries", "span_quarantine"), strict=True):
        rows = manifest.rows(table)
        if rows != number:
            scene.findings.add(MANIFEST_NAME, f"rows of {table}, and {name} counted, differ: {rows:,} and {number:,}")
    if [tagger["name"] for tagger in state.made_from["taggers"]] == [IMPORT]:
        dropped = sum(number for name, number in state.counts.items() if name.startswith("dropped."))
        found, imported = counted["spans"] + dropped + counted["quarantined"], state.counts.get("imported", 0)
        if found != imported:
            scene.findings.add(
                MANIFEST_NAME,
                f"spans kept, dropped and quarantined are not those imported: {found:,} and {imported:,}",
            )


def _wordpieces(scene: Scene) -> Wordpieces | None:
    state = scene.manifest.stages[SPANS_STAGE]
    name, found = str(state.details["encoder"]), None
    if name == DEFAULT_ENCODER or Path(name).is_dir():  # nothing that a manifest names is fetched from a hub
        with contextlib.suppress(RetrodbError):
            found = load_wordpieces(name)
    if found is not None and found.fingerprint == state.made_from["wordpieces"]:
        return found
    scene.findings.note("the tokenizer of the masked queries is not here: they were not tokenised again")
    return None


def _read(scene: Scene, number: int) -> _Texts | None:
    documents, chunks = scene.shard("documents", number), scene.shard("chunks", number)
    if documents is None or chunks is None:
        return None
    table = scene.table(documents, "document_id", "text", "split")
    ids = scene.table(chunks, "chunk_id", "document_id")
    return _Texts(
        scalars(table, "document_id"),
        table["text"].to_pylist(),
        table["split"].to_numpy(),
        scalars(ids, "chunk_id"),
        scalars(ids, "document_id"),
    )


def _check_place(scene: Scene, shard: Shard, table: pa.Table, name: str, texts: _Texts) -> None:
    """Ids, documents, chunks and offsets of spans or queries."""
    refuse, ids = scene.findings.refuse, scalars(table, name)
    check_ids(scene, shard, ids, name)
    document_ids = scalars(table, "document_id")
    rows = texts.rows(document_ids)
    if refuse(shard.path, rows < 0, "a document that does not exist"):
        return
    chunk_ids = _nullable(table, "chunk_id")
    at = _rows(texts.chunk_ids, chunk_ids)
    foreign = (chunk_ids != _NONE) & ((at < 0) | (texts.owners[np.maximum(at, 0)] != document_ids))
    refuse(shard.path, foreign, "a chunk that does not exist, or is of another document")
    first, last = scalars(table, "sentence_start"), scalars(table, "sentence_end")
    start, end = _nullable(table, "start"), _nullable(table, "end")
    spanless = (start == _NONE) & (end == _NONE)
    lengths = np.array([len(data) for data in texts.data], dtype=np.int64)[rows]
    ordered = (first >= 0) & (first < last) & (last <= lengths)
    within = spanless | ((first <= start) & (start < end) & (end <= last))
    if refuse(shard.path, ~(ordered & within), "offsets that are not inside a sentence of the document"):
        return
    bounds = np.stack([first, last, np.where(spanless, first, start), np.where(spanless, last, end)], axis=1)
    cut = [
        not all(is_boundary(texts.data[row], at) for at in own)
        for row, own in zip(rows.tolist(), bounds.tolist(), strict=True)
    ]
    refuse(shard.path, np.array(cut, dtype=bool), "offsets that cut a character")


def _check_queries(scene: Scene, shard: Shard, spans: pa.Table, texts: _Texts, wordpieces: Wordpieces | None) -> None:
    table = scene.storage.read_table(shard)
    _check_place(scene, shard, table, "query_id", texts)
    refuse, state = scene.findings.refuse, scene.manifest.stages[SPANS_STAGE]
    tokens, n_tokens = lists(table, "tokens"), scalars(table, "n_tokens")
    positions, targets = lists(table, "masked_positions", _NONE), lists(table, "target_ids", 0)
    n_masked = scalars(table, "n_masked").astype(np.int64)
    there = np.arange(positions.shape[1]) < n_masked[:, None]
    absent = lists(table, "target_ids", 0).shape != positions.shape
    wrong = ((positions != _NONE) != there).any(axis=1) | (n_masked < 1) | absent
    wrong |= (there & ((positions < 0) | (positions >= n_tokens[:, None]))).any(axis=1)
    ascending = ~there[:, 1:] | (positions[:, 1:] > positions[:, :-1])
    if refuse(shard.path, wrong | ~ascending.all(axis=1), "masked positions that are not n_masked ascending ones"):
        return
    masked = np.take_along_axis(tokens, np.maximum(positions, 0).astype(np.int64), axis=1) == state.details["mask_id"]
    refuse(shard.path, (there & ~masked).any(axis=1), "a masked position without the mask token")
    beyond = np.arange(tokens.shape[1]) >= n_tokens[:, None]
    refuse(shard.path, (beyond & (tokens != 0)).any(axis=1), "padded token slots that are not 0")
    rows = np.maximum(texts.rows(scalars(table, "document_id")), 0)
    refuse(shard.path, texts.splits[rows] != table["split"].to_numpy(), "a split that is not the document's")
    _check_drawn(scene, shard, table, spans)
    if wordpieces is not None and not scene.findings.has(shard.path):
        found = [
            _same(row, texts.data[at], wordpieces, own, target)
            for row, at, own, target in zip(table.to_pylist(), rows.tolist(), tokens, targets, strict=True)
        ]
        refuse(shard.path, ~np.array(found, dtype=bool), "a query that is not its sentence with its span masked")
    scene.findings.count("masked queries", table.num_rows)


def _check_drawn(scene: Scene, shard: Shard, queries: pa.Table, spans: pa.Table) -> None:
    """The span of each query is one of the shard's, at the same place; of a random mask there is none."""
    ids, known = _nullable(queries, "span_id"), scalars(spans, "span_id")
    at = _rows(known, ids)
    salient = scene.manifest.stages[SPANS_STAGE].made_from["mask"] == "salient"
    wrong = (at < 0) if salient else (ids != _NONE)
    for name in ("document_id", "sentence_start", "sentence_end", "start", "end") if salient and len(known) else ():
        wrong = wrong | (_nullable(queries, name) != scalars(spans, name)[np.maximum(at, 0)])
    scene.findings.refuse(shard.path, wrong, "a span that is not the one it names")


def _same(row: dict[str, Any], text: bytes, wordpieces: Wordpieces, tokens: np.ndarray, targets: np.ndarray) -> bool:
    """Whether a query is what tokenising its sentence and masking its span once more gives."""
    sentence = text[row["sentence_start"] : row["sentence_end"]].decode()
    made = next(iter(wordpieces.tokenizer.tokenize([sentence])))
    positions = np.array(row["masked_positions"][: row["n_masked"]], dtype=np.int64)
    if row["start"] is not None:
        offset = row["sentence_start"]
        if not np.array_equal(inside(made, row["start"] - offset, row["end"] - offset), positions):
            return False
    ids = made.ids[: len(tokens)].copy()
    if len(ids) != row["n_tokens"] or not np.array_equal(ids[positions], targets[: len(positions)]):
        return False
    ids[positions] = wordpieces.mask_id
    return np.array_equal(ids, tokens[: len(ids)])


def _nullable(table: pa.Table, name: str) -> np.ndarray:
    """A column of int64 with -1 for null."""
    found: np.ndarray = table[name].fill_null(_NONE).to_numpy()
    return found


def _rows(known: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The row of each id among ascending ones, -1 for one that is not there."""
    if not len(known):
        return np.full(len(ids), -1, dtype=np.int64)
    rows = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    return np.where(known[rows] == ids, rows, -1)
