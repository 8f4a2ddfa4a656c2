"""The space of deleted documents is returned: what is left keeps its ids, and is what a build without them would be.

The labels C1 and C2 are those of the requirements of REALM mode.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import (
    Progress,
    Running,
    build_here,
    manifest_of,
    near_duplicates_of,
    retrodb,
    rows_of,
    save_manifest,
    sha256,
    shards_of,
    stamps,
    table_of,
    vectors_of,
)

import retrodb as package
from retrodb.config import RunSettings
from retrodb.corpus.quickstart import quickstart_lines
from retrodb.corpus.selection import Selection
from retrodb.database import Database
from retrodb.errors import InputError, LockedError
from retrodb.lock import writer_lock
from retrodb.quality.verify import verify_database
from retrodb.storage import Storage

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


def test_compact_C2_what_is_left_is_what_a_build_without_the_documents_has(database: Path) -> None:
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
    assert pinned.version == 2
    assert pinned.search(query, k=3), "who reads version 2 goes on with it"
    assert problems(database) == problems(database, version=2) == problems(database, version=1) == []
