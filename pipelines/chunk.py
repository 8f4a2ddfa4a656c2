"""chunk: document shards to chunk shards; finishes the documents table, whose ``n_chunks`` only chunking knows."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from retrodb.pipelines.corpus import DOCUMENT_ROW_GROUP
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.shards import as_read
from retrodb.pipelines.sketches import sketch_path, with_sketches
from retrodb.pipelines.tasks import DealOut, DoTasks, Task

from retrodb import schemas
from retrodb.chunking import ChunkTokenizer, chunk_documents, load_tokenizer
from retrodb.chunking.blocks import Room, block_documents
from retrodb.chunking.sentences import splitter_identity
from retrodb.chunking.tokenizer import tokenizer_from_json
from retrodb.corpus import VALIDATION
from retrodb.corpus.near_duplicates import without_removed
from retrodb.errors import DamagedError, MismatchError
from retrodb.formats import File
from retrodb.manifest import Shard, shard_path
from retrodb.storage import Storage

CHUNK_ROW_GROUP = 1 << 16
VALIDATION_CHUNKS = "validation_chunks"
"""How many chunks of each shard are of validation documents, in what is recorded of the stage: they are not indexed."""


@dataclass(frozen=True)
class ChunkSettings:
    """How documents are cut. ``tokenizer`` is what `load_tokenizer` takes, or, where ``stored`` is its fingerprint and
    not "", the path of one that is kept in the database. ``blocks`` is how long a block may be and what splits
    sentences; None where the unit is the chunk. Sketches are kept with the text that they were made from."""

    tokenizer: str
    stored: str
    chunk_tokens: int
    keep_text: bool
    blocks: "BlockSettings | None" = None


@dataclass(frozen=True)
class BlockSettings:
    """How blocks are packed. ``splitter`` is `splitter_identity` where the build was started."""

    room: Room
    splitter: str


@dataclass(frozen=True)
class ChunkInput:
    """One shard's documents, and what the dedup stage says of them; "" where that is nothing. In ``sketches`` those of
    documents as they were read may wait; "" where they are to have none."""

    documents: File
    duplicates: File
    sketches: str = ""


@functools.lru_cache(maxsize=2)
def open_tokenizer(url: str, spec: str, stored: str) -> ChunkTokenizer:
    """The tokenizer of a database, once a process.

    Raises:
        DamagedError: the one that is kept in the database has other bytes than its fingerprint says.
    """
    if not stored:
        return load_tokenizer(spec)
    storage = Storage(url)
    tokenizer = tokenizer_from_json(storage.read_bytes(spec), spec)
    if tokenizer.fingerprint != stored:
        raise DamagedError(
            f"{storage.describe(spec)} has sha256 {tokenizer.fingerprint[:16]}.., expected is {stored[:16]}..: "
            "it is damaged. Run the build again to repair it."
        )
    return tokenizer


def _chunk(book: ReceiptBook, settings: ChunkSettings, task: Task) -> Iterator[Receipt]:
    storage, number = book.storage, task.number
    documents = kept_documents(storage, task.payload)
    tokenizer = open_tokenizer(storage.url, settings.tokenizer, settings.stored)
    chunks, counts = _cut(documents, tokenizer, settings, number)
    written = storage.commit_table(shard_path("chunks", number), chunks, CHUNK_ROW_GROUP)
    finished = finished_documents(documents, pa.array(counts), settings.keep_text)
    # Beside those that are recorded, which readers still see: all of them change places when the stage is done.
    place = storage.placed(shard_path("documents", number))
    documents_written = storage.commit_table(book.staged(place), finished, DOCUMENT_ROW_GROUP)
    yield Receipt(
        number,
        {
            "chunks": Shard.of(written, number, chunks.num_rows),
            "documents": replace(Shard.of(documents_written, number, finished.num_rows), path=place),
        },
        chunk_counts(chunks),
        {VALIDATION_CHUNKS: int(np.asarray(counts)[_is_validation(documents)].sum())},
    )


def _cut(
    documents: pa.Table, tokenizer: ChunkTokenizer, settings: ChunkSettings, number: int
) -> tuple[pa.Table, np.ndarray]:
    document_ids, texts = documents["document_id"].to_numpy(), documents["text"].to_pylist()
    if settings.blocks is None:
        return chunk_documents(document_ids, texts, tokenizer, settings.chunk_tokens, number)
    if settings.blocks.splitter != splitter_identity():
        raise MismatchError(
            f"sentences are split by {splitter_identity()} on this worker, and the build was started with "
            f"{settings.blocks.splitter}: install the same version everywhere."
        )
    return block_documents(document_ids, documents["title"].to_pylist(), texts, tokenizer, settings.blocks.room, number)


def chunk_counts(chunks: pa.Table) -> dict[str, int]:
    """What is counted of chunks or blocks."""
    counts = {"chunks": chunks.num_rows, "tokens": int(chunks["n_tokens"].to_numpy().sum(dtype="int64"))}
    for flag in ("split_sentence", "truncated_title"):
        if flag in chunks.column_names:
            counts[f"{flag}_blocks"] = int(pc.sum(chunks[flag]).as_py() or 0)
    return counts


def _is_validation(documents: pa.Table) -> np.ndarray:
    """bool [n]."""
    found: np.ndarray = pc.equal(documents["split"], VALIDATION).to_numpy()
    return found


def kept_documents(storage: Storage, item: ChunkInput) -> pa.Table:
    """A shard's documents, with their sketches and without those that the dedup stage removes; finished ones are that
    already."""
    documents = storage.read_table(item.documents)
    if documents["n_chunks"].null_count == 0:
        return documents
    if item.sketches:
        documents = with_sketches(storage, documents, item.sketches)
    if not item.duplicates:
        return documents
    return without_removed(documents, storage.read_table(item.duplicates))


def finished_documents(documents: pa.Table, n_chunks: pa.Array, keep_text: bool) -> pa.Table:
    """The documents with their number of chunks, and without their text and sketch where those are not to be kept."""
    schema = schemas.documents()
    columns = {name: documents[name] for name in schema.names}
    columns["n_chunks"] = n_chunks
    if not keep_text:
        for name in ("text", "sketch"):
            columns[name] = pa.nulls(documents.num_rows, schema.field(name).type)
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def chunk_inputs(
    documents: Sequence[Shard], duplicates: Sequence[Shard], sketched: bool = False
) -> dict[int, ChunkInput]:
    """What is read for each document shard; ``sketched`` where documents are to have sketches."""
    found: dict[int, File] = {shard.number: shard for shard in duplicates}
    return {
        shard.number: ChunkInput(as_read(shard), found.get(shard.number, ""), sketch_path(shard) if sketched else "")
        for shard in documents
    }


def chunk_tasks(documents: Sequence[Shard], duplicates: Sequence[Shard], sketched: bool) -> list[Task]:
    """One task a document shard; ``sketched`` as in `chunk_inputs`."""
    inputs = chunk_inputs(documents, duplicates, sketched)
    return [Task(shard.number, inputs[shard.number], weight=shard.bytes) for shard in documents]


def chunk_pipeline(
    pipeline: beam.Pipeline, book: ReceiptBook, tasks: Sequence[Task], settings: ChunkSettings
) -> beam.PCollection:
    """Tokenise and cut document shards."""
    work = functools.partial(_chunk, book, settings)
    return pipeline | DealOut(tasks) | "chunk" >> beam.ParDo(DoTasks(book, work))
