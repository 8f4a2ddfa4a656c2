"""One writer at a time, and others that wait for their turn: ``--wait``."""

import json
import signal
import threading
import time
from pathlib import Path

import pytest
from retrodb.pipelines.holding import held
from retrodb.pipelines.watch import Watch, WatchSettings
from support import Progress, Running, build_here, retrodb, write_jsonl
from typer.testing import CliRunner

from retrodb.cli import app
from retrodb.config import RunSettings, make_config
from retrodb.errors import LockedError, UsageError
from retrodb.lock import LOCK_NAME, writer_lock
from retrodb.manifest import Manifest
from retrodb.storage import Storage

WRITERS = ("build", "refresh", "add", "swap", "delete", "compact", "gc", "spans")


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A database before anything is built in it."""
    (tmp_path / "db").mkdir()
    Manifest().save(Storage(str(tmp_path / "db")), before=None)
    return tmp_path / "db"


@pytest.mark.parametrize("command", WRITERS)
def test_every_command_that_writes_a_database_waits_if_it_is_told_to(command: str) -> None:
    assert "--wait" in CliRunner().invoke(app, [command, "--help"]).output


def test_how_long_is_written_with_its_unit() -> None:
    for wrong in ("", "10", "-3s", "5 parsecs", "1e3s"):
        with pytest.raises(UsageError, match=r"--wait .*is not a duration; write it as 30s, 10m or 2h"):
            make_config({}, {"wait": wrong})
    with pytest.raises(UsageError, match="--wait"):
        make_config({}, {"wait": -1.0})


@pytest.mark.slow
def test_a_command_waits_for_its_turn_and_says_once_for_whom(database: Path) -> None:
    with writer_lock(Storage(str(database))):
        running = Running.start("gc", database, "--wait", "60s")
        assert running.wait_for(lambda: "waiting for it, 1m at most" in running.err)
        time.sleep(1.5)  # it has looked again
        assert running.process.poll() is None
    assert running.end() == 0
    assert running.err.count("waiting for it") == 1
    assert "is being built by process" in running.err
    assert not (database / LOCK_NAME).exists()


@pytest.mark.slow
def test_a_command_whose_wait_is_over_or_interrupted_leaves_the_holder_alone(database: Path) -> None:
    with writer_lock(Storage(str(database))):
        holder = (database / LOCK_NAME).read_text(encoding="utf-8")
        running = Running.start("gc", database, "--wait", "60s")
        ran = retrodb("gc", database, "--wait", "0.5s", "--json")
        assert (ran.code, ran.json["exit_code"]) == (6, 6)
        assert "It was waited for, 0.5s. Wait for it, as --wait 10m does" in ran.err
        assert running.wait_for(lambda: "waiting for it" in running.err)
        running.signal_group(signal.SIGINT)
        assert running.end() == 130
        assert (database / LOCK_NAME).read_text(encoding="utf-8") == holder


def test_a_writer_is_refused_at_once_where_it_was_not_told_to_wait(database: Path) -> None:
    progress = Progress()
    with (
        writer_lock(Storage(str(database))),
        pytest.raises(LockedError, match=r"by process \d+ on .*since .*\. Wait for it, as --wait 10m does, or build"),
        held(Storage(str(database)), progress),
    ):
        pass
    assert progress.lines == []


def test_a_build_waits_as_the_others_do(database: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    with writer_lock(Storage(str(database))), pytest.raises(LockedError, match=r"It was waited for, 0\.2s\."):
        build_here([path], database, encoder=str(tiny_encoder), wait="0.2s")


def test_of_writers_that_wait_each_gets_its_turn(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrodb.lock._LOOK_SECONDS", 0.02)
    inside, most, turns = 0, 0, []

    def write(name: str) -> None:
        nonlocal inside, most
        with writer_lock(Storage(str(database)), wait=30.0):
            inside += 1
            most = max(most, inside)
            time.sleep(0.05)
            inside -= 1
            turns.append(name)

    writers = [threading.Thread(target=write, args=[name]) for name in "abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert (sorted(turns), most) == (list("abcd"), 1)


@pytest.mark.parametrize("wait", [None, 0.2])
def test_a_refresher_tries_again_for_ever_or_as_long_as_it_is_told_and_says_so_once(
    database: Path, tmp_path: Path, wait: float | None
) -> None:
    exports, progress = tmp_path / "exports", Progress()
    (exports / "step-5").mkdir(parents=True)
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(json.loads((exports / "refresher.json").read_text(encoding="utf-8"))["staleness"]["steps"])
        assert seconds <= 0.05
        time.sleep(seconds)
        if len(looks) == 10:
            raise KeyboardInterrupt

    settings = WatchSettings(str(exports), poll=0.05)
    watch = Watch(Storage(str(database)), settings, RunSettings(workers=1, wait=wait), progress, sleep)
    with writer_lock(Storage(str(database))), pytest.raises(KeyboardInterrupt if wait is None else LockedError):
        watch.run()
    assert set(looks) == {5}, "how stale it is, is told meanwhile"
    assert sum("Trying again" in line for line in progress.lines) == 1
    assert sum("step 5:" in line for line in progress.lines) == 1
    assert len(looks) == 10 if wait is None else 3 <= len(looks) <= 5
