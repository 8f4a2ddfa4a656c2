"""A database that lives on ``s3://`` and ``gs://``: the bytes of a local one after each command, after kills too; one
writer at a time, whoever sleeps; readers of every version answered from it.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import object_stores
import pytest
from object_stores import ObjectStore
from support import Progress, Running, build_here, collected, make_tiny_encoder, retrodb, traces

import retrodb as package
from retrodb.config import RunSettings
from retrodb.corpus import expand_inputs
from retrodb.corpus.quickstart import quickstart_lines
from retrodb.corpus.selection import Selection
from retrodb.errors import LockedError, UnreachableError
from retrodb.lock import LOCK_NAME
from retrodb.manifest import Manifest
from retrodb.quality.verify import verify_database
from retrodb.spans import SpanSettings
from retrodb.storage import Storage

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'retrodb[dev]'")
pytest.importorskip("moto", reason="moto is not installed: pip install 'retrodb[dev]'")

pytestmark = pytest.mark.slow

QUERY = "how are names bound"
CHUNKS = {"shard_bytes": "8KiB", "sequence_tokens": 256, "neighbours": 4, "tokenizer": "train:600"}
BLOCKS = {"unit": "block", "metric": "ip", "chunk_tokens": 64, "shard_bytes": "8KiB", "neighbours": 4}
RUN = RunSettings(workers=1)


@dataclass
class Place:
    """A store, what is put into databases there, and a local folder for the databases that those have to equal."""

    store: ObjectStore
    settings: dict[str, Any]
    folder: Path
    encoders: list[Path]
    inputs: list[Path]
    versions: dict[int, Manifest] = field(default_factory=dict)

    @property
    def local(self) -> Storage:
        return Storage(str(self.folder / "db"))

    @property
    def remote(self) -> Storage:
        return Storage(self.store.url("db"))

    def build(self, storage: Storage) -> Storage:
        build_here(self.inputs[:1], storage.url, encoder=str(self.encoders[0]), **self.settings)
        return storage

    def copy(self, version: int, name: str) -> Storage:
        """The local database as it was when ``version`` was published, put into the store."""
        storage = Storage(self.store.url(name))
        storage._filesystem.put(str(self.folder / f"at-{version}"), storage._root, recursive=True)
        return storage


def added(storage: Storage, path: Path) -> Any:
    from retrodb.pipelines.add import add

    return add(storage, expand_inputs([str(path)]).files, RUN, Progress())


def deleted(storage: Storage, *places: int) -> Any:
    from retrodb.pipelines.living import delete

    manifest = Manifest.load(storage)
    ids = [
        found
        for shard in manifest.shards("documents")
        for found in storage.read_table(shard)["document_id"].to_pylist()
    ]
    return delete(storage, Selection(ids=tuple(ids[place] for place in places)), Progress())


def compacted(storage: Storage) -> Any:
    from retrodb.pipelines.compact import compact

    return compact(storage, RUN, Progress())


def refreshed(storage: Storage, encoder: Path) -> Any:
    from retrodb.pipelines.refresh import refresh

    return refresh(storage, str(encoder), RUN, Progress(), step=500)


def swapped(storage: Storage, path: Path) -> Any:
    from retrodb.pipelines.swap import swap

    return swap(storage, expand_inputs([str(path)]), RUN, Progress())


def swapped_back(storage: Storage, version: int) -> Any:
    from retrodb.pipelines.swap import swap_back

    return swap_back(storage, version, Progress())


def spans(storage: Storage) -> Any:
    from retrodb.pipelines.spans_stage import build_spans

    return build_spans(storage, SpanSettings((), "random-span"), RUN, Progress())


def problems(storage: Storage, version: int | None = None) -> list[str]:
    report = verify_database(package.open(storage.url, version=version), 1.0)
    return [f"{found.path}: {found.what}" for found in report.problems]


def answers(storage: Storage, version: int) -> list[Any]:
    with package.open(storage.url, version=version) as db:
        first = next(iter(db.chunks()))["chunk_id"].to_pylist()[0]
        vectors = np.asarray(db.embeddings(first >> 32))
        return [db.search(QUERY, k=9), db.chunk(first), db.neighbours(first), vectors.tobytes()]


@pytest.fixture(scope="module", params=["s3-chunks", "gs-blocks"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    protocol, unit = request.param.split("-")
    folder = tmp_path_factory.mktemp(request.param)
    lines = [line for line in quickstart_lines() if 2_000 < len(line) < 5_000][:8]
    inputs = [folder / name for name in ("first.jsonl", "more.jsonl", "other.jsonl")]
    for path, some in zip(inputs, (lines[:4], lines[4:6], lines[6:]), strict=True):
        path.write_text("\n".join(some) + "\n", encoding="utf-8")
    encoders = [make_tiny_encoder(folder / f"step-{seed}", seed=seed) for seed in (1, 2)]
    before = dict(os.environ)
    with object_stores.running(protocol, folder / "requests.log") as store:
        os.environ.update({**store.environment, "RETRODB_CACHE": str(folder / "cache"), "AWS_MAX_ATTEMPTS": "2"})
        yield Place(store, CHUNKS if unit == "chunks" else BLOCKS, folder, encoders, inputs)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def lived(place: Place) -> Place:
    """A local database and one on the store that went through the same: build, spans, add, delete, compact, refresh,
    swap. Do not change them."""
    reader, found = None, None
    for storage in (place.local, place.remote):
        place.build(storage)
        spans(storage)
        if storage.is_local:
            shutil.copytree(place.folder / "db", place.folder / "at-1")
        else:
            reader = package.open(storage.url)
            found = reader.search(QUERY, k=9)
        for number, step in (
            (2, lambda at: added(at, place.inputs[1])),
            (3, lambda at: deleted(at, 1, 4)),
            (4, compacted),
            (5, lambda at: refreshed(at, place.encoders[1])),
            (6, lambda at: swapped(at, place.inputs[2])),
        ):
            step(storage)
            if storage.is_local:
                place.versions[number] = Manifest.load_whole(storage)
                shutil.copytree(place.folder / "db", place.folder / f"at-{number}")
            else:
                assert Manifest.load_whole(storage).tables == place.versions[number].tables, number
    assert reader.search(QUERY, k=9) == found, "who reads version 1 goes on with it"
    return place


def test_after_the_same_commands_a_database_has_the_files_of_a_local_one(lived: Place) -> None:
    local = {str(p.relative_to(lived.folder / "db")) for p in (lived.folder / "db").rglob("*") if p.is_file()}
    remote = lived.remote._filesystem.find(lived.remote._root)
    assert {path.removeprefix(f"{lived.remote._root}/") for path in remote} == local
    assert problems(lived.remote) == []


def test_readers_of_every_version_are_answered_from_it_through_one_cache(lived: Place) -> None:
    for version in (1, 4, 2, 6, 5, 3, 1):
        assert answers(lived.remote, version) == answers(lived.local, version), version


def test_who_evaluates_and_trains_reads_there_what_a_local_one_has(lived: Place, tmp_path: Path) -> None:
    from retrodb.evaluation.questions import QuestionSet
    from retrodb.evaluation.retrieval import evaluate_retrieval

    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question": QUERY, "answer": ["name"]}) + "\n", encoding="utf-8")
    found = []
    for storage in (lived.local, lived.remote):
        with package.open(storage.url, version=2) as db:
            result = evaluate_retrieval(db, QuestionSet(str(questions)), (5, 20), progress=Progress())
            batch = next(db.queries(batch=4))
            read = [result.as_json()["criteria"], batch.tokens.tolist(), batch.chunk_ids.tolist()]
            if lived.settings is BLOCKS:
                vectors = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
                candidates = db.candidates(vectors, 4, own_chunks=batch.chunk_ids, exclude="self", tokens=True)
                read += [candidates.ids.tolist(), candidates.scores.tolist(), candidates.tokens.tolist()]
            else:
                read += [sample["tokens"].tolist() for sample in db.training()]
            found.append(read)
    assert found[0] == found[1]


# -- kills, faults and sleepers ----------------------------------------------------------------------------------------


def test_a_killed_command_leaves_the_old_version_and_goes_on_to_the_same_bytes(lived: Place) -> None:
    number, arguments = (2, ("add", lived.inputs[1])) if lived.store.protocol == "s3" else (4, ("compact",))
    storage = lived.copy(number - 1, "killed")
    running = Running.start(arguments[0], storage.url, *arguments[1:], "--workers", 1)
    try:
        assert running.wait_for(lambda: bool(storage.list_files(f"versions/{number}/neighbours"))), running.err
    finally:
        running.kill()
    assert storage.size(LOCK_NAME) is not None, "its holder is known to be dead: it ran on this machine"
    assert Manifest.load_whole(storage).version.id == number - 1
    assert problems(storage) == []
    done = added(storage, lived.inputs[1]) if number == 2 else compacted(storage)
    assert done.version == number
    assert Manifest.load_whole(storage).tables == lived.versions[number].tables
    assert not [path for path in storage.list_below("versions") if "/.build/" in path or "/added/" in path]
    assert problems(storage) == []


def test_a_store_that_goes_down_ends_a_command_which_then_goes_on(lived: Place) -> None:
    if lived.store.protocol == "gs":
        pytest.skip("gcsfs' own six attempts take half a minute; builds are tested so")
    storage = lived.copy(4, "interrupted")
    running = Running.start("refresh", storage.url, "--encoder", lived.encoders[1], "--step", 500, "--workers", 1)
    assert running.wait_for(lambda: bool(storage.list_files("versions/5/embeddings"))), running.err
    with lived.store.failing("down"):
        assert running.end(120) == 3, running.err
    assert "the store does not answer" in running.err
    assert "what is finished is kept" in running.err
    assert "Traceback" not in running.err
    assert Manifest.load_whole(storage).version.id == 4
    assert refreshed(storage, lived.encoders[1]).version == 5
    assert Manifest.load_whole(storage).tables == lived.versions[5].tables


def test_a_right_that_is_denied_is_named_and_nothing_is_changed(lived: Place) -> None:
    storage = lived.copy(4, "denied")
    before = storage.read_bytes("manifest.json")
    for command in (
        lambda: deleted(storage, 0),
        lambda: swapped_back(storage, 2),
        lambda: collected(storage, grace=0),
        lambda: compacted(storage),
    ):
        with lived.store.failing("denied PUT POST"), pytest.raises(UnreachableError) as raised:
            command()
        assert f"cannot write {storage.url}/.lock: permission is denied" in str(raised.value)
    assert storage.read_bytes("manifest.json") == before
    assert swapped_back(storage, 2).version == 2


@pytest.fixture
def sleeping(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has the next writer sleep just before it publishes, for so long that it is taken for dead; meanwhile something is
    done."""
    from retrodb.pipelines import living

    monkeypatch.setattr("retrodb.lock.WATCH_SECONDS", 0.1)
    publish = living.publish

    def arrange(storage: Storage, meanwhile: Any) -> None:
        def late(*arguments: Any) -> Manifest:
            monkeypatch.setattr(living, "publish", publish)
            lock = json.loads(storage.read_bytes(LOCK_NAME))
            lock |= {"machine": "another", "beat": time.time() - 1000}
            storage.commit_bytes(LOCK_NAME, json.dumps(lock).encode())
            meanwhile()
            return publish(*arguments)

        monkeypatch.setattr(living, "publish", late)

    return arrange


def test_a_writer_that_wakes_up_after_another_has_published_publishes_nothing(lived: Place, sleeping: Any) -> None:
    storage = lived.copy(1, "overslept")
    sleeping(storage, lambda: deleted(storage, 0))
    with pytest.raises(LockedError, match="was changed by another process while this one was at work"):
        deleted(storage, 1, 2)
    db = package.open(storage.url)
    assert (db.version, len(db.deletions)) == (2, 1), "what the other has published stands"
    assert storage.size(LOCK_NAME) is None
    assert problems(storage) == problems(storage, version=1) == []


def test_a_writer_that_wakes_up_while_another_is_at_work_publishes_nothing(lived: Place, sleeping: Any) -> None:
    """Where the manifest is as it was, but for the mark of who took over."""
    storage = lived.copy(1, "woken")
    with contextlib.ExitStack() as other:
        sleeping(storage, lambda: other.enter_context(_held(storage)))
        with pytest.raises(LockedError, match="was changed by another process"):
            deleted(storage, 1, 2)
        assert Manifest.load_whole(storage).version.id == 1
        with pytest.raises(LockedError, match="is being built by process"):
            deleted(storage, 1)
    assert deleted(storage, 0).version == 2
    assert problems(storage) == problems(storage, version=1) == []


def _held(storage: Storage) -> Any:
    from retrodb.pipelines.holding import held

    return held(storage, Progress())


def test_of_two_writers_that_race_none_undoes_the_other(lived: Place) -> None:
    """Without a lock, as on a store that overlooks who has it: the pointer itself is exchanged for what was known."""
    storage = lived.copy(1, "raced")
    current = Manifest.load_whole(storage)
    replace(current, software={"by": "one"}).save(storage, current)
    with pytest.raises(LockedError):
        replace(current, software={"by": "another"}).save(storage, current)
    assert Manifest.load_whole(storage).software == {"by": "one"}


# -- what is retired ---------------------------------------------------------------------------------------------------


def test_a_version_stays_for_a_day_after_it_was_last_current(lived: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """However old its followers are: it was current again meanwhile."""
    storage = lived.copy(6, "graced")
    for number in (1, 6):
        swapped_back(storage, number)
    manifest = Manifest.load_whole(storage)
    long_ago = "2020-01-01T00:00:00+00:00"
    aged = [entry if entry.version.id == 1 else _aged(entry, long_ago) for entry in manifest.versions]
    _with_versions(manifest, aged).save(storage, manifest)
    done = collected(storage)
    assert (done.retired, done.in_use) == ((2, 3), (1,))
    assert answers(storage, 1) == answers(lived.local, 1)
    assert problems(storage) == problems(storage, version=1) == []


def _aged(entry: Any, at: str) -> Any:
    return replace(entry, replaced=at if entry.replaced else None, version=replace(entry.version, created=at))


def _with_versions(manifest: Manifest, versions: list[Any]) -> Manifest:
    return replace(manifest, versions=tuple(versions))


def test_forget_leaves_no_byte_of_a_deleted_document_on_the_store_nor_in_the_cache(
    lived: Place, tmp_path: Path
) -> None:
    storage = lived.copy(4, "forgotten")
    first = Manifest.load_whole(Storage(str(lived.folder / "at-1")))
    documents, chunks = (
        [row for shard in first.shards(table) for row in storage.read_table(shard).to_pylist()]
        for table in ("documents", "chunks")
    )
    vectors = np.concatenate([storage.read_array(shard) for shard in first.shards("embeddings")])
    own = np.array([row["document_id"] == documents[1]["document_id"] for row in chunks])
    tokens = [row["tokens"] for row in chunks if row["document_id"] == documents[1]["document_id"]]
    of_it = (documents[1]["text"], np.array(tokens, dtype=np.uint16)[:-1], vectors[own])
    cache = Path(os.environ["RETRODB_CACHE"])

    def traced(name: str) -> list[str]:
        storage._filesystem.get(storage._root, str(tmp_path / name), recursive=True)
        found = traces([path for path in (tmp_path / name).rglob("*") if path.is_file()], *of_it)
        return found + [
            shard.path
            for table in ("documents", "chunks", "embeddings")
            for shard in first.shards(table)
            if shard.sha256 not in kept and (cache / shard.sha256).exists()
        ]

    kept = {s.sha256 for shards in Manifest.load_whole(storage).tables.values() for s in shards}
    assert len(traced("before")) > 3
    ran = retrodb("gc", storage.url, "--forget", "--json")
    assert (ran.code, ran.json["retired"], ran.json["in_use"]) == (6, [], [1, 2, 3]), ran.err
    assert "version 1, 2, 3, replaced less than 24 hours ago, and may be open" in ran.err
    assert "with --grace 0" in ran.err
    assert collected(storage, forget=True, grace=0).retired == (1, 2, 3)
    assert traced("after") == []
    assert problems(storage) == []
