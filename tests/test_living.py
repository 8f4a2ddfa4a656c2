"""A database that lives: what is deleted is gone for every reader at once, and other versions are as they were.

The labels C1 and C2 are those of the requirements of REALM mode.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support import Progress, Running, build_here, manifest_of, retrodb, rows_of, save_manifest, stamps, table_of

import retrodb as package
from retrodb.corpus.quickstart import quickstart_lines
from retrodb.corpus.selection import Condition, Selection
from retrodb.database import Database
from retrodb.deletions import Deletions
from retrodb.errors import InputError, LockedError, UsageError
from retrodb.evaluation.exact import exact_search
from retrodb.lock import writer_lock
from retrodb.quality.verify import verify_database
from retrodb.storage import Storage
from retrodb.training.table import TrainingTable


@pytest.fixture(scope="module")
def first(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten topics of real text in several shards, with languages and years to select by. Do not change it."""
    folder = tmp_path_factory.mktemp("living")
    lines = [json.loads(line) for line in quickstart_lines() if 2_000 < len(line) < 8_000][:10]
    with (folder / "topics.jsonl").open("w", encoding="utf-8") as file:
        for at, line in enumerate(lines):
            language, year = ("de", 2010 + at) if at % 3 == 0 else ("en", 2000 + at)
            file.write(json.dumps({**line, "id": f"topic-{at}", "lang": language, "year": year}) + "\n")
    out = folder / "db"
    build_here(
        [folder / "topics.jsonl"],
        out,
        encoder=str(tiny_encoder),
        shard_bytes="16KiB",
        sequence_tokens=256,
        neighbours=4,
    )
    return out


@pytest.fixture
def database(first: Path, tmp_path: Path) -> Path:
    """A copy of `first` to be changed."""
    shutil.copytree(first, tmp_path / "db")
    return tmp_path / "db"


def deleted(database: Path, **selection: object) -> tuple[int, int, int]:
    """Delete in this process: (version, documents, chunks)."""
    from retrodb.pipelines.living import delete

    done = delete(Storage(str(database)), Selection(**selection), Progress())
    return done.version, done.documents, done.chunks


def problems(database: Path, version: int | None = None) -> list[str]:
    report = verify_database(package.open(str(database), version=version), 1.0)
    return [f"{found.path}: {found.what}" for found in report.problems]


def keys_of(db: Database) -> list[str]:
    return [document.key for document in db.documents()]


def brute_force(database: Path, query: np.ndarray, gone: set[int], k: int) -> list[int]:
    """Chunk ids by distance with nothing of retrodb, without those of deleted documents."""
    chunks = table_of(database, "chunks")
    ids = chunks["chunk_id"].to_numpy()
    vectors = np.concatenate(
        [np.load(database / shard["path"]) for shard in manifest_of(database)["tables"]["embeddings"]["shards"]]
    ).astype(np.float32)
    there = ~np.isin(chunks["document_id"].to_numpy(), sorted(gone))
    distances = ((vectors[there] - query.astype(np.float16).astype(np.float32)) ** 2).sum(1)
    return ids[there][np.lexsort((ids[there], distances))][:k].tolist()


# -- deletion ----------------------------------------------------------------------------------------------------------


def test_delete_C2_masks_search_neighbours_documents_and_chunks_at_once(database: Path) -> None:
    db = package.open(str(database))
    victim = next(db.documents())
    old = {chunk: db.neighbours(chunk) for chunk in table_of(database, "chunks")["chunk_id"].to_pylist()}
    query = db.embeddings(0)[0]
    assert db.search(query, k=1)[0].document_id == victim.document_id

    assert deleted(database, ids=(victim.document_id,)) == (2, 1, victim.n_chunks)
    now = package.open(str(database))
    assert now.version == 2
    assert victim.key not in keys_of(now)
    assert len(keys_of(now)) == len(keys_of(db)) - 1
    found = [hit.chunk_id for hit in now.search(query, k=30)]
    assert found == brute_force(database, query, {victim.document_id}, 30)
    gone = [row["chunk_id"] for row in rows_of(database, "chunks") if row["document_id"] == victim.document_id]
    for chunk, before in old.items():
        if chunk in gone:
            for look in (now.chunk, now.neighbours):
                with pytest.raises(InputError, match=r"was deleted .*version 2"):
                    look(chunk)
        else:
            assert now.neighbours(chunk) == [one for one in before if one.document_id != victim.document_id]
    exact = exact_search(now, query[None, :], 30)[0].tolist()
    assert exact == found + [-1] * (30 - len(found))
    assert sum(table.num_rows for table in now.chunks()) == len(old) - len(gone)
    with pytest.raises(InputError, match="was deleted"):
        now.document(victim.document_id)
    assert db.search(query, k=1)[0].document_id == victim.document_id, "who reads version 1 goes on with it"
    assert problems(database) == problems(database, version=1) == []


def test_delete_C2_masks_the_training_stream_at_once(database: Path, tmp_path: Path) -> None:
    whole = list(package.open(str(database)).training(split="train"))
    victims = {row["document_id"] for row in rows_of(database, "documents")[::3]}
    deleted(database, ids=tuple(victims))
    db = package.open(str(database))
    masked = list(db.training(split="train"))
    table = TrainingTable(db.storage, db.manifest, str(tmp_path / "cache"), neighbours=2)
    assert len(masked) == len(whole) == len(table)
    owner = {row["chunk_id"]: row["document_id"] for row in rows_of(database, "chunks")}
    for at, (before, after) in enumerate(zip(whole, masked, strict=True)):
        kept = [slot for slot, of in enumerate(before["document_ids"].tolist()) if of >= 0 and of not in victims]
        n = len(kept)
        assert after["chunk_ids"].tolist() == before["chunk_ids"][kept].tolist() + [-1] * (4 - n)
        assert after["document_ids"].tolist() == before["document_ids"][kept].tolist() + [-1] * (4 - n)
        assert after["chunk_lengths"].tolist() == before["chunk_lengths"][kept].tolist() + [0] * (4 - n)
        assert int(after["n_tokens"]) == int(after["chunk_lengths"].sum())
        assert after["tokens"].view(4, 64)[:n].equal(before["tokens"].view(4, 64)[kept])
        assert not after["tokens"].view(4, 64)[n:].any()
        for slot, old in enumerate(kept):
            near = [j for j, of in enumerate(before["neighbour_ids"][old].tolist()) if owner.get(of) not in victims]
            near = [j for j in near if before["neighbour_ids"][old][j] >= 0]
            v = len(near)
            assert int(after["n_valid"][slot]) == v
            assert after["neighbour_ids"][slot].tolist() == before["neighbour_ids"][old][near].tolist() + [-1] * (2 - v)
            assert after["neighbour_tokens"][slot][:v].equal(before["neighbour_tokens"][old][near])
            assert after["neighbour_lengths"][slot][:v].equal(before["neighbour_lengths"][old][near])
            assert not after["neighbour_tokens"][slot][v:].any()
            assert not after["neighbour_lengths"][slot][v:].any()
        for name, value in table[at].items():
            assert value.equal(after[name]), name


def test_delete_writes_one_small_file_and_a_manifest(database: Path) -> None:
    before = stamps(database)
    deleted(database, ids=(0,))
    after = stamps(database)
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed == {
        "manifest.json",
        "reports/manifest.json",
        "versions/1/manifest.json",
        "versions/2/deleted/00000.parquet",
        "versions/2/manifest.json",
    }


def test_deletions_add_up_and_nothing_is_deleted_twice(database: Path) -> None:
    ids = [row["document_id"] for row in rows_of(database, "documents")]
    deleted(database, ids=(ids[0],))
    version, documents, _ = deleted(database, ids=(ids[0], ids[4]))
    assert (version, documents) == (3, 1)
    before = stamps(database)
    assert deleted(database, ids=(ids[0],)) == (3, 0, 0)
    assert stamps(database) == before
    db = package.open(str(database))
    assert db.deletions.document_ids.tolist() == sorted([ids[0], ids[4]])
    assert db.summary()["documents"]["deleted"] == 2
    assert problems(database) == []
    assert len(list(package.open(str(database), version=2).documents())) == len(ids) - 1


def test_what_was_deleted_can_be_added_again_from_its_own_file(
    old: Path, halves: tuple[Path, Path], tmp_path: Path
) -> None:
    database = tmp_path / "db"
    shutil.copytree(old, database)
    first = rows_of(database, "documents")[0]["document_id"]
    deleted(database, ids=(first,))
    with pytest.raises(InputError, match=r"5 documents of it would be there twice\. Delete what is there"):
        added(database, halves[0])
    keys = keys_of(package.open(str(old)))
    deleted(database, sources=("*a.jsonl",))
    added(database, halves[0])
    assert keys_of(package.open(str(database))) == keys
    assert problems(database) == []


def test_nothing_is_deleted_from_a_database_that_is_half_built(
    old: Path, tiny_encoder: Path, halves: tuple[Path, Path], tmp_path: Path
) -> None:
    """It would have a version of its own then, and could neither be built on nor changed."""
    build_here([halves[0]], tmp_path / "db", encoder=str(tiny_encoder), until="index", **ADDED)
    with pytest.raises(InputError, match="is not finished: run its build to the end before documents are deleted"):
        deleted(tmp_path / "db", ids=(0,))
    build_here([halves[0]], tmp_path / "db", encoder=str(tiny_encoder), **ADDED)
    assert problems(tmp_path / "db") == []


def test_everything_can_be_deleted(database: Path) -> None:
    deleted(database, sources=("*",))
    db = package.open(str(database))
    assert keys_of(db) == []
    assert db.search("anything", k=3) == []
    assert all(int(sample["n_tokens"]) == 0 for sample in db.training(split=None))
    assert problems(database) == []


def test_a_position_in_the_stream_holds_when_documents_are_deleted(database: Path) -> None:
    dataset = package.open(str(database)).training(split="train")
    stream = iter(dataset)
    first = [next(stream) for _ in range(2)]
    state = dataset.state_dict()
    last_document = rows_of(database, "documents")[-1]["document_id"]
    deleted(database, ids=(last_document,))
    resumed = package.open(str(database)).training(split="train")
    resumed.load_state_dict(state)
    rest = [int(sample["sequence_id"]) for sample in resumed]
    every = [int(sample["sequence_id"]) for sample in package.open(str(database)).training(split="train")]
    assert [int(sample["sequence_id"]) for sample in first] + rest == every


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--key", "topic-1", "--key", "topic-2"), {1, 2}),
        (("--where", "lang=de"), {0, 3, 6, 9}),
        (("--where", "lang = de", "--where", "year >= 2013"), {3, 6, 9}),
        (("--where", "year<2005"), {1, 2, 4}),
        (("--where", "key ~ ^topic-[78]$"), {7, 8}),
        (("--where", "document_id <= 1"), {0, 1}),
        (("--where", "document_id != 3"), {0, 1, 2, 4, 5, 6, 7, 8, 9}),
        (("--where", "text ~ (?s)."), set(range(10))),
        (("--where", "lang != de", "--where", "key!=topic-1"), {2, 4, 5, 7, 8}),
        (("--source", "*nowhere*"), set()),
    ],
)
def test_documents_are_selected_by_what_they_say(database: Path, flags: tuple[str, ...], expected: set[int]) -> None:
    ran = retrodb("delete", database, *flags, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["documents"] == len(expected)
    left = {int(key.removeprefix("topic-")) for key in keys_of(package.open(str(database)))}
    assert left == set(range(10)) - expected


def test_a_deletion_of_what_is_not_there_changes_nothing(database: Path) -> None:
    before = stamps(database)
    for flags, code, said in (
        ((), 2, "say which documents"),
        (("--ids", "0,999"), 3, "has no document 999: nothing was changed"),
        (("--key", "nobody"), 3, "has no document 'nobody'"),
        (("--ids", "x"), 2, "write document ids"),
        (("--where", "lang"), 2, "write FIELD OP VALUE"),
        (("--where", "title ~ ("), 2, "is no regular expression"),
        (("--where", "langg != de"), 3, "has a field 'langg': nothing was changed. There are the columns document_id"),
        (("--where", "lang = de", "--source", "*"), 2, "--where stands alone"),
    ):
        ran = retrodb("delete", database, *flags)
        assert (ran.code, said in ran.err) == (code, True), ran.err
    with writer_lock(Storage(str(database))), pytest.raises(LockedError):
        deleted(database, ids=(0,))
    with pytest.raises(UsageError):
        deleted(database)
    assert stamps(database) == before
    assert retrodb("delete", database.parent / "nothing", "--ids", 1).code == 3


def test_conditions_compare_numbers_as_numbers_texts_as_texts_and_never_hold_of_what_is_missing() -> None:
    assert Condition.parse("year >= 9").holds(10)
    assert Condition.parse("year >= 9").holds("10")
    assert Condition.parse("name >= 9").holds("abc"), "what is no number is compared as text"
    assert not Condition.parse("year = 5").holds(None)
    assert not Condition.parse("year != 5").holds(None)
    assert Condition.parse("year = 2020").holds(2020.0)
    assert not Condition.parse("key = 7").holds("007")
    assert not Condition.parse("key = 1000").holds("1e3")
    assert not Condition.parse("n = 9007199254740993").holds(9007199254740992)
    assert Condition.parse("n > 9007199254740992").holds(9007199254740993)
    assert Condition.parse("x != nan").holds("inf")
    assert Condition.parse("flag = true").holds(True)
    assert Condition.parse("content_hash ~ ^00ff").holds(b"\x00\xff")
    assert Condition.parse("tags ~ b").holds(["a", "b"])


def test_intervals_of_deleted_chunks_are_exact() -> None:
    gone = Deletions(np.array([3, 9]), np.array([40, 10]), np.array([42, 13]))
    assert gone.of_chunks(np.array([-1, 9, 10, 12, 13, 39, 40, 41, 42])).tolist() == [
        False, False, True, True, False, False, True, True, False,
    ]  # fmt: skip
    assert gone.of_documents(np.array([[3, 4], [9, -1]])).tolist() == [[True, False], [True, False]]
    nothing = Deletions(*(np.empty(0, np.int64),) * 3)
    assert not nothing.of_chunks(np.array([0, 5])).any()


def test_exports_refuse_what_they_cannot_mask(database: Path, tmp_path: Path) -> None:
    deleted(database, ids=(0,))
    ran = retrodb("export", database, "--to", "huggingface", "--out", tmp_path / "out")
    assert ran.code == 3
    assert "1 deleted document," in ran.err


def test_verify_names_a_table_of_deleted_documents_that_is_wrong(database: Path) -> None:
    deleted(database, ids=(0,))
    import pyarrow.parquet as pq
    from support import sha256

    path = database / "versions/2/deleted/00000.parquet"
    table = pq.read_table(path)
    columns = {"document_id": [0], "first_chunk_id": [1], "n_chunks": [2]}
    pq.write_table(type(table).from_pydict(columns, schema=table.schema), path)
    manifest = manifest_of(database)
    entry = manifest["tables"]["deleted"]["shards"][0]
    entry |= {"sha256": sha256(path), "bytes": path.stat().st_size}
    save_manifest(database, manifest)
    named = [problem for problem in problems(database) if problem.startswith("versions/2/deleted/00000.parquet")]
    assert any("n_chunks" in problem for problem in named)
    assert any("first chunk" in problem for problem in named)


# -- addition ----------------------------------------------------------------------------------------------------------

ADDED = {"shard_bytes": "8KiB", "sequence_tokens": 256, "neighbours": 4}
TABLES = ("documents", "chunks", "neighbours", "training", "leakage")


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two files of real text, each larger than a shard."""
    folder = tmp_path_factory.mktemp("halves")
    lines = [line for line in quickstart_lines() if 2_000 < len(line) < 8_000][:9]
    for name, some in (("a", lines[:6]), ("b", lines[6:])):
        (folder / f"{name}.jsonl").write_text("\n".join(some) + "\n", encoding="utf-8")
    return folder / "a.jsonl", folder / "b.jsonl"


@pytest.fixture(scope="module")
def old(halves: tuple[Path, Path], tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of the first half. Do not change it."""
    out = tmp_path_factory.mktemp("old") / "db"
    build_here([halves[0]], out, encoder=str(tiny_encoder), **ADDED)
    return out


@pytest.fixture(scope="module")
def everything(halves: tuple[Path, Path], tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that was built of both. Do not change it."""
    out = tmp_path_factory.mktemp("all") / "db"
    build_here(halves, out, encoder=str(tiny_encoder), **ADDED)
    return out


def added(database: Path, *inputs: Path, progress: Progress | None = None) -> object:
    """Add in this process."""
    from retrodb.pipelines.add import add

    from retrodb.config import RunSettings
    from retrodb.corpus import expand_inputs

    listing = expand_inputs([str(path) for path in inputs])
    return add(Storage(str(database)), listing.files, RunSettings(workers=1), progress or Progress())


def test_refresh_R6_of_a_changed_corpus_only_the_new_shards_are_embedded(
    old: Path, halves: tuple[Path, Path], tmp_path: Path
) -> None:
    database = shutil.copytree(old, tmp_path / "db")
    before = manifest_of(database)["tables"]["embeddings"]["shards"]
    progress = Progress()
    done = added(database, halves[1], progress=progress)
    after = manifest_of(database)["tables"]["embeddings"]["shards"]
    assert after[: len(before)] == before
    assert all(shard["path"].startswith("versions/2/") for shard in after[len(before) :])
    said = progress.lines[progress.lines.index("begin embed") + 1]
    assert said.startswith(f"{done.chunks:,} vectors")
    assert done.chunks == sum(shard["rows"] for shard in after[len(before) :])


@pytest.mark.parametrize(
    "settings",
    [
        {"index_key": "IVF4,Flat", "metric": "ip"},
        {"index_key": "OPQ16_32,IVF4,PQ16x8", "exclude": "none", "min_recall": 0.5},
    ],
)
def test_add_C2_to_an_approximate_index_is_within_the_recall_gate(
    halves: tuple[Path, Path], tiny_encoder: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    """Measured anew over old and new queries, and again here by brute force over every query."""
    database = tmp_path / "db"
    settings = {"min_recall": 0.8, "chunk_tokens": 16, **ADDED, "sequence_tokens": 64, "neighbours": 10, **settings}
    build_here([halves[0]], database, encoder=str(tiny_encoder), **settings)
    added(database, halves[1])
    db = package.open(str(database))
    measured = db.summary()["neighbours"]["recall_at_10"]
    assert measured >= settings["min_recall"]
    chunks = table_of(database, "chunks")
    ids, owners = chunks["chunk_id"].to_numpy(), chunks["document_id"].to_numpy()
    shards = manifest_of(database)["tables"]["embeddings"]["shards"]
    vectors = np.concatenate([np.load(database / shard["path"]) for shard in shards]).astype(np.float32)
    product = settings.get("metric") == "ip"
    hits = []
    for row in rows_of(database, "neighbours"):
        at = int(np.searchsorted(ids, row["chunk_id"]))
        distances = -(vectors @ vectors[at]) if product else ((vectors - vectors[at]) ** 2).sum(1)
        allowed = ids != row["chunk_id"]
        if settings.get("exclude") != "none":
            allowed &= owners != owners[at]
        exact = ids[allowed][np.lexsort((ids[allowed], distances[allowed]))][:10]
        hits.append(len(set(exact.tolist()) & set(row["neighbour_ids"])) / 10)
        found = [place for place in row["neighbour_ids"] if place is not None]
        stored = distances[np.searchsorted(ids, found)] * (-1 if product else 1)
        assert np.allclose(row["distances"], stored, rtol=1e-4, atol=1e-5)
    assert float(np.mean(hits)) == pytest.approx(measured, abs=0.03)
    assert problems(database) == []


def test_add_C2_then_read_equals_build_all_then_read(
    old: Path, everything: Path, halves: tuple[Path, Path], tmp_path: Path
) -> None:
    database = shutil.copytree(old, tmp_path / "db")
    files = {path: stamp for path, stamp in stamps(database).items() if "manifest" not in path}
    before = package.open(str(database))
    found = before.search("how are names bound", k=5)
    done = added(database, halves[1])
    assert (done.version, done.documents) == (2, 3)
    assert done.changed > 0
    for table in TABLES:
        ours, theirs = table_of(database, table), table_of(everything, table)
        assert ours.equals(theirs), table
    vectors = [
        np.concatenate([np.load(d / shard["path"]) for shard in manifest_of(d)["tables"]["embeddings"]["shards"]])
        for d in (database, everything)
    ]
    assert np.array_equal(*vectors)
    after, whole = package.open(str(database)), package.open(str(everything))
    for k in (1, 7, 40):
        assert after.search("how are names bound", k=k) == whole.search("how are names bound", k=k)
    assert after.summary()["documents"]["kept"] == whole.summary()["documents"]["kept"] == 9
    left, right = (db.manifest.stages["report"].details for db in (after, whole))
    assert (left["histograms"], left["worst"]) == (right["histograms"], right["worst"])
    assert {path: stamps(database)[path] for path in files} == files, "nothing that was there is written"
    assert before.search("how are names bound", k=5) == found, "who reads version 1 goes on with it"
    assert problems(database) == problems(database, version=1) == []


def by_name(database: Path) -> dict[str, object]:
    """Blocks, neighbours and duplicates of a database whatever its ids: a block is its document's key and place."""
    keys = {row["document_id"]: row["key"] for row in rows_of(database, "documents")}
    blocks = sorted(rows_of(database, "chunks"), key=lambda row: row["chunk_id"])
    first = {row["document_id"]: row["chunk_id"] for row in reversed(blocks)}
    names = {row["chunk_id"]: (keys[row["document_id"]], row["chunk_id"] - first[row["document_id"]]) for row in blocks}
    return {
        "blocks": {names[row["chunk_id"]]: (row["uid"], row["tokens"]) for row in blocks},
        "neighbours": {
            names[row["chunk_id"]]: [
                (names[other], keys[document], distance)
                for other, document, distance in zip(
                    row["neighbour_ids"], row["neighbour_document_ids"], row["distances"], strict=True
                )
                if other is not None
            ]
            for row in rows_of(database, "neighbours")
        },
        "queries": sorted(
            (keys[row["document_id"]], row["tokens"], row["masked_positions"], names[row["chunk_id"]])
            for row in rows_of(database, "queries")
        ),
        "duplicates": {
            row["uid"]: [names[chunk_id] for chunk_id in row["chunk_ids"]]
            for row in rows_of(database, "block_duplicates")
        },
    }


def spans_of(database: Path, *flags: str) -> None:
    ran = retrodb("spans", database, *flags, "--workers", 1)
    assert ran.code == 0, ran.err


@pytest.mark.parametrize("k", [3, 40])
def test_add_C2_of_blocks_equals_build_all_where_new_ones_repeat_old_ones(
    halves: tuple[Path, Path], tiny_encoder: Path, tmp_path: Path, k: int
) -> None:
    """Also with more neighbours asked for than there are distinct blocks."""
    old, new = (path.read_text(encoding="utf-8").splitlines()[:3] for path in halves)
    again = [json.dumps({**json.loads(line), "id": f"again-{at}"}) for at, line in enumerate(old[:2])]
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file, lines in zip(files, (old, [again[0], *new, again[1]]), strict=True):
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "unit": "block",
        "metric": "ip",
        "chunk_tokens": 64,
        "neighbours": k,
        "shard_bytes": "8KiB",
        "dedup": "off",
    }
    for out, inputs in ((tmp_path / "db", files[:1]), (tmp_path / "all", files)):
        build_here(inputs, out, encoder=str(tiny_encoder), **settings)
        spans_of(out, "--mask", "random-span" if k == 3 else "random-token")
    assert added(tmp_path / "db", files[1]).documents == 5
    ours, theirs = by_name(tmp_path / "db"), by_name(tmp_path / "all")
    assert len(ours["duplicates"]) > 0
    assert len(ours["queries"]) > 0
    assert ours == theirs
    ours, theirs = package.open(str(tmp_path / "db")), package.open(str(tmp_path / "all"))
    for stage in ("chunk", "spans"):
        assert ours.manifest.stages[stage].counts == theirs.manifest.stages[stage].counts
    vectors = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    found, expected = (db.candidates(vectors, 6) for db in (ours, theirs))
    assert np.array_equal(found.scores, expected.scores)
    assert problems(tmp_path / "db") == problems(tmp_path / "db", version=1) == []


def test_an_addition_draws_queries_only_by_what_drew_those_that_are_there(
    old: Path, halves: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = shutil.copytree(old, tmp_path / "db")
    spans_of(database, "--tagger", "dates")
    before = stamps(database)
    monkeypatch.setattr("retrodb.spans.dates.VERSION", "9")
    with pytest.raises(InputError, match="drawn by dates 1.*here are dates 9"):
        added(database, halves[1])
    assert stamps(database) == before


def test_add_C2_killed_leaves_one_version_and_goes_on(
    old: Path, everything: Path, halves: tuple[Path, Path], tmp_path: Path
) -> None:
    database = shutil.copytree(old, tmp_path / "db")
    for moment in ("chunks", "neighbours"):
        running = Running.start("add", database, halves[1], "--workers", 1)
        running.wait_for((database / "versions" / "2" / moment).exists)
        running.kill()
        assert package.open(str(database)).version == 1
        assert problems(database) == []
    ran = retrodb("add", database, halves[1], "--json")
    assert ran.code == 0, ran.err
    assert ran.json["version"] == 2
    assert "damaged" not in ran.err, "a kill damages nothing"
    for table in TABLES:
        assert table_of(database, table).equals(table_of(everything, table)), table
    assert problems(database) == []
    assert not list((database / "versions/2").rglob(".build"))
    assert not (database / "versions/2/added").exists()


def test_add_C2_an_input_that_was_written_anew_is_known_by_its_content(old: Path, tmp_path: Path) -> None:
    database, file = shutil.copytree(old, tmp_path / "db"), tmp_path / "more.jsonl"
    texts = ["What the file said at first, and what was deleted.", "What it says since."]
    for at, text in enumerate(texts):
        file.write_text(json.dumps({"id": f"more-{at}", "text": text}) + "\n", encoding="utf-8")
        added(database, file)
        if at == 0:
            deleted(database, sources=(str(file),))
    copy = tmp_path / "copy.jsonl"
    copy.write_text(json.dumps({"id": "more-0", "text": texts[0]}) + "\n", encoding="utf-8")
    assert added(database, copy).documents == 1, "what is left of the file is of another content"
    with pytest.raises(InputError, match="is in .* already .*1 document of it"):
        added(database, file)
    assert problems(database) == []


def test_add_and_swap_take_no_file_of_the_database_for_an_input(
    old: Path, halves: tuple[Path, Path], tmp_path: Path
) -> None:
    """Nor does a build: the database may lie in the folder of its corpus, and what is deleted must not come back."""
    database = shutil.copytree(old, tmp_path / "corpus" / "db")
    deleted(database, ids=(0,))
    before = stamps(database)
    for command in ("add", "swap"):
        ran = retrodb(command, database, database)
        assert (ran.code, "the database itself" in ran.err) == (3, True), ran.err
    assert stamps(database) == before
    shutil.copy(halves[1], tmp_path / "corpus" / "more.jsonl")
    for command in ("add", "swap"):
        ran = retrodb(command, database, tmp_path / "corpus", "--workers", 1)
        assert ran.code == 0, ran.err
        sources = {row["source"] for row in rows_of(database, "documents")}
        assert not any(source.startswith(str(database)) for source in sources)


def test_an_addition_that_cannot_be_meant_changes_nothing(
    old: Path, halves: tuple[Path, Path], tiny_encoder: Path, tmp_path: Path
) -> None:
    database = shutil.copytree(old, tmp_path / "db")
    before = stamps(database)
    with pytest.raises(InputError, match="is in .* already"):
        added(database, halves[0])
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(InputError):
        added(database, tmp_path / "empty.jsonl")
    for path, stamp in before.items():
        assert stamps(database)[path] == stamp
    assert package.open(str(database)).version == 1
    assert problems(database) == []
    with pytest.raises(InputError, match="is not a retrodb database"):
        added(tmp_path / "nothing", halves[1])
