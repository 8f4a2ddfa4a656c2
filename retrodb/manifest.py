"""The manifest: what a database is, which shards it has, and what made them.

``manifest.json`` is the only file that says what exists. It is replaced atomically; a shard that it does not record
does not exist, and readers follow it and never list folders. It holds a checksum of itself, by which a verification
proves every bit of it, and each save leaves a copy, `MANIFEST_COPY`, from which a build puts a damaged one back.
Readers look at neither.
"""

import contextlib
import datetime
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from retrodb.errors import DamagedError, InputError, LockedError, MismatchError
from retrodb.formats import Committed, json_bytes
from retrodb.schemas import ID_SHIFT, SCHEMA_VERSION
from retrodb.storage import TEMPORARY_PREFIX, Storage, checked_relative

MANIFEST_NAME: Final = "manifest.json"
REPORTS_FOLDER: Final = "reports"
MANIFEST_COPY: Final = f"{REPORTS_FOLDER}/manifest.json"
FORMAT_NAME: Final = "retrodb"
TABLES: Final = (
    "documents",
    "quarantine",
    "duplicates",
    "chunks",
    "block_duplicates",
    "embeddings",
    "null",
    "index",
    "neighbours",
    "training",
    "leakage",
    "deleted",
    "spans",
    "queries",
    "span_quarantine",
)
STAGES: Final = ("corpus", "dedup", "chunk", "embed", "index", "neighbours", "training", "report")
"""In the order of the data flow; each depends on those before it, but none on training (`retrodb.pipelines.stages`)."""
TEXT_STAGES: Final = STAGES[: STAGES.index("embed")]
"""What all versions share."""
SPANS_STAGE: Final = "spans"
"""A stage of its own, made from the chunks by ``retrodb spans``; a database is complete without it."""
RECORDED_STAGES: Final = (*STAGES, SPANS_STAGE)
"""Every stage that a manifest may record."""
TRAINED_TOKENIZER: Final = "tokenizer.json"
"""A tokenizer learnt by the build itself."""
RECALL_REPORT: Final = "reports/recall.json"
DEDUP_REPORT: Final = "reports/dedup.json"
LEAKAGE_REPORT: Final = "reports/leakage.json"
STAGE_REPORTS: Final = {"dedup": DEDUP_REPORT, "neighbours": RECALL_REPORT, "report": LEAKAGE_REPORT}
"""What a stage leaves for people to read."""
REPORT_SHA256: Final = "report_sha256"
"""Key of a stage's details: the checksum of its report."""
REPORT_PATH: Final = "report_path"
"""Key of a stage's details: where its report lies, if a later version wrote it."""
TEMPLATE_NUMBER: Final = -1
"""The number of the trained quantiser among the index' shards."""
TEMPLATE_PATH: Final = "index/quantiser.faiss"
VERSIONED_TABLES: Final = ("embeddings", "null", "index", "neighbours", "training", "leakage")
"""What a later version has of its own, under ``versions/<n>/``; the text is every version's."""
FIRST_VERSION: Final = 1
VERSIONS_FOLDER: Final = "versions"
LARGEST_NORM: Final = "largest_norm"
"""Key of the index stage's details, for inner products: the largest norm of an indexed vector."""
LEFT_OUT: Final = "deleted"
"""Part of the index stage: the shards of deleted documents whose chunks are not in the index, sha256 by path."""
WORK_FOLDER: Final = ".build"
"""Where a build keeps its receipts until a stage is recorded."""
DAMAGE_REPORT: Final = "reports/damage.json"
"""``{"paths": [..]}``: what a verification found, so that the next build looks at just that byte by byte."""

_OWN_MARK: Final = f'"name": "{FORMAT_NAME}"'.encode()
"""What the first lines of every manifest hold, torn or not."""
_MENDED_BY_BUILD: Final = f"Run the build again: it puts {MANIFEST_NAME} back from {MANIFEST_COPY}."
_REMEDY: Final = f"Put a copy of {MANIFEST_NAME} back, or delete the database and build it again."


def fingerprint(value: Any) -> str:
    """sha256, in hex, of ``value``'s canonical JSON: sorted keys, no spaces. Raises TypeError for what JSON lacks."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def shard_path(table: str, number: int) -> str:
    """Relative path of shard ``number`` of a table: ``chunks/00000.parquet``, ``embeddings/00000.npy``."""
    suffix = {"embeddings": "npy", "null": "npy", "index": "faiss"}.get(table, "parquet")
    return f"{table}/{number:05d}.{suffix}"


def version_folder(version: int) -> str:
    """Where a version's own tables lie: the first one's in the database itself."""
    return "" if version == FIRST_VERSION else f"{VERSIONS_FOLDER}/{version}"


def version_path(version: int) -> str:
    """Relative path of the manifest that a published version keeps."""
    return f"{VERSIONS_FOLDER}/{version}/{MANIFEST_NAME}"


def is_of_a_table(path: str) -> bool:
    """Whether a file in a table's folder is a build's to remove where it is not recorded: by its kind, or as a
    leftover. Anything else there is someone's own."""
    name = path.rpartition("/")[2]
    return name.startswith(TEMPORARY_PREFIX) or name.endswith((".parquet", ".npy", ".faiss"))


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
        except (KeyError, TypeError, ValueError, OverflowError) as error:  # int() of infinity
            raise DamagedError(f"malformed shard entry {entry!r}: {error!r}.") from error

    def as_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "rows": self.rows,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "number": self.number,
        }


def documents_fingerprint(shards: Iterable[Shard]) -> str:
    """What tells document shards as they were read from those that the chunk stage has finished."""
    return fingerprint({shard.path: shard.sha256 for shard in shards})


@dataclass(frozen=True)
class StageState:
    """A finished stage: its ``fingerprint`` is that of ``made_from``; what it counted; details worth keeping."""

    fingerprint: str
    made_from: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def report(self, stage: str) -> str:
        """Relative path of what the stage left for people to read. Raises KeyError for a stage without a report."""
        return checked_relative(str(self.details.get(REPORT_PATH, STAGE_REPORTS[stage])))

    @property
    def facts(self) -> dict[str, Any]:
        """The details without what is recorded of the report's file."""
        return {name: value for name, value in self.details.items() if name not in (REPORT_SHA256, REPORT_PATH)}

    @staticmethod
    def parse(entry: Mapping[str, Any]) -> "StageState":
        """Raises TypeError for a malformed entry."""
        state = StageState(**entry)
        if not all(isinstance(part, dict) for part in (state.made_from, state.counts, state.details)):
            raise TypeError("a stage is described by something else than objects")
        if not all(type(number) is int for number in state.counts.values()):
            raise TypeError("a stage counts something else than whole numbers")
        return state


@dataclass(frozen=True)
class Version:
    """Which version of the database a manifest describes, and what made it.

    ``step`` is the training step of the encoder's checkpoint, ``created`` UTC in ISO 8601 to the second; both null
    where nobody told (a plain build's manifest depends on its inputs and settings alone).
    """

    id: int = FIRST_VERSION
    parent: int | None = None
    made_by: str = "build"
    step: int | None = None
    created: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """What is true of its vectors: corpus (fingerprint of the text tables), encoder, metric, dim, dtype, rows. Empty
    while a first build is unfinished."""

    @staticmethod
    def parse(entry: Mapping[str, Any]) -> "Version":
        """Raises TypeError for a malformed entry."""
        version = Version(**entry)
        numbers = (version.id, version.parent, version.step)
        if not all(number is None or (type(number) is int and number >= 0) for number in numbers) or not version.id:
            raise TypeError(f"a version is numbered by something else than whole numbers: {numbers}")
        if not isinstance(version.facts, dict):
            raise TypeError("a version's facts are no object")
        return version


@dataclass(frozen=True)
class KeptVersion:
    """A published version that can still be opened: where its manifest is, and what it is."""

    version: Version
    bytes: int
    sha256: str
    replaced: str | None = None
    """When another one took its place, UTC in ISO 8601; None for the current one, and where nobody told."""

    @property
    def path(self) -> str:
        """Of the version's manifest."""
        return version_path(self.version.id)

    def as_json(self) -> dict[str, Any]:
        entry = {"version": asdict(self.version), "bytes": self.bytes, "sha256": self.sha256}
        return entry if self.replaced is None else {**entry, "replaced": self.replaced}

    @staticmethod
    def parse(entry: Mapping[str, Any]) -> "KeptVersion":
        """Raises KeyError, TypeError or ValueError for a malformed entry."""
        replaced = entry.get("replaced")
        if replaced is not None:
            datetime.datetime.fromisoformat(replaced)
        return KeptVersion(Version.parse(entry["version"]), int(entry["bytes"]), str(entry["sha256"]), replaced)


def changed_meanwhile(storage: Storage) -> LockedError:
    """What is raised where a writer finds that another one has taken over from it."""
    return LockedError(
        f"{storage.url} was changed by another process while this one was at work: it gave no sign of life for long, "
        "and was taken for dead. Nothing of the other's is undone; run the same command again."
    )


@contextlib.contextmanager
def taken_from(manifest_path: str) -> Iterator[None]:
    """Inside, something is made of what a manifest says, and of nothing else.

    Raises:
        DamagedError: it does not say it, or nonsense.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise DamagedError(f"{manifest_path} is malformed: {error!r}. Verify the database.") from error


@dataclass(frozen=True)
class Manifest:
    """An immutable picture of ``manifest.json``. `replace` it and `save` to change what exists."""

    config: dict[str, Any] = field(default_factory=dict)
    fingerprints: dict[str, Any] = field(default_factory=dict)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    stages: dict[str, StageState] = field(default_factory=dict)
    tables: dict[str, tuple[Shard, ...]] = field(default_factory=dict)
    software: dict[str, str] = field(default_factory=dict)
    version: Version = field(default_factory=Version)
    versions: tuple[KeptVersion, ...] = ()
    """Those that can be opened, this one among them once there are several; empty in a version's own manifest."""
    fenced: int = 0
    """How often a writer took over from one that may wake up again: what that one knew is not this manifest then, and
    it can write none in its place. In ``manifest.json`` alone."""
    used: dict[str, int] = field(default_factory=dict)
    """The highest ``version`` and the first free document ``shard`` of versions that were retired though they were the
    newest: ids are never used again. In ``manifest.json`` alone."""

    def shards(self, table: str) -> tuple[Shard, ...]:
        """Recorded shards of a table in order of number; empty where the table is not built."""
        return self.tables.get(table, ())

    @property
    def reports(self) -> list[str]:
        """Relative paths of what its stages left for people to read."""
        recorded = [stage for stage in STAGE_REPORTS if stage in self.stages]
        return [self.stages[s].report(s) for s in recorded if REPORT_SHA256 in self.stages[s].details]

    @property
    def left_out(self) -> tuple[Shard, ...]:
        """The shards of ``deleted`` that the index was made without."""
        return self._left_out("index")

    @property
    def passed_over(self) -> tuple[Shard, ...]:
        """The shards of ``deleted`` that were there when neighbours were last written: of those alone, rows that were
        written before may name something."""
        return tuple(sorted({*self.left_out, *self._left_out("neighbours")}))

    def _left_out(self, stage: str) -> tuple[Shard, ...]:
        state = self.stages.get(stage)
        known = state.made_from.get(LEFT_OUT, {}) if state is not None else {}
        return tuple(shard for shard in self.shards("deleted") if known.get(shard.path) == shard.sha256)

    @property
    def has_finished_documents(self) -> bool:
        """Whether the recorded documents are finished: of an earlier chunk stage too, while it is made again."""
        state = self.stages.get("corpus")
        return state is not None and documents_fingerprint(self.shards("documents")) != state.details.get("documents")

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
        """What ``manifest.json`` holds. ``checksum`` is the `fingerprint` of all the rest."""
        content = {
            "format": {"name": FORMAT_NAME, "schema_version": SCHEMA_VERSION},
            "config": self.config,
            "fingerprints": self.fingerprints,
            "inputs": self.inputs,
            "stages": {name: asdict(self.stages[name]) for name in RECORDED_STAGES if name in self.stages},
            "tables": {
                name: {"shards": [shard.as_json() for shard in self.tables[name]]}
                for name in TABLES
                if name in self.tables
            },
            "software": self.software,
            "version": asdict(self.version),
            "versions": [kept.as_json() for kept in self.versions],
            **({"fenced": self.fenced} if self.fenced else {}),
            **({"used": self.used} if self.used else {}),
        }
        # Of the content as it is read back, where a number that was a key is text, and sorted as such.
        return {**content, "checksum": fingerprint(json.loads(json.dumps(content)))}

    def as_bytes(self) -> bytes:
        """The file ``manifest.json``. Raises ValueError for what JSON or UTF-8 lacks."""
        return json_bytes(self.as_json())

    @property
    def own(self) -> "Manifest":
        """What a version's own manifest says: nothing of other versions and writers."""
        return replace(self, versions=(), fenced=0, used={})

    def beside(self, pointer: "Manifest") -> "Manifest":
        """This version as ``manifest.json`` says it, beside all else that ``pointer`` says."""
        return replace(self, versions=pointer.versions, fenced=pointer.fenced, used=pointer.used)

    def save(self, storage: Storage, before: "Manifest | None") -> None:
        """Replace ``manifest.json`` atomically, then its copy. Needs the build lock.

        Args:
            storage: the database.
            before: the manifest that is there; None where there is none.

        Raises:
            LockedError: another one is there by now: this writer was suspended, and another took over.
        """
        data = self.as_bytes()
        # The one that counts comes first, so that a copy is never alone unless something was lost. A kill between the
        # two leaves a copy that is one save old: the next build writes it anew before it changes anything else. Were
        # the first lost before that, the copy would still do: what it names is deleted or overwritten only after both
        # were written, and what it does not name yet is made again.
        if not storage.exchange(MANIFEST_NAME, None if before is None else before.as_bytes(), data):
            raise changed_meanwhile(storage)
        storage.commit_bytes(MANIFEST_COPY, data)

    @staticmethod
    def parse(data: Any, where: str) -> "Manifest":
        """Read a manifest's JSON.

        Raises:
            InputError: it is not a retrodb manifest.
            MismatchError: it was written by a later schema version.
            DamagedError: it is one, but malformed; or an object with nothing in it, which is nobody's.
        """
        if data == {}:
            raise DamagedError(f"{where} is empty.")
        if not isinstance(data, dict) or not isinstance(data.get("format"), dict):
            raise InputError(f"{where} is not a retrodb manifest.")
        if data["format"].get("name") != FORMAT_NAME:
            raise InputError(f"{where} is not a retrodb manifest (format {data['format'].get('name')!r}).")
        version = data["format"].get("schema_version")
        if type(version) is not int or version < 1:
            raise DamagedError(f"{where} is malformed: its schema version is {version!r}.")
        if version > SCHEMA_VERSION:
            raise MismatchError(
                f"{where} has schema version {version}; this retrodb reads up to {SCHEMA_VERSION}: install a newer one."
            )
        try:
            return Manifest(
                config=dict(data["config"]),
                fingerprints=dict(data["fingerprints"]),
                inputs=[dict(entry) for entry in data["inputs"]],
                stages={name: StageState.parse(state) for name, state in data["stages"].items()},
                tables={
                    name: tuple(Shard.parse(entry) for entry in table["shards"])
                    for name, table in data["tables"].items()
                },
                software=dict(data["software"]),
                version=Version.parse(data["version"]),
                versions=tuple(KeptVersion.parse(entry) for entry in data["versions"]),
                fenced=int(data.get("fenced", 0)),
                used={str(name): int(number) for name, number in data.get("used", {}).items()},
            )
        except DamagedError as error:
            raise DamagedError(f"{where}: {error}") from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DamagedError(f"{where} is malformed: {error!r}.") from error

    @staticmethod
    def load(storage: Storage) -> "Manifest | None":
        """The database's manifest as a reader takes it, or None where there is none.

        The checksum is not looked at: what can be read is read.

        Raises:
            InputError, MismatchError, DamagedError: as `parse` does.
        """
        try:
            data = storage.read_json(MANIFEST_NAME)
            return None if data is None else Manifest.parse(data, storage.describe(MANIFEST_NAME))
        except DamagedError as error:
            raise DamagedError(f"{error} {_MENDED_BY_BUILD}") from error

    @staticmethod
    def load_whole(storage: Storage, name: str = MANIFEST_NAME) -> "Manifest | None":
        """The manifest in the file ``name``, proved to be what was saved, or None where there is no such file.

        Raises:
            InputError, MismatchError: as `parse` does.
            DamagedError: likewise; or any bit of the file is not as `save` wrote it.
        """
        data = storage.read_if_there(name)
        return None if data is None else _parse_whole(data, storage.describe(name))

    @staticmethod
    def recover(storage: Storage) -> "Manifest | None":
        """The manifest that a build goes on from: ``manifest.json``, else its copy. None where there is no database.

        Writes nothing. A whole ``manifest.json`` always wins, whatever the copy says.

        Raises:
            InputError: ``manifest.json`` is another program's.
            MismatchError: it, or the copy that it has to be put back from, was written by a later schema version.
            DamagedError: neither is whole.
        """
        damage = None
        try:
            if (manifest := Manifest.load_whole(storage)) is not None:
                return manifest
        except DamagedError as error:
            damage = error
        copy = storage.read_if_there(MANIFEST_COPY)
        if damage is None and (copy is None or _OWN_MARK not in copy):
            return None  # a file of that name alone may well be another program's
        lost = damage or f"{storage.describe(MANIFEST_NAME)} is missing."
        if copy is None:
            raise DamagedError(f"{lost} There is no copy of it. {_REMEDY}")
        try:
            return _parse_whole(copy, storage.describe(MANIFEST_COPY))
        except MismatchError:
            raise
        except (InputError, DamagedError) as error:
            raise DamagedError(f"{lost} Its copy does not hold either: {error} {_REMEDY}") from error


def _parse_whole(data: bytes, where: str) -> Manifest:
    """Parse a manifest that is byte for byte what saving it gives: no checksum alone would prove spaces or a key twice.

    Raises:
        InputError, MismatchError: as `Manifest.parse` does.
        DamagedError: likewise; or it is not what was saved.
    """
    try:
        content = json.loads(data)
        manifest = Manifest.parse(content, where)
        if manifest.as_bytes() == data:
            return manifest
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{where} is not valid JSON ({error}).") from error
    stated, found = str(content.get("checksum", "missing")), manifest.as_json()["checksum"]
    raise DamagedError(
        f"{where} is not what was saved: its checksum is {stated[:16]}, that of what it says {found[:16]}."
    )
