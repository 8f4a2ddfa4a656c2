"""spans: document shards to salient spans and masked queries, one task a shard."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import apache_beam as beam
import pyarrow as pa
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.tasks import DealOut, DoTasks, Task

from retrodb.errors import MismatchError
from retrodb.formats import File
from retrodb.manifest import Manifest, Shard, shard_path
from retrodb.spans import SpanSettings
from retrodb.spans.imports import PIECE, document_rows
from retrodb.spans.table import span_tables
from retrodb.spans.taggers import resolve_taggers
from retrodb.spans.wordpieces import load_wordpieces

SPAN_ROW_GROUP = 1 << 14


@dataclass(frozen=True)
class SpanWork:
    """What every task of the stage needs.

    ``identities`` are those of the taggers as the driver found them, in the order of ``settings.taggers``;
    ``wordpieces`` is the fingerprint of the encoder's tokenizer.
    """

    settings: SpanSettings
    encoder: str
    wordpieces: str
    identities: tuple[str, ...]


@dataclass(frozen=True)
class SpanInput:
    """One shard's documents and chunks, and the pieces of imported spans that are of them."""

    documents: File
    chunks: File
    imported: tuple[str, ...] = ()


def _find(book: ReceiptBook, work: SpanWork, task: Task) -> Iterator[Receipt]:
    storage, number, item = book.storage, task.number, task.payload
    taggers, _ = resolve_taggers(work.settings.taggers)
    wordpieces = load_wordpieces(work.encoder)
    found = tuple(repr(tagger.identity) for tagger in taggers)
    if found != work.identities or wordpieces.fingerprint != work.wordpieces:
        raise MismatchError(
            f"this worker has other taggers or another tokenizer than the driver: {', '.join(found)}, "
            f"{work.encoder!r} {wordpieces.fingerprint[:16]}. Install the same packages everywhere."
        )
    pieces = [storage.read_table(path) for path in item.imported]
    tables = span_tables(
        storage.read_table(item.documents, ["document_id", "text", "content_hash", "split"]),
        storage.read_table(item.chunks, ["chunk_id", "document_id", "start", "end"]),
        document_rows(pa.concat_tables(pieces)) if pieces else {},
        taggers=taggers,
        wordpieces=wordpieces,
        settings=work.settings,
        shard=number,
    )
    shards = {}
    named = {"spans": tables.spans, "queries": tables.queries, "span_quarantine": tables.quarantine}
    for name, table in named.items():
        if name != "span_quarantine" or table.num_rows:
            committed = storage.commit_table(shard_path(name, number), table, SPAN_ROW_GROUP)
            shards[name] = Shard.of(committed, number, table.num_rows)
    yield Receipt(number, shards, tables.counts)


def span_tasks(manifest: Manifest, imported: dict[int, tuple[str, ...]]) -> list[Task]:
    """One task a document shard."""
    chunks = {shard.number: shard for shard in manifest.shards("chunks")}
    return [
        Task(shard.number, SpanInput(shard, chunks[shard.number], imported.get(shard.number, ())), weight=shard.rows)
        for shard in manifest.shards("documents")
    ]


def span_pieces_path(book: ReceiptBook, shard: int, batch: int) -> str:
    """Where the driver leaves imported spans of a shard."""
    return f"{book.folder}/imported/{shard:05d}-{batch:05d}.parquet"


def write_pieces(book: ReceiptBook, batch: int, tables: dict[int, pa.Table]) -> dict[int, str]:
    """Write one batch of imported spans, by shard."""
    paths = {shard: span_pieces_path(book, shard, batch) for shard in tables}
    for shard, table in tables.items():
        book.storage.commit_table(paths[shard], table.cast(PIECE), SPAN_ROW_GROUP)
    return paths


def span_pipeline(
    pipeline: beam.Pipeline, book: ReceiptBook, tasks: Sequence[Task], work: SpanWork
) -> beam.PCollection:
    """Find spans in document shards, and draw queries."""
    return pipeline | DealOut(tasks) | "spans" >> beam.ParDo(DoTasks(book, functools.partial(_find, book, work)))
