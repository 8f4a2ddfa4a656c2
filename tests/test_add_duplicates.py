"""Near-duplicates of documents that join a database: as a build of everything finds them (C2), wherever it removes
nothing that is there already."""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from near_duplicates import assert_conserved, counts_of, varied, verified, words_of
from support import (
    Progress,
    Running,
    build_here,
    manifest_of,
    retrodb,
    rows_of,
    stamps,
    table_of,
    vectors_of,
    write_jsonl,
)

from retrodb.errors import InputError
from retrodb.storage import Storage

pytestmark = pytest.mark.slow

TABLES = ("documents", "duplicates", "chunks", "neighbours", "training", "leakage")
SETTINGS = {"shard_bytes": "12KiB", "precision": "fp32", "chunk_tokens": 32, "sequence_tokens": 128}


def record(key: str, text: str) -> dict[str, str]:
    return {"id": key, "text": text}


def far(words: list[str], *places: int) -> str:
    """The words with some of them changed: two keep a similarity of 0.83, four do not reach 0.8."""
    changed = list(words)
    for place in places:
        changed[place] = f"changed{place}"
    return " ".join(changed)


A, B, C, D = (words_of(100 + n) for n in range(4))
OLD = [
    *(record(f"alone-{n}", " ".join(words_of(n))) for n in range(4)),
    record("a-0", varied(A, 0)),
    record("left", far(D, 30, 60)),
    record("b-0", varied(B, 0)),
    *(record(f"alone-{n}", " ".join(words_of(n))) for n in range(4, 9)),
    record("a-1", varied(A, 1)),
    record("right", far(D, 120, 200)),
]
"""A cluster of two, a document that will have a near-duplicate, and two that one between them will connect."""
NEW = [
    record("a-2", varied(A, 2)),
    *(record(f"fresh-{n}", " ".join(words_of(50 + n))) for n in range(3)),
    record("c-0", varied(C, 0)),
    record("between", " ".join(D)),
    record("b-1", varied(B, 1)),
    *(record(f"fresh-{n}", " ".join(words_of(50 + n))) for n in range(3, 6)),
    record("c-1", varied(C, 1)),
]


def without(records: Iterable[dict[str, str]], *keys: str) -> list[dict[str, str]]:
    return [one for one in records if one["id"] not in keys]


def written(folder: Path, old: list[dict[str, str]], new: list[dict[str, str]]) -> list[Path]:
    return [write_jsonl(folder / "a-old.jsonl", old), write_jsonl(folder / "b-new.jsonl", new)]


def add(database: Path, *inputs: Path) -> Any:
    """Add in this process."""
    from retrodb.pipelines.add import add

    from retrodb.config import RunSettings
    from retrodb.corpus import expand_inputs

    listing = expand_inputs([str(path) for path in inputs])
    return add(Storage(str(database)), listing.files, RunSettings(workers=1), Progress())


def clusters(database: Path) -> set[frozenset[str]]:
    """By the keys of their documents, as the table documents has them."""
    found = defaultdict(set)
    for row in rows_of(database, "documents"):
        if row["cluster_id"] is not None:
            found[row["cluster_id"]].add(row["key"])
    return {frozenset(keys) for keys in found.values()}


def removed(database: Path) -> dict[str, str]:
    return {row["key"]: row["removed"] for row in rows_of(database, "duplicates") if row["removed"]}


def assert_same(database: Path, whole: Path) -> None:
    for table in TABLES:
        assert table_of(database, table).equals(table_of(whole, table)), table
    assert (vectors_of(database) == vectors_of(whole)).all()
    ours, theirs = (manifest_of(path)["stages"] for path in (database, whole))
    for stage in ("corpus", "dedup", "chunk", "neighbours"):
        assert ours[stage]["counts"] == theirs[stage]["counts"], stage
    reports = [json.loads((path / "reports/dedup.json").read_text()) for path in (database / "versions/2", whole)]
    assert reports[0] == reports[1]
    assert_conserved(database)
    verified(database)


@pytest.mark.parametrize("exclude", ["document", "cluster"])
def test_add_C2_finds_near_duplicates_of_what_is_there(exclude: str, tiny_encoder: Path, tmp_path: Path) -> None:
    """Also where two clusters become one, whose documents are no neighbours of each other any more."""
    files = written(tmp_path, OLD, NEW)
    for out, inputs in ((tmp_path / "db", files[:1]), (tmp_path / "all", files)):
        build_here(inputs, out, encoder=str(tiny_encoder), exclude=exclude, **SETTINGS)
    assert clusters(tmp_path / "db") == {frozenset({"a-0", "a-1"})}
    before = stamps(tmp_path / "db")
    done = add(tmp_path / "db", files[1])
    assert (done.version, done.documents) == (2, len(NEW))
    expected = [{"a-0", "a-1", "a-2"}, {"b-0", "b-1"}, {"c-0", "c-1"}, {"left", "right", "between"}]
    assert clusters(tmp_path / "db") == {frozenset(keys) for keys in expected}
    assert_same(tmp_path / "db", tmp_path / "all")
    after = stamps(tmp_path / "db")
    assert {path: after[path] for path in before if "manifest" not in path} == {
        path: stamp for path, stamp in before.items() if "manifest" not in path
    }, "nothing that was there is written"
    if exclude == "cluster":
        keys = {row["document_id"]: row["key"] for row in rows_of(tmp_path / "db", "documents")}
        owners = {row["chunk_id"]: keys[row["document_id"]] for row in rows_of(tmp_path / "db", "chunks")}
        beside = {
            keys[document]
            for row in rows_of(tmp_path / "db", "neighbours")
            if owners[row["chunk_id"]] == "left"
            for document in row["neighbour_document_ids"]
            if document is not None
        }
        assert beside
        assert not beside & {"left", "right", "between"}


def test_add_C2_with_dedup_drop_takes_in_what_is_new_alone(tiny_encoder: Path, tmp_path: Path) -> None:
    files = written(tmp_path, without(OLD, "right"), without(NEW, "between"))
    for out, inputs in ((tmp_path / "db", files[:1]), (tmp_path / "all", files)):
        build_here(inputs, out, encoder=str(tiny_encoder), dedup="drop", **SETTINGS)
    add(tmp_path / "db", files[1])
    assert removed(tmp_path / "db") == dict.fromkeys(["a-1", "a-2", "b-1", "c-1"], "near_duplicate")
    assert_same(tmp_path / "db", tmp_path / "all")


def test_with_dedup_drop_what_would_join_two_documents_goes_and_both_stay(tiny_encoder: Path, tmp_path: Path) -> None:
    """A build of everything would keep one of the two; they are no near-duplicates of each other."""
    files = written(tmp_path, OLD, NEW)
    build_here(files[:1], tmp_path / "db", encoder=str(tiny_encoder), dedup="drop", **SETTINGS)
    add(tmp_path / "db", files[1])
    assert removed(tmp_path / "db")["between"] == "near_duplicate"
    assert {"left", "right"} <= {row["key"] for row in rows_of(tmp_path / "db", "documents")}
    assert clusters(tmp_path / "db") == set()
    assert_conserved(tmp_path / "db")
    verified(tmp_path / "db")


def test_what_repeats_validation_documents_is_not_taken_in(tiny_encoder: Path, tmp_path: Path) -> None:
    held_out = write_jsonl(
        tmp_path / "held-out.jsonl", [record("h", varied(C, 3)), record("i", " ".join(words_of(70)))]
    )
    files = written(tmp_path, OLD, NEW)
    for out, inputs in ((tmp_path / "db", files[:1]), (tmp_path / "all", files)):
        build_here(inputs, out, encoder=str(tiny_encoder), validation=[str(held_out)], **SETTINGS)
    add(tmp_path / "db", files[1])
    assert removed(tmp_path / "db") == dict.fromkeys(["c-0", "c-1"], "validation_duplicate")
    by_key = [{row["key"]: row["split"] for row in rows_of(tmp_path / name, "documents")} for name in ("db", "all")]
    assert by_key[0] == by_key[1]
    assert clusters(tmp_path / "db") == clusters(tmp_path / "all")
    assert_conserved(tmp_path / "db")
    verified(tmp_path / "db")


def test_a_validation_document_that_repeats_what_is_trained_on_is_not_taken_in(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    """What falls to --validation-fraction later than its near-duplicate was taken in."""
    files = written(tmp_path, OLD, [record(f"a-{n}", varied(A, n)) for n in range(2, 20)])
    settings = {"validation_fraction": 0.3, **SETTINGS}
    build_here(files[:1], tmp_path / "db", encoder=str(tiny_encoder), **settings)
    split = {row["key"]: row["split"] for row in rows_of(tmp_path / "db", "documents")}
    assert split.get("a-0", "train") == split.get("a-1", "train")
    add(tmp_path / "db", files[1])
    sides = {row["split"] for row in rows_of(tmp_path / "db", "documents") if row["key"].startswith("a-")}
    assert len(sides) == 1, "the side that was there first"
    assert set(removed(tmp_path / "db").values()) == {"validation_duplicate"}
    assert_conserved(tmp_path / "db")
    verified(tmp_path / "db")


def test_deleted_documents_are_not_compared_with(tiny_encoder: Path, tmp_path: Path) -> None:
    """Neither those that are masked nor those that a compaction has taken away, after which rows are no ids."""
    files = written(tmp_path, OLD, NEW)
    build_here(files[:1], tmp_path / "db", encoder=str(tiny_encoder), dedup="drop", **SETTINGS)
    for keys, command in ((("alone-0", "b-0"), "compact"), (("left", "right"), None)):
        for key in keys:
            assert retrodb("delete", tmp_path / "db", "--key", key).code == 0
        if command is not None:
            assert retrodb(command, tmp_path / "db", "--workers", "1").code == 0
    add(tmp_path / "db", files[1])
    assert removed(tmp_path / "db") == dict.fromkeys(["a-1", "a-2", "c-1"], "near_duplicate")
    assert counts_of(tmp_path / "db")["dropped"]["near_duplicate"] == 3
    verified(tmp_path / "db")


def test_where_nothing_is_new_nothing_is_done(tiny_encoder: Path, tmp_path: Path) -> None:
    files = written(tmp_path, OLD, [record("a-9", varied(A, 9)), record("b-9", varied(B, 9))])
    build_here(files[:1], tmp_path / "db", encoder=str(tiny_encoder), dedup="drop", **SETTINGS)
    with pytest.raises(InputError, match="nothing is new: of 2 documents each is a near-duplicate"):
        add(tmp_path / "db", files[1])
    assert manifest_of(tmp_path / "db")["version"]["id"] == 1
    verified(tmp_path / "db")


def test_without_text_near_duplicates_that_matter_are_refused(tiny_encoder: Path, tmp_path: Path) -> None:
    files = written(tmp_path, OLD, NEW)
    build_here(files[:1], tmp_path / "db", encoder=str(tiny_encoder), dedup="drop", text=False, **SETTINGS)
    with pytest.raises(InputError, match="--dedup drop, and its text is not kept"):
        add(tmp_path / "db", files[1])


def test_add_C2_killed_while_near_duplicates_are_found_goes_on(tiny_encoder: Path, tmp_path: Path) -> None:
    files = written(tmp_path, OLD, NEW)
    for out, inputs in ((tmp_path / "db", files[:1]), (tmp_path / "all", files)):
        build_here(inputs, out, encoder=str(tiny_encoder), exclude="cluster", **SETTINGS)
    left = next(row["document_id"] for row in rows_of(tmp_path / "db", "documents") if row["key"] == "left")
    for moment in ("added/.build", "duplicates", f"documents/{left >> 32:05d}.parquet", "neighbours"):
        running = Running.start("add", tmp_path / "db", files[1], "--workers", 1)
        running.wait_for((tmp_path / "db/versions/2" / moment).exists)
        running.kill()
        assert manifest_of(tmp_path / "db")["version"]["id"] == 1
        verified(tmp_path / "db")
    ran = retrodb("add", tmp_path / "db", files[1])
    assert ran.code == 0, ran.err
    assert_same(tmp_path / "db", tmp_path / "all")
    shutil.rmtree(tmp_path / "all")
