"""What every check of a verification needs: the database, what it was made with, and which shards are still trusted.

A shard that has a problem is not looked at again, neither for itself nor as the other side of a join: so one damaged
file gives one problem, and names itself and no other.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np
import pyarrow as pa

from retrodb.chunking.duplicates import uid_keys, uid_matrix
from retrodb.deletions import Deletions
from retrodb.errors import DamagedError
from retrodb.index import Metric
from retrodb.manifest import MANIFEST_NAME, SPANS_STAGE, TABLES, Manifest, Shard
from retrodb.neighbours import Exclude, clusters_of
from retrodb.quality.findings import Findings
from retrodb.recent import Recent
from retrodb.schemas import ID_SHIFT, TOKEN_TYPES
from retrodb.storage import Storage
from retrodb.training.columns import lists, scalars
from retrodb.units import Unit, unit_of

STAGE_OF: Final = {
    "documents": "corpus",
    "quarantine": "corpus",
    "duplicates": "dedup",
    "chunks": "chunk",
    "block_duplicates": "chunk",
    "embeddings": "embed",
    "null": "embed",
    "index": "index",
    "neighbours": "neighbours",
    "training": "training",
    "leakage": "report",
    "spans": SPANS_STAGE,
    "queries": SPANS_STAGE,
    "span_quarantine": SPANS_STAGE,
}
"""The stage that makes a table exist."""

_SKETCHING: Final = 2
"""The corpus stage's code since which documents have a column ``sketch``: an addition to a database of an earlier
retrodb, or a compaction, leaves its documents as they are."""
_ID_CACHE_BYTES: Final = 128 << 20
_TOKEN_CACHE_BYTES: Final = 128 << 20


@dataclass(frozen=True)
class Facts:
    """What a database was made with, as its finished stages record it; None for what no finished stage knows."""

    unit: Unit
    chunk_tokens: int | None
    special_tokens: int
    token_type: str
    vocabulary_size: int
    lossless: bool
    keeps_text: bool
    has_sketches: bool
    sketched: bool
    drops_duplicates: bool
    decontaminated: bool
    own_tokens: bool
    dimension: int | None
    metric: Metric
    index_key: str
    k: int | None
    exclude: Exclude
    rerank: str
    searched: int | None
    sequence_tokens: int | None
    training_neighbours: int | None
    leakage_neighbours: int | None

    @property
    def tiles(self) -> bool:
        """Whether the byte ranges of a document's chunks tile its text: those of blocks leave out what is blank."""
        return self.lossless and self.unit == "chunk"

    @staticmethod
    def of(manifest: Manifest) -> "Facts":
        """Raises DamagedError where a finished stage does not say what it was made from."""
        try:
            return Facts._read(manifest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedError(
                f"{MANIFEST_NAME} does not say what its stages were made from: {error!r}. Run the build again."
            ) from error

    @staticmethod
    def _read(manifest: Manifest) -> "Facts":
        def made(stage: str) -> Mapping[str, Any]:
            return manifest.stages[stage].made_from if stage in manifest.stages else {}

        tokenizer = manifest.fingerprints["tokenizer"] if "chunk" in manifest.stages else {}
        encoder = manifest.fingerprints["encoder"] if "embed" in manifest.stages else {}
        has_sketches = int(made("corpus").get("code", 0)) >= _SKETCHING
        facts = Facts(
            unit=unit_of(made("chunk")),
            chunk_tokens=_whole(made("chunk"), "chunk_tokens"),
            special_tokens=int(made("chunk").get("special_tokens", 0)),
            token_type=str(tokenizer.get("token_type", "uint16")),
            vocabulary_size=int(tokenizer.get("vocabulary_size", 0)),
            lossless=bool(tokenizer.get("lossless", False)),
            keeps_text=bool(made("chunk").get("text", True)),
            has_sketches=has_sketches,
            sketched=has_sketches and bool(made("chunk").get("text", True)) and made("dedup").get("dedup") != "off",
            drops_duplicates=made("dedup").get("dedup") == "drop",
            decontaminated=bool(made("dedup").get("decontaminate", False)),
            own_tokens=tokenizer.get("name") == "encoder",
            dimension=_whole(encoder, "dimension"),
            metric="ip" if made("index").get("metric") == "ip" else "l2",
            index_key=str(made("index").get("key", "")),
            k=_whole(made("neighbours"), "neighbours"),
            exclude=made("neighbours").get("exclude", "document"),
            rerank=made("neighbours").get("rerank", "none"),
            searched=_whole(made("neighbours"), "rerank_candidates", "neighbours"),
            sequence_tokens=_whole(made("training"), "sequence_tokens"),
            training_neighbours=_whole(made("training"), "training_neighbours"),
            leakage_neighbours=_whole(made("report"), "neighbours"),
        )
        facts._check(made("index").get("metric", "l2"))
        return facts

    def _check(self, metric: str) -> None:
        if self.token_type not in TOKEN_TYPES or metric not in ("l2", "ip"):
            raise ValueError(f"token type {self.token_type!r}, metric {metric!r}")
        if self.exclude not in ("document", "cluster", "none"):
            raise ValueError(f"exclude {self.exclude!r}")
        if self.rerank not in ("none", "overlap", "bm25") or (self.searched or 0) < (self.k or 0):
            raise ValueError(f"rerank {self.rerank!r}, {self.k} of {self.searched}")
        if self.unit == "block" and not self.own_tokens:
            raise ValueError("blocks that are not of the encoder's own tokens")
        if self.sequence_tokens is not None and self.sequence_tokens % (self.chunk_tokens or 1):
            raise ValueError(f"sequences of {self.sequence_tokens} tokens from chunks of {self.chunk_tokens}")


def _whole(made_from: Mapping[str, Any], name: str, otherwise: str = "") -> int | None:
    """A recorded size, or another where there is none of this name, bounded so that a hostile manifest cannot ask for
    the whole memory; None before its stage."""
    if not made_from:
        return None
    value = int(made_from[name if name in made_from or not otherwise else otherwise])
    if not 1 <= value <= 1 << 20:
        raise ValueError(f"{name} is {value}")
    return value


@dataclass(frozen=True)
class ChunkIds:
    """The id columns of one chunk shard, and what its documents say of each chunk.

    Attributes:
        chunk_ids: int64 [n], strictly ascending.
        document_ids: int64 [n].
        validation: bool [n], whether the document is of the validation split.
        indexed: bool [n], whether it may be a neighbour: a training chunk that was not deleted before the index was
            made.
        living: bool [n], the same, and not deleted since.
        clusters: int64 [n], `NO_CLUSTER` for a cluster of one.
        uids: int64 [n], what tells equal blocks; of chunks the ids themselves.
    """

    chunk_ids: np.ndarray
    document_ids: np.ndarray
    validation: np.ndarray
    indexed: np.ndarray
    living: np.ndarray
    clusters: np.ndarray
    uids: np.ndarray

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """int64 [p]: the row of each id, -1 for one that does not exist."""
        if not len(self.chunk_ids):
            return np.full(len(ids), -1, dtype=np.int64)
        rows = np.minimum(np.searchsorted(self.chunk_ids, ids), len(self.chunk_ids) - 1)
        return np.where(self.chunk_ids[rows] == ids, rows, -1)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in vars(self).values())


@dataclass(frozen=True)
class ChunkTokens:
    """``tokens`` [n, m] and ``n_tokens`` int16 [n] of one chunk shard."""

    tokens: np.ndarray
    n_tokens: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.n_tokens.nbytes


@dataclass
class Scene:
    """A database under verification."""

    storage: Storage
    manifest: Manifest
    facts: Facts
    findings: Findings
    _trusted: dict[str, dict[int, Shard]] = field(init=False)

    def __post_init__(self) -> None:
        self._trusted = {table: {s.number: s for s in self.manifest.shards(table)} for table in TABLES}
        self._ids = Recent(self._load_ids, lambda ids: ids.nbytes, _ID_CACHE_BYTES)
        self._tokens = Recent(self._load_tokens, lambda tokens: tokens.nbytes, _TOKEN_CACHE_BYTES)

    def done(self, stage: str) -> bool:
        """Whether a stage is finished."""
        return stage in self.manifest.stages

    # -- which shards are trusted ----------------------------------------------------------------------------------

    def shards(self, table: str) -> list[Shard]:
        """The shards of a table that have had no problem so far, in order of number."""
        return [shard for _, shard in sorted(self._trusted[table].items()) if not self.findings.has(shard.path)]

    def shard(self, table: str, number: int) -> Shard | None:
        """A shard, if it is recorded and has had no problem so far."""
        shard = self._trusted[table].get(number)
        return None if shard is None or self.findings.has(shard.path) else shard

    def recorded(self, table: str, number: int) -> bool:
        """Whether a shard of this number is recorded, damaged or not."""
        return number in self._trusted[table] or any(s.number == number for s in self.manifest.shards(table))

    @contextlib.contextmanager
    def examining(self, shard: Shard) -> Iterator[None]:
        """A shard that cannot be read is a problem of that shard."""
        with self.findings.blaming(shard.path):
            yield

    # -- reading ---------------------------------------------------------------------------------------------------

    def table(self, shard: Shard, *columns: str) -> pa.Table:
        """Some columns of a shard."""
        return self.storage.read_table(shard, list(columns))

    def ids(self, number: int) -> ChunkIds | None:
        """The ids of a chunk shard; None where it or its documents are not trusted."""
        if self.shard("chunks", number) is None or self.shard("documents", number) is None:
            return None
        return self._ids.get(number)

    def tokens(self, number: int) -> ChunkTokens | None:
        """The tokens of a chunk shard; None where it is not trusted."""
        return None if self.shard("chunks", number) is None else self._tokens.get(number)

    def _load_ids(self, number: int) -> ChunkIds:
        chunks, documents = self.shard("chunks", number), self.shard("documents", number)
        assert chunks is not None, "asked for by ids"
        assert documents is not None, "asked for by ids"
        blocks = self.facts.unit == "block"
        table = self.table(chunks, "chunk_id", "document_id", *(["uid"] if blocks else []))
        chunk_ids, document_ids = scalars(table, "chunk_id"), scalars(table, "document_id")
        owners = self.table(documents, "document_id", "split", "cluster_id")
        rows = np.searchsorted(scalars(owners, "document_id"), document_ids)
        validation = owners["split"].to_numpy() == "validation"
        uids = uid_keys(uid_matrix(table)) if blocks else chunk_ids
        held_out = validation[rows].astype(bool)
        indexed = ~held_out & ~self._left_out.of_documents(document_ids)
        living = indexed & ~self.deleted.of_documents(document_ids)
        return ChunkIds(chunk_ids, document_ids, held_out, indexed, living, clusters_of(owners)[rows], uids)

    @cached_property
    def _left_out(self) -> Deletions:
        """What was deleted before the index was made."""
        return self._named_by(self.manifest.left_out)

    @cached_property
    def passed_over(self) -> Deletions:
        """What was deleted before neighbours were last written."""
        return self._named_by(self.manifest.passed_over)

    @cached_property
    def deleted(self) -> Deletions:
        """All that is deleted."""
        return self._named_by(self.manifest.shards("deleted"))

    def _named_by(self, shards: Sequence[Shard]) -> Deletions:
        trusted = set(self.shards("deleted"))
        return Deletions.of_shards(self.storage, [shard for shard in shards if shard in trusted])

    def _load_tokens(self, number: int) -> ChunkTokens:
        chunks = self.shard("chunks", number)
        assert chunks is not None, "asked for by tokens"
        table = self.table(chunks, "tokens", "n_tokens")
        return ChunkTokens(lists(table, "tokens"), scalars(table, "n_tokens"))


def grouped(ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(shard number, the positions of its ids) of int64 ``ids`` [p], shards ascending."""
    shards = ids >> ID_SHIFT
    order = np.argsort(shards, kind="stable")
    if len(order):
        for part in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            yield int(shards[part[0]]), part


def check_ids(scene: Scene, shard: Shard, ids: np.ndarray, name: str) -> None:
    """Ids strictly ascend and are ``shard << 32 | row``, where a compaction may have left rows out."""
    refuse = scene.findings.refuse
    refuse(shard.path, ids >> ID_SHIFT != shard.number, f"{name} of another shard", lambda row: str(ids[row]))
    refuse(shard.path, np.diff(ids) <= 0, f"{name} does not ascend from one row to the next", lambda row: str(ids[row]))
