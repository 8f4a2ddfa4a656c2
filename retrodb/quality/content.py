"""documents, quarantine, chunks and embeddings: schemas, counts from stage to stage, and the joins between them."""

import hashlib
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrodb import schemas
from retrodb.corpus.near_duplicates import DEDUP_RULES
from retrodb.errors import DamagedError
from retrodb.manifest import MANIFEST_NAME, Manifest, Shard
from retrodb.quality.scene import Scene, check_ids
from retrodb.quality.span_content import span_schemas
from retrodb.schemas import SPLITS
from retrodb.sizes import count_of
from retrodb.training.columns import lists, scalars

_VECTOR_ROWS: Final = 1 << 14


# -- schemas -----------------------------------------------------------------------------------------------------------


def check_schemas(scene: Scene) -> None:
    """Every Parquet shard has the columns of `retrodb.schemas`, more may be there, and the recorded rows."""
    for table, expected in _expected_schemas(scene).items():
        for shard in scene.shards(table):
            with scene.examining(shard), scene.storage.open_parquet(shard) as file:
                for fault in _schema_faults(file.schema_arrow, expected):
                    scene.findings.add(shard.path, fault)
                if file.metadata.num_rows != shard.rows:
                    scene.findings.add(
                        shard.path, f"has {count_of(file.metadata.num_rows, 'row')}, recorded are {shard.rows:,}"
                    )


def _expected_schemas(scene: Scene) -> dict[str, pa.Schema]:
    facts = scene.facts
    documents = schemas.documents()
    if not facts.has_sketches:
        documents = documents.remove(documents.get_field_index("sketch"))
    found = {
        "documents": documents,
        "quarantine": schemas.quarantine(),
        "duplicates": schemas.duplicates(),
        "leakage": schemas.leakage(),
        "deleted": schemas.deleted(),
        **span_schemas(scene.manifest),
    }
    if facts.chunk_tokens:
        kind = schemas.blocks if facts.unit == "block" else schemas.chunks
        found["chunks"] = kind(facts.chunk_tokens, facts.token_type)
        found["block_duplicates"] = schemas.block_duplicates()
    if facts.k:
        found["neighbours"] = schemas.neighbours(facts.k, ranked=facts.rerank != "none")
    if facts.sequence_tokens and facts.chunk_tokens and facts.training_neighbours:
        found["training"] = schemas.training(
            facts.sequence_tokens, facts.chunk_tokens, facts.training_neighbours, facts.token_type
        )
    return found


def _schema_faults(found: pa.Schema, expected: pa.Schema) -> list[str]:
    faults = []
    for column in expected:
        if found.get_all_field_indices(column.name) == []:
            faults.append(f"has no column {column.name!r}")
        elif len(found.get_all_field_indices(column.name)) > 1:
            faults.append(f"has the column {column.name!r} more than once")
        elif not _same_type(found.field(column.name).type, column.type):
            faults.append(f"has {column.name} of type {found.field(column.name).type}, not {column.type}")
    return faults


def _same_type(found: pa.DataType, expected: pa.DataType) -> bool:
    """Equal but for the name that Parquet gives a list's elements."""
    if pa.types.is_fixed_size_list(expected):
        lists_both = pa.types.is_fixed_size_list(found)
        return lists_both and (found.list_size, found.value_type) == (expected.list_size, expected.value_type)
    return bool(found == expected)


# -- counts ------------------------------------------------------------------------------------------------------------


def check_counts(scene: Scene) -> None:
    """Nothing lost from stage to stage: problems are of ``manifest.json``, or of the shard whose rows do not fit."""
    manifest, findings = scene.manifest, scene.findings

    def same(what: str, found: int, expected: object) -> None:
        if found != expected:
            findings.add(MANIFEST_NAME, f"{what}: {found:,} and {expected}")

    if scene.done("corpus"):
        counts = manifest.stages["corpus"].counts
        kept, quarantined = counts.get("kept", 0), counts.get("quarantined", 0)
        dropped = sum(number for name, number in counts.items() if name.startswith("dropped."))
        same("documents kept, dropped and quarantined are not those in", kept + dropped + quarantined, counts.get("in"))
        removed = removed_documents(manifest) if manifest.has_finished_documents else 0
        same("rows of documents, and documents kept, differ", manifest.rows("documents"), kept - removed)
        same("rows of quarantine, and records quarantined, differ", manifest.rows("quarantine"), quarantined)
    if scene.done("chunk"):
        counted = manifest.stages["chunk"].counts.get("chunks")
        same("rows of chunks, and chunks made, differ", manifest.rows("chunks"), counted)
    rows = {shard.number: shard.rows for shard in manifest.shards("chunks")}
    for table in ("embeddings", "neighbours", "leakage"):
        for shard in scene.shards(table):
            if shard.rows != rows.get(shard.number, shard.rows):
                findings.add(
                    shard.path, f"has {count_of(shard.rows, 'row')} for {count_of(rows[shard.number], 'chunk')}"
                )


def removed_documents(manifest: Manifest) -> int:
    """How many documents the dedup stage removes."""
    state = manifest.stages.get("dedup")
    counts = state.counts if state is not None else {}
    return sum(counts.get(f"dropped.{rule}", 0) for rule in DEDUP_RULES)


# -- documents and quarantine ------------------------------------------------------------------------------------------


def check_documents(scene: Scene) -> None:
    """Ids, splits and content hashes of the documents; the quarantine can be read."""
    for shard in scene.shards("documents"):
        with scene.examining(shard):
            _check_documents(scene, shard)
    for shard in scene.shards("quarantine"):
        with scene.examining(shard):
            table = scene.table(shard, "source", "position", "reason")
            for name in table.column_names:
                scene.findings.refuse(shard.path, nulls(table, name), f"null {name}")
            scene.findings.count("quarantined records", table.num_rows)


def _check_documents(scene: Scene, shard: Shard) -> None:
    findings = scene.findings
    names = ["document_id", "key", "source", "text", "n_chunks", "content_hash", "split"]
    table = scene.table(shard, *names, *(["sketch"] if scene.facts.sketched else []))
    check_ids(scene, shard, scalars(table, "document_id"), "document_id")
    for name in ("key", "source", "content_hash"):
        findings.refuse(shard.path, nulls(table, name), f"null {name}")
    known = pc.is_in(table["split"], pa.array(SPLITS)).to_numpy()
    findings.refuse(shard.path, ~known, f"split is not one of {', '.join(SPLITS)}")
    if scene.done("chunk"):
        n_chunks = table["n_chunks"].fill_null(-1).to_numpy()
        findings.refuse(shard.path, n_chunks < 0, "n_chunks is null or negative")
        absent = nulls(table, "text")
        if scene.facts.keeps_text:
            findings.refuse(shard.path, absent, "null text")
        else:
            findings.refuse(shard.path, ~absent, "a text, though the database was built with --no-text")
        if scene.facts.sketched:
            findings.refuse(shard.path, nulls(table, "sketch"), "null sketch")
    findings.refuse(shard.path, _wrong_hashes(table), "content_hash is not the sha256 of the text")
    findings.count("documents", table.num_rows)


def _wrong_hashes(table: pa.Table) -> np.ndarray:
    """bool [n]: rows whose text is there and has another sha256."""
    wrong = np.zeros(table.num_rows, dtype=bool)
    row = 0
    for batch in table.select(["text", "content_hash"]).to_batches(max_chunksize=1024):
        texts = batch.column(0).cast(pa.large_binary())
        for text, recorded in zip(texts, batch.column(1), strict=True):
            if text.is_valid:
                wrong[row] = hashlib.sha256(text.as_buffer()).digest() != recorded.as_py()
            row += 1
    return wrong


def nulls(table: pa.Table, name: str) -> np.ndarray:
    """bool [n]: where a column is null."""
    return np.asarray(table[name].is_null().to_numpy())


# -- chunks ------------------------------------------------------------------------------------------------------------


def check_chunks(scene: Scene) -> None:
    """Chunks lie one after the other in the documents of their shard, full but for the last, and cover the text."""
    tokens = 0
    for shard in scene.shards("chunks"):
        with scene.examining(shard):
            tokens += _check_chunks(scene, shard)
    if scene.done("chunk") and len(scene.shards("chunks")) == len(scene.manifest.shards("chunks")):
        counted = scene.manifest.stages["chunk"].counts.get("tokens")
        if tokens != counted:
            scene.findings.add(MANIFEST_NAME, f"the chunks hold {count_of(tokens, 'token')}, counted were {counted}")


def _check_chunks(scene: Scene, shard: Shard) -> int:
    """Checks one shard; returns its tokens."""
    table = scene.table(shard, "chunk_id", "document_id", "position", "tokens", "n_tokens", "start", "end")
    check_ids(scene, shard, scalars(table, "chunk_id"), "chunk_id")
    n_tokens = scalars(table, "n_tokens")
    _check_tokens(scene, shard, lists(table, "tokens"), n_tokens)
    firsts = _check_order(scene, shard, table, n_tokens)
    documents = scene.shard("documents", shard.number)
    if documents is None:
        scene.findings.note("documents are damaged: their chunks were not joined with them")
    else:
        _join_documents(scene, shard, table, firsts, scene.table(documents, "document_id", "n_chunks", "text"))
    scene.findings.count("chunks", table.num_rows)
    return int(n_tokens.sum(dtype=np.int64))


def _check_tokens(scene: Scene, shard: Shard, tokens: np.ndarray, n_tokens: np.ndarray) -> None:
    refuse, (_, width) = scene.findings.refuse, tokens.shape
    refuse(shard.path, (n_tokens < 1) | (n_tokens > width), f"n_tokens outside 1 to {width}")
    padding = np.arange(width) >= n_tokens[:, None]
    refuse(shard.path, ((tokens != 0) & padding).any(axis=1), "padding that is not 0")
    if scene.facts.vocabulary_size:
        beyond = (tokens >= scene.facts.vocabulary_size).any(axis=1)
        refuse(shard.path, beyond, f"tokens outside the vocabulary of {scene.facts.vocabulary_size:,}")


def _check_order(scene: Scene, shard: Shard, table: pa.Table, n_tokens: np.ndarray) -> np.ndarray:
    """Chunks follow each other in their documents; bool [n]: whether each is the first of its document."""
    refuse, path = scene.findings.refuse, shard.path
    chunk_ids, document_ids = scalars(table, "chunk_id"), scalars(table, "document_id")
    positions, starts, ends = (scalars(table, name) for name in ("position", "start", "end"))
    refuse(path, np.diff(document_ids) < 0, "chunks that are not in the order of their documents")
    inside = np.diff(document_ids) == 0  # row i + 1 continues the document of row i
    firsts = np.concatenate([np.ones(min(1, len(positions)), dtype=bool), ~inside])
    refuse(path, firsts & (positions != 0), "the first chunk of a document is not at position 0")
    refuse(path, inside & (np.diff(positions) != 1), "position does not count through the document, after chunk")
    refuse(path, inside & (np.diff(chunk_ids) != 1), "chunk ids of one document are not consecutive, after chunk")
    if scene.facts.unit == "chunk":
        full = n_tokens == scene.facts.chunk_tokens
        refuse(path, inside & ~full[:-1], "a chunk that is not its document's last is not full")
    else:
        refuse(path, inside & (starts[1:] < ends[:-1]), "byte ranges that overlap, after block")
    refuse(path, (starts < 0) | (ends < starts), "a byte range that ends before it starts")
    if scene.facts.tiles:
        refuse(path, inside & (starts[1:] != ends[:-1]), "byte ranges that do not tile the text, after chunk")
        refuse(path, firsts & (starts != 0), "the first chunk of a document does not start at byte 0")
    else:
        refuse(path, inside & (np.diff(starts) < 0), "byte ranges that go back, after chunk")
    return firsts


def _join_documents(scene: Scene, shard: Shard, table: pa.Table, firsts: np.ndarray, documents: pa.Table) -> None:
    refuse, path = scene.findings.refuse, shard.path
    document_ids, ends = scalars(table, "document_id"), scalars(table, "end")
    known = scalars(documents, "document_id")
    lost = ~np.isin(document_ids, known)
    if refuse(path, lost, "chunks of a document that does not exist", lambda row: f"document {document_ids[row]}"):
        return
    rows = np.searchsorted(known, document_ids)
    counted = np.bincount(rows, minlength=len(known))
    recorded = documents["n_chunks"].fill_null(-1).to_numpy()
    refuse(path, counted != recorded, "documents with another number of chunks than their n_chunks, by document")
    if scene.facts.keeps_text:
        sizes = pc.binary_length(documents["text"]).fill_null(0).to_numpy()
        lasts = np.concatenate([firsts[1:], np.ones(min(1, len(firsts)), dtype=bool)])
        beyond = ends > sizes[rows]
        if scene.facts.tiles:
            beyond |= lasts & (ends != sizes[rows])
        refuse(path, beyond, "byte ranges that do not end with the text")
        if scene.facts.tiles:
            refuse(path, (sizes > 0) & (counted == 0), "documents with text and no chunk, by document")


# -- embeddings --------------------------------------------------------------------------------------------------------


def check_embeddings(scene: Scene) -> None:
    """Vectors are float16 [rows, d] and finite."""
    for shard in scene.shards("embeddings"):
        with scene.examining(shard):
            vectors = scene.storage.read_array(shard)
            expected = (shard.rows, scene.facts.dimension)
            if vectors.dtype != np.float16 or vectors.shape != expected:
                raise DamagedError(f"holds {vectors.dtype} {list(vectors.shape)}, not float16 {list(expected)}")
            for start in range(0, len(vectors), _VECTOR_ROWS):
                block = np.asarray(vectors[start : start + _VECTOR_ROWS])
                if not np.isfinite(block).all():
                    row = start + int(np.argmin(np.isfinite(block).all(axis=1)))
                    raise DamagedError(f"the vector in row {row} holds NaN or infinity")
            scene.findings.count("vectors", len(vectors))
