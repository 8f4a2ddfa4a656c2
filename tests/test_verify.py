"""`retrodb verify` finds and names what is off: broken files, and whole files that say something untrue."""

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from retrodb.schemas import ID_SHIFT
from support import build_here, manifest_of, retrodb, rows_of, save_manifest, sha256, stamps, vectors_of

import retrodb as retrodb_package
from retrodb.errors import DamagedError, InputError, MismatchError
from retrodb.index import build_index_shard, commit_index_shard
from retrodb.manifest import Manifest
from retrodb.quality import verify as verify_module
from retrodb.quality.recompute import drawn_shards
from retrodb.quality.verify import VerifyReport, verify_database
from retrodb.storage import Storage

Row = dict[str, Any]
K = 6


@pytest.fixture(scope="module")
def whole(quickstart_corpus: Path, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of several shards that nobody changes."""
    out = tmp_path_factory.mktemp("verify") / "db"
    build_here(
        [quickstart_corpus],
        out,
        encoder=str(tiny_encoder),
        shard_bytes="16KiB",
        neighbours=K,
        sequence_tokens=512,
    )
    return out


def test_a_shard_whose_records_were_all_put_aside_is_no_damage(
    quickstart_corpus: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    (tmp_path / "torn.jsonl").write_text('{"id": "torn", "text": ')
    inputs = [quickstart_corpus, tmp_path / "torn.jsonl"]
    build_here(inputs, tmp_path / "db", encoder=str(tiny_encoder), shard_bytes="16KiB")
    assert 0 in [shard["rows"] for shard in manifest_of(tmp_path / "db")["tables"]["training"]["shards"]]
    assert verify(tmp_path / "db", sample=1.0).ok


@pytest.fixture
def database(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return shutil.copytree(whole, tmp_path / "db")


def verify(database: Path, sample: float = 0.0) -> VerifyReport:
    return verify_database(retrodb_package.open(str(database)), sample=sample)


def found(database: Path, path: str, words: str, sample: float = 0.0) -> VerifyReport:
    """The report, after asserting that ``path`` is named with ``words``."""
    report = verify(database, sample)
    assert not report.ok
    assert any(problem.path == path and words in problem.what for problem in report.problems), report.as_json()
    return report


# -- changing a shard so that its checksum is right -------------------------------------------------------------------


def entry_of(manifest: Row, path: str) -> Row:
    return next(s for table in manifest["tables"].values() for s in table["shards"] if s["path"] == path)


def record(database: Path, path: str, rows: int) -> None:
    """Make the manifest agree with the file at ``path``."""
    manifest = manifest_of(database)
    file = database / path
    entry_of(manifest, path).update(rows=rows, bytes=file.stat().st_size, sha256=sha256(file))
    save_manifest(database, manifest)


def rewrite(database: Path, path: str, change: Callable[[list[Row]], list[Row] | None]) -> None:
    """Change rows of a Parquet shard; ``change`` edits them in place, or returns others."""
    table = pq.read_table(database / path)
    rows = table.to_pylist()
    rows = change(rows) or rows
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), database / path, row_group_size=64)
    record(database, path, len(rows))


def chunk_rows(database: Path, number: int = 0) -> list[Row]:
    return pq.read_table(database / f"chunks/{number:05d}.parquet").to_pylist()


# -- whole databases ---------------------------------------------------------------------------------------------------


def test_a_whole_database_is_verified_and_left_as_it_was(whole: Path) -> None:
    before = stamps(whole)
    report = verify(whole, sample=1.0)
    assert (report.ok, report.complete) == (True, True), report.as_json()
    assert stamps(whole) == before
    rows = {table: sum(s["rows"] for s in t["shards"]) for table, t in manifest_of(whole)["tables"].items()}
    assert len(manifest_of(whole)["tables"]["chunks"]["shards"]) > 2
    assert report.checked["chunks"] == rows["chunks"] == report.checked["indexed vectors"]
    assert report.checked["chunks recomputed"] == report.checked["vectors recomputed"] == rows["chunks"]
    assert report.checked["neighbours"] == report.checked["neighbours recomputed"] == rows["chunks"] * K
    assert report.checked["vectors not bit-identical"] == report.checked["distances not bit-identical"] == 0
    assert report.checked["chunks of known leakage"] == report.checked["leakage recomputed"] == rows["chunks"]
    assert report.checked["overlaps derived again"] == rows["chunks"]


@pytest.mark.parametrize(
    "settings",
    [
        {"metric": "ip", "exclude": "none"},
        {"text": False, "index_key": "IVF4,SQ8"},
        {"tokenizer": "encoder"},
        {"tokenizer": "train:300", "neighbours": 400},
    ],
    ids=str,
)
def test_what_any_settings_build_is_whole(
    settings: Row, quickstart_corpus: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    build_here([quickstart_corpus], tmp_path / "db", encoder=str(tiny_encoder), shard_bytes="16KiB", **settings)
    report = verify(tmp_path / "db", sample=0.01)
    assert report.ok, report.as_json()
    assert report.checked["shards recomputed"] == 1
    assert report.checked["vectors recomputed"] > 0


@pytest.mark.parametrize("until", ["corpus", "chunk", "neighbours"])
def test_an_unfinished_database_is_verified_as_far_as_it_goes(
    until: str, quickstart_corpus: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    build_here([quickstart_corpus], tmp_path / "db", encoder=str(tiny_encoder), until=until)
    report = verify(tmp_path / "db", sample=0.5)
    assert (report.ok, report.complete) == (True, False), report.as_json()
    assert "training" in " ".join(report.notes)
    path = "documents/00000.parquet"
    (tmp_path / "db" / path).write_bytes(b"")
    found(tmp_path / "db", path, "0 bytes")


# -- broken files ------------------------------------------------------------------------------------------------------


def recorded_paths(database: Path) -> list[str]:
    return [s["path"] for table in manifest_of(database)["tables"].values() for s in table["shards"]]


def damage(database: Path, dice: random.Random, kind: str) -> set[str]:
    """Do one random thing to the files; the paths that must be named."""
    paths = recorded_paths(database)
    path = dice.choice(paths)
    file = database / path
    data = file.read_bytes()
    if kind == "flip":
        at = dice.randrange(len(data))
        file.write_bytes(data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :])
    elif kind == "truncate":
        file.write_bytes(data[: dice.randrange(len(data))])
    elif kind == "grow":
        file.write_bytes(data + b"\0")
    elif kind == "delete":
        file.unlink()
    elif kind == "extra":
        folder = path.rpartition("/")[0]
        path = folder + dice.choice(["/00999.parquet", "/.tmp-00000.parquet-1f", "/sub/deep/x.npy", "/notes.txt"])
        (database / path).parent.mkdir(parents=True, exist_ok=True)
        (database / path).write_bytes(data)
    else:
        table = path.partition("/")[0]
        others = [p for p in paths if p.startswith(table + "/") and (database / p).read_bytes() != data]
        if not others:
            return damage(database, dice, kind)
        other = dice.choice(others)
        file.write_bytes((database / other).read_bytes())
        (database / other).write_bytes(data)
        return {path, other}
    return {path}


@pytest.mark.parametrize("kind", ["flip", "truncate", "grow", "delete", "extra", "swap"])
def test_every_random_fault_of_a_file_is_found_and_it_alone_is_named(kind: str, whole: Path, tmp_path: Path) -> None:
    for seed in range(20 if kind == "flip" else 8):
        database = shutil.copytree(whole, tmp_path / str(seed), copy_function=shutil.copy)
        named = damage(database, random.Random(f"{kind}-{seed}"), kind)
        report = verify(database)
        assert set(report.paths) == named, (seed, report.as_json())
        assert json.loads((database / "reports/damage.json").read_text()) == {"paths": sorted(named)}
        shutil.rmtree(database)


def test_a_lost_bit_of_the_stored_tokenizer_is_found(
    quickstart_corpus: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    settings = {"encoder": str(tiny_encoder), "tokenizer": "train:300", "until": "chunk"}
    build_here([quickstart_corpus], tmp_path / "db", **settings)
    file = tmp_path / "db" / "tokenizer.json"
    file.write_bytes(file.read_bytes().replace(b'"a"', b'"a "', 1))
    found(tmp_path / "db", "tokenizer.json", "sha256", sample=1.0)


def test_a_build_that_goes_on_meanwhile_is_told_from_damage(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its files that give way were called damaged, and made again by the next build."""
    check = verify_module.check_files

    def rebuild_begins(scene: Any) -> None:
        scene.manifest.without(["report"], ["leakage"]).save(Storage(str(database)), scene.manifest)
        (database / "leakage" / "00000.parquet").unlink()
        check(scene)

    monkeypatch.setattr(verify_module, "check_files", rebuild_begins)
    with pytest.raises(MismatchError, match="a build is at work"):
        verify(database)
    assert not (database / "reports" / "damage.json").exists()


def test_a_database_that_cannot_be_written_is_still_verified(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (database / "chunks" / "00000.parquet").unlink()

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Storage, "commit_json", refuse)
    report = found(database, "chunks/00000.parquet", "missing")
    assert any("could not be written" in note for note in report.notes)


# -- the manifest ------------------------------------------------------------------------------------------------------


def forget(table: str) -> Callable[[Row], object]:
    return lambda manifest: manifest["tables"][table]["shards"].pop(1)


MANIFEST_FAULTS: dict[str, tuple[Callable[[Row], object], str]] = {
    "swapped paths": (lambda m: swap_paths(m, "chunks"), "manifest.json"),
    "a shard twice": (lambda m: m["tables"]["chunks"]["shards"].append(m["tables"]["chunks"]["shards"][0]), "manifest"),
    "a forgotten chunk shard": (forget("chunks"), "chunks/00001.parquet"),
    "a forgotten training shard": (forget("training"), "training/00001.parquet"),
    "a forgotten index shard": (forget("index"), "index/00000.faiss"),
    "an unknown table": (lambda m: m["tables"].update(extra={"shards": []}), "manifest.json"),
    "a table without its stage": (lambda m: m["stages"].pop("training"), "manifest.json"),
    "a stage without the one before": (lambda m: m["stages"].pop("embed"), "manifest.json"),
    "a lost document": (lambda m: m["stages"]["corpus"]["counts"].update({"in": 13}), "manifest.json"),
    "a lost chunk": (lambda m: m["stages"]["chunk"]["counts"].update(chunks=7), "manifest.json"),
    "a lost token": (lambda m: m["stages"]["chunk"]["counts"].update(tokens=7), "manifest.json"),
    "other figures of leakage": (lambda m: m["stages"]["report"]["details"].update(histograms={}), "manifest.json"),
    "another report": (lambda m: m["stages"]["report"]["details"].update(report_sha256=""), "reports/leakage.json"),
    "a changed setting": (lambda m: m["stages"]["neighbours"]["made_from"].update(exclude="none"), "manifest.json"),
    "another encoder": (lambda m: m["fingerprints"]["encoder"].update(pooling="cls"), "manifest.json"),
    "mixed builds": (lambda m: m["fingerprints"]["stages"].update(chunk="0" * 64), "manifest.json"),
    "no chunk size": (lambda m: m["stages"]["chunk"].update(made_from={}), "manifest.json"),
    "a huge size": (lambda m: m["stages"]["neighbours"]["made_from"].update(neighbours=1 << 60), "manifest.json"),
    "a wrong row count": (lambda m: m["tables"]["training"]["shards"][0].update(rows=1), "training/00000.parquet"),
}


def swap_paths(manifest: Row, table: str) -> None:
    first, second = manifest["tables"][table]["shards"][:2]
    first["path"], second["path"] = second["path"], first["path"]


@pytest.mark.parametrize("fault", MANIFEST_FAULTS)
def test_a_manifest_that_contradicts_itself_or_the_shards_is_found(fault: str, database: Path) -> None:
    change, path = MANIFEST_FAULTS[fault]
    manifest = copy.deepcopy(manifest_of(database))
    change(manifest)
    save_manifest(database, manifest)
    assert any(name.startswith(path) for name in verify(database).paths), verify(database).as_json()


@pytest.mark.parametrize(
    "change", [lambda m: m["config"].update(seed=5), lambda m: m.pop("checksum")], ids=["edited", "unsealed"]
)
def test_a_manifest_that_was_edited_by_hand_can_be_read_but_is_not_verified(
    change: Callable[[Row], object], database: Path
) -> None:
    manifest = manifest_of(database)
    change(manifest)
    (database / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    assert retrodb_package.open(str(database)).summary()["chunks"] > 0
    assert found(database, "manifest.json", "checksum").paths == ["manifest.json"]


def test_a_copy_of_the_manifest_that_is_missing_or_another_is_found_unless_a_build_is_at_work(database: Path) -> None:
    copy = database / "reports/manifest.json"
    older = Manifest.load(Storage(str(database))).without(["training"], ["training"]).as_bytes()
    for change, words in ((lambda: copy.write_bytes(older), "not a copy"), (copy.unlink, "missing")):
        change()
        assert found(database, "reports/manifest.json", words).paths == ["reports/manifest.json"]
        (database / "reports/damage.json").unlink()
        (database / ".lock").touch()
        report = verify(database)
        assert report.ok
        assert any("reports/manifest.json" in note and words in note for note in report.notes)
        (database / ".lock").unlink()


def test_a_database_that_has_lost_its_manifest_is_damaged(database: Path) -> None:
    (database / "manifest.json").unlink()
    with pytest.raises(DamagedError, match=r"lost its manifest\.json.*build"):
        retrodb_package.open(str(database))
    shutil.rmtree(database / "reports")
    with pytest.raises(InputError, match="not a retrodb database"):
        retrodb_package.open(str(database))


# -- whole files that say something untrue -----------------------------------------------------------------------------


def own_document(database: Path, rows: list[Row]) -> None:
    chunks = chunk_rows(database)
    row = next(n for n in range(len(chunks) - 1) if chunks[n]["document_id"] == chunks[n + 1]["document_id"])
    rows[row]["neighbour_ids"][0] = chunks[row + 1]["chunk_id"]
    rows[row]["neighbour_document_ids"][0] = chunks[row + 1]["document_id"]


def itself(database: Path, rows: list[Row]) -> None:
    rows[3]["neighbour_ids"][0] = rows[3]["chunk_id"]


def unsorted(database: Path, rows: list[Row]) -> None:
    row = next(r for r in rows if r["distances"][0] != r["distances"][1])
    for name in ("neighbour_ids", "neighbour_document_ids", "distances"):
        row[name][:2] = row[name][1::-1]


def ties_by_descending_id(database: Path, rows: list[Row]) -> None:
    row = next(r for r in rows if r["neighbour_ids"][0] > r["neighbour_ids"][1])
    row["distances"][1] = row["distances"][0]


def twice(database: Path, rows: list[Row]) -> None:
    for name in ("neighbour_ids", "neighbour_document_ids", "distances"):
        rows[5][name][4] = rows[5][name][3]


def no_such_chunk(database: Path, rows: list[Row]) -> None:
    rows[0]["neighbour_ids"][1] = (1 << ID_SHIFT) + 99_999


def no_such_shard(database: Path, rows: list[Row]) -> None:
    rows[0]["neighbour_ids"][1] = 77 << ID_SHIFT


def minus_one(database: Path, rows: list[Row]) -> None:
    rows[0]["neighbour_ids"][K - 1] = -1


def wrong_document(database: Path, rows: list[Row]) -> None:
    rows[0]["neighbour_document_ids"][1] += 1


def fewer_than_there_are(database: Path, rows: list[Row]) -> None:
    for name in ("neighbour_ids", "neighbour_document_ids", "distances"):
        rows[7][name][K - 1] = None
    rows[7]["n_valid"] = K - 1


def untrue_count(database: Path, rows: list[Row]) -> None:
    rows[7]["n_valid"] = K - 1


def null_in_the_middle(database: Path, rows: list[Row]) -> None:
    for name in ("neighbour_ids", "neighbour_document_ids", "distances"):
        rows[7][name][0] = None
    rows[7]["n_valid"] = K - 1


def no_distance(database: Path, rows: list[Row]) -> None:
    rows[7]["distances"][K - 1] = None


def not_a_number(database: Path, rows: list[Row]) -> None:
    rows[7]["distances"][K - 1] = float("nan")


def rows_in_another_order(database: Path, rows: list[Row]) -> list[Row]:
    return [rows[1], rows[0], *rows[2:]]


NEIGHBOUR_FAULTS = {
    own_document: "own document",
    itself: "its own neighbour",
    unsorted: "order of their distances",
    ties_by_descending_id: "order of their ids",
    twice: "twice",
    no_such_chunk: "does not exist",
    no_such_shard: "chunk shard 77, which does not exist",
    minus_one: "negative id",
    wrong_document: "neighbour_document_ids",
    fewer_than_there_are: "what there is to be found",
    untrue_count: "number of neighbours",
    null_in_the_middle: "behind a missing one",
    no_distance: "nulls of ids, document ids and distances disagree",
    not_a_number: "not finite",
    rows_in_another_order: "chunk ids are not those",
}


@pytest.mark.parametrize("fault", NEIGHBOUR_FAULTS, ids=lambda fault: fault.__name__)
def test_a_neighbours_shard_that_breaks_a_rule_is_found(fault: Callable[..., Any], database: Path) -> None:
    path = "neighbours/00000.parquet"
    rewrite(database, path, lambda rows: fault(database, rows))
    assert verify(database).paths == [path]
    found(database, path, NEIGHBOUR_FAULTS[fault])


M = 64


def continuation_across_documents(database: Path, rows: list[Row]) -> None:
    chunks = {chunk["chunk_id"]: chunk for chunk in rows_of(database, "chunks")}
    for row in rows:
        for cell, neighbour in enumerate(row["neighbour_ids"]):
            if neighbour is not None and not row["neighbour_lengths"][2 * cell + 1] and neighbour + 1 in chunks:
                following = chunks[neighbour + 1]
                assert following["document_id"] != chunks[neighbour]["document_id"]
                row["neighbour_lengths"][2 * cell + 1] = following["n_tokens"]
                row["neighbour_tokens"][(2 * cell + 1) * M : (2 * cell + 2) * M] = following["tokens"]
                return
    pytest.fail("no neighbour is the last chunk of its document")


def continuation_left_out(database: Path, rows: list[Row]) -> None:
    cell = next(c for c, length in enumerate(rows[0]["neighbour_lengths"]) if c % 2 and length)
    rows[0]["neighbour_lengths"][cell] = 0
    rows[0]["neighbour_tokens"][cell * M : (cell + 1) * M] = [0] * M


def a_row_dropped(database: Path, rows: list[Row]) -> list[Row]:
    return rows[:-1]


def a_row_twice(database: Path, rows: list[Row]) -> list[Row]:
    return [*rows, rows[-1]]


def a_chunk_twice(database: Path, rows: list[Row]) -> None:
    rows[0]["chunk_ids"][1] = rows[0]["chunk_ids"][0]


def a_wrong_token(database: Path, rows: list[Row]) -> None:
    rows[0]["tokens"][70] ^= 1


def a_wrong_neighbour_token(database: Path, rows: list[Row]) -> None:
    rows[0]["neighbour_tokens"][5] ^= 1


def tokens_of_a_missing_chunk(database: Path, rows: list[Row]) -> None:
    assert rows[-1]["chunk_ids"][-1] is None
    rows[-1]["tokens"][-1] = 9


def another_split(database: Path, rows: list[Row]) -> None:
    rows[-1]["split"] = "validation"


def another_document(database: Path, rows: list[Row]) -> None:
    rows[0]["document_ids"][0] += 1


def another_sum(database: Path, rows: list[Row]) -> None:
    rows[0]["n_tokens"] -= 1


def another_length(database: Path, rows: list[Row]) -> None:
    rows[0]["chunk_lengths"][0] -= 1
    rows[0]["n_tokens"] -= 1


def other_neighbours(database: Path, rows: list[Row]) -> None:
    rows[0]["neighbour_ids"][:2] = rows[0]["neighbour_ids"][1::-1]


def another_count(database: Path, rows: list[Row]) -> None:
    rows[0]["n_valid"][0] = 1


def another_sequence_id(database: Path, rows: list[Row]) -> None:
    rows[1]["sequence_id"] += 5


TRAINING_FAULTS = {
    continuation_across_documents: "those of the continuation",
    continuation_left_out: "those of the continuation",
    a_row_dropped: "in no sequence",
    a_row_twice: "more than once",
    a_chunk_twice: "more than once",
    a_wrong_token: "tokens that are not those of the chunks",
    a_wrong_neighbour_token: "those of the neighbour",
    tokens_of_a_missing_chunk: "tokens that are not those of the chunks",
    another_split: "a split",
    another_document: "document_ids",
    another_sum: "n_tokens",
    another_length: "chunk_lengths",
    other_neighbours: "neighbour_ids",
    another_count: "n_valid",
    another_sequence_id: "sequence_id",
}


@pytest.mark.parametrize("fault", TRAINING_FAULTS, ids=lambda fault: fault.__name__)
def test_a_training_shard_that_is_not_the_join_is_found(fault: Callable[..., Any], database: Path) -> None:
    path = "training/00000.parquet"
    rewrite(database, path, lambda rows: fault(database, rows))
    assert verify(database).paths == [path]
    found(database, path, TRAINING_FAULTS[fault])


LEAKAGE_FAULTS: dict[str, tuple[Callable[[list[Row]], object], str]] = {
    "another chunk": (lambda r: r[1].update(chunk_id=r[1]["chunk_id"] + (1 << ID_SHIFT)), "chunk ids"),
    "an overlap beyond the chunk": (lambda r: some_leak(r).update(overlap=65, leakage=65 / M), "outside 0"),
    "a negative overlap": (lambda r: some_leak(r).update(overlap=-1, leakage=-1 / M), "outside 0"),
    "another quotient": (lambda r: some_leak(r).update(leakage=0.9), "not overlap / m"),
    "no neighbour": (lambda r: some_leak(r).update(neighbour_id=None), "null just where"),
    "a neighbour of nothing": (lambda r: some_leak(r).update(overlap=0, leakage=0.0), "null just where"),
    "another neighbour": (lambda r: some_leak(r).update(neighbour_id=r[0]["chunk_id"]), "one of the first"),
    "too little": (lambda r: leak(some_leak(r), -1), "the tokens do not give"),
    "too much": (lambda r: leak(some_leak(r), 1), "the tokens do not give"),
}


def some_leak(rows: list[Row]) -> Row:
    """A row with an overlap of some tokens, but not of all."""
    return next(row for row in rows if 1 < row["overlap"] < M - 1)


def leak(row: Row, more: int) -> None:
    row.update(overlap=row["overlap"] + more, leakage=(row["overlap"] + more) / M)


@pytest.mark.parametrize("fault", LEAKAGE_FAULTS)
def test_a_leakage_shard_that_breaks_a_rule_is_found(fault: str, database: Path) -> None:
    change, words = LEAKAGE_FAULTS[fault]
    path = "leakage/00000.parquet"
    rewrite(database, path, lambda rows: change(rows) and None)
    assert verify(database).paths == [path]
    found(database, path, words)


def test_a_leak_in_a_row_that_is_not_derived_every_time_is_found_by_recomputing(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrodb.quality import leakage_content

    path = "leakage/00000.parquet"
    monkeypatch.setattr(leakage_content, "_DERIVED_ROWS", 0)
    rewrite(database, path, lambda rows: leak(some_leak(rows), -1))
    assert verify(database).paths == ["manifest.json"], "the histograms alone tell"
    found(database, path, "the tokens do not give", sample=1.0)


CHUNK_FAULTS: dict[str, tuple[Callable[[list[Row]], object], str]] = {
    "an id of another shard": (lambda r: r[-1].update(chunk_id=r[-1]["chunk_id"] + (1 << ID_SHIFT)), "another shard"),
    "ids out of order": (lambda r: r[2].update(chunk_id=r[1]["chunk_id"]), "does not ascend"),
    "a gap in the ids of a document": (lambda r: r[-1].update(chunk_id=r[-1]["chunk_id"] + 5), "not consecutive"),
    "a lost position": (lambda r: r[1].update(position=7), "position"),
    "no first chunk": (lambda r: r[0].update(position=1), "position 0"),
    "an empty chunk": (lambda r: r[2].update(n_tokens=0), "n_tokens outside"),
    "a short chunk in the middle": (lambda r: r[1].update(n_tokens=63, tokens=[*r[1]["tokens"][:63], 0]), "not full"),
    "padding with something": (lambda r: last(r)["tokens"].__setitem__(-1, 3), "padding"),
    "a token outside the vocabulary": (lambda r: r[1]["tokens"].__setitem__(0, 60_000), "vocabulary"),
    "a gap in the text": (lambda r: r[1].update(start=r[1]["start"] + 1), "do not tile"),
    "text that is not covered": (lambda r: r[-1].update(end=r[-1]["end"] - 1), "end with the text"),
    "a document that does not exist": (lambda r: [x.update(document_id=99) for x in r[-1:]], "does not exist"),
}


def last(rows: list[Row]) -> Row:
    """The last chunk of some document, not full."""
    return next(row for row in rows if row["n_tokens"] < M)


@pytest.mark.parametrize("fault", CHUNK_FAULTS)
def test_a_chunk_shard_that_breaks_a_rule_is_found(fault: str, database: Path) -> None:
    change, words = CHUNK_FAULTS[fault]
    rewrite(database, "chunks/00000.parquet", lambda rows: change(rows) and None)
    found(database, "chunks/00000.parquet", words)


DOCUMENT_FAULTS: dict[str, tuple[Callable[[list[Row]], object], str]] = {
    "a changed text": (lambda r: r[0].update(text="X" + r[0]["text"][1:]), "content_hash"),
    "a changed hash": (lambda r: r[0].update(content_hash=bytes(32)), "content_hash"),
    "a lost text": (lambda r: r[0].update(text=None), "null text"),
    "an unknown split": (lambda r: r[0].update(split="test"), "split"),
    "no count of chunks": (lambda r: r[0].update(n_chunks=None), "n_chunks"),
    "an id twice": (lambda r: r[0].update(document_id=r[1]["document_id"]), "does not ascend"),
}


@pytest.mark.parametrize("fault", DOCUMENT_FAULTS)
def test_a_documents_shard_that_breaks_a_rule_is_found(fault: str, database: Path) -> None:
    change, words = DOCUMENT_FAULTS[fault]
    rewrite(database, "documents/00000.parquet", lambda rows: change(rows) and None)
    assert verify(database).paths == ["documents/00000.parquet"]
    found(database, "documents/00000.parquet", words)


def test_a_lost_document_row_is_found(database: Path) -> None:
    rewrite(database, "documents/00000.parquet", lambda rows: rows[:-1])
    assert {"manifest.json", "chunks/00000.parquet"} <= set(verify(database).paths)


def test_validation_documents_in_the_index_the_neighbours_or_training_sequences_are_found(database: Path) -> None:
    rewrite(database, "documents/00001.parquet", lambda rows: rows[0].update(split="validation"))
    report = found(database, "index/00000.faiss", "indexes validation chunks")
    assert any("of the validation split" in problem.what for problem in report.problems)
    assert "training/00001.parquet" in report.paths


EMBEDDING_FAULTS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "not a number": (lambda v: np.where(np.arange(len(v))[:, None] == 3, np.float16("nan"), v), "NaN"),
    "another type": (lambda v: v.astype(np.float32), "float32"),
    "a lost vector": (lambda v: v[:-1], "not float16"),
    "a lost dimension": (lambda v: v[:, :-1], "not float16"),
}


@pytest.mark.parametrize("fault", EMBEDDING_FAULTS)
def test_an_embeddings_shard_that_is_not_one_finite_vector_a_chunk_is_found(fault: str, database: Path) -> None:
    change, words = EMBEDDING_FAULTS[fault]
    path = "embeddings/00001.npy"
    vectors = np.load(database / path)
    np.save(database / path, change(vectors))
    record(database, path, len(vectors))
    assert verify(database).paths == [path]
    found(database, path, words)


def rebuilt_index(database: Path, change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> None:
    """Index shard 0 made anew from changed ids and vectors."""
    db = retrodb_package.open(str(database))
    parts = []
    for shard in db.manifest.shards("chunks"):
        ids = pq.read_table(database / shard.path)["chunk_id"].to_numpy()
        parts.append(change(ids, np.array(db.embeddings(shard.number))))
    template = (database / "index/quantiser.faiss").read_bytes()
    index = build_index_shard(template, parts, parts[0][1].shape[1], "l2")
    commit_index_shard(db.storage, "index/00000.faiss", index)
    record(database, "index/00000.faiss", int(index.ntotal))


INDEX_FAULTS: dict[str, tuple[Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]], str]] = {
    "a chunk left out": (lambda ids, vectors: (ids[1:], vectors[1:]), "does not index"),
    "a chunk twice": (lambda ids, v: (np.concatenate([ids, ids[:1]]), np.concatenate([v, v[:1]])), "twice"),
    "a chunk that does not exist": (lambda ids, vectors: (ids + 1, vectors), "do not exist"),
    "a shard that does not exist": (lambda ids, vectors: (ids + (9 << ID_SHIFT), vectors), "does not exist"),
    "vectors of other chunks": (lambda ids, vectors: (ids, vectors[::-1]), "other vectors"),
}


@pytest.mark.parametrize("fault", INDEX_FAULTS)
def test_an_index_that_does_not_hold_every_chunk_once_is_found(fault: str, database: Path) -> None:
    change, words = INDEX_FAULTS[fault]
    rebuilt_index(database, change)
    found(database, "index/00000.faiss", words)


def test_a_lost_or_changed_column_is_found_and_one_more_is_welcome(database: Path) -> None:
    path = "neighbours/00000.parquet"
    table = pq.read_table(database / path)

    def write(changed: pa.Table) -> None:
        pq.write_table(changed, database / path)
        record(database, path, changed.num_rows)

    write(table.append_column("mood", pa.array(["fine"] * table.num_rows)))
    assert verify(database).ok
    write(table.drop_columns("n_valid"))
    found(database, path, "no column 'n_valid'")
    write(table.set_column(table.schema.get_field_index("n_valid"), "n_valid", table["n_valid"].cast(pa.int64())))
    found(database, path, "int64, not int16")
    write(table.append_column("n_valid", table["n_valid"]))
    found(database, path, "more than once")


# -- recomputing -------------------------------------------------------------------------------------------------------


def test_wrong_distances_are_found_by_recomputing_them(database: Path) -> None:
    path = "neighbours/00000.parquet"
    rewrite(database, path, lambda rows: rows[4]["distances"].__setitem__(-1, rows[4]["distances"][-1] * 1.001))
    assert verify(database).ok
    assert found(database, path, "not those of the stored vectors", sample=1.0).paths == [path]


def test_neighbours_that_are_not_the_nearest_are_found_by_brute_force(database: Path) -> None:
    path = "neighbours/00000.parquet"

    def leave_out_the_best(rows: list[Row]) -> None:
        rows[4]["neighbour_ids"].pop(0), rows[4]["neighbour_document_ids"].pop(0), rows[4]["distances"].pop(0)
        chunks, vectors = rows_of(database, "chunks"), vectors_of(database).astype(np.float32)
        taken = {*rows[4]["neighbour_ids"], rows[4]["chunk_id"]}
        far = []
        for chunk, vector in zip(chunks, vectors, strict=True):
            distance = float(((vectors[4] - vector) ** 2).sum())
            if chunk["document_id"] != chunks[4]["document_id"] and chunk["chunk_id"] not in taken:
                far.append((distance, chunk["chunk_id"], chunk["document_id"]))
        distance, chunk_id, document_id = max(far)
        rows[4]["neighbour_ids"].append(chunk_id)
        rows[4]["neighbour_document_ids"].append(document_id)
        rows[4]["distances"].append(distance)

    rewrite(database, path, leave_out_the_best)
    found(database, path, "not the nearest of all chunks", sample=1.0)


def test_vectors_of_other_text_are_found_by_embedding_again(database: Path) -> None:
    path = "embeddings/00000.npy"
    vectors = np.load(database / path)
    np.save(database / path, vectors[::-1])
    record(database, path, len(vectors))
    found(database, path, "not what", sample=1.0)


def test_vectors_that_another_processor_rounds_otherwise_are_only_noted(database: Path) -> None:
    path = "embeddings/00000.npy"
    vectors = np.load(database / path)
    bits = vectors.view(np.uint16).copy()
    bits[2, 5] ^= 1  # the last bit of the mantissa
    np.save(database / path, bits.view(np.float16))
    record(database, path, len(vectors))
    report = verify(database, sample=1.0)
    assert path not in report.paths
    assert report.checked["vectors not bit-identical"] == 1
    assert any("not bit-identical" in note for note in report.notes)


def test_tokens_of_another_text_are_found_by_cutting_it_again(database: Path) -> None:
    path = "chunks/00000.parquet"
    rewrite(database, path, lambda rows: rows[0]["tokens"].__setitem__(0, rows[0]["tokens"][0] ^ 1))
    assert path not in verify(database).paths
    found(database, path, "tokens are not what", sample=1.0)


def test_tokens_are_checked_against_the_content_hash_where_the_text_is_not_kept(
    quickstart_corpus: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    database, path = tmp_path / "db", "chunks/00000.parquet"
    build_here([quickstart_corpus], database, encoder=str(tiny_encoder), text=False, until="embed")
    rewrite(database, path, lambda rows: rows[0]["tokens"].__setitem__(0, rows[0]["tokens"][0] ^ 1))
    found(database, path, "content_hash", sample=1.0)


def test_the_sample_is_seeded_and_never_empty() -> None:
    numbers = list(range(100))
    assert drawn_shards(numbers, 0.1, seed=3) == drawn_shards(numbers, 0.1, seed=3)
    assert drawn_shards(numbers, 0.1, seed=3) != drawn_shards(numbers, 0.1, seed=4)
    assert len(drawn_shards(numbers, 0.1, seed=0)) == 10
    assert len(drawn_shards(numbers, 1e-9, seed=0)) == 1
    assert drawn_shards(numbers, 1.0, seed=0) == numbers
    assert drawn_shards([], 0.5, seed=0) == []


def test_a_sample_without_the_encoder_is_refused_and_not_passed_over(
    database: Path, tmp_path: Path, tiny_encoder: Path
) -> None:
    manifest = manifest_of(database)
    manifest["fingerprints"]["encoder"]["name"] = str(tmp_path / "gone")  # a name is no part of a fingerprint
    save_manifest(database, manifest)
    with pytest.raises(InputError):
        verify(database, sample=0.5)
    (database / "chunks/00000.parquet").unlink()
    report = found(database, "chunks/00000.parquet", "missing", sample=0.5)
    assert any("nothing was recomputed" in note for note in report.notes)


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_line_says_so_with_its_exit_code(copied: Path) -> None:
    ran = retrodb("verify", copied)
    assert (ran.code, ran.err) == (0, "")
    ran = retrodb("verify", copied, "--sample", "0.01", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["ok"]
    assert ran.json["checked"]["vectors recomputed"] > 0
    assert ran.json["checked"]["vectors not bit-identical"] == 0, "on the machine that made them they are the same"
    file = copied / "embeddings/00000.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    ran = retrodb("verify", copied)
    assert ran.code == 4
    assert "embeddings/00000.npy" in ran.err
    ran = retrodb("verify", copied, "--json")
    assert ran.code == 4
    assert [problem["path"] for problem in ran.json["problems"]] == ["embeddings/00000.npy"]
    (copied / "manifest.json").write_text("{ half")
    ran = retrodb("verify", copied)
    assert (ran.code, "manifest.json" in ran.err) == (DamagedError.exit_code, True)
