"""What an addition costs follows what is new (realm.md, C2): of what is there, only what changed is made again.

That what comes of it is what a build of everything would make stands in `test_living` and `test_add_duplicates`; that
texts are not read again for near-duplicates, in `test_sketches`.
"""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from retrodb.pipelines import integrity, join, leakage
from retrodb.pipelines.add import add
from retrodb.pipelines.compact import compact
from retrodb.pipelines.living import delete
from retrodb.pipelines.runners import LocalRunner
from support import Progress, build_here, manifest_of, retrodb, rows_of, save_manifest, shards_of

from retrodb.config import RunSettings
from retrodb.corpus import expand_inputs
from retrodb.corpus.quickstart import quickstart_lines
from retrodb.corpus.selection import Selection
from retrodb.errors import DamagedError
from retrodb.storage import Storage

pytestmark = pytest.mark.slow

RUN = RunSettings(workers=1)
SETTINGS = {
    "shard_bytes": "8KiB",
    "precision": "fp32",
    "sequence_tokens": 256,
    "neighbours": 8,
    "training_neighbours": 1,
}


def short_lines() -> list[str]:
    return [line for line in quickstart_lines() if 1_000 < len(line) < 9_000]


@pytest.fixture(scope="module")
def folder(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of real text, in several shards, and a file to add. Not to be changed."""
    folder = tmp_path_factory.mktemp("cost")
    lines = short_lines()
    (folder / "topics.jsonl").write_text("\n".join(lines[3:]) + "\n", encoding="utf-8")
    (folder / "more.jsonl").write_text(lines[0] + "\n", encoding="utf-8")
    build_here([folder / "topics.jsonl"], folder / "db", encoder=str(tiny_encoder), **SETTINGS)
    assert len(shards_of(folder / "db", "training")) > 4
    return folder


@pytest.fixture
def database(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "db", tmp_path / "db"))


def added(database: Path, *inputs: Path) -> None:
    add(Storage(str(database)), expand_inputs([str(path) for path in inputs]).files, RUN, Progress())


def firsts(rows: list[dict[str, Any]], k: int) -> dict[int, list[int | None]]:
    return {row["chunk_id"]: row["neighbour_ids"][:k] for row in rows}


def by_shard(manifest: dict[str, Any], table: str) -> dict[int, str]:
    return {shard["number"]: shard["path"] for shard in manifest["tables"][table]["shards"]}


def same_files(before: dict[str, Any], after: dict[str, Any], table: str) -> set[int]:
    were = by_shard(before, table)
    return {number for number, path in by_shard(after, table).items() if were.get(number) == path}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How many neighbours each shard asks for, for training and leakage together."""
    counted: Counter[int] = Counter()
    real = join.requests

    def counting(ids: np.ndarray, number: int) -> Any:
        counted[number] += int((ids >= 0).sum())
        return real(ids, number)

    monkeypatch.setattr(join, "requests", counting)
    return counted


def assert_asked_for_what_changed(asked: Counter[int], database: Path, before: list[dict[str, Any]]) -> None:
    rows = rows_of(database, "neighbours")
    expected: Counter[int] = Counter()
    changed = 0
    for k in (1, 8):
        were = firsts(before, k)
        for chunk_id, ids in firsts(rows, k).items():
            fresh = were.get(chunk_id) != ids
            expected[chunk_id >> 32] += fresh * sum(one is not None for one in ids)
            changed += fresh
    assert changed < len(rows), "most of it is as it was"
    assert +asked == +expected


def test_add_C2_joins_and_compares_the_chunks_whose_neighbours_changed(
    folder: Path, database: Path, asked: Counter[int]
) -> None:
    before = rows_of(database, "neighbours")
    added(database, folder / "more.jsonl")
    assert_asked_for_what_changed(asked, database, before)


def test_compact_C2_joins_and_compares_the_chunks_whose_neighbours_changed(database: Path, asked: Counter[int]) -> None:
    before = rows_of(database, "neighbours")
    ids = sorted({row["document_id"] for row in rows_of(database, "documents")})[:1]
    delete(Storage(str(database)), Selection(ids=tuple(ids)), Progress())
    compact(Storage(str(database)), RUN, Progress())
    assert_asked_for_what_changed(asked, database, before)


def test_add_C2_a_training_shard_none_of_whose_joined_neighbours_changed_stays_the_file_it_is(
    folder: Path, database: Path
) -> None:
    before = manifest_of(database)
    were = firsts(rows_of(database, "neighbours"), 1)
    added(database, folder / "more.jsonl")
    after = manifest_of(database)
    nearest = firsts(rows_of(database, "neighbours"), 1)
    changed = {chunk_id >> 32 for chunk_id, ids in nearest.items() if were.get(chunk_id) != ids}
    stayed = {n for n, path in by_shard(after, "training").items() if by_shard(before, "training").get(n) == path}
    assert stayed == set(by_shard(after, "training")) - changed
    rewritten = {
        n for n, path in by_shard(after, "neighbours").items() if by_shard(before, "neighbours").get(n) != path
    }
    assert stayed & rewritten, "its later neighbours did"
    assert retrodb("verify", database, "--sample", "1").code == 0


@pytest.mark.parametrize("change", ["add", "compact"])
def test_add_C2_and_compact_C2_by_shuffles_as_on_a_cluster_give_the_same_bytes(
    folder: Path, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    other = Path(shutil.copytree(database, tmp_path / "other"))

    def changed(out: Path) -> None:
        if change == "add":
            added(out, folder / "more.jsonl")
        else:
            delete(Storage(str(out)), Selection(keys=(rows_of(out, "documents")[3]["key"],)), Progress())
            compact(Storage(str(out)), RUN, Progress())

    changed(database)
    with monkeypatch.context() as cluster:
        cluster.setattr(LocalRunner, "is_local", False)
        changed(other)
    ours, theirs = (manifest_of(out)["tables"] for out in (database, other))
    assert {table: held["shards"] for table, held in ours.items()} == {
        table: held["shards"] for table, held in theirs.items()
    }


def test_add_C2_reads_no_tokens_of_a_shard_whose_leakage_stays(
    folder: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "db"
    build_here([folder / "topics.jsonl"], out, encoder=str(tiny_encoder), **{**SETTINGS, "neighbours": 1})
    read: set[int] = set()
    real = leakage.read_chunks

    def noting(storage: Storage, shard: Any) -> Any:
        read.add(shard.number)
        return real(storage, shard)

    monkeypatch.setattr(leakage, "read_chunks", noting)
    before = manifest_of(out)
    added(out, folder / "more.jsonl")
    after = manifest_of(out)
    stayed = same_files(before, after, "leakage")
    assert stayed
    assert read == set(by_shard(after, "leakage")) - stayed


def test_add_C2_tries_the_nprobe_that_the_others_were_searched_with_alone(
    folder: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrodb.pipelines import neighbours

    out = tmp_path / "db"
    settings = {**SETTINGS, "index_key": "IVF16,SQ8", "min_recall": 0.95}
    build_here([folder / "topics.jsonl"], out, encoder=str(tiny_encoder), **settings)
    nprobe = manifest_of(out)["stages"]["neighbours"]["details"]["nprobe"]
    assert nprobe > 1
    tried: list[int] = []
    real = neighbours.nprobe_tasks

    def counting(nprobes: Any, queries: int) -> Any:
        tried.extend(nprobes)
        return real(nprobes, queries)

    monkeypatch.setattr(neighbours, "nprobe_tasks", counting)
    added(out, folder / "more.jsonl")
    details = manifest_of(out)["stages"]["neighbours"]["details"]
    assert (tried, details["nprobe"]) == ([nprobe], nprobe)
    assert details["recall_at_10"] >= 0.95


def test_a_training_shard_that_does_not_hold_what_it_should_is_not_taken_over(folder: Path, database: Path) -> None:
    """Whole by its checksum, but of other chunks: what is made from it is refused, and the current version stays."""
    manifest = manifest_of(database)
    shards = manifest["tables"]["training"]["shards"]
    held = [(database / shard["path"]).read_bytes() for shard in shards]
    recorded = [{name: shard[name] for name in ("rows", "bytes", "sha256")} for shard in shards]
    for at, shard in enumerate(shards):
        (database / shard["path"]).write_bytes(held[at - 1])
        shard.update(recorded[at - 1])
    save_manifest(database, manifest)
    ran = retrodb("add", database, folder / "more.jsonl", "--workers", 1)
    assert ran.code == 4
    assert "of the version before lacks" in ran.err
    assert manifest_of(database)["version"]["id"] == 1


@pytest.mark.parametrize(
    ("change", "table"),
    [
        *(("add", table) for table in ("neighbours", "training", "leakage")),
        *(("compact", table) for table in ("documents", "chunks", "embeddings", "neighbours", "training", "leakage")),
    ],
)
def test_damage_is_not_taken_over_where_a_database_is_too_large_to_be_checked_whole(
    folder: Path, database: Path, monkeypatch: pytest.MonkeyPatch, change: str, table: str
) -> None:
    """One bit of each shard, in a database whose files are looked at by their sizes: rows of a damaged shard would get
    a checksum of their own with the shard that is made from it."""
    monkeypatch.setattr(integrity, "CHECK_ALL_BYTES", 0)
    if change == "compact":
        delete(Storage(str(database)), Selection(keys=(rows_of(database, "documents")[3]["key"],)), Progress())
    before = manifest_of(database)
    for shard in before["tables"][table]["shards"]:
        path = database / shard["path"]
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 1
        path.write_bytes(bytes(data))
    make = {
        "add": lambda: added(database, folder / "more.jsonl"),
        "compact": lambda: compact(Storage(str(database)), RUN, Progress()),
    }
    with pytest.raises(DamagedError, match=rf"{table}/\d+"):
        make[change]()
    assert manifest_of(database) == before


def test_rows_that_were_taken_over_are_taken_over_again(folder: Path, database: Path, tmp_path: Path) -> None:
    for n in range(3):
        more = tmp_path / f"{n}.jsonl"
        more.write_text(short_lines()[n] + "\n", encoding="utf-8")
        added(database, more)
    assert manifest_of(database)["version"]["id"] == 4
    assert retrodb("verify", database, "--sample", "1").code == 0
