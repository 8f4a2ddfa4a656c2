"""Files appear whole or not at all, hash as recorded, and no path leaves the database."""

import hashlib
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrodb.errors import DamagedError, InputError
from retrodb.remote import absolute_url
from retrodb.storage import Storage, checked_relative


@pytest.fixture(params=["local", "memory"])
def storage(request, tmp_path):
    """A folder, and an object store."""
    return Storage(str(tmp_path / "db") if request.param == "local" else f"memory://{tmp_path.name}/db")


def test_what_is_committed_is_what_is_read(storage):
    data = b"abc" * 1000
    committed = storage.commit_bytes("a/x.bin", data)
    assert (committed.bytes, committed.sha256) == (3000, hashlib.sha256(data).hexdigest())
    assert storage.read_bytes("a/x.bin") == data
    assert storage.sha256("a/x.bin") == committed.sha256
    assert storage.size("a/x.bin") == 3000
    assert storage.list_files("a") == ["x.bin"]
    storage.delete("a/x.bin")
    storage.delete("a/x.bin")
    assert storage.size("a/x.bin") is None


def test_tables_and_arrays_round_trip_with_the_hash_of_their_bytes(storage):
    table = pa.table({"x": pa.array([1, None, 3])})
    committed = storage.commit_table("t/0.parquet", table, 2)
    assert storage.read_table("t/0.parquet").equals(table)
    assert storage.sha256("t/0.parquet") == committed.sha256
    array = np.arange(12, dtype=np.float16).reshape(3, 4)
    committed = storage.commit_array("e/0.npy", array)
    np.testing.assert_array_equal(storage.read_array("e/0.npy"), array)
    assert storage.sha256("e/0.npy") == committed.sha256


def test_arrays_are_what_numpy_writes(tmp_path):
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    Storage(str(tmp_path)).commit_array("a.npy", array)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy", mmap_mode="r"), array)


def test_local_arrays_are_memory_mapped(tmp_path):
    storage = Storage(str(tmp_path))
    storage.commit_array("a.npy", np.zeros((4, 4), dtype=np.float16))
    assert isinstance(storage.read_array("a.npy"), np.memmap)


def test_a_writer_that_fails_leaves_nothing(storage):
    def fail(writer):
        writer.write(b"half")
        raise RuntimeError("full disk")

    with pytest.raises(RuntimeError):
        storage.commit("a/x.bin", fail)
    assert storage.list_files("a") == []


def test_a_writer_that_fails_leaves_the_old_file(storage):
    storage.commit_bytes("a/x.bin", b"old")

    def fail(writer):
        writer.write(b"new")
        raise RuntimeError("full disk")

    with pytest.raises(RuntimeError):
        storage.commit("a/x.bin", fail)
    assert storage.read_bytes("a/x.bin") == b"old"


def test_a_writer_that_is_killed_never_shows_half_a_file(tmp_path):
    code = """
import os, signal, sys
from retrodb.storage import Storage
def write(writer):
    writer.write(b"half")
    writer.flush()
    os.kill(os.getpid(), signal.SIGKILL)
Storage(sys.argv[1]).commit("a/x.bin", write)
"""
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == -9
    names = Storage(str(tmp_path)).list_files("a")
    assert "x.bin" not in names
    assert all(name.startswith(".tmp-") for name in names)


@pytest.mark.parametrize(
    "path", ["../x", "/etc/passwd", "a/../../x", "", "a//b", "./a", "a/", "..", "C:\\x", "s3://b/x"]
)
def test_paths_that_leave_the_database_are_refused(path):
    with pytest.raises(DamagedError, match="refused"):
        checked_relative(path)


@given(st.text())
def test_no_accepted_path_leaves_the_folder(path):
    try:
        accepted = checked_relative(path)
    except DamagedError:
        return
    assert not accepted.startswith("/")
    assert ".." not in accepted.split("/")


def test_damaged_files_are_named(storage):
    storage.commit_bytes("t/0.parquet", b"PAR1 no table at all PAR1")
    storage.commit_bytes("e/0.npy", b"no array")
    storage.commit_bytes("e/1.npy", b"")
    storage.commit_bytes("m.json", b"{")
    with pytest.raises(DamagedError, match="t/0.parquet"):
        storage.read_table("t/0.parquet")
    for name in ("e/0.npy", "e/1.npy", "e/missing.npy"):
        with pytest.raises(DamagedError, match=name):
            storage.read_array(name)
    with pytest.raises(DamagedError, match="m.json"):
        storage.read_json("m.json")
    assert storage.read_json("missing.json") is None


def test_arrays_with_pickles_are_refused(tmp_path):
    np.save(tmp_path / "p.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DamagedError):
        Storage(str(tmp_path)).read_array("p.npy")


def test_storage_travels_to_workers_by_its_url(storage):
    assert pickle.loads(pickle.dumps(storage)) == storage


def test_an_unknown_protocol_is_an_input_error():
    with pytest.raises(InputError, match="nosuch"):
        absolute_url("nosuch://x/y")


@pytest.mark.parametrize("url", ["s3://", "gs:///", "file://", "memory://"])
def test_a_url_that_names_nothing_is_refused(url):
    """Its slashes cut off, it would be a local folder named `s3:`."""
    with pytest.raises(InputError, match="names no bucket and no folder"):
        absolute_url(url)
