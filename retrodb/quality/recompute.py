"""A random fraction made once more from the source text, through tokens and vectors to leakage, and compared.

Whole shards are drawn, because the batches that a vector is computed in are a function of its whole shard. Tokens must
be the same to the bit. Vectors are the same to the bit on the machine that made them; another processor may round
differently, so it is a problem only where a vector points elsewhere. Distances must be those of the stored vectors.
"""

import contextlib
import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa

from retrodb.chunking import ChunkTokenizer, chunk_documents
from retrodb.chunking.blocks import Room, block_documents
from retrodb.corpus.sketches import kept_sketches, sketch
from retrodb.encoding import chunk_texts
from retrodb.errors import DamagedError
from retrodb.manifest import Shard
from retrodb.quality.leakage_content import compare_leakage
from retrodb.quality.recompute_neighbours import compare_neighbours
from retrodb.quality.scene import Scene
from retrodb.sizes import count_of
from retrodb.training.columns import lists, scalars

if TYPE_CHECKING:
    from retrodb.database import Database
    from retrodb.encoding.encoder import Encoder

LEAST_COSINE: Final = {"fp32": 0.9999, "fp16": 0.9999, "bf16": 0.9995}
"""Of a vector with itself, computed elsewhere in the same precision (bf16 and fp32 of one text: 0.9999 at worst)."""


@dataclass(frozen=True)
class Tools:
    """The tokenizer and the encoder of a database; None where its stage is not done."""

    tokenizer: ChunkTokenizer | None
    encoder: "Encoder | None"


def load_tools(db: "Database", encoder: str | None = None) -> Tools:
    """What recomputing needs; ``encoder`` says where that is now, if not where it was.

    Raises:
        InputError: the tokenizer or the encoder is not on this machine.
        MismatchError: what is found under its name is another.
    """
    stages = db.manifest.stages
    tokenizer = db.tokenizer if "chunk" in stages else None
    return Tools(tokenizer, db.encoder(encoder) if "embed" in stages else None)


def drawn_shards(numbers: list[int], sample: float, seed: int) -> list[int]:
    """The shards to recompute: a seeded uniform fraction, rounded up; ascending."""
    count = min(len(numbers), math.ceil(sample * len(numbers)))
    drawn = np.random.default_rng(seed).permutation(len(numbers))[:count]
    return sorted(numbers[at] for at in drawn)


def recompute(scene: Scene, tools: Tools, sample: float, seed: int) -> None:
    """Make the drawn shards once more and compare."""
    numbers = drawn_shards([shard.number for shard in scene.manifest.shards("chunks")], sample, seed)
    scene.findings.count("shards recomputed", 0)
    for number in numbers:
        chunks, documents = scene.shard("chunks", number), scene.shard("documents", number)
        if chunks is None or documents is None:
            scene.findings.note("damaged shards were not recomputed")
            continue
        if scene.facts.sketched:
            with scene.examining(documents):
                _compare_sketches(scene, documents)
        if tools.tokenizer is not None:
            with scene.examining(chunks):
                _compare_tokens(scene, chunks, documents, tools.tokenizer)
        embeddings = scene.shard("embeddings", number)
        if embeddings is not None and tools.encoder is not None:
            with scene.examining(embeddings):
                _compare_vectors(scene, embeddings, chunks, documents, tools)
        neighbours = scene.shard("neighbours", number)
        if neighbours is not None:
            with scene.examining(neighbours):
                compare_neighbours(scene, neighbours)
        leakage = scene.shard("leakage", number)
        if leakage is not None:
            with scene.examining(leakage):
                compare_leakage(scene, leakage)
        scene.findings.count("shards recomputed", 1)
    encoder = tools.encoder
    for null in scene.shards("null") if encoder is not None else ():
        assert encoder is not None, "looked at above"
        with scene.examining(null), _one_thread():
            _compare_with(scene, null, encoder.embed_null(), encoder)


# -- sketches ----------------------------------------------------------------------------------------------------------


def _compare_sketches(scene: Scene, documents: Shard) -> None:
    """Sketches are those of the texts, where the libraries here are those that made them."""
    table = scene.table(documents, "text", "sketch")
    kept, comparable = kept_sketches(table["sketch"])
    if not comparable.all():
        scene.findings.note(
            "documents were sketched by other libraries than are here: their sketches were not recomputed"
        )
    made = sketch(table["text"])
    unlike = (kept.bands != made.bands).any(axis=0) | (kept.signatures != made.signatures)
    scene.findings.refuse(documents.path, unlike & comparable, "sketch is not that of the text")
    scene.findings.count("sketches recomputed", int(comparable.sum()))


# -- tokens ------------------------------------------------------------------------------------------------------------


def _compare_tokens(scene: Scene, chunks: Shard, documents: Shard, tokenizer: ChunkTokenizer) -> None:
    if not scene.facts.keeps_text:
        _compare_hashes(scene, chunks, documents, tokenizer)
        return
    stored = scene.storage.read_table(chunks)
    made = _made_again(scene, documents, tokenizer, chunks.number)
    if made.num_rows != stored.num_rows:
        raise DamagedError(f"has {count_of(stored.num_rows, 'chunk')}, the documents' text gives {made.num_rows:,}")
    for name in ("document_id", "position", "n_tokens", "start", "end"):
        wrong = scalars(stored, name) != scalars(made, name)
        scene.findings.refuse(chunks.path, wrong, f"{name} is not what the documents' text gives")
    wrong = (lists(stored, "tokens") != lists(made, "tokens")).any(axis=1)
    scene.findings.refuse(chunks.path, wrong, "tokens are not what the documents' text gives")
    for name in ("uid", "title_tokens", "split_sentence", "truncated_title") if scene.facts.unit == "block" else ():
        theirs, mine = stored[name].to_pylist(), made[name].to_pylist()
        unlike = np.array([a != b for a, b in zip(theirs, mine, strict=True)], dtype=bool)
        scene.findings.refuse(chunks.path, unlike, f"{name} is not what the documents give")
    scene.findings.count("chunks recomputed", made.num_rows)


def _made_again(scene: Scene, documents: Shard, tokenizer: ChunkTokenizer, number: int) -> pa.Table:
    """The chunks or blocks that the documents' text gives."""
    facts = scene.facts
    assert facts.chunk_tokens is not None, "there are chunks"
    source = scene.table(documents, "document_id", "title", "text")
    ids, titles, texts = scalars(source, "document_id"), source["title"].to_pylist(), source["text"].to_pylist()
    if facts.unit == "chunk":
        return chunk_documents(ids, texts, tokenizer, facts.chunk_tokens, number)[0]
    room = Room(facts.chunk_tokens, facts.special_tokens)
    return block_documents(ids, titles, texts, tokenizer, room, number)[0]


def _compare_hashes(scene: Scene, chunks: Shard, documents: Shard, tokenizer: ChunkTokenizer) -> None:
    """Without the text, a lossless tokenizer's tokens give it back, and the content hash tells whether it is that."""
    if not tokenizer.lossless:
        scene.findings.note("the text is not kept and the tokenizer is not lossless: tokens were not recomputed")
        return
    source = scene.table(documents, "document_id", "content_hash")
    hashes = dict(zip(source["document_id"].to_pylist(), source["content_hash"].to_pylist(), strict=True))
    table = scene.table(chunks, "document_id", "tokens", "n_tokens")
    document_ids = scalars(table, "document_id")
    pieces = _token_bytes(lists(table, "tokens"), scalars(table, "n_tokens"), tokenizer)
    wrong = np.zeros(len(document_ids), dtype=bool)
    for first, last in _runs(document_ids):
        found = hashlib.sha256(b"".join(itertools.islice(pieces, last - first))).digest()
        wrong[first] = found != hashes[int(document_ids[first])]
    scene.findings.refuse(chunks.path, wrong, "tokens do not decode to the document of the content_hash")
    scene.findings.count("chunks recomputed", len(document_ids))


def _token_bytes(tokens: np.ndarray, n_tokens: np.ndarray, tokenizer: ChunkTokenizer) -> Iterator[bytes]:
    return (tokenizer.decode(row[:count].tolist()) for row, count in zip(tokens, n_tokens, strict=True))


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and one past the last row of each run of equal values."""
    if len(values):
        edges = np.flatnonzero(np.diff(values)) + 1
        yield from itertools.pairwise([0, *edges.tolist(), len(values)])


# -- vectors -----------------------------------------------------------------------------------------------------------


def _compare_vectors(scene: Scene, embeddings: Shard, chunks: Shard, documents: Shard, tools: Tools) -> None:
    encoder = tools.encoder
    assert encoder is not None, "the caller has looked"
    table = scene.table(chunks, "document_id", "tokens", "n_tokens", "start", "end")
    with _one_thread():
        if scene.facts.own_tokens:
            tokens, n_tokens = lists(table, "tokens"), scalars(table, "n_tokens")
            bodies = [row[:n].tolist() for row, n in zip(tokens, n_tokens, strict=True)]
            if scene.facts.unit == "block":
                made = encoder.embed_pairs(scene.table(chunks, "title_tokens")["title_tokens"].to_pylist(), bodies)
            else:
                made = encoder.embed_own_tokens(bodies)
        else:
            made = encoder.embed(_texts(scene, table, documents, tools))
    _compare_with(scene, embeddings, made, encoder)


def _compare_with(scene: Scene, embeddings: Shard, made: np.ndarray, encoder: "Encoder") -> None:
    """Stored vectors against what the encoder gives now."""
    stored = np.asarray(scene.storage.read_array(embeddings))
    a, b = made.astype(np.float64), stored.astype(np.float64)
    norms = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    cosines = np.where(
        norms > 0, (a * b).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny), (a == b).all(axis=1)
    )
    least = LEAST_COSINE.get(encoder.identity.precision, LEAST_COSINE["bf16"])
    lengths = np.abs(np.sqrt((a * a).sum(axis=1)) - np.sqrt((b * b).sum(axis=1)))
    wrong = (cosines < least) | (lengths > (1 - least) ** 0.5 * np.sqrt((a * a).sum(axis=1)))
    scene.findings.refuse(
        embeddings.path,
        wrong,
        f"vectors that are not what {encoder.identity.name} gives for the chunk's text",
        lambda row: f"cosine {cosines[row]:.6f}",
    )
    scene.findings.count("vectors recomputed", len(stored))
    differing = int((made.view(np.uint16) != stored.view(np.uint16)).any(axis=1).sum())
    scene.findings.count("vectors not bit-identical", differing)
    if differing:
        worst = float(np.abs(a - b).max())
        scene.findings.note(
            f"{embeddings.path}: {count_of(differing, 'vector is', 'vectors are')} not bit-identical here (largest "
            f"difference {worst:.1e}, least cosine {cosines.min():.6f}): another processor or library rounds "
            "differently"
        )


def _texts(scene: Scene, table: pa.Table, documents: Shard, tools: Tools) -> list[str]:
    """The text of every chunk: its exact source slice, or the bytes of its tokens, widened to whole characters."""
    document_ids, starts, ends = (scalars(table, name) for name in ("document_id", "start", "end"))
    if scene.facts.keeps_text:
        source = scene.table(documents, "document_id", "text")
        texts = dict(zip(source["document_id"].to_pylist(), source["text"].to_pylist(), strict=True))
    else:
        assert tools.tokenizer is not None, "vectors come after tokens"
        pieces = list(_token_bytes(lists(table, "tokens"), scalars(table, "n_tokens"), tools.tokenizer))
    result: list[str] = []
    for first, last in _runs(document_ids):
        whole = texts[int(document_ids[first])].encode() if scene.facts.keeps_text else b"".join(pieces[first:last])
        result += chunk_texts(whole, starts[first:last], ends[first:last])
    return result


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Workers embed on one thread; more may round differently."""
    import torch  # noqa: PLC0415 - an encoder is loaded already

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
