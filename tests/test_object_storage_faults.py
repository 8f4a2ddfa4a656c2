"""What object stores do wrong, and what is said then: denied rights, stores that go down, drivers not installed,
objects that are not what was recorded."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import object_stores
import pytest
from object_stores import ObjectStore
from support import Running, build_here, manifest_of, retrodb

from retrodb.errors import DamagedError
from retrodb.storage import Storage

pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'retrodb[dev]'")
pytest.importorskip("moto", reason="moto is not installed: pip install 'retrodb[dev]'")

pytestmark = pytest.mark.slow

SETTINGS = ("--shard-bytes", "16KiB", "--workers", "1", "--chunk-tokens", "32", "--sequence-tokens", "256")
LOCAL = {"shard_bytes": "16KiB", "chunk_tokens": 32, "sequence_tokens": 256}


@pytest.fixture(scope="module", params=["s3", "gs"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    folder = tmp_path_factory.mktemp(request.param)
    before = dict(os.environ)
    with object_stores.running(request.param, folder / "requests.log") as running:
        os.environ.update({**running.environment, "RETRODB_CACHE": str(folder / "cache"), "AWS_MAX_ATTEMPTS": "2"})
        yield running
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def source(quickstart_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    topics = quickstart_corpus.read_text(encoding="utf-8").splitlines()[:6]
    path = tmp_path_factory.mktemp("source") / "in.jsonl"
    path.write_text("\n".join(topics) + "\n", encoding="utf-8")
    return path


def recorded(manifest: dict[str, Any]) -> dict[str, str]:
    return {shard["path"]: shard["sha256"] for table in manifest["tables"].values() for shard in table["shards"]}


def test_a_right_that_is_denied_is_named_with_what_was_asked(store, source, tiny_encoder):
    url = store.url("denied")
    command = ["build", source, "--out", url, "--encoder", tiny_encoder, *SETTINGS, "--until", "corpus"]
    with store.failing("denied PUT POST"):
        writing = retrodb(*command)
    assert writing.code == 3, writing.err
    assert f"cannot write {url}/" in writing.err
    assert retrodb(*command).code == 0
    with store.failing("denied GET HEAD"):
        reading = retrodb("info", url)
    assert reading.code == 3, reading.err
    assert f"cannot read {url}/manifest.json" in reading.err
    for ran in (writing, reading):
        assert "permission is denied" in ran.err
        assert "Reading needs get and list, building also put and delete" in ran.err
        assert "Traceback" not in ran.err


def test_a_store_that_goes_down_in_the_middle_ends_the_build_and_the_next_one_finishes_it(
    store, source, tiny_encoder, tmp_path
):
    url = store.url("interrupted")
    command = ["build", source, "--out", url, "--encoder", tiny_encoder, *SETTINGS]
    running = Running.start(*command)
    storage = Storage(url)
    assert running.wait_for(lambda: bool(storage.list_files("chunks")))
    with store.failing("down"):
        assert running.end(120) == 3, running.err
    assert "the store does not answer" in running.err
    assert "what is finished is kept" in running.err
    assert "Traceback" not in running.err
    again = retrodb(*command, "--json")
    assert again.code == 0, again.err
    build_here([source], tmp_path / "db", encoder=str(tiny_encoder), **LOCAL)
    assert recorded(json.loads(storage.read_bytes("manifest.json"))) == recorded(manifest_of(tmp_path / "db"))


def test_a_template_that_was_exchanged_is_never_used(store, source, tiny_encoder, tmp_path):
    """By no stage and no reader: the manifest says which bytes it has."""
    url = store.url("exchanged")
    storage = Storage(url)
    command = ["build", source, "--out", url, "--encoder", tiny_encoder, *SETTINGS]
    command += ["--index-key", "IVF4,Flat", "--min-recall", "0"]
    assert retrodb(*command, "--until", "index").code == 0
    template = "index/quantiser.faiss"
    whole = storage.read_bytes(template)
    storage.commit_bytes(template, whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    cold = {"RETRODB_CACHE": str(tmp_path / "cache")}
    merged = retrodb("index", "merge", url, "--out", tmp_path / "merged", **cold)
    assert merged.code == 4, merged.err
    assert template in merged.err
    mended = retrodb(*command, "--until", "index", "--json", **cold)
    assert mended.code == 0, mended.err
    assert storage.read_bytes(template) == whole


def test_a_learnt_tokenizer_that_was_exchanged_is_never_used(store, source, tmp_path):
    from retrodb.pipelines.chunk import open_tokenizer

    url = store.url("learnt")
    built = retrodb("build", source, "--out", url, *SETTINGS, "--tokenizer", "train:300", "--until", "chunk")
    assert built.code == 0, built.err
    storage = Storage(url)
    fingerprint = json.loads(storage.read_bytes("manifest.json"))["fingerprints"]["tokenizer"]["fingerprint"]
    assert open_tokenizer(url, "tokenizer.json", fingerprint).fingerprint == fingerprint
    storage.commit_bytes("tokenizer.json", storage.read_bytes("tokenizer.json") + b" ")
    open_tokenizer.cache_clear()
    with pytest.raises(DamagedError, match="tokenizer.json has sha256 .* expected is"):
        open_tokenizer(url, "tokenizer.json", fingerprint)


@pytest.mark.parametrize(("module", "said"), [("s3fs", "pip install 'retrodb[s3]'"), ("adlfs", "Install the fsspec")])
def test_a_driver_that_is_not_installed_is_named_with_how_to_get_it(tmp_path, module, said):
    scheme = {"s3fs": "s3", "adlfs": "az"}[module]
    program = f"import sys; sys.modules[{module!r}] = None; from retrodb.__main__ import main; main()"
    command = [sys.executable, "-c", program, "info", f"{scheme}://bucket/db"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
