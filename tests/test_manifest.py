"""The manifest says what exists; it round-trips, refuses what it cannot mean, trusts no path, and can be proved."""

import copy
import hashlib
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrodb.errors import DamagedError, InputError, MismatchError, RetrodbError
from retrodb.manifest import MANIFEST_COPY, MANIFEST_NAME, Manifest, Shard, StageState, fingerprint, shard_path
from retrodb.storage import Storage


@pytest.fixture
def manifest():
    shards = [Shard(n, shard_path("chunks", n), 10 + n, 100, "ab" * 32) for n in (1, 0)]
    return Manifest(config={"seed": 0}).with_stage(
        "chunk", StageState("f" * 64, {"a": 1}, {"chunks": 21}), {"chunks": shards}
    )


def test_it_round_trips_through_the_disk(manifest, tmp_path):
    storage = Storage(str(tmp_path))
    manifest.save(storage, None)
    assert Manifest.load(storage) == manifest
    assert [shard.number for shard in manifest.shards("chunks")] == [0, 1], "in order of number"
    assert manifest.rows("chunks") == 21


def test_the_json_has_the_keys_of_the_contract(manifest):
    data = json.loads(json.dumps(manifest.as_json()))
    assert {"format", "config", "fingerprints", "tables"} <= set(data)
    assert {"path", "rows", "bytes", "sha256"} <= set(data["tables"]["chunks"]["shards"][0])


def test_no_manifest_is_no_database(tmp_path):
    assert Manifest.load(Storage(str(tmp_path))) is None


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "chunks/\0"])
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


@pytest.mark.parametrize("data", [None, [], {"format": "x"}, {"format": {"name": "other"}}])
def test_anything_else_is_no_manifest(data):
    with pytest.raises(InputError, match="not a retrodb manifest"):
        Manifest.parse(data, "manifest.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["tables"]["chunks"]["shards"][0].update(rows=float("inf")),
        lambda data: data["tables"]["chunks"]["shards"].append(7),
        lambda data: data["stages"]["chunk"].update(details=0.5),
        lambda data: data["stages"]["chunk"].update(made_from="x"),
        lambda data: data["stages"]["chunk"]["counts"].update(chunks="many"),
        lambda data: data["inputs"].append(0.5),
    ],
)
def test_what_is_not_of_its_kind_is_damage(manifest, change):
    data = copy.deepcopy(manifest.as_json())
    change(data)
    with pytest.raises(DamagedError, match="malformed"):
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


# -- its checksum, and its copy ----------------------------------------------------------------------------------------


@pytest.fixture
def storage(manifest, tmp_path):
    """A folder with the manifest and its copy."""
    storage = Storage(str(tmp_path))
    manifest.save(storage, None)
    return storage


def test_the_checksum_is_the_sha256_of_the_canonical_json_of_all_the_rest(storage):
    content = json.loads(storage.read_bytes(MANIFEST_NAME))
    stated = content.pop("checksum")
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert stated == hashlib.sha256(canonical.encode()).hexdigest()


def test_a_save_leaves_a_copy_of_the_same_bytes(storage, manifest):
    assert storage.read_bytes(MANIFEST_COPY) == storage.read_bytes(MANIFEST_NAME) == manifest.as_bytes()
    assert Manifest.load_whole(storage) == Manifest.load_whole(storage, MANIFEST_COPY) == manifest


def test_every_single_flipped_bit_is_found(storage, manifest, monkeypatch):
    whole = manifest.as_bytes()
    for bit in range(len(whole) * 8):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        monkeypatch.setattr(Storage, "read_bytes", lambda self, name, data=bytes(flipped): data)
        with pytest.raises(RetrodbError, match=MANIFEST_COPY):
            Manifest.load_whole(storage, MANIFEST_COPY)


def spaced(text):
    return text.replace('"seed": 0', '"seed":  0')


def with_one_more_key(text):
    return text.replace('"config"', '"mood": "fine",\n "config"')


def with_a_key_twice(text):
    return text.replace('"seed": 0', '"seed": 1, "seed": 0')


def in_another_order(text):
    return json.dumps(dict(reversed(json.loads(text).items())), indent=1) + "\n"


def escaped(text):
    return text.replace("seed", "\\u0073eed")


def without_a_checksum(text):
    return json.dumps({key: value for key, value in json.loads(text).items() if key != "checksum"}, indent=1) + "\n"


SAID_OTHERWISE = [spaced, with_one_more_key, with_a_key_twice, in_another_order, escaped, without_a_checksum]


@pytest.mark.parametrize("change", SAID_OTHERWISE, ids=lambda change: change.__name__)
def test_what_retrodb_would_not_write_is_not_whole_though_readers_take_it(storage, manifest, change):
    changed = change(storage.read_bytes(MANIFEST_NAME).decode())
    assert changed.encode() != manifest.as_bytes()
    storage.commit_bytes(MANIFEST_NAME, changed.encode())
    assert Manifest.load(storage) == manifest
    with pytest.raises(DamagedError, match="checksum"):
        Manifest.load_whole(storage)


def test_a_number_as_a_key_is_sorted_as_it_is_read_back(manifest, tmp_path):
    """2 comes before 10, but "10" before "2"."""
    storage = Storage(str(tmp_path))
    state = replace(manifest.stages["chunk"], details={"rows": dict.fromkeys(range(11), 0)})
    manifest.with_stage("chunk", state, {}).save(storage, None)
    assert Manifest.load_whole(storage).stages["chunk"].details["rows"]["10"] == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
    max_leaves=10,
)


@settings(deadline=None)  # files, on a machine that may be busy
@given(st.dictionaries(st.text(), JSON))
def test_whatever_is_saved_is_whole(config):
    storage = Storage("memory://whole")
    Manifest(config=config).save(storage, Manifest.load(storage))
    assert Manifest.load_whole(storage) == Manifest(config=config)


OTHER = b'{"name": "my web app"}'
WHOLE, OLDER, FLIPPED, TORN, EMPTIED = "whole", "older", "flipped", "torn", "emptied"
LATER, MISSING = "later", "missing"


def put(storage, name, manifest, state):
    """The file ``name`` in one of these states."""
    whole = manifest.as_bytes()
    content = {
        WHOLE: whole,
        OLDER: Manifest().as_bytes(),
        FLIPPED: whole.replace(b'"seed": 0', b'"seed": 1'),
        TORN: whole[: len(whole) // 2],
        EMPTIED: b"{}",
        LATER: whole.replace(b'"schema_version": ', b'"schema_version": 9'),
        OTHER: OTHER,
    }
    storage.delete(name)
    if state != MISSING:
        storage.commit_bytes(name, content[state])


RECOVERED = [
    *((WHOLE, copy, WHOLE) for copy in (WHOLE, OLDER, FLIPPED, TORN, LATER, OTHER, MISSING)),
    *((damaged, WHOLE, WHOLE) for damaged in (FLIPPED, TORN, EMPTIED, MISSING)),
    *((damaged, OLDER, OLDER) for damaged in (FLIPPED, TORN, MISSING)),
    *(
        (damaged, copy, DamagedError)
        for damaged in (FLIPPED, TORN, EMPTIED)
        for copy in (FLIPPED, TORN, OTHER, MISSING)
    ),
    *((MISSING, copy, DamagedError) for copy in (FLIPPED, TORN)),
    *((damaged, LATER, MismatchError) for damaged in (FLIPPED, TORN, MISSING)),
    *((LATER, copy, MismatchError) for copy in (WHOLE, FLIPPED, MISSING)),
    *((OTHER, copy, InputError) for copy in (WHOLE, FLIPPED, MISSING)),
    *((MISSING, copy, None) for copy in (OTHER, MISSING)),
]


@pytest.mark.parametrize(("primary", "copy", "outcome"), RECOVERED, ids=str)
def test_a_build_goes_on_from_a_whole_manifest_else_from_a_whole_copy(storage, manifest, primary, copy, outcome):
    put(storage, MANIFEST_NAME, manifest, primary)
    put(storage, MANIFEST_COPY, manifest, copy)
    if isinstance(outcome, type):
        with pytest.raises(outcome) as raised:
            Manifest.recover(storage)
        assert type(raised.value) is outcome
        assert outcome is not DamagedError or "delete the database" in str(raised.value)
    else:
        assert Manifest.recover(storage) == {WHOLE: manifest, OLDER: Manifest(), None: None}[outcome]


# -- fingerprints ------------------------------------------------------------------------------------------------------


def test_fingerprints_depend_on_content_not_on_order():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    with pytest.raises(ValueError, match="JSON"):
        fingerprint(float("nan"))
