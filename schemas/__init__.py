"""The Arrow schemas of every table: the single source of truth, and the only place where columns are named.

Each function returns a `pyarrow.Schema` whose fields carry a ``description`` and whose metadata carries the table's
name and `SCHEMA_VERSION`. Missing values are null *elements*, never null lists; padded token slots hold 0 and are told
by the length columns alone.
"""

from typing import Final

import pyarrow as pa

SCHEMA_VERSION: Final = 1
"""Raised when a column changes its name, type or meaning. A reader refuses databases of a later version."""

ID_SHIFT: Final = 32
"""Ids are int64 ``shard << 32 | row``: known without a global barrier, decoded in O(1), never reused."""

NULL_ID: Final = (1 << 63) - 1
"""The null document's id among the candidates of a query (REALM): of no row, in no index, never found by a search."""

CONTENT_HASH_BYTES: Final = 32
UID_BYTES: Final = 16
SKETCH_BYTES: Final = 216
SPLITS: Final = ("train", "validation")

TOKEN_TYPES: Final = {"uint16": pa.uint16(), "uint32": pa.uint32()}


def _schema(table: str, fields: list[tuple[str, pa.DataType, str]]) -> pa.Schema:
    return pa.schema(
        [pa.field(name, kind, metadata={"description": text}) for name, kind, text in fields],
        metadata={"retrodb.table": table, "retrodb.schema_version": str(SCHEMA_VERSION)},
    )


def documents() -> pa.Schema:
    """One row a kept document."""
    return _schema(
        "documents",
        [
            ("document_id", pa.int64(), "shard << 32 | row"),
            ("key", pa.string(), "the record's own id, else source#position; may repeat"),
            ("source", pa.string(), "file the record was read from"),
            ("title", pa.string(), "title, null where the record has none"),
            ("text", pa.large_string(), "the whole text, verbatim; null with --no-text"),
            ("n_chunks", pa.int32(), "number of chunks; null until the chunk stage has run"),
            ("content_hash", pa.binary(CONTENT_HASH_BYTES), "sha256 of the text's UTF-8 bytes"),
            ("metadata", pa.string(), "JSON object of what else the record held, null if nothing"),
            ("cluster_id", pa.int64(), "near-duplicate cluster; null is a cluster of one"),
            ("split", pa.string(), "train, or validation: a query, never a neighbour"),
            (
                "sketch",
                pa.binary(SKETCH_BYTES),
                "27 little-endian uint64, by which documents that join find their near-duplicates: what sketched it, "
                "hashes of 25 bands of its MinHash signature and of all of it; null with --dedup off or --no-text",
            ),
        ],
    )


def chunks(chunk_tokens: int, token_type: str) -> pa.Schema:
    """One row a chunk of ``chunk_tokens`` (m) tokens; ``token_type`` is ``uint16`` or ``uint32``."""
    tokens = pa.list_(pa.field("item", TOKEN_TYPES[token_type]), chunk_tokens)
    return _schema(
        "chunks",
        [
            ("chunk_id", pa.int64(), "shard << 32 | row"),
            ("document_id", pa.int64(), "the document it was cut from"),
            ("position", pa.int32(), "0, 1, .. in its document"),
            ("tokens", tokens, "token ids, padded with 0"),
            ("n_tokens", pa.int16(), "valid tokens"),
            ("start", pa.int64(), "first UTF-8 byte in the document's text"),
            ("end", pa.int64(), "one past the last UTF-8 byte in the document's text"),
        ],
    )


def blocks(budget: int, token_type: str) -> pa.Schema:
    """One row a block: the ``chunks`` table of a database whose unit is the block. With the title and the special
    tokens a block has at most ``budget`` tokens."""
    own = [
        ("uid", pa.binary(UID_BYTES), "what tells equal blocks: the hash of title and body"),
        ("title_tokens", pa.list_(pa.field("item", TOKEN_TYPES[token_type])), "tokens of the document's title"),
        ("split_sentence", pa.bool_(), "whether it holds a part of a sentence longer than a block"),
        ("truncated_title", pa.bool_(), "whether the title was too long, so that title_tokens are its beginning"),
    ]
    schema = chunks(budget, token_type)
    return pa.schema([*schema, *_schema("chunks", own)], metadata=schema.metadata)


def block_duplicates() -> pa.Schema:
    """One row a uid that several blocks have."""
    return _schema(
        "block_duplicates",
        [
            ("uid", pa.binary(UID_BYTES), "as in chunks"),
            ("chunk_ids", pa.list_(pa.int64()), "the blocks that have it, ascending; two or more"),
        ],
    )


def neighbours(k: int, ranked: bool = False) -> pa.Schema:
    """One row a chunk (query) with its ``k`` kept neighbours; ``ranked`` where they were chosen by re-ranking."""
    ranks = (
        "neighbour_ranks",
        pa.list_(pa.int16(), k),
        "with --rerank alone: place of each neighbour by what its tokens have in common with the chunk's, 0 the best; "
        "the order in which models take them; null where missing",
    )
    return _schema(
        "neighbours",
        [
            ("chunk_id", pa.int64(), "the query"),
            ("neighbour_ids", pa.list_(pa.int64(), k), "chunk ids, best first; null where missing"),
            ("neighbour_document_ids", pa.list_(pa.int64(), k), "documents of the neighbours; null where missing"),
            (
                "distances",
                pa.list_(pa.float32(), k),
                "squared L2, ascending (or inner product, descending) of the stored vectors; null where missing",
            ),
            ("n_valid", pa.int16(), "number of neighbours found"),
            *([ranks] if ranked else []),
        ],
    )


def leakage() -> pa.Schema:
    """One row a chunk: what it has in common with its nearest neighbours (RETRO, section 2.6)."""
    return _schema(
        "leakage",
        [
            ("chunk_id", pa.int64(), "the query"),
            ("overlap", pa.int16(), "tokens of the longest substring in common with a neighbour and its continuation"),
            ("leakage", pa.float32(), "r: overlap / m"),
            ("neighbour_id", pa.int64(), "the neighbour it is shared with, the nearest of equals; null where 0"),
        ],
    )


def quarantine() -> pa.Schema:
    """One row a record that could not be read."""
    return _schema(
        "quarantine",
        [
            ("source", pa.string(), "file"),
            ("position", pa.int64(), "byte offset in the decompressed file; row number in Parquet"),
            ("reason", pa.string(), "why it could not be read"),
            ("record", pa.binary(), "its first 64 KiB"),
        ],
    )


def duplicates() -> pa.Schema:
    """One row a document that has near-duplicates, kept or removed."""
    return _schema(
        "duplicates",
        [
            ("row", pa.int32(), "its place among the documents of its shard as they were read"),
            ("document_id", pa.int64(), "its id; null where it was removed"),
            ("cluster_id", pa.int64(), "its near-duplicate cluster: the id of the first document of it that was kept"),
            ("cluster_kept", pa.int64(), "documents of the cluster that were kept"),
            ("removed", pa.string(), "near_duplicate, validation_duplicate; null where it was kept"),
            ("key", pa.string(), "as in documents"),
            ("source", pa.string(), "as in documents"),
            ("content_hash", pa.binary(CONTENT_HASH_BYTES), "as in documents"),
        ],
    )


def deleted() -> pa.Schema:
    """One row a deleted document whose rows are still in the other tables: readers pass over them."""
    return _schema(
        "deleted",
        [
            ("document_id", pa.int64(), "the document"),
            ("first_chunk_id", pa.int64(), "its first chunk; null where it has none"),
            ("n_chunks", pa.int32(), "so many chunks from that one on are gone with it"),
        ],
    )


def spans() -> pa.Schema:
    """One row a salient span of a document."""
    return _schema(
        "spans",
        [
            ("span_id", pa.int64(), "shard << 32 | row"),
            ("document_id", pa.int64(), "the document it stands in"),
            ("chunk_id", pa.int64(), "the chunk or block with the larger part of it; null if none has any"),
            ("sentence_start", pa.int64(), "first UTF-8 byte of its sentence in the document's text"),
            ("sentence_end", pa.int64(), "one past the last"),
            ("start", pa.int64(), "first UTF-8 byte of the span in the document's text"),
            ("end", pa.int64(), "one past the last"),
            ("label", pa.string(), "what it is, as its tagger says: PERSON, DATE, ..; null where it does not"),
            ("tagger", pa.string(), "who found it: name@version; of imported ones import:source"),
        ],
    )


def queries(max_tokens: int, max_masked: int, token_type: str) -> pa.Schema:
    """One row a sentence with a masked span (REALM, section 3.4), in wordpieces of the encoder's own tokenizer."""
    token = TOKEN_TYPES[token_type]
    return _schema(
        "queries",
        [
            ("query_id", pa.int64(), "shard << 32 | row"),
            ("span_id", pa.int64(), "the span that is masked; null where the mask is random"),
            ("document_id", pa.int64(), "the document it stands in"),
            (
                "chunk_id",
                pa.int64(),
                "the chunk or block with the larger part of the masked span; where tokens are masked at random, of the "
                "query; null if none has any",
            ),
            ("split", pa.string(), "train or validation, as its document"),
            ("sentence_start", pa.int64(), "first UTF-8 byte of the sentence in the document's text"),
            ("sentence_end", pa.int64(), "one past the last"),
            ("start", pa.int64(), "first UTF-8 byte of the masked span; null where single tokens are masked"),
            ("end", pa.int64(), "one past the last"),
            ("label", pa.string(), "as in spans; null where the mask is random"),
            ("tagger", pa.string(), "as in spans; random-span or random-token where the mask is random"),
            (
                "tokens",
                pa.list_(token, max_tokens),
                "the sentence's wordpieces, without special tokens, the mask token in place of masked ones; padded "
                "with 0",
            ),
            ("n_tokens", pa.int16(), "valid tokens; a longer sentence is cut"),
            ("masked_positions", pa.list_(pa.int16(), max_masked), "where tokens are masked, ascending; null beyond"),
            ("target_ids", pa.list_(token, max_masked), "the wordpieces that stood there; null beyond"),
            ("n_masked", pa.int16(), "how many"),
        ],
    )


def span_quarantine() -> pa.Schema:
    """One row an imported span that could not be used."""
    return _schema(
        "span_quarantine",
        [
            ("source", pa.string(), "file"),
            ("position", pa.int64(), "byte offset in the decompressed file; row number in Parquet"),
            ("reason", pa.string(), "why it could not be used"),
            ("record", pa.binary(), "its first 64 KiB"),
        ],
    )


def training(sequence_tokens: int, chunk_tokens: int, neighbours: int, token_type: str) -> pa.Schema:
    """One row a sequence of n = ``sequence_tokens`` tokens: n/m chunks with k' = ``neighbours`` neighbours each."""
    slots = sequence_tokens // chunk_tokens
    token = TOKEN_TYPES[token_type]
    return _schema(
        "training",
        [
            ("sequence_id", pa.int64(), "shard << 32 | row"),
            ("split", pa.string(), "train or validation"),
            ("tokens", pa.list_(token, sequence_tokens), "[n/m, m] tokens, each chunk padded with 0"),
            ("n_tokens", pa.int32(), "valid tokens in the row"),
            ("chunk_ids", pa.list_(pa.int64(), slots), "[n/m]; null where padded"),
            ("document_ids", pa.list_(pa.int64(), slots), "[n/m]; null where padded"),
            ("chunk_lengths", pa.list_(pa.int16(), slots), "[n/m] valid tokens of each chunk; sums to n_tokens"),
            (
                "neighbour_tokens",
                pa.list_(token, slots * neighbours * 2 * chunk_tokens),
                "[n/m, k', 2, m]: each neighbour N, then its continuation F, padded with 0",
            ),
            ("neighbour_lengths", pa.list_(pa.int16(), slots * neighbours * 2), "[n/m, k', 2] valid tokens of N, F"),
            ("neighbour_ids", pa.list_(pa.int64(), slots * neighbours), "[n/m, k']; null where missing"),
            ("n_valid", pa.list_(pa.int8(), slots), "[n/m] valid neighbours of each chunk"),
        ],
    )
