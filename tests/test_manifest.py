"""The manifest says what exists; it round-trips, refuses what it cannot mean, and trusts no path."""

import copy
import json

import pytest

from retrodb.errors import DamagedError, InputError, MismatchError
from retrodb.manifest import Manifest, Shard, StageState, fingerprint, shard_path
from retrodb.storage import Storage


@pytest.fixture
def manifest():
    shards = [Shard(n, shard_path("chunks", n), 10 + n, 100, "ab" * 32) for n in (1, 0)]
    return Manifest(config={"seed": 0}).with_stage(
        "chunk", StageState("f" * 64, {"a": 1}, {"chunks": 21}), {"chunks": shards}
    )


def test_it_round_trips_through_the_disk(manifest, tmp_path):
    storage = Storage(str(tmp_path))
    manifest.save(storage)
    assert Manifest.load(storage) == manifest
    assert [shard.number for shard in manifest.shards("chunks")] == [0, 1], "in order of number"
    assert manifest.rows("chunks") == 21


def test_the_json_has_the_keys_of_the_contract(manifest):
    data = json.loads(json.dumps(manifest.as_json()))
    assert {"format", "config", "fingerprints", "tables"} <= set(data)
    assert {"path", "rows", "bytes", "sha256"} <= set(data["tables"]["chunks"]["shards"][0])


def test_no_manifest_is_no_database(tmp_path):
    assert Manifest.load(Storage(str(tmp_path))) is None


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd"])
def test_a_path_out_of_the_database_is_refused(manifest, path):
    data = manifest.as_json()
    data["tables"]["chunks"]["shards"][0]["path"] = path
    with pytest.raises(DamagedError, match="refused"):
        Manifest.parse(data, "manifest.json")


def test_a_later_schema_is_refused(manifest):
    data = copy.deepcopy(manifest.as_json())
    data["format"]["schema_version"] = 99
    with pytest.raises(MismatchError, match="99"):
        Manifest.parse(data, "manifest.json")


@pytest.mark.parametrize("data", [None, [], {}, {"format": "x"}, {"format": {"name": "other"}}])
def test_anything_else_is_no_manifest(data):
    with pytest.raises(InputError, match="not a retrodb manifest"):
        Manifest.parse(data, "manifest.json")


@pytest.mark.parametrize("key", ["config", "tables", "stages", "fingerprints", "inputs"])
def test_a_missing_part_is_damage(manifest, key):
    data = manifest.as_json()
    del data[key]
    with pytest.raises(DamagedError, match=key):
        Manifest.parse(data, "manifest.json")


def test_undoing_a_stage_leaves_the_others(manifest):
    after = manifest.without(["chunk"], ["chunks"])
    assert after.shards("chunks") == ()
    assert after.stages == {}
    assert after.config == manifest.config


def test_fingerprints_depend_on_content_not_on_order():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    with pytest.raises(ValueError, match="JSON"):
        fingerprint(float("nan"))
