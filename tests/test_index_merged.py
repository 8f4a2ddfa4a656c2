"""Index shards merged into one index on disk: the same answers, and nothing of it in the database."""

from pathlib import Path

import numpy as np
import pytest
from support import build_here, retrodb, stamps

from retrodb.errors import DamagedError, InputError
from retrodb.index import GroupedIndex, IndexFile, build_index_shard, commit_index_shard, search_group, train_template
from retrodb.index.merged import MERGED_LISTS, merge_index, open_merged
from retrodb.storage import Storage

D = 16
VECTORS = np.random.default_rng(3).standard_normal((1_500, D)).astype(np.float16)
VECTORS[400:700] = VECTORS[400]


def shards(folder: Path, key: str, metric: str) -> tuple[Storage, bytes, list[IndexFile]]:
    storage, template = Storage(str(folder)), train_template(VECTORS.astype(np.float32), key, metric, 0)
    files = []
    for number, rows in enumerate(np.array_split(np.arange(len(VECTORS)), 3)):
        index = build_index_shard(template, [((number << 32) + rows, VECTORS[rows])], D, metric)
        commit_index_shard(storage, f"index/{number:05d}.faiss", index)
        files.append(IndexFile(f"index/{number:05d}.faiss", int(index.ntotal)))
    return storage, template, files


@pytest.mark.parametrize("key", ["IVF16,Flat", "IVF16,SQ8", "OPQ1,IVF16,SQ8"])
@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_the_merged_index_answers_as_its_shards_do_wherever_its_folder_is(key, metric, tmp_path):
    storage, template, files = shards(tmp_path / "db", key, metric)
    merged = merge_index(storage, template, files, D, metric, tmp_path / "merged")
    (tmp_path / "merged").rename(tmp_path / "moved")
    index = open_merged(tmp_path / "moved" / merged.path.name, D, metric, len(VECTORS))
    queries = VECTORS[::7].astype(np.float32)
    apart = GroupedIndex(storage, files, D, metric)
    for nprobe in (2, 16):
        expected, ids = apart.search(queries, 30, nprobe)
        raw, found = search_group(index, queries, 30, nprobe)
        assert np.array_equal(raw, expected)
        for row in range(len(queries)):  # among equals at the cut, any may be kept
            inside = raw[row] != raw[row, -1]
            assert set(found[row][inside]) == set(ids[row][inside])


def test_what_cannot_be_merged_is_refused_and_nothing_is_overwritten(tmp_path):
    storage, template, files = shards(tmp_path / "db", "IVF16,SQ8", "l2")
    exact = train_template(VECTORS.astype(np.float32), "Flat", "l2", 0)
    with pytest.raises(InputError, match="exact"):
        merge_index(storage, exact, [], D, "l2", tmp_path / "m")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    with pytest.raises(InputError, match="there already"):
        merge_index(storage, template, files, D, "l2", tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    merged = merge_index(storage, template, files, D, "l2", tmp_path / "m")
    (tmp_path / "m" / MERGED_LISTS).unlink()
    with pytest.raises(DamagedError, match="cannot read"):
        open_merged(merged.path, D, "l2", len(VECTORS))
    storage.delete(files[1].path)
    with pytest.raises(DamagedError):
        merge_index(storage, template, files, D, "l2", tmp_path / "n")


@pytest.mark.slow
def test_the_command_merges_beside_the_database_and_leaves_it_as_it_was(quickstart_corpus, tiny_encoder, tmp_path):
    db = tmp_path / "db"
    build_here([quickstart_corpus], db, encoder=str(tiny_encoder), until="index", index_key="IVF4,SQ8")
    before = stamps(db)
    ran = retrodb("index", "merge", db, "--out", tmp_path / "merged", "--json")
    assert ran.code == 0, ran.err
    assert stamps(db) == before
    index = open_merged(Path(ran.json["path"]), 32, "l2", ran.json["vectors"])
    assert index.ntotal == ran.json["vectors"]
    inside = retrodb("index", "merge", db, "--out", db / "merged")
    assert (inside.code, "inside the database" in inside.err) == (3, True)
