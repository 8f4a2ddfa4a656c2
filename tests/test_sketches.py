"""Sketches: kept with their documents, so that what joins a database is compared with what is there unread."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from near_duplicates import varied, words_of
from retrodb.schemas import SKETCH_BYTES
from support import Progress, build_here, retrodb, shards_of, table_of, write_jsonl

from retrodb.config import RunSettings
from retrodb.corpus import expand_inputs, sketches
from retrodb.corpus.sketches import BANDS, BandFilter, Sketches, kept_sketches, sketch
from retrodb.errors import DamagedError, MismatchError, WorkerError
from retrodb.manifest import Manifest, Shard
from retrodb.storage import Storage

SETTINGS = {"shard_bytes": "12KiB", "precision": "fp32", "chunk_tokens": 32, "sequence_tokens": 128}
OLD = [{"id": f"old-{n}", "text": " ".join(words_of(n))} for n in range(9)]
NEW = [
    {"id": "like-3", "text": varied(words_of(3), 0)},
    {"id": "fresh", "text": " ".join(words_of(70))},
]


def texts_of(*documents: list[str]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(some, pa.large_string()) for some in documents], pa.large_string())


def drawn(n: int, seed: int) -> Sketches:
    random = np.random.default_rng(seed)
    return Sketches(
        random.integers(0, 1 << 63, (BANDS, n), dtype=np.uint64), random.integers(0, 1 << 63, n, dtype=np.uint64)
    )


# -- as they are kept ------------------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=40), max_size=8), st.integers(0, 8), st.lists(st.booleans(), min_size=8, max_size=8))
@settings(deadline=None, max_examples=60)
def test_a_column_gives_back_the_sketches_it_was_made_from(texts, cut, absent):
    made = sketch(texts_of(texts))
    column = made.as_column()
    missing = np.array(absent[: len(texts)], dtype=bool)
    values = [None if gone else value for gone, value in zip(missing, column.to_pylist(), strict=True)]
    pieces = pa.chunked_array([pa.array(part, pa.binary(SKETCH_BYTES)) for part in (values[:cut], values[cut:])])
    for whole in (pieces, pieces.slice(min(1, len(texts)))):
        first = len(texts) - len(whole)
        found, comparable = kept_sketches(whole)
        assert comparable.tolist() == (~missing[first:]).tolist()
        assert np.array_equal(found.bands[:, comparable], made.bands[:, first:][:, comparable])
        assert np.array_equal(found.signatures[comparable], made.signatures[first:][comparable])


@pytest.mark.parametrize("kind", [pa.binary(), pa.binary(8), pa.int64()])
def test_a_column_of_something_else_is_damage(kind):
    with pytest.raises(DamagedError, match="a column sketch of .* holds no sketches"):
        kept_sketches(pa.chunked_array([pa.nulls(3, kind)]))


def test_sketches_that_other_libraries_made_are_told_from_ours(monkeypatch):
    theirs = sketch(texts_of(["one", "two"])).as_column()
    monkeypatch.setattr(sketches, "_SEED", sketches._SEED + 1)
    sketches.sketcher.cache_clear()
    try:
        ours = sketch(texts_of(["three"])).as_column()
        _, comparable = kept_sketches(pa.chunked_array([theirs, ours]))
        assert comparable.tolist() == [False, False, True]
    finally:
        monkeypatch.undo()
        sketches.sketcher.cache_clear()


# -- who may be alike ------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(0, 30), st.integers(1, 60), st.data())
@settings(deadline=None, max_examples=60)
def test_whoever_shares_a_band_with_one_of_the_others_passes(seed, others, count, data):
    them, us = drawn(others, seed), drawn(count, seed + 1)
    shares = np.zeros(count, dtype=bool)
    if others:
        for row in data.draw(st.lists(st.integers(0, count - 1), unique=True)):
            band, other = data.draw(st.integers(0, BANDS - 1)), data.draw(st.integers(0, others - 1))
            us.bands[band, row] = them.bands[band, other]
            shares[row] = True
    half = others // 2
    pieces = [them.take(np.arange(half)), them.take(np.arange(half, others))]
    assert BandFilter(pieces, others)(us)[shares].all()


@pytest.mark.parametrize("others", [0, 1, 100, 20_000])
def test_few_pass_that_share_none(others):
    passed = BandFilter([drawn(others, 1)], others)(drawn(20_000, 2))
    assert passed.mean() <= (0.06 if others else 0)


def test_beside_very_many_a_filter_takes_no_more_memory():
    few, many = BandFilter([], 32_768), BandFilter([], 10**9)
    assert few._there.nbytes == many._there.nbytes < 64 << 20


# -- in a database ---------------------------------------------------------------------------------------------------


def add(database: Path, *inputs: Path) -> None:
    """Add in this process."""
    from retrodb.pipelines.add import add

    listing = expand_inputs([str(path) for path in inputs])
    add(Storage(str(database)), listing.files, RunSettings(workers=1), Progress())


def clusters(database: Path) -> set[frozenset[str]]:
    shards = shards_of(database, "documents")
    table = pa.concat_tables([pq.read_table(path, columns=["key", "cluster_id"]) for path in shards])
    found: dict[int, set[str]] = {}
    for key, cluster in zip(table["key"].to_pylist(), table["cluster_id"].to_pylist(), strict=True):
        found.setdefault(cluster, set()).add(key)
    return {frozenset(keys) for cluster, keys in found.items() if cluster is not None}


@pytest.fixture
def database(tiny_encoder: Path, tmp_path: Path) -> Path:
    out = tmp_path / "db"
    build_here([write_jsonl(tmp_path / "old.jsonl", OLD)], out, encoder=str(tiny_encoder), **SETTINGS)
    return out


@pytest.fixture
def more(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "more.jsonl", NEW)


def test_every_document_has_the_sketch_of_its_text(database: Path) -> None:
    table = table_of(database, "documents")
    assert table["sketch"].combine_chunks().equals(sketch(table["text"]).as_column())
    assert retrodb("verify", database, "--sample", "1").code == 0


@pytest.mark.parametrize("settings", [{"dedup": "off"}, {"text": False}])
def test_there_is_none_where_none_is_looked_for_or_the_text_is_not_kept(
    settings: dict[str, object], database: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "old.jsonl"
    for out in (tmp_path / "other", database):  # at once, and where there were sketches
        build_here([source], out, encoder=str(tiny_encoder), **SETTINGS, **settings)
        assert table_of(out, "documents")["sketch"].null_count == len(OLD)
        assert retrodb("verify", out).code == 0
    build_here([source], database, encoder=str(tiny_encoder), **SETTINGS)
    assert table_of(database, "documents")["sketch"].null_count == 0


def test_add_C2_finds_near_duplicates_of_what_is_there_without_sketching_it_again(
    database: Path, more: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sketched: list[str] = []

    def counting(texts: pa.ChunkedArray) -> Sketches:
        sketched.extend(texts.to_pylist())
        return sketch(texts)

    monkeypatch.setattr("retrodb.pipelines.sketches.sketch", counting)
    add(database, more)
    assert sorted(sketched) == sorted(record["text"] for record in NEW)
    assert clusters(database) == {frozenset({"old-3", "like-3"})}


def test_add_C2_sketches_again_what_other_libraries_sketched(
    tiny_encoder: Path, tmp_path: Path, more: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "db"
    with monkeypatch.context() as before:
        before.setattr(sketches, "_SEED", sketches._SEED + 1)
        sketches.sketcher.cache_clear()
        build_here([write_jsonl(tmp_path / "old.jsonl", OLD)], out, encoder=str(tiny_encoder), **SETTINGS)
    sketches.sketcher.cache_clear()
    assert not kept_sketches(table_of(out, "documents")["sketch"])[1].any()
    add(out, more)
    assert clusters(out) == {frozenset({"old-3", "like-3"})}
    ran = retrodb("verify", out, "--sample", "1")
    assert (ran.code, "sketched by other libraries" in ran.out) == (0, True)


def test_killed_before_its_libraries_changed_a_build_goes_on(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has sketched by then is sketched again: nothing else would ever be comparable with it."""

    def build() -> None:
        build_here([write_jsonl(tmp_path / "old.jsonl", OLD)], tmp_path / "db", encoder=str(tiny_encoder), **SETTINGS)

    with monkeypatch.context() as before:
        before.setattr(sketches, "_SEED", sketches._SEED + 1)
        before.setattr("retrodb.pipelines.dedup.pair_pipeline", None)
        sketches.sketcher.cache_clear()
        with pytest.raises(WorkerError):
            build()
    sketches.sketcher.cache_clear()
    assert len(list((tmp_path / "db" / ".build" / "sketches").iterdir())) > 1
    build()
    table = table_of(tmp_path / "db", "documents")
    assert table["sketch"].combine_chunks().equals(sketch(table["text"]).as_column())


def test_a_worker_with_other_libraries_than_the_driver_leaves_no_sketches(database: Path) -> None:
    from retrodb.pipelines.sketches import _sketch, sketch_tasks

    storage = Storage(str(database))
    manifest = Manifest.load(storage)
    assert manifest is not None
    task = sketch_tasks(manifest.shards("documents"))[0]
    with pytest.raises(MismatchError, match=r"the driver has other libraries .*rensa"):
        list(_sketch(storage, sketches.sketcher() + 1, task))
    assert storage.size(task.payload.path) is None


def test_workers_with_other_libraries_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from retrodb.pipelines.sketches import read_sketches

    storage = Storage(str(tmp_path))
    table = pa.table({"document_id": pa.array([0]), "sketch": sketch(texts_of(["one"])).as_column()})
    storage.commit_table("theirs.parquet", table, 1)
    monkeypatch.setattr("retrodb.corpus.sketches.sketcher", lambda: 1)
    with pytest.raises(MismatchError, match=r"theirs\.parquet was sketched by other libraries .*rensa"):
        read_sketches(storage, "theirs.parquet")


def test_a_changed_sketch_is_found(database: Path, tmp_path: Path) -> None:
    """By its checksum always; one that was written with a wrong sketch where its shard is made again."""
    from retrodb.pipelines.corpus import DOCUMENT_ROW_GROUP

    storage = Storage(str(database))
    manifest = Manifest.load(storage)
    assert manifest is not None
    first, *others = manifest.shards("documents")
    table = storage.read_table(first)
    wrong = sketch(texts_of(["another text"] * table.num_rows)).as_column()
    for values, said in ((wrong, "sketch is not that of the text"), (pa.nulls(len(wrong), wrong.type), "null sketch")):
        shutil.rmtree(tmp_path / "changed", ignore_errors=True)
        shutil.copytree(database, tmp_path / "changed")
        there = Storage(str(tmp_path / "changed"))
        place = table.column_names.index("sketch")
        changed = table.set_column(place, table.schema.field("sketch"), values)
        committed = there.commit_table(first.path, changed, DOCUMENT_ROW_GROUP)
        shard = Shard.of(committed, first.number, first.rows)
        replace(manifest, tables={**manifest.tables, "documents": (shard, *others)}).save(there, manifest)
        ran = retrodb("verify", tmp_path / "changed", "--sample", "1")
        assert (ran.code, said in ran.err + ran.out) == (4, True), ran.err


def test_a_database_of_an_earlier_retrodb_is_whole_without_sketches_also_once_it_has_grown(
    tiny_encoder: Path, tmp_path: Path, more: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrodb.pipelines import stages

    out = tmp_path / "db"
    with monkeypatch.context() as before:
        before.setitem(stages._CODE, "corpus", 1)
        build_here([write_jsonl(tmp_path / "old.jsonl", OLD)], out, encoder=str(tiny_encoder), **SETTINGS)
    storage = Storage(str(out))
    manifest = Manifest.load(storage)
    assert manifest is not None
    shards = []
    for shard in manifest.shards("documents"):
        committed = storage.commit_table(shard.path, storage.read_table(shard).drop_columns(["sketch"]), 1 << 10)
        shards.append(Shard.of(committed, shard.number, shard.rows))
    replace(manifest, tables={**manifest.tables, "documents": tuple(shards)}).save(storage, manifest)
    assert retrodb("verify", out, "--sample", "1").code == 0
    add(out, more)
    assert clusters(out) == {frozenset({"old-3", "like-3"})}
    assert retrodb("verify", out, "--sample", "1").code == 0


def test_a_damaged_document_shard_gets_its_sketches_back(database: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (database / "documents").iterdir()}
    path = sorted((database / "documents").iterdir())[0]
    path.write_bytes(path.read_bytes()[:-7])
    build_here([tmp_path / "old.jsonl"], database, encoder=str(tiny_encoder), **SETTINGS)
    after = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (database / "documents").iterdir()}
    assert after == before
