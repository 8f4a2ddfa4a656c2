"""What each stage is made from: the parts of its fingerprint, so that exactly what depends on a change is rebuilt.

A part is anything that, changed, changes the stage's bytes. Each stage holds the fingerprint of the one before it, so
a change runs down the data flow and never up; what does not reach the bytes (workers, runner, device) is no part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from retrodb.chunking.pairs import PairTemplate
from retrodb.chunking.sentences import splitter_identity
from retrodb.config import BuildConfig
from retrodb.corpus import TRAIN, VALIDATION, ScannedFile
from retrodb.encoding import EncoderIdentity
from retrodb.index import KeyChoice
from retrodb.manifest import LEFT_OUT, RECORDED_STAGES, SPANS_STAGE, STAGES, Manifest, fingerprint
from retrodb.quality.leakage import NEAREST
from retrodb.spans import SpanSettings

STAGE_TABLES: Final = {
    "corpus": ("documents", "quarantine"),
    "dedup": ("duplicates",),
    "chunk": ("chunks", "block_duplicates"),
    "embed": ("embeddings", "null"),
    "index": ("index",),
    "neighbours": ("neighbours",),
    "training": ("training",),
    "report": ("leakage",),
    SPANS_STAGE: ("spans", "queries", "span_quarantine"),
}
"""The tables that exist only once a stage is done, in a database of either unit. (chunk also finishes the
documents.)"""

STAGE_READS: Final = {
    "corpus": (),
    "dedup": ("documents",),
    "chunk": ("documents", "duplicates"),
    "embed": ("documents", "chunks"),
    "index": ("documents", "chunks", "embeddings", "deleted"),
    "neighbours": ("documents", "chunks", "embeddings", "index"),
    "training": ("documents", "chunks", "neighbours"),
    "report": ("documents", "chunks", "neighbours"),
    SPANS_STAGE: ("documents", "chunks"),
}
"""The recorded tables that a stage is made from."""

UPSTREAM: Final = {
    "corpus": "the documents",
    "there": "the documents that are there",
    "documents": "the documents that are kept",
    "chunks": "the chunks",
    "embeddings": "the embeddings",
    "index": "the index",
    "neighbour_table": "the neighbours",
}
"""Parts that are fingerprints of an earlier stage."""

_CODE: Final = {**dict.fromkeys(RECORDED_STAGES, 1), "corpus": 2, SPANS_STAGE: 2}
"""Raised when a stage's code changes its bytes, so that old tables are rebuilt, never mixed with new ones."""


@dataclass(frozen=True)
class TokenizerIdentity:
    """What cut the text: enough to tell two tokenizers apart, and to find this one again."""

    name: str
    fingerprint: str
    vocabulary_size: int
    lossless: bool
    token_type: str
    stored: str | None = None

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


def corpus_parts(files: Sequence[ScannedFile], config: BuildConfig, shard_bytes: int) -> dict[str, Any]:
    """By content: a touched or copied-over file of the same bytes changes nothing. ``shard_bytes`` is the plan's."""
    parts = {
        "code": _CODE["corpus"],
        "inputs": {file.url: file.sha256 for file in files if file.split == TRAIN},
        "text_field": config.text_field,
        "id_field": config.id_field,
        "title_field": config.title_field,
        "shard_bytes": shard_bytes,
    }
    if held_out := {file.url: file.sha256 for file in files if file.split == VALIDATION}:
        parts["validation"] = held_out
    if config.validation_fraction:
        parts |= {"validation_fraction": config.validation_fraction, "seed": config.seed}
    return parts


def dedup_parts(corpus: str, config: BuildConfig) -> dict[str, Any]:
    """``decontaminate`` matters only beside validation documents."""
    parts = {"code": _CODE["dedup"], "corpus": corpus, "dedup": config.dedup}
    return {**parts, "decontaminate": config.decontaminate} if config.has_validation else parts


def chunk_parts(dedup: str, config: BuildConfig, tokenizer: str, pairs: PairTemplate | None) -> dict[str, Any]:
    """``tokenizer`` is a fingerprint, or ``train:VOCAB`` (then the corpus and the seed decide); ``pairs`` is how the
    encoder reads a title with a body, where the unit is the block."""
    blocks = (
        {"unit": config.unit, "splitter": splitter_identity(), "special_tokens": pairs.special_tokens} if pairs else {}
    )
    return {
        "code": _CODE["chunk"],
        "documents": dedup,
        "tokenizer": tokenizer,
        "chunk_tokens": config.chunk_tokens,
        "text": config.text,
        **({"seed": config.seed} if config.tokenizer.startswith("train:") else {}),
        **blocks,
    }


def embed_parts(chunk: Mapping[str, Any], encoder: EncoderIdentity) -> dict[str, Any]:
    """The vectors depend on the chunks, not on whether the documents' text is kept."""
    return {"code": _CODE["embed"], "chunks": fingerprint(chunks_of(chunk)), "encoder": encoder.fingerprint}


def chunks_of(chunk: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of the chunk stage that reach the chunks."""
    return {name: value for name, value in chunk.items() if name != "text"}


def index_parts(
    embed: str, config: BuildConfig, choice: KeyChoice, deleted: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The key, not the memory it was chosen for; ``deleted`` are the shards (sha256 by path) of what was deleted before
    the index was made, and is not in it."""
    parts: dict[str, Any] = {"code": _CODE["index"], "embeddings": embed, "metric": config.metric, "key": choice.key}
    if deleted:
        parts[LEFT_OUT] = dict(deleted)
    return parts if choice.exact else {**parts, "seed": config.seed}


def neighbours_parts(
    index: str, config: BuildConfig, choice: KeyChoice, deleted: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """An approximate index is searched as hard as the recall gate asks; ``deleted`` are the shards (sha256 by path) of
    what the index still has vectors of, and the search passed over."""
    parts = {
        "code": _CODE["neighbours"],
        "index": index,
        "neighbours": config.neighbours,
        "exclude": config.exclude,
    }
    if config.rerank != "none":
        parts |= {"rerank": config.rerank, "rerank_candidates": config.searched_neighbours}
    if deleted:
        parts[LEFT_OUT] = dict(deleted)
    return parts if choice.exact else {**parts, "min_recall": config.min_recall, "seed": config.seed}


def training_parts(neighbours: str, config: BuildConfig) -> dict[str, Any]:
    """The join."""
    return {
        "code": _CODE["training"],
        "neighbour_table": neighbours,
        "sequence_tokens": config.sequence_tokens,
        "training_neighbours": config.training_neighbours,
    }


def report_parts(neighbours: str, config: BuildConfig) -> dict[str, Any]:
    """RETRO looks at ten neighbours; fewer where fewer are kept. The training shards are no part of it."""
    return {
        "code": _CODE["report"],
        "neighbour_table": neighbours,
        "neighbours": min(NEAREST, config.neighbours),
    }


def spans_parts(
    chunk: str, settings: SpanSettings, taggers: Sequence[Mapping[str, Any]], wordpieces: str
) -> dict[str, Any]:
    """``taggers`` are identities: name, version, hash; ``wordpieces`` is the fingerprint of the query's tokenizer."""
    return {
        "code": _CODE[SPANS_STAGE],
        "chunks": chunk,
        "mask": settings.mask,
        "seed": settings.seed,
        "max_tokens": settings.max_tokens,
        "max_masked": settings.max_masked,
        "taggers": [dict(tagger) for tagger in taggers],
        "sentences": splitter_identity(),
        "wordpieces": wordpieces,
    }


def downstream(stage: str) -> tuple[str, ...]:
    """``stage`` and every stage after it that depends on it: none depends on training or on spans, which are made from
    the chunks alone."""
    if stage in ("training", SPANS_STAGE):
        return (stage,)
    after = STAGES[STAGES.index(stage) :]
    return (*after, SPANS_STAGE) if "chunk" in after else after


def undone_by(manifest: Manifest, stage: str, parts: Mapping[str, Any]) -> tuple[str, ...]:
    """The stages that have to be made again when ``stage`` is made from ``parts``: it, and what its bytes reach.

    Keeping the documents' text or not changes the documents alone: vectors made from the same chunks stay.
    """
    embed = manifest.stages.get("embed")
    if stage == "chunk" and embed is not None and embed.made_from.get("chunks") == fingerprint(chunks_of(parts)):
        return (stage, SPANS_STAGE)
    return downstream(stage)


def why_rebuilt(manifest: Manifest, stage: str, parts: Mapping[str, Any]) -> list[str]:
    """What changed, in words, between what a stage was made from and what it would be made from now."""
    state = manifest.stages.get(stage)
    if state is None:
        return []
    changes = []
    for name in sorted(set(parts) | set(state.made_from)):
        old, new = state.made_from.get(name), parts.get(name)
        if old == new:
            continue
        if name in ("inputs", "validation"):
            changes += _input_changes(old or {}, new or {}, "input" if name == "inputs" else "validation input")
        elif name == "code":
            changes.append("made by an earlier version of this stage")
        elif name in UPSTREAM:
            changes.append(f"{UPSTREAM[name]} changed")
        elif name != "seed" or None not in (old, new):  # a seed comes and goes with what is drawn by it
            changes.append(f"{name.replace('_', '-')}: {_short(old)} -> {_short(new)}")
    return changes


def _input_changes(old: Mapping[str, str], new: Mapping[str, str], kind: str) -> list[str]:
    groups = {
        f"new {kind}": sorted(set(new) - set(old)),
        f"{kind} gone": sorted(set(old) - set(new)),
        f"{kind} changed": sorted(url for url in set(old) & set(new) if old[url] != new[url]),
    }
    return [f"{what}: {_several(urls)}" for what, urls in groups.items() if urls]


def _several(urls: Sequence[str]) -> str:
    return urls[0] if len(urls) == 1 else f"{urls[0]} and {len(urls) - 1} more"


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 64 else text
