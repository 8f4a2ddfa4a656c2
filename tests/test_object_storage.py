"""Databases on ``s3://`` and ``gs://``, as separate processes against emulators: the same bytes as on a local disk,
after kills too; one builder at a time; requests that grow with shards, never with rows."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import object_stores
import pytest
from object_stores import ObjectStore, endpoint
from support import Ran, Running, build_here, manifest_of, retrodb

from retrodb.corpus import expand_inputs
from retrodb.corpus.source import refuse_written
from retrodb.errors import InputError, LockedError
from retrodb.lock import LOCK_NAME, writer_lock
from retrodb.remote import filesystem_of
from retrodb.storage import Storage

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'retrodb[dev]'")
pytest.importorskip("moto", reason="moto is not installed: pip install 'retrodb[dev]'")

pytestmark = pytest.mark.slow

SETTINGS = ("--shard-bytes", "16KiB", "--workers", "1")


@pytest.fixture(scope="module", params=["s3", "gs"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    folder = tmp_path_factory.mktemp(request.param)
    before = dict(os.environ)
    with object_stores.running(request.param, folder / "requests.log") as running:
        os.environ.update({**running.environment, "RETRODB_CACHE": str(folder / "cache")})
        yield running
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def local(quickstart_corpus: Path, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database that all others have to equal."""
    out = tmp_path_factory.mktemp("local") / "db"
    build_here([quickstart_corpus], out, encoder=str(tiny_encoder), shard_bytes="16KiB")
    return out


@dataclass
class Built:
    """The database on a store, after a build that was killed and a second one that finished it."""

    url: str
    storage: Storage
    shards: int
    first: Ran
    requests: dict[str, int]


def command_of(source: str, url: str, encoder: Path) -> list[object]:
    return ["build", source, "--out", url, "--encoder", encoder, *SETTINGS]


@pytest.fixture(scope="module")
def built(store: ObjectStore, quickstart_corpus: Path, tiny_encoder: Path) -> Built:
    source = store.url("inputs/topics.jsonl")
    filesystem, path = filesystem_of(source)
    filesystem.put_file(str(quickstart_corpus), path)
    url = store.url("db")
    with store.counting() as requests:
        first = retrodb(*command_of(source, url, tiny_encoder), "--json")
    assert first.code == 0, first.err
    storage = Storage(url)
    tables = json.loads(storage.read_bytes("manifest.json"))["tables"]
    return Built(url, storage, sum(len(table["shards"]) for table in tables.values()), first, dict(requests))


def test_an_input_that_is_replaced_by_as_many_bytes_while_it_is_read_is_refused(store: ObjectStore) -> None:
    url = store.url("inputs/replaced.jsonl")
    filesystem, path = filesystem_of(url)
    filesystem.pipe_file(path, b'{"text": "one"}\n')
    for given in (url, store.url("inputs/replaced*.jsonl")):  # listings and single answers tell the same
        (listed,) = expand_inputs([given]).files
        refuse_written(listed.url, listed.stamp)
    filesystem.pipe_file(path, b'{"text": "two"}\n')
    with pytest.raises(InputError, match="was written or replaced while the build was reading it"):
        refuse_written(listed.url, listed.stamp)
    filesystem.rm_file(path)
    with pytest.raises(InputError, match="cannot read"):
        refuse_written(listed.url, listed.stamp)


def recorded(manifest: dict[str, Any]) -> dict[str, str]:
    return {shard["path"]: shard["sha256"] for table in manifest["tables"].values() for shard in table["shards"]}


def manifest_at(storage: Storage) -> dict[str, Any]:
    return json.loads(storage.read_bytes("manifest.json"))


# The corpus' own URL is in `source`: a database of another source differs in that column, and in what hashes it.
SAME_ANYWHERE = ("chunks", "embeddings", "neighbours", "training", "leakage")


def folders_of(manifest: dict[str, Any]) -> list[str]:
    return sorted({path.split("/")[0] for path in recorded(manifest)} | {"reports"})


def same_anywhere(manifest: dict[str, Any]) -> dict[str, str]:
    return {path: digest for path, digest in recorded(manifest).items() if path.split("/")[0] in SAME_ANYWHERE}


def test_the_tables_are_those_of_a_local_build(built: Built, local: Path) -> None:
    assert same_anywhere(manifest_at(built.storage)) == same_anywhere(manifest_of(local))
    assert built.storage.list_folders("") == folders_of(manifest_at(built.storage))
    assert built.storage.list_files("") == ["manifest.json"]


def test_requests_of_a_build_are_counted_in_shards(built: Built) -> None:
    """Each shard and its receipt is written once and read a few times; whatever else is asked belongs to a stage."""
    assert built.requests["PUT" if "PUT" in built.requests else "POST"] <= 3 * built.shards + 25
    assert built.requests["GET"] <= 3 * built.shards + 40
    assert built.requests["HEAD"] <= 4 * built.shards
    assert built.requests["LIST"] <= 2 * built.shards + 100
    assert sum(built.requests.values()) <= 14 * built.shards + 100


def test_a_build_with_nothing_to_do_reads_each_shard_once_and_writes_nothing_but_the_lock(
    store: ObjectStore, built: Built, tiny_encoder: Path
) -> None:
    before = built.storage.read_bytes("manifest.json")
    with store.counting() as requests:
        ran = retrodb(*command_of(store.url("inputs/topics.jsonl"), built.url, tiny_encoder), "--json")
    assert (ran.code, ran.json["done"]) == (0, []), ran.err
    assert built.storage.read_bytes("manifest.json") == before
    assert requests["PUT"] == requests["DELETE"] == 1
    assert requests["GET"] <= built.shards + 20
    assert requests["HEAD"] <= 10
    assert requests["LIST"] <= 40


def test_a_dry_run_writes_nothing(store: ObjectStore, built: Built, tiny_encoder: Path) -> None:
    with store.counting() as requests:
        ran = retrodb(*command_of(store.url("inputs/topics.jsonl"), store.url("new"), tiny_encoder), "--dry-run")
    assert ran.code == 0, ran.err
    assert "PUT" not in requests
    assert "DELETE" not in requests


def test_verify_reads_each_shard_once_and_finds_what_was_changed(store: ObjectStore, built: Built) -> None:
    with store.counting() as requests:
        ran = retrodb("verify", built.url, "--json")
    assert (ran.code, ran.json["ok"]) == (0, True), ran.out
    assert requests["GET"] <= built.shards + 10
    assert requests["LIST"] + requests["HEAD"] <= 30
    shard = "chunks/00001.parquet"
    whole = built.storage.read_bytes(shard)
    built.storage.commit_bytes(shard, whole[:-9] + b"x" + whole[-8:])
    try:
        ran = retrodb("verify", built.url)
        assert ran.code == 4
        assert shard in ran.err
    finally:
        built.storage.commit_bytes(shard, whole)
        built.storage.delete("reports/damage.json")


def test_looking_again_asks_for_the_manifest_alone(store: ObjectStore, built: Built, tmp_path: Path) -> None:
    """Index, vectors and text come from the cache; with none, each shard that is wanted comes once."""
    fresh = {"RETRODB_CACHE": str(tmp_path / "cache")}
    with store.counting() as cold:
        first = retrodb("query", built.url, "how do generators work", "--json", **fresh)
    with store.counting() as warm:
        second = retrodb("query", built.url, "how do generators work", "--json", **fresh)
    assert (first.code, second.code) == (0, 0), first.err
    assert first.json == second.json
    assert set(cold) == {"GET"}
    assert cold["GET"] <= built.shards
    assert warm == {"GET": 1}
    chunk = first.json["neighbours"][0]["chunk_id"]
    retrodb("show", built.url, chunk, **fresh)
    with store.counting() as shown:
        assert retrodb("show", built.url, chunk, "--json", **fresh).json["chunk"]["chunk_id"] == chunk
    assert shown == {"GET": 1}
    assert retrodb("info", built.url, "--json").json["chunks"] > 0


def test_the_training_stream_fetches_each_shard_once(
    store: ObjectStore, built: Built, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import retrodb as package

    monkeypatch.setenv("RETRODB_CACHE", str(tmp_path / "cache"))
    shards = len(manifest_at(built.storage)["tables"]["training"]["shards"])
    assert shards > 2
    with store.counting() as requests:
        stream = [sample["tokens"].numpy() for sample in package.open(built.url).training()]
    assert requests == {"GET": shards + 1}
    np.testing.assert_array_equal(stream, [sample["tokens"].numpy() for sample in package.open(str(local)).training()])
    with store.counting() as again:
        list(package.open(built.url).training(shuffle=True))
    assert again == {"GET": 1}


def test_a_killed_build_goes_on_at_once_and_comes_to_the_same(
    store: ObjectStore, quickstart_corpus: Path, tiny_encoder: Path, local: Path
) -> None:
    """kill -9 leaves the lock behind: its holder is known to be dead, for it ran on this machine."""
    url = store.url("killed")
    command = command_of(str(quickstart_corpus), url, tiny_encoder)
    running = Running.start(*command)
    storage = Storage(url)
    try:
        assert running.wait_for(lambda: bool(storage.list_files("embeddings")))
    finally:
        running.kill()
    assert storage.size(LOCK_NAME) is not None
    ran = retrodb(*command, "--json")
    assert ran.code == 0, ran.err
    assert recorded(manifest_at(storage)) == recorded(manifest_of(local))
    assert storage.size(LOCK_NAME) is None
    assert storage.list_folders("") == folders_of(manifest_at(storage))


def lock_of(**changes: Any) -> bytes:
    holder = {"host": "elsewhere", "pid": 7, "since": "now", "machine": "another", "token": "t", "beat": time.time()}
    return json.dumps({**holder, **changes}).encode()


def test_a_builder_elsewhere_is_not_disturbed(
    store: ObjectStore, built: Built, quickstart_corpus: Path, tiny_encoder: Path
) -> None:
    built.storage.commit_bytes(LOCK_NAME, lock_of())
    try:
        ran = retrodb(*command_of(str(quickstart_corpus), built.url, tiny_encoder))
        assert ran.code == 6
        assert "process 7 on elsewhere" in ran.err
        assert json.loads(built.storage.read_bytes(LOCK_NAME))["token"] == "t"
    finally:
        built.storage.delete(LOCK_NAME)


def test_a_file_is_exchanged_only_for_the_very_one_that_is_known(store: ObjectStore) -> None:
    storage = Storage(store.url("exchanged"))
    assert storage.exchange("a file", None, b"1")
    assert not storage.exchange("a file", None, b"2")
    assert not storage.exchange("a file", b"2", b"3")
    assert storage.exchange("a file", b"1", b"2")
    assert storage.read_bytes("a file") == b"2"
    assert not storage.exchange("no file", b"1", b"2")
    assert storage.size("no file") is None


def test_of_many_that_exchange_a_file_at_the_same_moment_one_alone_does(store: ObjectStore) -> None:
    storage = Storage(store.url("raced"))
    storage.commit_bytes("a file", b"0")
    barrier = threading.Barrier(8)
    done: list[bytes] = []

    def exchange(data: bytes) -> None:
        barrier.wait()
        if storage.exchange("a file", b"0", data):
            done.append(data)

    writers = [threading.Thread(target=exchange, args=[bytes([number + 65])]) for number in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert done == [storage.read_bytes("a file")]


@pytest.mark.parametrize("unconditional", [False, True])
def test_of_two_builders_that_see_no_lock_one_alone_gets_it(store: ObjectStore, unconditional: bool) -> None:
    """By the store's own condition; where a store ignores it, the last one is told by reading back."""
    storage = Storage(store.url(f"contended-{unconditional}"))
    with store.failing("unconditional") if unconditional else contextlib.nullcontext():
        assert storage.exchange(LOCK_NAME, None, lock_of(token="a"))
        assert storage.exchange(LOCK_NAME, None, lock_of(token="b")) == unconditional
        _refuse_all_but_one(storage)


def _refuse_all_but_one(storage: Storage) -> None:
    def build(name: str) -> None:
        with contextlib.suppress(LockedError), writer_lock(storage):
            held.append(name)
            time.sleep(1)

    storage.delete(LOCK_NAME)
    held: list[str] = []
    builders = [threading.Thread(target=build, args=[name]) for name in "abcd"]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert len(held) == 1
    assert storage.size(LOCK_NAME) is None


def test_a_writer_that_waits_has_the_lock_once_its_holder_is_done(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrodb.lock._REMOTE_LOOK_SECONDS", 0.1)
    storage, said = Storage(store.url("waited-for")), []
    storage.commit_bytes(LOCK_NAME, lock_of())
    with pytest.raises(LockedError, match="It was waited for"), writer_lock(storage, wait=0.3):
        pass
    done = threading.Timer(1.0, lambda: storage.delete(LOCK_NAME))
    done.start()
    with writer_lock(storage, wait=60.0, tell=said.append):
        assert json.loads(storage.read_bytes(LOCK_NAME))["token"] != "t"
    done.join()
    assert len(said) == 1
    assert "process 7 on elsewhere, since now: waiting for it, 1m at most" in said[0]
    assert storage.size(LOCK_NAME) is None


def test_a_silent_holder_elsewhere_is_watched_before_its_lock_is_taken(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clock may be wrong: only if it does not beat while we look is it dead."""
    monkeypatch.setattr("retrodb.lock.WATCH_SECONDS", 1.0)
    storage = Storage(store.url("silent"))
    storage.commit_bytes(LOCK_NAME, lock_of(beat=time.time() - 1000))
    beating = threading.Timer(0.4, lambda: storage.commit_bytes(LOCK_NAME, lock_of(beat=time.time() - 990)))
    beating.start()
    with pytest.raises(LockedError), writer_lock(storage):
        pass
    beating.join()
    with writer_lock(storage):
        assert json.loads(storage.read_bytes(LOCK_NAME))["token"] != "t"
    assert storage.size(LOCK_NAME) is None


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_bucket_that_does_not_exist_is_named(store: ObjectStore, quickstart_corpus: Path, tiny_encoder: Path) -> None:
    url = f"{store.protocol}://no-such-bucket/db"
    reading = retrodb(*command_of(f"{store.protocol}://no-such-bucket/*.jsonl", store.url("unread"), tiny_encoder))
    for ran in (retrodb(*command_of(str(quickstart_corpus), url, tiny_encoder)), retrodb("info", url), reading):
        assert ran.code == 3
        assert "no such bucket" in ran.err
        assert "Traceback" not in ran.err


def test_an_object_is_no_folder(store: ObjectStore, quickstart_corpus: Path, tiny_encoder: Path) -> None:
    Storage(store.url("place")).commit_bytes("object", b"1")
    ran = retrodb(*command_of(str(quickstart_corpus), store.url("place/object"), tiny_encoder))
    assert ran.code == 3
    assert "is a file; name a folder" in ran.err


def test_a_store_that_does_not_answer_is_named_with_what_was_tried(tmp_path: Path) -> None:
    """S3 alone: gcsfs' own six attempts take half a minute."""
    with socket.socket() as listener:
        listener.bind((object_stores.LOOPBACK, 0))
        port = listener.getsockname()[1]  # bound, and nobody listens
        keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_MAX_ATTEMPTS": "2"}
        ran = retrodb("info", "s3://bucket/db", **keys, **endpoint("s3", port))
    assert ran.code == 3, ran.err
    assert "cannot read s3://bucket/db/manifest.json: the store does not answer" in ran.err
    assert "Traceback" not in ran.err


def test_missing_credentials_are_named(tmp_path: Path) -> None:
    nothing = {
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ACCESS_KEY_ID": "",
        "AWS_SECRET_ACCESS_KEY": "",
    }
    ran = retrodb("info", "s3://bucket/db", **nothing, **endpoint("s3", 9))
    assert ran.code == 3, ran.err
    assert "there are no valid credentials" in ran.err


def test_a_killed_upload_shows_no_object(store: ObjectStore, tmp_path: Path) -> None:
    """110 MB go up in parts; the process is killed after the first."""
    code = tmp_path / "upload.py"
    code.write_text(
        "import sys\nfrom retrodb.storage import Storage\n"
        "Storage(sys.argv[1]).commit_bytes('large.bin', bytes(110 << 20))\n",
        encoding="utf-8",
    )
    before = len(store.lines())
    with subprocess.Popen([sys.executable, code, store.url("uploads")]) as process:
        deadline = time.monotonic() + 60
        while not any("upload" in line and "large.bin" in line for line in store.lines()[before:]):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    time.sleep(0.5)
    assert Storage(store.url("uploads")).size("large.bin") is None
