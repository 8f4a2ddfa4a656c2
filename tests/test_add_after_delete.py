"""Additions and compactions of a database with deletions: what is written after a deletion has no place for what was
deleted, and an approximate index is searched as hard as what is left asks for.

The labels C1 and C2 are those of the requirements of REALM mode.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from support import Progress, build_here, manifest_of, rows_of, save_manifest, table_of, vectors_of, write_jsonl

import retrodb as package
from retrodb.config import RunSettings
from retrodb.corpus import expand_inputs
from retrodb.corpus.quickstart import quickstart_lines
from retrodb.corpus.selection import Selection
from retrodb.errors import RecallError
from retrodb.neighbours import from_table, to_table
from retrodb.quality.recall import choose_nprobe, recall_remedy
from retrodb.quality.verify import verify_database
from retrodb.storage import Storage

SETTINGS = {"shard_bytes": "16KiB", "sequence_tokens": 256, "neighbours": 4}
BLOCKS = {"unit": "block", "metric": "ip", "chunk_tokens": 64, "shard_bytes": "16KiB", "neighbours": 4, "dedup": "off"}


@pytest.fixture(scope="module")
def texts() -> list[dict[str, Any]]:
    """Twelve topics of real text."""
    return [json.loads(line) for line in quickstart_lines() if 2_000 < len(line) < 8_000][:12]


def added(database: Path, *inputs: Path) -> Any:
    from retrodb.pipelines.add import add

    listing = expand_inputs([str(path) for path in inputs])
    return add(Storage(str(database)), listing.files, RunSettings(workers=1), Progress())


def compacted(database: Path) -> Any:
    from retrodb.pipelines.compact import compact

    return compact(Storage(str(database)), RunSettings(workers=1), Progress())


def deleted(database: Path, *places: int) -> set[int]:
    """Delete documents by their place in the table: their ids."""
    from retrodb.pipelines.living import delete

    ids = table_of(database, "documents")["document_id"].to_numpy()[list(places)].tolist()
    delete(Storage(str(database)), Selection(ids=tuple(ids)), Progress())
    return set(ids)


def problems(database: Path) -> list[str]:
    report = verify_database(package.open(str(database)), 1.0)
    return [f"{found.path}: {found.what}" for found in report.problems]


def living_neighbours(database: Path, gone: set[int]) -> dict[int, list[int]]:
    """By brute force, with nothing of retrodb: of each chunk all others that it may have, nearest first. Of equal
    blocks the first alone."""
    manifest = manifest_of(database)
    chunks, vectors = table_of(database, "chunks"), vectors_of(database).astype(np.float32)
    ids, owners = chunks["chunk_id"].to_numpy(), chunks["document_id"].to_numpy()
    uids = chunks["uid"].to_pylist() if "uid" in chunks.column_names else ids.tolist()
    clusters = {row["document_id"]: row["cluster_id"] for row in rows_of(database, "documents")}
    found = {}
    for at, own in enumerate(owners):
        same = owners == own
        if manifest["config"]["exclude"] == "cluster" and clusters[own] is not None:
            same |= np.array([clusters[document] == clusters[own] for document in owners])
        there = np.flatnonzero(~same & ~np.isin(owners, sorted(gone)))
        product = manifest["config"]["metric"] == "ip"
        keys = -(vectors[there] @ vectors[at]) if product else ((vectors[there] - vectors[at]) ** 2).sum(1)
        seen, row = {uids[at]}, []
        for place in there[np.lexsort((ids[there], np.round(keys, 5)))].tolist():
            if uids[place] not in seen:
                seen.add(uids[place])
                row.append(place)
        found[int(ids[at])] = ids[row].tolist()
    return found


def assert_written_without(database: Path, gone: set[int], first_new: int) -> int:
    """New rows are the nearest living ones; of old ones, those that have anything new, and the others as far as they
    name nothing deleted. How many old rows took something new."""
    manifest, nearest = manifest_of(database), living_neighbours(database, gone)
    owners = {row["chunk_id"]: row["document_id"] for row in rows_of(database, "chunks")}
    took = 0
    for row in rows_of(database, "neighbours"):
        ids = [other for other in row["neighbour_ids"] if other is not None]
        whole = row["chunk_id"] >= first_new or any(other >= first_new for other in ids)
        took += whole and row["chunk_id"] < first_new
        if whole or not any(owners[other] in gone for other in ids):
            assert ids == nearest[row["chunk_id"]][: manifest["config"]["neighbours"]], row["chunk_id"]
    return took


CASES = {
    "exact": {},
    "exact, inner product, cluster": {"metric": "ip", "exclude": "cluster"},
    "all lists": {"index_key": "IVF2,Flat", "min_recall": 1.0},
}


@pytest.mark.parametrize("case", CASES)
def test_add_C2_after_a_deletion_writes_rows_without_what_was_deleted(
    texts: list[dict[str, Any]], tiny_encoder: Path, tmp_path: Path, case: str
) -> None:
    """k valid ones where there are as many (invariant 2); what is not written anew keeps what readers pass over."""
    database = tmp_path / "db"
    first = write_jsonl(tmp_path / "a.jsonl", texts[:8])
    build_here([first], database, encoder=str(tiny_encoder), **SETTINGS, **CASES[case])
    gone = deleted(database, *range(0, 8, 2))
    done = added(database, write_jsonl(tmp_path / "b.jsonl", texts[8:10]))
    new = max(row["chunk_id"] for row in rows_of(database, "chunks")) >> 32 << 32
    assert done.chunks > 0
    assert assert_written_without(database, gone, new) > 0
    assert problems(database) == []
    gone |= deleted(database, 1)
    added(database, write_jsonl(tmp_path / "c.jsonl", texts[10:12]))
    new = max(row["chunk_id"] for row in rows_of(database, "chunks")) >> 32 << 32
    assert_written_without(database, gone, new)
    assert problems(database) == []
    compacted(database)
    nearest = living_neighbours(database, set())
    for row in rows_of(database, "neighbours"):
        assert [other for other in row["neighbour_ids"] if other is not None] == nearest[row["chunk_id"]][:4]
    assert problems(database) == []


def test_add_C2_after_a_deletion_reranks_what_is_left(
    texts: list[dict[str, Any]], tiny_encoder: Path, tmp_path: Path
) -> None:
    database = tmp_path / "db"
    first = write_jsonl(tmp_path / "a.jsonl", texts[:6])
    build_here([first], database, encoder=str(tiny_encoder), rerank="bm25", **SETTINGS)
    gone = deleted(database, 0, 2, 4)
    assert problems(database) == []
    added(database, write_jsonl(tmp_path / "b.jsonl", texts[8:9]))
    for row in rows_of(database, "neighbours"):
        assert row["n_valid"] == 4
        assert not gone & set(row["neighbour_document_ids"])
    assert problems(database) == []


def test_add_C2_a_block_that_comes_back_is_found_in_place_of_its_deleted_equal(
    texts: list[dict[str, Any]], tiny_encoder: Path, tmp_path: Path
) -> None:
    """A deleted block stands for no equal: neither for a new one, nor for one that was there all along."""
    database = tmp_path / "db"
    copy = {**texts[1], "id": "copy"}
    build_here([write_jsonl(tmp_path / "a.jsonl", [*texts[:5], copy])], database, encoder=str(tiny_encoder), **BLOCKS)
    gone = deleted(database, 0, 1)
    named = [document for row in rows_of(database, "neighbours") for document in row["neighbour_document_ids"]]
    assert gone & set(named), "readers pass over what rows from before name"
    added(database, write_jsonl(tmp_path / "b.jsonl", [{**texts[0], "id": "again"}, texts[6]]))
    new = max(row["chunk_id"] for row in rows_of(database, "chunks")) >> 32 << 32
    assert assert_written_without(database, gone, new) > 0
    again = next(row["document_id"] for row in rows_of(database, "documents") if row["key"] == "again")
    assert any(again in row["neighbour_document_ids"] for row in rows_of(database, "neighbours"))
    assert problems(database) == []


def test_compact_C2_of_most_of_an_approximate_index_searches_as_hard_as_what_is_left_asks_for(
    texts: list[dict[str, Any]], tiny_encoder: Path, tmp_path: Path
) -> None:
    """The lists that sufficed while there was much in each do not once there is little: nprobe is tuned anew, and is
    what all rows were searched with. What is deleted can always be got rid of, though its gate stays."""
    database = tmp_path / "db"
    settings = {**SETTINGS, "chunk_tokens": 16, "sequence_tokens": 64, "index_key": "IVF16,SQ8", "min_recall": 0.7}
    build_here([write_jsonl(tmp_path / "a.jsonl", texts[:9])], database, encoder=str(tiny_encoder), **settings)
    before = manifest_of(database)["stages"]["neighbours"]["details"]["nprobe"]
    deleted(database, *range(7))
    compacted(database)
    details = manifest_of(database)["stages"]["neighbours"]["details"]
    assert details["nprobe"] > before
    assert details["recall_at_10"] >= 0.7
    nearest = living_neighbours(database, set())
    rows = rows_of(database, "neighbours")
    hits = [len(set(row["neighbour_ids"]) & set(nearest[row["chunk_id"]][:4])) / 4 for row in rows]
    assert float(np.mean(hits)) == pytest.approx(details["recall_at_10"], abs=0.05)
    assert problems(database) == []


def test_rows_that_stayed_and_are_below_the_gate_are_searched_anew(
    texts: list[dict[str, Any]], tiny_encoder: Path, tmp_path: Path
) -> None:
    """Here they are made so: every row that is there loses what it says, and the gate sees that."""
    database = tmp_path / "db"
    settings = {**SETTINGS, "index_key": "IVF4,Flat", "min_recall": 0.9}
    build_here([write_jsonl(tmp_path / "a.jsonl", texts[:6])], database, encoder=str(tiny_encoder), **settings)
    manifest = manifest_of(database)
    for shard in manifest["tables"]["neighbours"]["shards"]:
        path = database / shard["path"]
        table = pq.read_table(path)
        far = from_table(table)
        far = replace(far, distances=np.where(far.neighbour_ids >= 0, np.float32(9e3), far.distances))
        commit = Storage(str(database)).commit_table(shard["path"], to_table(far), 1 << 14)
        shard["bytes"], shard["sha256"] = commit.bytes, commit.sha256
    save_manifest(database, manifest)
    deleted(database, 0)
    compacted(database)
    assert manifest_of(database)["stages"]["neighbours"]["details"]["recall_at_10"] >= 0.9
    assert problems(database) == []


@pytest.mark.parametrize("made_by", ["add", "compact", "swap", "refresh"])
def test_a_recall_below_the_gate_names_a_remedy_that_the_command_has(made_by: str) -> None:
    with pytest.raises(RecallError, match=f"`retrodb {made_by}` keeps .*: build another with `retrodb build") as raised:
        choose_nprobe({1: 0.4}, 0.9, "IVF10,SQ8", requested=True, made_by=made_by)
    assert "IVF10,Flat" in str(raised.value)
    assert recall_remedy("IVF10,SQ8", True, "build").startswith("--index-key")
