"""Another corpus in place of the current one: as the next version, and back by the pointer alone.

The label C1 is that of the requirements of REALM mode.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from retrodb.pipelines.spans_stage import build_spans
from retrodb.pipelines.swap import swap
from support import (
    Progress,
    Running,
    build_here,
    collected,
    manifest_of,
    retrodb,
    rows_of,
    sha256,
    stamps,
    table_of,
    vectors_of,
    write_jsonl,
)

import retrodb as package
from retrodb.config import RunSettings
from retrodb.corpus import expand_inputs
from retrodb.corpus.quickstart import quickstart_lines
from retrodb.corpus.selection import Selection
from retrodb.errors import DamagedError, InputError, LockedError, RetrodbError
from retrodb.lock import writer_lock
from retrodb.quality.verify import verify_database
from retrodb.refreshing import Follower
from retrodb.spans import SpanSettings
from retrodb.storage import Storage

SETTINGS = {"shard_bytes": "16KiB", "sequence_tokens": 256, "neighbours": 4, "tokenizer": "train:600"}
TABLES = ("documents", "chunks", "neighbours", "training", "leakage")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Three files of real text that have no document in common, the third a single one."""
    folder = tmp_path_factory.mktemp("corpora")
    lines = [line for line in quickstart_lines() if 2_000 < len(line) < 8_000][:12]
    for name, some in (("a", lines[:6]), ("b", lines[6:11]), ("c", lines[11:])):
        (folder / f"{name}.jsonl").write_text("\n".join(some) + "\n", encoding="utf-8")
    return folder / "a.jsonl", folder / "b.jsonl", folder / "c.jsonl"


@pytest.fixture(scope="module")
def first(corpora: tuple[Path, ...], tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of the first corpus, with a tokenizer that was learnt from it. Do not change it."""
    out = tmp_path_factory.mktemp("swap") / "db"
    build_here([corpora[0]], out, encoder=str(tiny_encoder), **SETTINGS)
    return out


@pytest.fixture(scope="module")
def swapped_once(first: Path, corpora: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, swapped to the second corpus. Do not change it."""
    database = shutil.copytree(first, tmp_path_factory.mktemp("swapped") / "db")
    assert swapped(database, corpora[1]).version == 2
    return database


@pytest.fixture
def database(swapped_once: Path, tmp_path: Path) -> Path:
    """A copy of `swapped_once` to be changed."""
    return shutil.copytree(swapped_once, tmp_path / "db")


def swapped(database: Path, *inputs: Path) -> Any:
    """Swap in this process."""
    listing = expand_inputs([str(path) for path in inputs])
    return swap(Storage(str(database)), listing, RunSettings(workers=1), Progress())


def back(database: Path, version: int) -> Any:
    from retrodb.pipelines.swap import swap_back

    return swap_back(Storage(str(database)), version, Progress())


def problems(database: Path, version: int | None = None) -> list[str]:
    report = verify_database(package.open(str(database), version=version), 1.0)
    return [f"{found.path}: {found.what}" for found in report.problems]


def ids_of(database: Path) -> set[int]:
    return {
        *table_of(database, "documents")["document_id"].to_pylist(),
        *table_of(database, "chunks")["chunk_id"].to_pylist(),
        *table_of(database, "training")["sequence_id"].to_pylist(),
    }


def test_swap_C1_gives_the_new_corpus_alone_and_trains_nothing(first: Path, database: Path) -> None:
    shards = [row["number"] for row in manifest_of(first)["tables"]["documents"]["shards"]]
    assert not ids_of(first) & ids_of(database), "no id means two things"
    assert min(ids_of(database)) >> 32 == max(shards) + 1
    named = {c for row in rows_of(database, "neighbours") for c in row["neighbour_ids"] if c is not None}
    assert named <= set(table_of(database, "chunks")["chunk_id"].to_pylist())
    old, new = manifest_of(first), manifest_of(database)
    assert new["fingerprints"]["tokenizer"] == old["fingerprints"]["tokenizer"]
    assert new["fingerprints"]["encoder"] == old["fingerprints"]["encoder"]
    assert new["config"] == old["config"]
    assert (database / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    db = package.open(str(database))
    assert (db.version, db.manifest.version.made_by, db.manifest.version.parent) == (2, "swap", 1)
    assert {hit.chunk_id for hit in db.search("how are names bound", k=50)} <= ids_of(database)
    assert sum(int(row["n_tokens"]) for row in db.training(split="train")) == db.summary()["tokens"]
    assert problems(database) == problems(database, version=1) == []


def test_swap_C1_is_a_build_of_the_new_corpus_but_for_the_numbers_of_its_shards(
    first: Path, database: Path, corpora: tuple[Path, ...], tiny_encoder: Path, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "tokenizer": str(first / "tokenizer.json")}
    build_here([corpora[1]], tmp_path / "plain", encoder=str(tiny_encoder), **settings)
    assert np.array_equal(vectors_of(database), vectors_of(tmp_path / "plain"))
    shift = min(ids_of(database)) >> 32 << 32
    for table in ("chunks", "neighbours"):
        rows = [
            {name: shifted(name, value, shift) for name, value in row.items()}
            for row in rows_of(tmp_path / "plain", table)
        ]
        assert rows_of(database, table) == rows, table


def shifted(name: str, value: Any, shift: int) -> Any:
    if not name.endswith(("_id", "_ids")):
        return value
    return [of if of is None else of + shift for of in value] if isinstance(value, list) else value + shift


@pytest.mark.parametrize("harm", ["lost", "changed"])
def test_swap_C1_back_to_a_version_that_is_damaged_is_refused(database: Path, harm: str) -> None:
    first = json.loads((database / "versions/1/manifest.json").read_text("utf-8"))
    path = database / first["tables"]["neighbours"]["shards"][0]["path"]
    data = path.read_bytes()
    path.unlink() if harm == "lost" else path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(DamagedError, match=r"neighbours/.*are damaged: the current version stays"):
        back(database, 1)
    assert package.open(str(database)).version == 2


def test_swap_C1_says_that_deleted_validation_documents_come_back(
    corpora: tuple[Path, ...], tiny_encoder: Path, tmp_path: Path
) -> None:
    from retrodb.pipelines.living import delete

    build_here([corpora[0]], tmp_path / "db", encoder=str(tiny_encoder), validation=[str(corpora[2])], **SETTINGS)
    held_out = [row["document_id"] for row in rows_of(tmp_path / "db", "documents") if row["split"] == "validation"]
    delete(Storage(str(tmp_path / "db")), Selection(ids=tuple(held_out[:1])), Progress())
    progress = Progress()
    listing = expand_inputs([str(corpora[1])])
    swap(Storage(str(tmp_path / "db")), listing, RunSettings(workers=1), progress)
    assert any("those of its validation files" in line and "come back" in line for line in progress.lines)


def test_swap_C1_back_is_bit_identical(first: Path, database: Path) -> None:
    was = package.open(str(first))
    files = {path: stamp for path, stamp in stamps(database).items() if "manifest" not in path}
    assert package.open(str(database)).version == 2
    pinned = package.open(str(database))
    found = pinned.search("how are names bound", k=5)
    ran = retrodb("swap", database, "--to", 1, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["version"] == 1
    assert manifest_of(database)["tables"] == manifest_of(first)["tables"]
    for table in manifest_of(first)["tables"].values():
        for shard in table["shards"]:
            assert sha256(database / shard["path"]) == sha256(first / shard["path"]) == shard["sha256"]
    db = package.open(str(database))
    for k in (1, 7, 40):
        assert db.search("how are names bound", k=k) == was.search("how are names bound", k=k)
    assert {path: stamp for path, stamp in stamps(database).items() if "manifest" not in path} == files
    assert pinned.search("how are names bound", k=5) == found, "who reads version 2 goes on with it"
    assert back(database, 1).version == 1
    assert back(database, 2).version == 2
    assert package.open(str(database)).search("how are names bound", k=5) == found
    assert problems(database) == problems(database, version=1) == []


def test_swap_C1_a_follower_takes_it_as_it_takes_a_refresh(
    first: Path, corpora: tuple[Path, ...], tmp_path: Path
) -> None:
    database = shutil.copytree(first, tmp_path / "db")
    follow = Follower(str(database))
    assert follow.at(step=0).version == 1
    swapped(database, corpora[2])
    assert follow.at(step=1).version == 2
    assert [document.source for document in follow.database.documents()] == [str(corpora[2])]
    back(database, 1)
    assert follow.at(step=2).version == 1


def test_swap_C1_draws_the_queries_of_the_new_corpus_by_the_same_taggers(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, progress = shutil.copytree(first, tmp_path / "db"), Progress()
    storage, run = Storage(str(database)), RunSettings(workers=1)
    texts = [f"In {1800 + n} a bridge was built. It fell on {n + 1} May {1850 + n}." for n in range(3)]
    dated = write_jsonl(tmp_path / "dated.jsonl", [{"id": f"dated-{n}", "text": text} for n, text in enumerate(texts)])
    other = write_jsonl(tmp_path / "other.jsonl", [{"id": "other", "text": texts[0] + " It stands."}])
    owner = rows_of(database, "documents")[0]["key"]
    spans = write_jsonl(tmp_path / "spans.jsonl", [{"key": owner, "start": 0, "end": 3}])

    def drawn(*taggers: str) -> Any:
        return build_spans(storage, SpanSettings(taggers, seed=5), run, Progress()).done

    drawn("dates", f"import:{spans}")
    before, files = rows_of(database, "queries"), stamps(database)
    with monkeypatch.context() as patched:
        patched.setattr("retrodb.spans.dates.VERSION", "9")
        with pytest.raises(InputError, match="drawn by dates 1.*here are dates 9"):
            swapped(database, dated)
    assert stamps(database) == files
    swap(storage, expand_inputs([str(dated)]), run, progress)
    rows = rows_of(database, "queries")
    assert {row["document_id"] for row in rows} == {row["document_id"] for row in rows_of(database, "documents")}
    assert {row["tagger"] for row in rows} == {"dates@1"}
    assert any("those that were imported are of the corpus before" in line for line in progress.lines)
    follow = Follower(str(database))
    assert sum(len(batch) for batch in follow.database.queries(split=None)) == len(rows) == 6
    files = stamps(database)
    assert drawn("dates") == (), "they are those that `retrodb spans` draws"
    assert stamps(database) == files
    assert problems(database) == []
    back(database, 1)
    assert rows_of(database, "queries") == before
    drawn(f"import:{spans}")
    assert swapped(database, other).version == 4
    assert "spans" not in manifest_of(database)["stages"], "all were imported"
    assert problems(database) == []


def test_swap_C1_killed_leaves_one_version_and_goes_on(
    first: Path, swapped_once: Path, corpora: tuple[Path, ...], tmp_path: Path
) -> None:
    database = shutil.copytree(first, tmp_path / "db")
    for moment in ("chunks", "neighbours"):
        running = Running.start("swap", database, corpora[1], "--workers", 1)
        running.wait_for((database / "versions" / "2" / moment).exists)
        running.kill()
        assert package.open(str(database)).version == 1
        assert problems(database) == []
    ran = retrodb("swap", database, corpora[1], "--json")
    assert ran.code == 0, ran.err
    assert manifest_of(database)["tables"] == manifest_of(swapped_once)["tables"]
    assert problems(database) == []


def test_swap_C1_ids_are_never_used_again_though_their_version_is_gone(
    database: Path, corpora: tuple[Path, ...]
) -> None:
    from retrodb.pipelines.compact import compact
    from retrodb.pipelines.living import delete

    storage, second = Storage(str(database)), ids_of(database)
    back(database, 1)
    for victim in rows_of(database, "documents")[:2]:
        delete(storage, Selection(ids=(victim["document_id"],)), Progress())
    assert compact(storage, RunSettings(workers=1), Progress()).version == 5
    assert collected(storage).retired == (1, 2)
    assert problems(database) == []
    assert swapped(database, corpora[1]).version == 6
    assert not ids_of(database) & second
    assert problems(database) == []


def test_swap_C1_ids_are_never_used_again_though_the_newest_version_was_forgotten(
    database: Path, corpora: tuple[Path, ...]
) -> None:
    second = ids_of(database)
    back(database, 1)
    assert collected(Storage(str(database)), forget=True).retired == (2,), "the current one has none of its documents"
    assert problems(database) == []
    assert swapped(database, corpora[1]).version == 3
    assert not ids_of(database) & second
    assert problems(database) == []


def test_a_learnt_tokenizer_survives_an_addition(first: Path, corpora: tuple[Path, ...], tmp_path: Path) -> None:
    from retrodb.pipelines.add import add

    database = shutil.copytree(first, tmp_path / "db")
    add(Storage(str(database)), expand_inputs([str(corpora[2])]).files, RunSettings(workers=1), Progress())
    assert (database / "tokenizer.json").exists()
    assert problems(database) == []


def test_a_swap_that_cannot_be_meant_changes_nothing(
    database: Path, corpora: tuple[Path, ...], tiny_encoder: Path, tmp_path: Path
) -> None:
    before = stamps(database)
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    for inputs, said in (
        ((corpora[1],), "version 2 of .* has just these inputs, and is current"),
        ((corpora[0],), "version 1 of .* has just these inputs: `retrodb swap --to 1`"),
        ((tmp_path / "empty.jsonl",), "every input file is empty"),
    ):
        with pytest.raises(InputError, match=said):
            swapped(database, *inputs)
        assert stamps(database) == before, inputs
    for arguments, code, said in (
        ((), 2, "give the new corpus, or --to VERSION"),
        ((corpora[2], "--to", 1), 2, "and not both"),
        (("--to", 9), 3, "has no version 9; there are: 1, 2"),
        ((tmp_path / "nothing.jsonl",), 3, "nothing.jsonl"),
    ):
        ran = retrodb("swap", database, *arguments)
        assert (ran.code, said in ran.err) == (code, True), ran.err
    assert retrodb("swap", tmp_path / "nothing", "--to", 1).code == 3
    with writer_lock(Storage(str(database))), pytest.raises(LockedError):
        back(database, 1)
    with writer_lock(Storage(str(database))), pytest.raises(LockedError):
        swapped(database, corpora[2])
    assert stamps(database) == before
    build_here([corpora[2]], tmp_path / "part", encoder=str(tiny_encoder), until="chunk", **SETTINGS)
    with pytest.raises(RetrodbError, match="run its build to the end before its corpus is swapped"):
        swapped(tmp_path / "part", corpora[1])
