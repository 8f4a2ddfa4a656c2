"""The manifest in itself, and every file it records: there, whole, of the recorded bytes, and none besides."""

import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Final

from retrodb.encoding import EncoderIdentity
from retrodb.errors import RetrodbError
from retrodb.lock import LOCK_NAME
from retrodb.manifest import (
    FIRST_VERSION,
    MANIFEST_COPY,
    MANIFEST_NAME,
    REPORT_SHA256,
    SPANS_STAGE,
    STAGE_REPORTS,
    STAGES,
    TABLES,
    TEMPLATE_NUMBER,
    TEMPLATE_PATH,
    VERSIONS_FOLDER,
    Manifest,
    Shard,
    fingerprint,
    is_of_a_table,
    shard_path,
    version_folder,
)
from retrodb.quality.findings import Findings
from retrodb.quality.scene import STAGE_OF, Scene
from retrodb.sizes import count_of
from retrodb.storage import TEMPORARY_PREFIX, Storage
from retrodb.units import stages_of, tables_of, unit_of

_THREADS: Final = 4
_REMOTE_THREADS: Final = 16
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_MOST_ROWS: Final = 1 << 32
_UPSTREAM: Final = {
    "dedup": {"corpus": "corpus"},
    "chunk": {"documents": "dedup"},
    "index": {"embeddings": "embed"},
    "neighbours": {"index": "index"},
    "training": {"neighbour_table": "neighbours"},
    "report": {"neighbour_table": "neighbours"},
    SPANS_STAGE: {"chunks": "chunk"},
}
"""By stage: the part of its ``made_from`` that is the fingerprint of which earlier stage."""


# -- the manifest ------------------------------------------------------------------------------------------------------


def check_saved(storage: Storage, findings: Findings) -> None:
    """``manifest.json`` and its copy are, to the last bit, what was saved, and the same."""
    locked = storage.size(LOCK_NAME) is not None
    manifest = copy = None
    with findings.blaming(MANIFEST_NAME):
        manifest = Manifest.load_whole(storage, MANIFEST_NAME)
    with findings.blaming(MANIFEST_COPY):
        copy = Manifest.load_whole(storage, MANIFEST_COPY)
    if copy is None and not findings.has(MANIFEST_COPY):
        fault = "is missing"
    elif copy is not None and manifest is not None and copy.as_bytes() != manifest.as_bytes():
        fault = f"is not a copy of {MANIFEST_NAME}"
    else:
        return
    if locked:  # a save is under way, or was cut short between the two files
        findings.note(f"{MANIFEST_COPY} {fault}: a build holds this database, or was killed there")
    else:
        findings.add(MANIFEST_COPY, fault)


def check_manifest(manifest: Manifest, findings: Findings) -> None:
    """Stages, tables, numbers, paths and fingerprints agree with each other. Problems are of ``manifest.json``."""
    _check_stages(manifest, findings)
    for table, shards in manifest.tables.items():
        if table not in TABLES:
            findings.add(MANIFEST_NAME, f"records an unknown table {table!r}")
            continue
        _check_entries(table, shards, manifest.version.id, findings)
        if table in STAGE_OF and STAGE_OF[table] not in manifest.stages:
            findings.add(MANIFEST_NAME, f"records {table} though the stage {STAGE_OF[table]} is not done")
    for table in tables_of(unit_of(manifest.config)):
        stage = STAGE_OF.get(table)
        if stage in manifest.stages and table not in manifest.tables:
            findings.add(MANIFEST_NAME, f"says the stage {stage} is done, but records no table {table}")
    _check_numbers(manifest, findings)


def _published(manifest: Manifest) -> Manifest:
    """What a version's own manifest says; but where its encoder is to be found may be known better since."""
    config = {name: value for name, value in manifest.config.items() if name != "encoder"}
    encoder = {name: value for name, value in manifest.fingerprints.get("encoder", {}).items() if name != "name"}
    return replace(manifest.own, config=config, fingerprints={**manifest.fingerprints, "encoder": encoder})


def check_versions(storage: Storage, manifest: Manifest, findings: Findings) -> dict[str, Shard]:
    """Every version that can be opened has the manifest that was published.

    Returns:
        The shards that other versions than ``manifest`` name, and it does not, by path.
    """
    current = Manifest.load(storage) or manifest
    named = {s.path: s for shards in current.tables.values() for s in shards}
    if current.versions and current.version.id not in {kept.version.id for kept in current.versions}:
        findings.add(MANIFEST_NAME, f"does not name its own version {current.version.id} among those there are")
    for kept in current.versions:
        with findings.blaming(kept.path):
            found = Manifest.load_whole(storage, kept.path)
            if found is None:
                findings.add(kept.path, "is missing")
                continue
            if storage.sha256(kept.path) != kept.sha256 or found.version.id != kept.version.id:
                findings.add(kept.path, f"is not the manifest that was published as version {kept.version.id}")
                continue
            if found.version.id == current.version.id and _published(found) != _published(current):
                findings.add(MANIFEST_NAME, f"is not what was published as version {found.version.id} ({kept.path})")
            named |= {s.path: s for shards in found.tables.values() for s in shards}
    own = {shard.path for shards in manifest.tables.values() for shard in shards}
    return {path: shard for path, shard in named.items() if path not in own}


def _check_stages(manifest: Manifest, findings: Findings) -> None:
    done: list[str] = [stage for stage in STAGES if stage in manifest.stages]
    stages = stages_of(unit_of(manifest.config))
    chain = [stage for stage in stages if stage != "training" or stage in done]  # nothing is made from training
    if unknown := sorted(set(manifest.stages) - {*stages, SPANS_STAGE}):
        findings.add(MANIFEST_NAME, f"records unknown stages {unknown}")
    if done != chain[: len(done)]:
        findings.add(MANIFEST_NAME, f"records the stages {done} without those before them")
    if SPANS_STAGE in manifest.stages:
        if "chunk" not in done:
            findings.add(MANIFEST_NAME, f"records the stage {SPANS_STAGE} without the chunks that it is made from")
        done.append(SPANS_STAGE)
    for stage in done:
        state = manifest.stages[stage]
        if state.fingerprint != fingerprint(state.made_from):
            findings.add(MANIFEST_NAME, f"the fingerprint of the stage {stage} is not that of what it was made from")
        for part, upstream in _UPSTREAM.get(stage, {}).items():
            expected = manifest.stages[upstream].fingerprint if upstream in manifest.stages else None
            if expected is not None and state.made_from.get(part) != expected:
                findings.add(MANIFEST_NAME, f"the stage {stage} was made from another {part} than the one recorded")
    recorded = manifest.fingerprints.get("stages", {})
    if done and recorded != {stage: manifest.stages[stage].fingerprint for stage in done}:
        # A repair that undid later stages leaves their fingerprints here until the next stage is recorded.
        stale = {name: value for name, value in recorded.items() if name in done}
        if stale != {stage: manifest.stages[stage].fingerprint for stage in done}:
            findings.add(MANIFEST_NAME, "fingerprints.stages are not the fingerprints of the stages")
    encoder = manifest.fingerprints.get("encoder")
    if encoder is not None:
        with findings.blaming(MANIFEST_NAME):
            if EncoderIdentity.from_json(encoder).fingerprint != encoder["fingerprint"]:
                findings.add(MANIFEST_NAME, "the encoder's fingerprint is not that of what is recorded of it")


def _check_entries(table: str, shards: Iterable[Shard], version: int, findings: Findings) -> None:
    numbers = Counter(shard.number for shard in shards)
    for shard in shards:
        template = table == "index" and shard.number == TEMPLATE_NUMBER
        expected = TEMPLATE_PATH if template else shard_path(table, shard.number)
        made_by, path = _maker(shard.path)
        if path != expected or made_by > version:
            findings.add(MANIFEST_NAME, f"records shard {shard.number} of {table} as {shard.path!r}, not {expected!r}")
        if numbers[shard.number] > 1:
            findings.add(MANIFEST_NAME, f"records shard {shard.number} of {table} {numbers[shard.number]} times")
        if not template and not 0 <= shard.number < 1 << 31:
            findings.add(MANIFEST_NAME, f"records a shard {shard.number} of {table}")
        if not 0 <= shard.rows < _MOST_ROWS or shard.bytes < 0 or not _SHA256.fullmatch(shard.sha256):
            findings.add(MANIFEST_NAME, f"records {shard.path} with {count_of(shard.rows, 'row')}, {shard.bytes} bytes")


def _maker(path: str) -> tuple[int, str]:
    """The version whose build wrote a file, and the file's path inside that version's folder."""
    folder, _, rest = path.partition("/")
    number, _, inside = rest.partition("/")
    return (int(number), inside) if folder == VERSIONS_FOLDER and number.isdigit() else (FIRST_VERSION, path)


def _check_numbers(manifest: Manifest, findings: Findings) -> None:
    """The tables have the same shard numbers as the documents; index shards are counted through."""
    wanted = {shard.number for shard in manifest.shards("documents")}
    for table in ("chunks", "embeddings", "neighbours", "training", "leakage", "spans", "queries"):
        if table not in manifest.tables:
            continue
        numbers = {shard.number for shard in manifest.shards(table)}
        for number in sorted(wanted - numbers):
            findings.add(shard_path(table, number), "is not recorded, though there is such a shard of documents")
        for number in sorted(numbers - wanted):
            findings.add(shard_path(table, number), "is recorded, though there is no such shard of documents")
    for shard in (
        shard for table in ("quarantine", "duplicates", "span_quarantine") for shard in manifest.shards(table)
    ):
        if shard.number not in wanted:
            findings.add(shard.path, "is recorded, though there is no such shard of documents")
    if "index" in manifest.tables:
        numbers = {shard.number for shard in manifest.shards("index")}
        groups = manifest.stages["index"].details.get("shards") if "index" in manifest.stages else None
        held = groups if isinstance(groups, int) else len(numbers) - 1
        expected = {TEMPLATE_NUMBER, *range(held)}
        for number in sorted(expected - numbers):
            path = TEMPLATE_PATH if number == TEMPLATE_NUMBER else shard_path("index", number)
            findings.add(path, "is not recorded, though the index needs it")
        for number in sorted(numbers - expected):
            findings.add(shard_path("index", number), f"is recorded, though the index has {count_of(held, 'shard')}")


# -- files -------------------------------------------------------------------------------------------------------------


def check_files(scene: Scene) -> None:
    """Every recorded file: there, of the recorded size and sha256; and nothing else in the table folders."""
    storage, findings = scene.storage, scene.findings
    others = check_versions(storage, scene.manifest, findings)
    shards = [shard for table in TABLES for shard in scene.manifest.shards(table) if not findings.has(shard.path)]
    shards += others.values()
    with ThreadPoolExecutor(_THREADS if storage.is_local else _REMOTE_THREADS) as pool:
        for shard, fault in zip(shards, pool.map(lambda shard: _fault(storage, shard), shards), strict=True):
            if fault:
                findings.add(shard.path, fault)
    findings.count("files", len(shards))
    findings.count("bytes", sum(shard.bytes for shard in shards))
    _check_tokenizer(scene)
    _check_reports(scene)
    _check_nothing_else(scene, set(others))


def _fault(storage: Storage, shard: Shard) -> str | None:
    """What is wrong with a file, if anything is; reads all its bytes."""
    try:
        return storage.fault(shard)
    except (OSError, RetrodbError) as error:
        return f"cannot be read: {error}"


def _check_tokenizer(scene: Scene) -> None:
    """The tokenizer that a ``train:VOCAB`` build keeps in the database is the one of the fingerprint."""
    recorded = scene.manifest.fingerprints.get("tokenizer") or {}
    path = recorded.get("stored")
    if path is None or not scene.done("chunk"):
        return
    with scene.findings.blaming(str(path)):
        found = scene.storage.sha256_if_there(path)
        if found is None:
            scene.findings.add(path, "is missing")
        elif found != recorded["fingerprint"]:
            scene.findings.add(path, "is not the tokenizer that cut the chunks: its sha256 is another")


def _check_reports(scene: Scene) -> None:
    """The reports of finished stages are those that the build wrote."""
    for stage in STAGE_REPORTS:
        state = scene.manifest.stages[stage] if scene.done(stage) else None
        recorded = state.details.get(REPORT_SHA256) if state is not None else None
        if state is None or recorded is None:
            continue
        path = state.report(stage)
        with scene.findings.blaming(path):
            found = scene.storage.sha256_if_there(path)
            if found is None:
                scene.findings.add(path, "is missing")
            elif found != recorded:
                scene.findings.add(path, "is not the report of this build: its sha256 is another")


def _check_nothing_else(scene: Scene, others: set[str]) -> None:
    """No file in a table's folder, at any depth, that no version records; but what a running build may have there."""
    locked = scene.storage.size(LOCK_NAME) is not None
    if locked:
        scene.findings.note("a build holds this database, or was killed there: its temporary files were passed over")
    recorded = {shard.path for shards in scene.manifest.tables.values() for shard in shards} | others
    current = Manifest.load(scene.storage) or scene.manifest
    for folder in [version_folder(kept.version.id) for kept in current.versions]:
        for table in TABLES if folder else ():
            for path in sorted(set(scene.storage.list_below(f"{folder}/{table}")) - recorded):
                scene.findings.add(path, "is recorded by no version: `retrodb gc` removes it")
    for table in TABLES:
        if table in STAGE_OF and not scene.done(STAGE_OF[table]):
            continue  # what lies there does not exist yet: the build goes on from it, or clears it away
        chunking = table == "documents" and not scene.done("chunk")
        for path in scene.storage.list_below(table):
            temporary = path.rpartition("/")[2].startswith(TEMPORARY_PREFIX)
            if path not in recorded and not (temporary and (locked or chunking)):
                remedy = "" if is_of_a_table(path) else ", and a build leaves it alone: remove it"
                scene.findings.add(path, f"is not recorded in the manifest: it should not be here{remedy}")
