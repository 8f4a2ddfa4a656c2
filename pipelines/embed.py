"""embed: chunk shards to float16 vector shards, once a chunk, ever."""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import apache_beam as beam
import numpy as np
from retrodb.pipelines.chunk import ChunkSettings, open_tokenizer
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.tasks import DealOut, DoTasksAhead, Task

from retrodb.encoding import EncoderFiles, chunk_texts, own_device, resolve_encoder
from retrodb.formats import File
from retrodb.manifest import Shard, shard_path
from retrodb.storage import Storage
from retrodb.training.columns import lists, scalars

if TYPE_CHECKING:
    from retrodb.encoding.encoder import Encoder
    from retrodb.encoding.feeding import Featurised


NULL_NUMBER: Final = -1
"""The task of the null document, whose vector is a table of its own."""


@dataclass(frozen=True)
class EmbedSettings:
    """The encoder, and where a chunk's text comes from: the documents, its tokens' bytes, or its own token ids, with
    the title's where ``blocks`` says so."""

    encoder: str
    files_sha256: str
    precision: str
    device: str
    own_tokens: bool
    blocks: bool
    chunking: ChunkSettings


@dataclass(frozen=True)
class EmbedInput:
    """One shard's chunk and document files."""

    chunks: File
    documents: File


def shard_texts(storage: Storage, item: EmbedInput, chunking: ChunkSettings) -> list[str]:
    """The text of every chunk of a shard: its exact source slice, widened to whole characters."""
    chunks = storage.read_table(item.chunks, ["document_id", "start", "end"])
    document_ids = chunks["document_id"].to_numpy()
    starts, ends = chunks["start"].to_numpy(), chunks["end"].to_numpy()
    if chunking.keep_text:
        documents = storage.read_table(item.documents, ["document_id", "text"])
        texts = dict(zip(documents["document_id"].to_pylist(), documents["text"].to_pylist(), strict=True))
    else:
        texts = {}
        tokens = _token_bytes(storage, item, chunking)
    result: list[str] = []
    edges = np.flatnonzero(np.diff(document_ids, prepend=-1, append=-1)) if len(document_ids) else np.zeros(0, int)
    for first, last in itertools.pairwise(edges.tolist()):
        text = texts[int(document_ids[first])].encode() if chunking.keep_text else b"".join(tokens[first:last])
        result += chunk_texts(text, starts[first:last], ends[first:last])
    return result


def _token_bytes(storage: Storage, item: EmbedInput, chunking: ChunkSettings) -> list[bytes]:
    """The bytes of every chunk from its tokens: the text itself, since the tokenizer is lossless."""
    tokenizer = open_tokenizer(storage.url, chunking.tokenizer, chunking.stored)
    return [tokenizer.decode(tokens.tolist()) for tokens in _tokens(storage, item)]


def _tokens(storage: Storage, item: EmbedInput) -> Iterator[np.ndarray]:
    """Each chunk's tokens, those that are valid."""
    chunks = storage.read_table(item.chunks, ["tokens", "n_tokens"])
    for tokens, n_tokens in zip(lists(chunks, "tokens"), scalars(chunks, "n_tokens"), strict=True):
        yield tokens[:n_tokens]


def _read(storage: Storage, settings: EmbedSettings, task: Task) -> "Featurised":
    """A shard's rows for the network: beside the computing of the shard before it."""
    encoder = _load_encoder(settings)
    if task.payload is None:
        return encoder.featurise_pairs([[]], [[]])
    if not settings.own_tokens:
        return encoder.featurise(shard_texts(storage, task.payload, settings.chunking))
    bodies = _tokens(storage, task.payload)
    if not settings.blocks:
        return encoder.featurise_own_tokens(bodies)
    titles = storage.read_table(task.payload.chunks, ["title_tokens"])["title_tokens"].to_pylist()
    return encoder.featurise_pairs(titles, bodies)


def _embed(storage: Storage, settings: EmbedSettings, task: Task, rows: "Featurised") -> Iterator[Receipt]:
    vectors = _load_encoder(settings).vectors(rows)
    if task.number == NULL_NUMBER:
        committed = storage.commit_array(shard_path("null", 0), vectors)
        yield Receipt(NULL_NUMBER, {"null": Shard.of(committed, 0, 1)})
        return
    committed = storage.commit_array(shard_path("embeddings", task.number), vectors)
    yield Receipt(
        task.number,
        {"embeddings": Shard.of(committed, task.number, len(vectors))},
        {"vectors": len(vectors)},
    )


def _load_encoder(settings: EmbedSettings) -> "Encoder":
    import torch  # noqa: PLC0415 - only a worker that embeds pays for it

    from retrodb.encoding.encoder import load_cached  # noqa: PLC0415
    from retrodb.errors import MismatchError  # noqa: PLC0415

    torch.set_num_threads(1)
    encoder = load_cached(_encoder_files(settings.encoder), settings.precision, own_device(settings.device))
    if encoder.identity.files_sha256 != settings.files_sha256:
        raise MismatchError(
            f"the encoder {settings.encoder!r} on this worker has files {encoder.identity.files_sha256[:12]}, "
            f"the build was started with {settings.files_sha256[:12]}: install the same encoder everywhere."
        )
    return encoder


@functools.lru_cache(maxsize=1)
def _encoder_files(spec: str) -> EncoderFiles:
    return resolve_encoder(spec)


def embed_tasks(chunks: Sequence[Shard], documents: Sequence[Shard], blocks: bool) -> list[Task]:
    """One task a chunk shard, and, with ``blocks``, one for the null document."""
    sources = {shard.number: shard for shard in documents}
    tasks = [Task(s.number, EmbedInput(s, sources[s.number]), weight=s.rows) for s in chunks]
    return [*tasks, Task(NULL_NUMBER, None)] if blocks else tasks


def embed_pipeline(
    pipeline: beam.Pipeline,
    book: ReceiptBook,
    tasks: Sequence[Task],
    settings: EmbedSettings,
    hints: Mapping[str, str],
) -> beam.PCollection:
    """Embed chunk shards; ``hints`` say what the workers need (Beam's resource hints)."""
    read = functools.partial(_read, book.storage, settings)
    embed = functools.partial(_embed, book.storage, settings)
    do = DoTasksAhead(book, read, embed)
    return pipeline | DealOut(tasks) | "embed" >> beam.ParDo(do).with_resource_hints(**hints)
