"""The space of deleted documents is returned: what is left keeps its ids, and is what a build without them would be.

The labels C1 and C2 are those of the requirements of REALM mode.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support import (
    Progress,
    Running,
    build_here,
    collected,
    make_tiny_encoder,
    manifest_of,
    near_duplicates_of,
    retrodb,
    rows_of,
    save_manifest,
    shards_of,
    stamps,
    table_of,
    traces,
    values_in,
    vectors_of,
    write_jsonl,
)

import retrodb as package
from retrodb.config import RunSettings
from retrodb.corpus.quickstart import quickstart_lines
from retrodb.corpus.selection import Selection
from retrodb.errors import DamagedError, InputError, LockedError
from retrodb.lock import writer_lock
from retrodb.quality.verify import verify_database
from retrodb.spans import SpanSettings
from retrodb.storage import Storage
from retrodb.training.table import TrainingTable

SETTINGS = {"shard_bytes": "16KiB", "sequence_tokens": 256, "neighbours": 4}
VICTIMS = (1, 6)
"""Documents, by their place, that most tests delete: of two shards of several."""


def topics(folder: Path, lines: list[str], name: str = "topics.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """Thirteen topics of real text."""
    return [line for line in quickstart_lines() if 2_000 < len(line) < 8_000][:13]


@pytest.fixture(scope="module")
def first(lines: list[str], tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten topics in several shards. Do not change it."""
    folder = tmp_path_factory.mktemp("compaction")
    build_here([topics(folder, lines[:10])], folder / "db", encoder=str(tiny_encoder), **SETTINGS)
    return folder / "db"


@pytest.fixture
def database(first: Path, tmp_path: Path) -> Path:
    """A copy of `first` to be changed."""
    return shutil.copytree(first, tmp_path / "db")


def deleted(database: Path, *places: int) -> list[int]:
    """Delete documents by their place in the table, in this process: their ids."""
    from retrodb.pipelines.living import delete

    ids = table_of(database, "documents")["document_id"].to_numpy()[list(places)].tolist()
    delete(Storage(str(database)), Selection(ids=tuple(ids)), Progress())
    return ids


def compacted(database: Path) -> Any:
    from retrodb.pipelines.compact import compact

    return compact(Storage(str(database)), RunSettings(workers=1), Progress())


def problems(database: Path, version: int | None = None) -> list[str]:
    report = verify_database(package.open(str(database), version=version), 1.0)
    return [f"{found.path}: {found.what}" for found in report.problems]


def brute_force(database: Path, queries: np.ndarray, own: np.ndarray, k: int) -> list[list[int]]:
    """Chunk ids by distance, with nothing of retrodb; none of the query's own document."""
    chunks = table_of(database, "chunks")
    ids, owners = chunks["chunk_id"].to_numpy(), chunks["document_id"].to_numpy()
    vectors = vectors_of(database).astype(np.float32)
    found = []
    for query, document in zip(queries.astype(np.float32), own, strict=True):
        there = owners != document
        distances = ((vectors[there] - query) ** 2).sum(1)
        found.append(ids[there][np.lexsort((ids[there], distances))][:k].tolist())
    return found


def test_compact_C2_what_is_left_is_what_a_build_without_the_documents_has(database: Path, tmp_path: Path) -> None:
    before = {table: table_of(database, table) for table in ("documents", "chunks", "neighbours")}
    vectors = vectors_of(database)
    gone = deleted(database, *VICTIMS)
    pinned = package.open(str(database))
    named = before["neighbours"].to_pylist()
    out = np.isin(before["chunks"]["document_id"].to_numpy(), gone)
    lost = sum(not set(row["neighbour_document_ids"]).isdisjoint(gone) for row in named)
    lost -= sum(
        not set(row["neighbour_document_ids"]).isdisjoint(gone) for row, own in zip(named, out, strict=True) if own
    )

    done = compacted(database)
    assert (done.version, done.documents, done.chunks, done.searched) == (3, 2, int(out.sum()), lost)
    assert done.bytes_after < done.bytes_before
    kept = ~np.isin(before["documents"]["document_id"].to_numpy(), gone)
    assert table_of(database, "documents").equals(before["documents"].filter(kept)), "ids stay"
    assert table_of(database, "chunks").equals(before["chunks"].filter(~out))
    assert np.array_equal(vectors_of(database), vectors[~out])
    chunks = table_of(database, "chunks")
    rows = rows_of(database, "neighbours")
    assert [row["chunk_id"] for row in rows] == chunks["chunk_id"].to_pylist()
    expected = brute_force(database, vectors_of(database), chunks["document_id"].to_numpy(), 4)
    assert [row["neighbour_ids"] for row in rows] == expected

    db = package.open(str(database))
    assert len(db.deletions) == 0
    assert "deleted" not in db.manifest.tables
    assert db.summary()["documents"] | {"near_duplicates": None} == {
        "in": 10,
        "kept": 8,
        "dropped": {"empty": 0, "deleted": 2},
        "quarantined": 0,
        "validation": 0,
        "deleted": 0,
        "near_duplicates": None,
    }
    query = vectors[int(np.flatnonzero(out)[0])]
    assert [hit.chunk_id for hit in db.search(query, k=30)] == brute_force(database, query[None], [-1], 30)[0]
    for row in rows[::7]:
        assert [found.chunk_id for found in db.neighbours(row["chunk_id"])] == row["neighbour_ids"]
        assert db.chunk(row["chunk_id"]).text
    with pytest.raises(InputError, match="there is no id"):
        db.document(gone[0])
    stream = [sample["chunk_ids"].tolist() for sample in db.training(split=None)]
    assert sorted(c for row in stream for c in row if c >= 0) == chunks["chunk_id"].to_pylist()
    pages = TrainingTable(db.storage, db.manifest, str(tmp_path / "cache"), neighbours=2)
    assert [row["chunk_ids"].tolist() for row in (pages[at] for at in range(len(pages)))] == stream
    assert pinned.version == 2
    assert pinned.search(query, k=3), "who reads version 2 goes on with it"
    assert problems(database) == problems(database, version=2) == problems(database, version=1) == []


def test_compact_C2_writes_only_what_changed(database: Path) -> None:
    before, files = manifest_of(database)["tables"], stamps(database)
    gone = deleted(database, VICTIMS[0])
    done = compacted(database)
    now = manifest_of(database)["tables"]
    number = gone[0] >> 32
    for table in ("documents", "chunks", "embeddings"):
        changed = [
            old["number"] for old, new in zip(before[table]["shards"], now[table]["shards"], strict=True) if old != new
        ]
        assert changed == [number], table
    for table in ("neighbours", "training", "leakage"):
        moved = {
            old["number"] for old, new in zip(before[table]["shards"], now[table]["shards"], strict=True) if old != new
        }
        named = {
            shard["number"]
            for shard in before["neighbours"]["shards"]
            for row in pq.read_table(database / shard["path"]).to_pylist()
            if gone[0] in row["neighbour_document_ids"]
        }
        assert moved == named | {number}, table
    assert len(before["documents"]["shards"]) > 2
    written = [
        path
        for path in stamps(database)
        if path.startswith("versions/3/") and path.endswith(("parquet", "npy", "faiss"))
    ]
    assert done.shards == len(written)
    assert {path: stamp for path, stamp in stamps(database).items() if path in files and "manifest" not in path} == {
        path: stamp for path, stamp in files.items() if "manifest" not in path
    }, "nothing of the old versions is written"


def named_files(database: Path) -> list[Path]:
    manifest = manifest_of(database)
    paths = {shard["path"] for table in manifest["tables"].values() for shard in table["shards"]}
    reports = {state["details"].get("report_path") for state in manifest["stages"].values()} - {None}
    return [database / path for path in sorted(paths | reports)]


def test_compact_C2_leaves_no_byte_of_a_deleted_document(database: Path) -> None:
    of_it = of_victim(database)
    assert {"00000.parquet", "00000.npy", "00000.faiss"} <= set(traces(named_files(database), *of_it))
    deleted(database, *VICTIMS)
    compacted(database)
    assert traces(named_files(database), *of_it) == []
    assert problems(database) == []
    deleted(database, 0)
    deleted(database, 1)  # the newest three versions are kept: those that name the document are not among them now
    ran = retrodb("gc", database, "--json")
    assert ran.json["retired"] == [1, 2]
    assert traces(every_file(database), *of_it) == []
    assert problems(database) == []


def of_victim(database: Path) -> tuple[str, np.ndarray, np.ndarray]:
    """Text, whole chunks of tokens and vectors of the first victim."""
    victim = table_of(database, "documents").to_pylist()[VICTIMS[0]]
    own = table_of(database, "chunks")["document_id"].to_numpy() == victim["document_id"]
    tokens = [row["tokens"] for row in table_of(database, "chunks").filter(own).to_pylist()]
    return victim["text"], np.array(tokens, dtype=np.uint16)[:-1], vectors_of(database)[own]


def every_file(database: Path) -> list[Path]:
    return [path for path in database.rglob("*") if path.is_file()]


def forgotten(database: Path) -> tuple[int, list[int], list[int]]:
    """``retrodb gc --forget``: its exit code, and the versions that it retired and left."""
    ran = retrodb("gc", database, "--forget", "--json")
    assert "Traceback" not in ran.err
    return ran.code, ran.json["retired"], ran.json["in_use"]


def test_forget_leaves_no_byte_of_a_deleted_document_anywhere_at_once(
    database: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    """Also of what killed runs left: of an unpublished version, and beside the tables."""
    from retrodb.pipelines.refresh import refresh

    of_it = of_victim(database)
    deleted(database, *VICTIMS)
    compacted(database)
    refresh(
        Storage(str(database)), str(make_tiny_encoder(tmp_path / "other", seed=5)), RunSettings(workers=1), Progress()
    )
    for path, of in (
        ("versions/9/embeddings/00000.npy", "embeddings/00000.npy"),
        (".build/chunk-1/documents/00000.parquet", "documents/00000.parquet"),
        ("chunks/.tmp-00000.parquet", "chunks/00000.parquet"),
    ):
        (database / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(database / of, database / path)
    assert {"00000.parquet", "00000.npy", "00000.faiss"} <= set(traces(every_file(database), *of_it))
    assert forgotten(database) == (0, [1, 2], [])
    assert traces(every_file(database), *of_it) == []
    assert [entry["version"]["id"] for entry in manifest_of(database)["versions"]] == [3, 4], "they never had it"
    assert problems(database) == problems(database, version=3) == []
    before = stamps(database)
    assert forgotten(database) == (0, [], [])
    assert stamps(database) == before


def test_forget_leaves_a_version_in_use_and_says_which(database: Path) -> None:
    of_it = of_victim(database)
    reader = package.open(str(database))
    found = reader.search("how are names bound", k=5)
    deleted(database, *VICTIMS)
    compacted(database)
    ran = retrodb("gc", database, "--forget")
    assert ran.code == 6
    assert "what is deleted is still in version 1, open in a reader. End who reads it" in ran.err
    assert [entry["version"]["id"] for entry in manifest_of(database)["versions"]] == [1, 3]
    assert reader.search("how are names bound", k=5) == found
    reader.close()
    assert forgotten(database) == (0, [1], [])
    assert traces(every_file(database), *of_it) == []
    assert problems(database) == []


def test_forget_without_a_compaction_is_refused_and_changes_nothing(database: Path) -> None:
    deleted(database, *VICTIMS)
    before = stamps(database)
    ran = retrodb("gc", database, "--forget")
    assert ran.code == 3, ran.err
    assert "2 deleted documents are" in ran.err
    assert "run `retrodb compact` first" in ran.err
    assert stamps(database) == before


def test_forget_killed_between_the_pointer_and_the_files_is_finished_by_the_next(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(storage: Storage, *paths: str) -> None:
        raise Killed

    of_it = of_victim(database)
    deleted(database, *VICTIMS)
    compacted(database)
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete", killed)
        with pytest.raises(Killed):
            collected(Storage(str(database)), forget=True)
    assert traces(every_file(database), *of_it)
    assert package.open(str(database)).search("how are names bound", k=5)
    assert collected(Storage(str(database)), forget=True).files > 0
    assert traces(every_file(database), *of_it) == []
    assert problems(database) == []


def test_compact_C2_killed_leaves_one_version_and_goes_on(database: Path) -> None:
    deleted(database, *VICTIMS)
    undisturbed = shutil.copytree(database, database.parent / "undisturbed")
    compacted(undisturbed)
    for moment in ("chunks", "neighbours", "training"):
        running = Running.start("compact", database, "--workers", 1)
        running.wait_for((database / "versions" / "3" / moment).exists)
        running.kill()
        assert package.open(str(database)).version == 2
        assert problems(database) == []
    ran = retrodb("compact", database, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["version"] == 3
    ours, theirs = manifest_of(database)["tables"], manifest_of(undisturbed)["tables"]
    assert ours == theirs
    assert problems(database) == []
    assert not list((database / "versions/3").rglob(".build"))


def test_compact_of_all_that_has_a_chunk_is_refused_and_says_so(tiny_encoder: Path, tmp_path: Path) -> None:
    """A document without a token is left, but nothing that could be retrieved."""
    records = [{"id": "full", "text": "A text of a few words."}, {"id": "void", "text": "\u200b"}]
    build_here(
        [write_jsonl(tmp_path / "in.jsonl", records)], tmp_path / "db", encoder=str(tiny_encoder), tokenizer="encoder"
    )
    deleted(tmp_path / "db", 0)
    with pytest.raises(InputError, match="every document of .* that has a chunk is deleted"):
        compacted(tmp_path / "db")
    assert [document.key for document in package.open(str(tmp_path / "db")).documents()] == ["void"]


def test_compact_of_a_database_without_deletions_changes_nothing(database: Path) -> None:
    before = stamps(database)
    done = compacted(database)
    assert (done.version, done.documents, done.shards) == (1, 0, 0)
    assert stamps(database) == before
    deleted(database, 0)
    compacted(database)
    before = stamps(database)
    assert compacted(database).version == 3
    assert stamps(database) == before


def test_a_compaction_that_cannot_be_meant_changes_nothing(
    database: Path, lines: list[str], tiny_encoder: Path, tmp_path: Path
) -> None:
    ids = deleted(database, *range(10))
    assert len(ids) == 10
    before = stamps(database)
    with pytest.raises(InputError, match=r"every document .* is deleted: nothing would be left"):
        compacted(database)
    with writer_lock(Storage(str(database))), pytest.raises(LockedError):
        compacted(database)
    assert stamps(database) == before
    with pytest.raises(InputError, match="is not a retrodb database"):
        compacted(tmp_path / "nothing")
    build_here([topics(tmp_path, lines[:2])], tmp_path / "part", encoder=str(tiny_encoder), until="chunk", **SETTINGS)
    ran = retrodb("compact", tmp_path / "part")
    assert (ran.code, "run its build to the end before it is compacted" in ran.err) == (3, True), ran.err


def test_compact_C2_what_comes_after_it_works(
    database: Path, lines: list[str], tiny_encoder: Path, tmp_path: Path
) -> None:
    from retrodb.pipelines.add import add
    from retrodb.pipelines.refresh import refresh

    from retrodb.corpus import expand_inputs

    storage, run = Storage(str(database)), RunSettings(workers=1)
    gone = deleted(database, *VICTIMS)
    compacted(database)
    more = topics(tmp_path, lines[10:], "more.jsonl")
    assert add(storage, expand_inputs([str(more)]).files, run, Progress()).version == 4
    added = [row["document_id"] for row in rows_of(database, "documents")][-3:]
    assert not set(added) & set(gone)
    refresh(storage, str(make_tiny_encoder(tmp_path / "other", seed=5)), run, Progress())
    deleted(
        database, 0, 8, 9, 10
    )  # the last three are all of the shards that were added: their index shard is empty then
    done = compacted(database)
    assert (done.version, done.documents) == (7, 4)
    chunks = table_of(database, "chunks")
    expected = brute_force(database, vectors_of(database), chunks["document_id"].to_numpy(), 4)
    assert [row["neighbour_ids"] for row in rows_of(database, "neighbours")] == expected
    assert len(rows_of(database, "documents")) == 7
    assert problems(database) == []
    ran = retrodb("export", database, "--to", "huggingface", "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert retrodb("query", database, "names are bound", "--json").json["version"] == 7
    ran = retrodb("gc", database, "--json")
    assert ran.code == 0, ran.err
    assert problems(database) == []


def test_verify_names_what_a_compaction_left_behind(database: Path) -> None:
    before = manifest_of(database)["tables"]
    deleted(database, *VICTIMS)
    compacted(database)
    whole = manifest_of(database)
    for table, said in (
        ("index", "indexes chunks that do not exist"),
        ("neighbours", "a neighbour that does not exist"),
        ("embeddings", "rows for"),
        ("documents", "another number of chunks than their n_chunks"),
    ):
        broken = json.loads(json.dumps(whole))
        broken["tables"][table] = before[table]
        save_manifest(database, broken)
        assert any(said in problem for problem in problems(database)), (table, problems(database))
    save_manifest(database, whole)


def test_refresh_C2_leaves_deleted_chunks_out_of_what_it_writes(database: Path, tmp_path: Path) -> None:
    from retrodb.pipelines.refresh import refresh

    gone = deleted(database, *VICTIMS)
    refresh(
        Storage(str(database)), str(make_tiny_encoder(tmp_path / "other", seed=5)), RunSettings(workers=1), Progress()
    )
    chunks = table_of(database, "chunks")
    out = np.isin(chunks["document_id"].to_numpy(), gone)
    index = [shard for shard in manifest_of(database)["tables"]["index"]["shards"] if shard["number"] >= 0]
    assert sum(shard["rows"] for shard in index) == int((~out).sum())
    named = {d for row in rows_of(database, "neighbours") for d in row["neighbour_document_ids"]}
    assert named
    assert not named & set(gone)
    assert problems(database) == []
    deleted(database, 0)  # after the index was made: it is masked, and may be named
    assert problems(database) == []
    compacted(database)
    chunks = table_of(database, "chunks")
    expected = brute_force(database, vectors_of(database), chunks["document_id"].to_numpy(), 4)
    assert [row["neighbour_ids"] for row in rows_of(database, "neighbours")] == expected
    assert problems(database) == []


@pytest.fixture(scope="module")
def spanned(first: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A copy of `first` with spans by pattern and imported ones, and the ``--tagger`` of the latter.

    Of those that could not be used one is of a document that stays, the others are, or may be, of the second victim.
    """
    folder = tmp_path_factory.mktemp("spanned")
    database, rows = shutil.copytree(first, folder / "db"), []
    documents = rows_of(first, "documents")
    victim, other = documents[VICTIMS[1]], documents[VICTIMS[1] + 1]
    assert victim["document_id"] >> 32, "rows that name nobody lie in another shard"
    for document in documents:
        words = [match.span() for match in re.finditer(rb"\b[a-z]{7,}\b", document["text"].encode())][::9]
        rows += [{"key": document["key"], "start": start, "end": end, "source": "words"} for start, end in words]
    bad = [
        {"key": other["key"], "start": 0, "end": 10**6},
        {"key": victim["key"], "start": 0, "end": 10**6},
        {"document_id": victim["document_id"], "start": 5, "end": 5},
        {"start": 0, "end": 9, "text": victim["text"][:200]},
    ]
    path = write_jsonl(folder / "spans.jsonl", [*rows, *bad, json.dumps({"text": victim["text"][:200]})[:-5]])
    draw_spans(database, f"import:{path}")
    return database, f"import:{path}"


def draw_spans(database: Path, imported: str) -> Any:
    from retrodb.pipelines.spans_stage import build_spans

    settings = SpanSettings(("dates", imported))
    return build_spans(Storage(str(database)), settings, RunSettings(workers=1), Progress())


def test_compact_carries_spans_and_queries_over_without_the_deleted_documents(
    spanned: tuple[Path, str], tmp_path: Path
) -> None:
    database, imported = shutil.copytree(spanned[0], tmp_path / "db"), spanned[1]
    before = {table: table_of(database, table) for table in ("spans", "queries")}
    entries, counted = manifest_of(database)["tables"], manifest_of(database)["stages"]["spans"]["counts"]
    victim = rows_of(database, "documents")[VICTIMS[1]]
    assert traces(named_files(database), victim["text"], np.empty((0, 64)), np.empty((0, 32)))
    gone = deleted(database, *VICTIMS)
    compacted(database)
    now = manifest_of(database)
    for table, rows in before.items():
        kept = ~np.isin(rows["document_id"].to_numpy(), gone)
        assert 0 < kept.sum() < len(kept)
        assert table_of(database, table).equals(rows.filter(kept)), f"{table}: ids stay"
        changed = {
            old["number"]
            for old, new in zip(entries[table]["shards"], now["tables"][table]["shards"], strict=True)
            if old != new
        }
        assert changed == {document_id >> 32 for document_id in gone}, table
    assert [json.loads(row["record"])["end"] for row in rows_of(database, "span_quarantine")] == [10**6]
    for path in named_files(database):
        if path.suffix == ".parquet" and path.parent.name != "quarantine":
            found = b"".join(b"".join(values_in(column)) for column in pq.read_table(path).columns)
            assert victim["key"].encode() not in found, path
            assert victim["text"][:100].encode() not in found, path
    counts = now["stages"]["spans"]["counts"]
    left_out = len(before["spans"]) - len(rows_of(database, "spans")) + 4
    assert counts == counted | {
        "spans": len(rows_of(database, "spans")),
        "queries": len(rows_of(database, "queries")),
        "quarantined": 1,
        "dropped.deleted": left_out,
    }
    queries = [int(one) for batch in package.open(str(database)).queries(split=None) for one in batch.query_ids]
    assert queries == [row["query_id"] for row in rows_of(database, "queries")]
    assert problems(database) == problems(database, version=1) == []
    files = stamps(database)
    assert draw_spans(database, imported).done == ()
    assert stamps(database) == files
    assert deleted(database, 0)
    compacted(database)
    assert manifest_of(database)["stages"]["spans"]["counts"]["dropped.deleted"] > left_out
    assert problems(database) == []


def test_spans_of_a_compacted_database_are_repaired_and_counted_anew(spanned: tuple[Path, str], tmp_path: Path) -> None:
    database, imported = shutil.copytree(spanned[0], tmp_path / "db"), spanned[1]
    deleted(database, *VICTIMS)
    compacted(database)
    shard = shards_of(database, "queries")[0]
    shard.write_bytes(b"")
    damage = problems(database)
    assert len(damage) == 1
    deleted(database, 0)
    with pytest.raises(DamagedError, match="Run `retrodb spans` again"):
        compacted(database)
    assert draw_spans(database, imported).done == ("spans",)
    assert problems(database) == damage, "of the version before alone"


def test_compact_C2_of_blocks_with_equals(lines: list[str], tiny_encoder: Path, tmp_path: Path) -> None:
    again = {**json.loads(lines[0]), "id": "again"}
    source = topics(tmp_path, [*lines[:3], json.dumps(again), lines[3]])
    given = {"unit": "block", "metric": "ip", "encoder": str(tiny_encoder), "chunk_tokens": 64, "shard_bytes": "8KiB"}
    database = tmp_path / "db"
    build_here([source], database, neighbours=5, **given)
    assert rows_of(database, "block_duplicates")
    old = {row["chunk_id"]: row["neighbour_ids"] for row in rows_of(database, "neighbours")}
    equal = next(row["document_id"] for row in rows_of(database, "documents") if row["key"] == "again")
    gone = deleted(database, 0)
    chunks = rows_of(database, "chunks")
    compacted(database)
    assert not rows_of(database, "block_duplicates"), "those that are left equal no other"
    out = {row["chunk_id"] for row in chunks if row["document_id"] in gone}
    uids, owners = ({row["chunk_id"]: row[name] for row in chunks} for name in ("uid", "document_id"))
    for row in rows_of(database, "neighbours"):
        before = old[row["chunk_id"]]
        if out.isdisjoint(before):
            assert row["neighbour_ids"] == before
        elif owners[row["chunk_id"]] != equal:  # the equal of what was deleted stands in its place
            assert {uids[c] for c in before if c in out} <= {uids[c] for c in row["neighbour_ids"]}
    db = package.open(str(database))
    batch = db.candidates(np.asarray(db.embeddings(0)), k=4)
    assert not out & set(batch.ids.reshape(-1).tolist())
    assert problems(database) == []


def test_compact_C2_of_an_approximate_index_with_validation_and_near_duplicates(
    lines: list[str], tiny_encoder: Path, tmp_path: Path
) -> None:
    source = topics(tmp_path, [*lines[:8], *near_duplicates_of(lines[:2])])
    held_out = topics(tmp_path, lines[10:12], "held-out.jsonl")
    settings = {"index_key": "IVF4,Flat", "tokenizer": "train:400", "exclude": "cluster", "min_recall": 0.8}
    database = tmp_path / "db"
    build_here([source], database, encoder=str(tiny_encoder), validation=[str(held_out)], **SETTINGS, **settings)
    documents = rows_of(database, "documents")
    clustered = next(at for at, row in enumerate(documents) if row["cluster_id"] is not None)
    validation = next(at for at, row in enumerate(documents) if row["split"] == "validation")
    assert problems(database) == []
    gone = deleted(database, clustered, validation, 3)
    compacted(database)
    assert problems(database) == []
    summary = package.open(str(database)).summary()
    assert summary["documents"]["validation"] == 1
    assert summary["documents"]["near_duplicates"]["in"] == 3
    assert summary["neighbours"]["recall_at_10"] >= 0.8
    for row in rows_of(database, "neighbours"):
        assert not set(row["neighbour_document_ids"]) & set(gone)
    assert (database / "tokenizer.json").exists()
    report = json.loads((database / "versions/3/reports/dedup.json").read_text(encoding="utf-8"))
    assert documents[clustered]["key"] not in {key for cluster in report["largest"] for key in cluster["keys"]}
