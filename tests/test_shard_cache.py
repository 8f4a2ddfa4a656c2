"""The cache of shards: what it gives has the recorded bytes, it stays below its bound, and processes share it."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from retrodb.cache import BYTES_VARIABLE, FOLDER_VARIABLE, ShardCache, shard_cache
from retrodb.errors import DamagedError, InputError


class Origin:
    """Where files come from: counts how often."""

    def __init__(self, data: bytes, seconds: float = 0.0) -> None:
        self.data = data
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.fetched = 0
        self._seconds = seconds

    def fetch(self, path: Path) -> None:
        self.fetched += 1
        time.sleep(self._seconds)
        path.write_bytes(self.data)

    def read(self, cache: ShardCache, *, renew: bool = False) -> bytes:
        with cache.hold("name", self.sha256, len(self.data), self.fetch, renew=renew) as path:
            return path.read_bytes()


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 1000)


def kept(cache: ShardCache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir() if path.name != ".lock")


def test_a_file_is_fetched_once(cache: ShardCache) -> None:
    origin = Origin(b"x" * 100)
    assert [origin.read(cache) for _ in range(3)] == [origin.data] * 3
    assert origin.fetched == 1
    assert kept(cache) == [origin.sha256]


def test_what_has_to_be_proved_is_fetched_again(cache: ShardCache) -> None:
    origin = Origin(b"x" * 100)
    origin.read(cache)
    assert origin.read(cache, renew=True) == origin.data
    assert origin.fetched == 2


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(b"y" * 100), id="other bytes"),
        pytest.param(lambda path: os.truncate(path, 50), id="cut short"),
        pytest.param(lambda path: (path.unlink(), path.mkdir()), id="a folder"),
        pytest.param(lambda path: (path.unlink(), path.symlink_to("/etc/hostname")), id="a link"),
    ],
)
def test_a_damaged_entry_is_fetched_again(cache: ShardCache, damage) -> None:
    origin = Origin(b"x" * 100)
    origin.read(cache)
    entry = cache.folder / origin.sha256
    entry.chmod(0o600)
    damage(entry)
    if entry.is_dir():
        with pytest.raises(OSError, match="directory"):
            origin.read(cache)  # nothing that is not ours is removed
        return
    assert origin.read(cache) == origin.data
    assert origin.fetched == 2


def test_what_is_not_what_was_recorded_never_enters(cache: ShardCache) -> None:
    origin = Origin(b"x" * 100)
    origin.data = b"y" * 100
    with pytest.raises(DamagedError, match=r"name has 100 bytes with sha256 .* recorded"):
        origin.read(cache)
    assert kept(cache) == []


def test_what_was_used_longest_ago_gives_way(cache: ShardCache) -> None:
    first, second, third = (Origin(letter * 400) for letter in (b"a", b"b", b"c"))
    first.read(cache)
    second.read(cache)
    first.read(cache)
    third.read(cache)
    assert kept(cache) == sorted([first.sha256, third.sha256])
    assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= cache.limit


def test_a_file_in_use_stays(cache: ShardCache) -> None:
    first, second = Origin(b"a" * 600), Origin(b"b" * 600)
    with cache.hold("name", first.sha256, 600, first.fetch) as path:
        second.read(cache)
        assert path.read_bytes() == first.data
    Origin(b"c" * 600).read(cache)
    assert first.sha256 not in kept(cache)


@pytest.mark.parametrize("limit", [0, 99])
def test_what_is_larger_than_the_bound_is_not_kept(tmp_path: Path, limit: int) -> None:
    origin = Origin(b"x" * 100)
    assert origin.read(ShardCache(tmp_path / "cache", limit)) == origin.data
    assert not (tmp_path / "cache").exists()


def test_threads_that_want_the_same_fetch_it_once(cache: ShardCache) -> None:
    origin = Origin(b"x" * 100, seconds=0.1)
    threads = [threading.Thread(target=origin.read, args=[cache]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert origin.fetched == 1


def test_processes_share_it_and_a_killed_one_leaves_nothing_that_counts(cache: ShardCache) -> None:
    origin = Origin(b"x" * 100)
    code = """
import os, signal, sys
from pathlib import Path
from retrodb.cache import ShardCache
def fetch(path):
    path.write_bytes(b"x" * 50)
    os.kill(os.getpid(), signal.SIGKILL)
with ShardCache(Path(sys.argv[1]), 1000).hold("name", sys.argv[2], 100, fetch):
    pass
"""
    assert subprocess.run([sys.executable, "-c", code, cache.folder, origin.sha256], check=False).returncode == -9
    assert kept(cache) == [f".part-{origin.sha256}"]
    other = Origin(b"z" * 10)
    other.read(cache)
    assert kept(cache) == [other.sha256]
    assert origin.read(cache) == origin.data


def test_the_environment_says_where_and_how_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "here"))
    monkeypatch.setenv(BYTES_VARIABLE, "2GiB")
    assert shard_cache() == ShardCache(tmp_path / "here", 2 << 30)
    monkeypatch.setenv(BYTES_VARIABLE, "a lot")
    with pytest.raises(InputError, match="RETRODB_CACHE_BYTES: 'a lot' is not a size"):
        shard_cache()
    monkeypatch.delenv(BYTES_VARIABLE)
    monkeypatch.delenv(FOLDER_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert shard_cache() == ShardCache(tmp_path / "xdg" / "retrodb" / "shards", 10 * 10**9)


UNSHARE = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
DISK = "DISK"
ON_A_SMALL_DISK = 'mount -t tmpfs -o size=64k tmpfs "$1" || exit 99; shift; exec "$@"'


@pytest.mark.parametrize(
    ("variable", "given", "code"),
    [
        ("TMPDIR", {"TMPDIR": DISK}, "Storage('memory://x/db').commit_bytes('a', bytes(1 << 20))"),
        ("RETRODB_CACHE", {"RETRODB_CACHE": DISK}, "open_array()"),
        ("TMPDIR", {"LATER": DISK, "RETRODB_CACHE_BYTES": "0"}, "open_array()"),
    ],
)
def test_a_full_disk_is_named_by_the_variable_that_chose_it(
    tmp_path: Path, variable: str, given: dict[str, str], code: str
) -> None:
    """A staged upload, a shard that is fetched, and one that the cache is too small for: nothing is taken for damaged,
    and the remedy is plain."""
    program = f"""
import os, tempfile
import numpy as np
from retrodb.storage import Storage
def open_array():
    storage = Storage('memory://x/db')
    committed = storage.commit_array('a.npy', np.zeros(1 << 20, np.uint8))
    tempfile.tempdir = os.environ.get("LATER")
    storage.read_array(committed)
{code}
"""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        [*UNSHARE, "sh", "-c", ON_A_SMALL_DISK, "sh", disk, sys.executable, "-c", program],
        env={**os.environ, **{name: value.replace(DISK, str(disk)) for name, value in given.items()}},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode in (99, 127) or "unshare" in done.stderr:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    last = done.stderr.strip().splitlines()[-1]
    assert "No space left on device" in last
    assert str(disk) in last
    assert variable in last
