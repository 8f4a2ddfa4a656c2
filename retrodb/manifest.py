"""The manifest: what a database is, which shards it has, and what made them.

``manifest.json`` is the only file that says what exists. It is replaced atomically; a shard that it does not record
does not exist, and readers follow it and never list folders.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from retrodb.errors import DamagedError, InputError, MismatchError
from retrodb.schemas import ID_SHIFT, SCHEMA_VERSION
from retrodb.storage import Committed, Storage, checked_relative

MANIFEST_NAME: Final = "manifest.json"
FORMAT_NAME: Final = "retrodb"
TABLES: Final = (
    "documents",
    "quarantine",
    "duplicates",
    "chunks",
    "embeddings",
    "index",
    "neighbours",
    "training",
    "leakage",
)
STAGES: Final = ("corpus", "dedup", "chunk", "embed", "index", "neighbours", "training", "report")
"""In the order of the data flow; each depends on those before it, but none on training (`retrodb.pipelines.stages`)."""
TRAINED_TOKENIZER: Final = "tokenizer.json"
"""A tokenizer learnt by the build itself."""
RECALL_REPORT: Final = "reports/recall.json"
DEDUP_REPORT: Final = "reports/dedup.json"
LEAKAGE_REPORT: Final = "reports/leakage.json"
REPORT_SHA256: Final = "report_sha256"
"""Key of the report stage's details: the checksum of `LEAKAGE_REPORT`."""
TEMPLATE_NUMBER: Final = -1
"""The number of the trained quantiser among the index' shards."""
TEMPLATE_PATH: Final = "index/quantiser.faiss"
WORK_FOLDER: Final = ".build"
"""Where a build keeps its receipts until a stage is recorded."""
DAMAGE_REPORT: Final = "reports/damage.json"
"""``{"paths": [..]}``: what a verification found, so that the next build looks at just that byte by byte."""

_REMEDY: Final = "Put a copy of it back, or delete the database and build it again."


def fingerprint(value: Any) -> str:
    """sha256, in hex, of ``value``'s canonical JSON: sorted keys, no spaces. Raises TypeError for what JSON lacks."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def shard_path(table: str, number: int) -> str:
    """Relative path of shard ``number`` of a table: ``chunks/00000.parquet``, ``embeddings/00000.npy``."""
    suffix = {"embeddings": "npy", "index": "faiss"}.get(table, "parquet")
    return f"{table}/{number:05d}.{suffix}"


def shard_of(identifier: int) -> int:
    """The shard number of a document, chunk or sequence id."""
    return identifier >> ID_SHIFT


@dataclass(frozen=True, order=True)
class Shard:
    """One recorded, immutable file of a table."""

    number: int
    path: str
    rows: int
    bytes: int
    sha256: str

    @staticmethod
    def of(committed: Committed, number: int, rows: int) -> "Shard":
        return Shard(number, committed.path, rows, committed.bytes, committed.sha256)

    @staticmethod
    def parse(entry: Mapping[str, Any]) -> "Shard":
        """Raises DamagedError for a malformed entry or a path that leaves the database."""
        try:
            return Shard(
                number=int(entry["number"]),
                path=checked_relative(str(entry["path"])),
                rows=int(entry["rows"]),
                bytes=int(entry["bytes"]),
                sha256=str(entry["sha256"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"manifest.json has a malformed shard entry {dict(entry)!r}: {error!r}.") from error

    def as_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "rows": self.rows,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "number": self.number,
        }


@dataclass(frozen=True)
class StageState:
    """A finished stage: its ``fingerprint`` is that of ``made_from``; what it counted; details worth keeping."""

    fingerprint: str
    made_from: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """An immutable picture of ``manifest.json``. `replace` it and `save` to change what exists."""

    config: dict[str, Any] = field(default_factory=dict)
    fingerprints: dict[str, Any] = field(default_factory=dict)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    stages: dict[str, StageState] = field(default_factory=dict)
    tables: dict[str, tuple[Shard, ...]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def shards(self, table: str) -> tuple[Shard, ...]:
        """Recorded shards of a table in order of number; empty where the table is not built."""
        return self.tables.get(table, ())

    def rows(self, table: str) -> int:
        return sum(shard.rows for shard in self.shards(table))

    def with_stage(self, stage: str, state: StageState, tables: Mapping[str, Iterable[Shard]]) -> "Manifest":
        """A manifest in which ``stage`` is done and ``tables`` hold the given shards."""
        merged = {**self.tables, **{name: tuple(sorted(shards)) for name, shards in tables.items()}}
        return replace(self, stages={**self.stages, stage: state}, tables=merged)

    def without(self, stages: Iterable[str], tables: Iterable[str]) -> "Manifest":
        """A manifest in which ``stages`` are undone and ``tables`` do not exist."""
        gone_stages, gone_tables = set(stages), set(tables)
        return replace(
            self,
            stages={name: state for name, state in self.stages.items() if name not in gone_stages},
            tables={name: shards for name, shards in self.tables.items() if name not in gone_tables},
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "format": {"name": FORMAT_NAME, "schema_version": SCHEMA_VERSION},
            "config": self.config,
            "fingerprints": self.fingerprints,
            "inputs": self.inputs,
            "stages": {name: asdict(self.stages[name]) for name in STAGES if name in self.stages},
            "tables": {
                name: {"shards": [shard.as_json() for shard in self.tables[name]]}
                for name in TABLES
                if name in self.tables
            },
            "versions": self.versions,
        }

    def save(self, storage: Storage) -> None:
        """Replace ``manifest.json`` atomically."""
        storage.commit_json(MANIFEST_NAME, self.as_json())

    @staticmethod
    def parse(data: Any, where: str) -> "Manifest":
        """Read a manifest's JSON.

        Raises:
            InputError: it is not a retrodb manifest.
            MismatchError: it was written by a later schema version.
            DamagedError: it is one, but malformed.
        """
        if not isinstance(data, dict) or not isinstance(data.get("format"), dict):
            raise InputError(f"{where} is not a retrodb manifest.")
        if data["format"].get("name") != FORMAT_NAME:
            raise InputError(f"{where} is not a retrodb manifest (format {data['format'].get('name')!r}).")
        version = data["format"].get("schema_version")
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise MismatchError(
                f"{where} has schema version {version!r}; "
                f"this retrodb reads up to {SCHEMA_VERSION}: install a newer one."
            )
        try:
            return Manifest(
                config=dict(data["config"]),
                fingerprints=dict(data["fingerprints"]),
                inputs=list(data["inputs"]),
                stages={name: StageState(**state) for name, state in data["stages"].items()},
                tables={
                    name: tuple(Shard.parse(entry) for entry in table["shards"])
                    for name, table in data["tables"].items()
                },
                versions=dict(data["versions"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DamagedError(f"{where} is malformed: {error!r}. {_REMEDY}") from error

    @staticmethod
    def load(storage: Storage) -> "Manifest | None":
        """The database's manifest, or None where there is no database. Raises as `parse` does."""
        try:
            data = storage.read_json(MANIFEST_NAME)
        except DamagedError as error:
            raise DamagedError(f"{error} {_REMEDY}") from error
        if data is None:
            return None
        return Manifest.parse(data, storage.describe(MANIFEST_NAME))
