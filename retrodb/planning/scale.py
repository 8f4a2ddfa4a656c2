"""The arithmetic: from tokens to shards, bytes, hours and messages."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from retrodb.config import BuildConfig
from retrodb.corpus import default_shard_bytes
from retrodb.errors import InputError
from retrodb.index import KeyChoice, choose_key, group_shards
from retrodb.index.engine import Metric, has_exact_codes
from retrodb.neighbours import Exclude, initial_candidates
from retrodb.planning import figures as f
from retrodb.planning.encoders import EncoderSize
from retrodb.planning.figures import BENCHMARKS, BUILD, CODE, INSTRUCT_RETRO, Figure
from retrodb.schemas import ID_SHIFT

_HNSW_BYTES_PER_LIST: Final = 32 * 2 * 4 + 16
_REPORTED_NEIGHBOURS: Final = 10
_BLOCK_QUERIES: Final = 8_192
_MOST_SHARDS: Final = 1 << (63 - ID_SHIFT)
_GROUPED_SHARDS: Final = 1 << 16


@dataclass(frozen=True)
class Assumed:
    """What is to be built. Sizes in tokens and bytes; ``document_tokens`` and ``bytes_per_token`` are averages,
    ``record_overhead`` what a record's other fields add to its text."""

    tokens: int
    encoder: EncoderSize
    chunk_tokens: int = 64
    sequence_tokens: int = 2048
    neighbours: int = 20
    training_neighbours: int = 2
    metric: Metric = "l2"
    memory_bytes: int = 16 << 30
    index_key: str | None = None
    shard_bytes: int | None = None
    document_tokens: float = f.DOCUMENT_TOKENS
    bytes_per_token: float = f.BYTES_PER_TOKEN
    record_overhead: float = f.RECORD_OVERHEAD
    token_bytes: int = 2
    exclude: Exclude = "document"

    @staticmethod
    def of(
        config: BuildConfig, tokens: int, encoder: EncoderSize, document_tokens: float = f.DOCUMENT_TOKENS
    ) -> "Assumed":
        """What a build with these settings makes of so many tokens."""
        return Assumed(
            tokens=tokens,
            encoder=encoder,
            chunk_tokens=config.chunk_tokens,
            sequence_tokens=config.sequence_tokens,
            neighbours=config.neighbours,
            training_neighbours=config.training_neighbours,
            metric=config.metric,
            memory_bytes=config.memory_bytes,
            index_key=config.index_key,
            shard_bytes=config.shard_bytes,
            document_tokens=document_tokens,
            exclude=config.exclude,
        )

    @property
    def documents(self) -> int:
        return max(1, round(self.tokens / self.document_tokens))

    @property
    def chunks(self) -> int:
        """Of documents whose lengths are spread geometrically. Half of the last chunk of a long one is empty, on
        average; one that is shorter than a chunk is one chunk all the same."""
        own_tokens = self.tokens / self.documents
        return math.ceil(self.documents / -math.expm1(-self.chunk_tokens / own_tokens))

    @property
    def text_bytes(self) -> int:
        return round(self.tokens * self.bytes_per_token)

    @property
    def shards(self) -> int:
        """Of each table."""
        size = self.text_bytes * self.record_overhead
        return max(1, math.ceil(size / (self.shard_bytes or default_shard_bytes(round(size)))))


@dataclass(frozen=True)
class Scale:
    """A plan: figures by section and name."""

    assumed: Assumed
    choice: KeyChoice
    sections: Mapping[str, Mapping[str, Figure]] = field(default_factory=dict)

    def value(self, section: str, name: str) -> float:
        """One figure's value. Raises KeyError."""
        return float(self.sections[section][name].value)

    def as_json(self) -> dict[str, Any]:
        return {
            "tokens": self.assumed.tokens,
            "encoder": self.assumed.encoder.name,
            **{
                section: {name: figure.as_json() for name, figure in figures.items()}
                for section, figures in self.sections.items()
            },
        }


def plan_build(assumed: Assumed) -> Scale:
    """What a build takes.

    Raises:
        InputError: no index is possible with these settings, or there are more shards than ids can number.
    """
    if assumed.shards >= _MOST_SHARDS:
        raise InputError(
            f"{assumed.shards:,} shards are more than the {_MOST_SHARDS:,} that ids can number: "
            "give a larger --shard-bytes."
        )
    choice = choose_key(
        assumed.chunks, assumed.encoder.dimension, assumed.memory_bytes, assumed.metric, assumed.index_key
    )
    index = _Index.of(assumed, choice)
    sections = {
        "corpus": _corpus(assumed),
        "index": _index(choice, index),
        "disk": _disk(assumed, index),
        "memory per worker": _memory(assumed, choice, index),
        "shuffle": _shuffle(assumed, choice, index),
        "requests": _requests(assumed, index),
        "time": _time(assumed, choice, index),
    }
    return Scale(assumed, choice, sections)


@dataclass(frozen=True)
class _Index:
    """How the index lies on disk. ``template_bytes`` are in every one of its ``shards``."""

    template_bytes: int
    vector_bytes: float
    shards: int
    largest: int
    """Vectors of the largest shard."""

    @staticmethod
    def of(assumed: Assumed, choice: KeyChoice) -> "_Index":
        dimension = assumed.encoder.dimension
        centroids = 0 if choice.exact else choice.n_lists * dimension * 4
        vector_bytes = (choice.estimated_bytes - centroids) / assumed.chunks
        template = 256 + centroids
        if "_HNSW" in choice.key:
            template += choice.n_lists * _HNSW_BYTES_PER_LIST
        if choice.key.startswith("OPQ"):
            template += dimension * dimension * 4
        grouped = min(assumed.shards, _GROUPED_SHARDS)  # the rest are grouped in the same way
        rows = assumed.chunks // assumed.shards
        groups = group_shards([rows] * grouped, template, math.ceil(vector_bytes), choice.exact)
        shards = math.ceil(len(groups) * (assumed.shards / grouped))
        return _Index(template, vector_bytes, shards, max(len(group) for group in groups) * rows)


def _corpus(a: Assumed) -> dict[str, Figure]:
    guess = "assumed; --document-tokens"
    return {
        "documents": Figure(a.documents, "", guess),
        "chunks": Figure(a.chunks, "", f"{a.chunk_tokens} tokens each, the last of a document half full"),
        "text": Figure(a.text_bytes, "bytes", f"{a.bytes_per_token} bytes a token; {BUILD}"),
        "shards of a table": Figure(a.shards, "", CODE),
        "chunks in a shard": Figure(math.ceil(a.chunks / a.shards), "", CODE),
    }


def _index(choice: KeyChoice, index: _Index) -> dict[str, Figure]:
    return {
        "key": Figure(choice.key, "", choice.reason),
        "training vectors": Figure(choice.training_vectors, "", CODE),
        "index shards": Figure(index.shards, "", CODE),
        "vectors in the largest": Figure(index.largest, "", CODE),
    }


def _disk(a: Assumed, index: _Index) -> dict[str, Figure]:
    stored = a.token_bytes / 2 * f.BYTES_PER_STORED_TOKEN
    joined = (1 + 2 * a.training_neighbours) * a.token_bytes / 2 * f.BYTES_PER_TRAINING_TOKEN
    neighbour = f.BYTES_PER_NEIGHBOUR + 2 * f.BYTES_PER_ID_BIT * math.log2(a.chunks + 1)
    parquet = a.shards * f.BYTES_PER_FILE
    tables = {
        "documents": (a.text_bytes * f.DOCUMENT_COMPRESSION + a.documents * f.BYTES_PER_DOCUMENT + parquet, BUILD),
        "chunks": (a.tokens * stored + a.chunks * f.BYTES_PER_CHUNK_ROW + parquet, BUILD),
        "embeddings": (a.chunks * a.encoder.dimension * 2 + a.shards * 128, CODE),
        "index": (a.chunks * index.vector_bytes + (index.shards + 1) * index.template_bytes, CODE),
        "neighbours": (a.chunks * a.neighbours * neighbour + parquet, BUILD),
        "training": (a.tokens * joined + 3 * parquet, BUILD),
        "leakage": (a.chunks * f.BYTES_PER_LEAKAGE_ROW + parquet, BUILD),
    }
    figures = {name: Figure(round(size), "bytes", source) for name, (size, source) in tables.items()}
    return {**figures, "all": Figure(round(sum(size for size, _ in tables.values())), "bytes", "the sum")}


def _memory(a: Assumed, choice: KeyChoice, index: _Index) -> dict[str, Figure]:
    rows, dimension = a.chunks / a.shards, a.encoder.dimension
    text = a.text_bytes / a.shards
    held = index.largest * (4 * dimension + 8) if choice.exact else index.template_bytes
    weights = 4 * a.encoder.parameters + 4 * 30_522 * dimension
    k = a.training_neighbours
    row = a.chunk_tokens * a.token_bytes
    stages = {
        "corpus, chunk": f.TOKENIZER_BYTES + 3 * text,
        "embed": f.TORCH_BYTES + weights + 2 * text + rows * 2 * dimension,
        "index, training": 6 * choice.training_vectors * dimension,
        "index, adding": index.template_bytes + index.largest * index.vector_bytes + rows * 2 * dimension,
        "neighbours": held
        + rows * (2 * dimension + 20 * a.neighbours)
        + min(f.COMBINE_BYTES + f.SELECT_BYTES, 8 * dimension * a.chunks),
        "training": rows * row * (2 + 3 * 2 * k),
        "report": rows * row * (2 + 2 * 2 * _REPORTED_NEIGHBOURS),
    }
    note = f"{BUILD} for an idle worker ({f.WORKER_BYTES / 1e6:,.0f} MB); the rest {CODE}"
    return {name: Figure(round(f.WORKER_BYTES + size), "bytes", note) for name, size in stages.items()}


def _shuffle(a: Assumed, choice: KeyChoice, index: _Index) -> dict[str, Figure]:
    asked = initial_candidates(a.neighbours, has_exact_codes(choice.key))
    excluded = a.document_tokens / a.chunk_tokens if a.exclude != "none" else 0
    asked = min(asked * next((n for n in (1, 2) if asked * n >= a.neighbours + excluded), 4), a.chunks)
    found = a.chunks * (asked * 12 * index.shards + 8 * index.shards + 2 * a.encoder.dimension + 24)
    vectors = a.chunks * asked * (2 * a.encoder.dimension + 24)
    pair = 2 * (a.chunk_tokens * a.token_bytes + 2) + 4 + 8
    return {
        "neighbours, candidates": Figure(
            found, "bytes", f"{CODE}; asked once, and less where it is merged before it is sent"
        ),
        "neighbours, vectors": Figure(vectors, "bytes", f"{CODE}; on object stores alone, at most"),
        "training": Figure(a.chunks * a.training_neighbours * pair, "bytes", CODE),
        "report": Figure(a.chunks * min(_REPORTED_NEIGHBOURS, a.neighbours) * pair, "bytes", CODE),
    }


def _requests(a: Assumed, index: _Index) -> dict[str, Figure]:
    blocks = math.ceil(a.chunks / max(_BLOCK_QUERIES, index.largest))
    return {
        "files of the database": Figure(6 * a.shards + index.shards + 6, "", f"{CODE}: six tables, index, reports"),
        "index shards opened": Figure(blocks * index.shards, "", f"{CODE}: once for a block of queries, in a round"),
        "query shards read for it": Figure(2 * a.shards * index.shards, "", f"{CODE}: ids and vectors"),
        "other shards read": Figure(14 * a.shards, "", f"{CODE}, about"),
    }


def _time(a: Assumed, choice: KeyChoice, index: _Index) -> dict[str, Figure]:
    per_chunk = a.chunk_tokens / 64
    gpu = f.BERT_LARGE_CHUNKS_PER_GPU_HOUR * f.BERT_LARGE_PARAMETERS / a.encoder.parameters / per_chunk
    cpu = f.MINILM_CHUNKS_PER_CORE_SECOND * f.MINILM_PARAMETERS / a.encoder.parameters / per_chunk
    share = 1.0 if choice.exact else min(f.PROBED_SHARE, f.PROBED_AT_MOST / choice.n_lists)
    width = a.encoder.dimension / 384
    pairs = a.chunks * share + (0 if choice.exact else index.shards * math.sqrt(choice.n_lists) * 16)
    by_flops = "" if a.encoder.name.startswith("bert-large") else "; from BERT-large by FLOPs, at best"
    return {
        "embedding, A100-hours": Figure(round(a.chunks / gpu, 3), "hours", INSTRUCT_RETRO + by_flops),
        "embedding without a GPU": Figure(round(a.chunks / cpu / 3600, 3), "core-hours", f"{BENCHMARKS}, by FLOPs"),
        "search": Figure(
            round(a.chunks * pairs * f.PAIR_SECONDS * width / 3600, 3),
            "core-hours",
            f"{BENCHMARKS}, one comparison; {share:.2%} of the vectors" + ("" if choice.exact else ", a guess"),
        ),
        "all else": Figure(round(a.text_bytes / f.TEXT_BYTES_PER_CORE_SECOND / 3600, 3), "core-hours", BENCHMARKS),
    }
