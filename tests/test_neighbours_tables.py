"""Stored vectors and documents behind neighbours, and the neighbours table."""

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrodb import schemas
from retrodb.errors import DamagedError
from retrodb.neighbours import Neighbours, StoredDocuments, StoredVectors, from_table, to_table
from retrodb.storage import Storage


def store(folder: Path, shards: dict[int, list[int]]) -> tuple[Storage, dict[int, str], dict[int, str]]:
    """Chunk and embedding shards with the given rows; vector and document tell the id."""
    storage = Storage(str(folder))
    chunks, embeddings = {}, {}
    for shard, rows in shards.items():
        ids = (shard << 32) + np.array(rows, dtype=np.int64)
        chunks[shard] = f"chunks/{shard:05d}.parquet"
        embeddings[shard] = f"embeddings/{shard:05d}.npy"
        table = pa.table({"chunk_id": ids, "document_id": ids * 3, "position": np.zeros(len(ids), np.int32)})
        storage.commit_table(chunks[shard], table, 100)
        vectors = np.stack([np.full(len(ids), shard), np.array(rows)], axis=1).astype(np.float16)
        storage.commit_array(embeddings[shard], vectors)
    return storage, chunks, embeddings


@settings(deadline=None)
@given(ids=st.lists(st.tuples(st.sampled_from([0, 1, 7]), st.integers(0, 9)), max_size=40))
def test_vectors_and_documents_come_in_the_order_of_the_ids(
    ids: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    storage, chunks, embeddings = store(tmp_path_factory.mktemp("db"), {s: list(range(10)) for s in (0, 1, 7)})
    documents = StoredDocuments(storage, chunks)
    asked = np.array([shard << 32 | row for shard, row in ids], dtype=np.int64)
    assert documents.document_ids(asked).tolist() == (asked * 3).tolist()
    for vectors in (StoredVectors(storage, embeddings), StoredVectors(storage, embeddings, documents.locate, 1)):
        found = vectors.rows(asked)
        assert found.dtype == np.float16
        assert [tuple(row) for row in found.tolist()] == ids


def test_after_a_compaction_rows_are_found_by_id(tmp_path: Path) -> None:
    storage, chunks, embeddings = store(tmp_path, {2: [0, 3, 4, 9]})
    documents = StoredDocuments(storage, chunks)
    vectors = StoredVectors(storage, embeddings, documents.locate)
    asked = (2 << 32) + np.array([9, 3, 3])
    assert vectors.rows(asked).tolist() == [[2, 9], [2, 3], [2, 3]]
    assert documents.document_ids(asked).tolist() == (asked * 3).tolist()
    for gone in (1, 8, 10):
        with pytest.raises(DamagedError, match=str((2 << 32) + gone)):
            vectors.rows(np.array([(2 << 32) + gone]))


@pytest.mark.parametrize("bad", [-1, 10, 5 << 32])
def test_an_id_that_does_not_exist_is_never_looked_up(bad: int, tmp_path: Path) -> None:
    storage, chunks, embeddings = store(tmp_path, {0: list(range(10))})
    for look in (StoredDocuments(storage, chunks).document_ids, StoredVectors(storage, embeddings).rows):
        with pytest.raises(DamagedError, match=r"chunk|-1"):
            look(np.array([0, bad]))


def test_caches_are_bounded_and_stay_behind_when_a_source_travels(tmp_path: Path) -> None:
    storage, chunks, embeddings = store(tmp_path, {s: list(range(100)) for s in range(6)})
    asked = (np.arange(6, dtype=np.int64) << 32) + 5
    documents = StoredDocuments(storage, chunks, cache_bytes=2 * 100 * 8)
    vectors = StoredVectors(storage, embeddings, cache_bytes=2 * 100 * 4)
    documents.document_ids(asked)
    vectors.rows(asked)
    assert (len(documents._recent), len(vectors._recent)) == (2, 2)
    sent = pickle.loads(pickle.dumps(vectors))
    assert len(sent._recent) == 0
    assert sent.rows(asked).tolist() == vectors.rows(asked).tolist()


def test_a_shard_that_is_no_float16_matrix_is_refused(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.commit_array("embeddings/00000.npy", np.zeros((3, 2), np.float32))
    with pytest.raises(DamagedError, match=r"00000\.npy is float32"):
        StoredVectors(storage, {0: "embeddings/00000.npy"}).rows(np.array([1]))


def neighbours_of(n_valid: list[int], k: int) -> Neighbours:
    n = len(n_valid)
    valid = np.arange(k)[None, :] < np.array(n_valid, dtype=np.int64).reshape(n, 1)
    values = np.arange(n * k, dtype=np.int64).reshape(n, k)
    return Neighbours(
        np.arange(n, dtype=np.int64) + (1 << 40),
        np.where(valid, values, -1),
        np.where(valid, values * 2, -1),
        np.where(valid, values / 8, np.nan).astype(np.float32),
        np.array(n_valid, dtype=np.int16),
    )


@settings(deadline=None)
@given(k=st.integers(1, 7), data=st.data())
def test_a_table_keeps_every_neighbour_with_null_elements_and_no_null_lists(k: int, data: st.DataObject) -> None:
    result = neighbours_of(data.draw(st.lists(st.integers(0, k), max_size=12)), k)
    table = to_table(result)
    assert table.schema.equals(schemas.neighbours(k), check_metadata=True)
    table.validate(full=True)
    for name in ("neighbour_ids", "neighbour_document_ids", "distances"):
        assert table[name].null_count == 0
        lists = table[name].to_pylist()
        assert [sum(item is not None for item in row) for row in lists] == result.n_valid.tolist()
        assert all(len(row) == k for row in lists)
    start = data.draw(st.integers(0, len(result.n_valid)))
    for rows in (slice(0, None), slice(start, None)):
        back = from_table(table.slice(rows.start))
        assert np.array_equal(back.chunk_ids, result.chunk_ids[rows])
        assert np.array_equal(back.neighbour_ids, result.neighbour_ids[rows])
        assert np.array_equal(back.neighbour_document_ids, result.neighbour_document_ids[rows])
        assert np.array_equal(back.distances, result.distances[rows], equal_nan=True)
        assert back.distances.dtype == np.float32
        assert back.n_valid.tolist() == result.n_valid[rows].tolist()


def test_a_table_in_pieces_reads_as_one(tmp_path: Path) -> None:
    result = neighbours_of([2, 0, 1, 2], 2)
    table = to_table(result)
    storage = Storage(str(tmp_path))
    storage.commit_table("neighbours/00000.parquet", table, 2)
    for read in (pa.concat_tables([table.slice(0, 1), table.slice(1)]), storage.read_table("neighbours/00000.parquet")):
        assert np.array_equal(from_table(read).neighbour_ids, result.neighbour_ids)


def test_a_row_whose_count_is_not_its_neighbours_is_refused() -> None:
    table = to_table(neighbours_of([2, 1], 2))
    wrong = table.set_column(4, table.schema.field("n_valid"), pa.array([2, 2], pa.int16()))
    with pytest.raises(DamagedError, match="n_valid"):
        from_table(wrong)
