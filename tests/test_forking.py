"""Worker processes, forked from one that has imported what they need."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import apache_beam as beam
import psutil
import pytest
from failing_work import Die, TellWhere
from retrodb.pipelines.forking import NEEDED_BY_ALL, ForkServer
from retrodb.pipelines.runners import WorkerDiedError, local, run_local
from support import build_here

NOBODY = "localhost:1"
"""A control service that does not answer: a worker waits for it."""


@pytest.fixture
def server() -> Iterator[ForkServer]:
    server = ForkServer(["apache_beam.runners.worker.sdk_worker"], quiet=True)
    yield server
    server.close()


def process_of(server: ForkServer) -> psutil.Process:
    """What it forks from: a child of this process, which may have others."""
    assert server._serving is not None
    return psutil.Process(server._serving._process.pid)


def native_threads(process: psutil.Process) -> set[str]:
    """Of a process, but for the first: jemalloc, which Arrow brings, sees to forks by itself."""
    own = [thread.id for thread in process.threads() if thread.id != process.pid]
    return {Path(f"/proc/{process.pid}/task/{number}/comm").read_text().strip() for number in own}


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


@pytest.mark.slow
def test_a_worker_that_is_killed_says_by_which_signal_and_the_others_go_on(server):
    workers = [server.start(NOBODY, f"worker_{number}") for number in range(2)]
    until(lambda: len(process_of(server).children()) == 2)
    assert native_threads(process_of(server)) <= {"jemalloc_bg_thd"}, "a fork copies no other thread, nor what it holds"
    process_of(server).children()[0].terminate()
    until(lambda: any(worker.code is not None for worker in workers))
    assert sorted((worker.code for worker in workers), key=str) == [-15, None]
    server.close()
    assert [worker.wait() for worker in workers] in ([-15, -9], [-9, -15])


@pytest.mark.slow
def test_workers_live_no_longer_than_the_process_they_come_from_and_the_next_comes_from_another(server):
    worker = server.start(NOBODY, "worker_0")
    until(lambda: process_of(server).children())
    first, orphan = process_of(server), process_of(server).children()[0]
    first.kill()
    assert worker.wait() == -9
    until(lambda: not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE)
    again = server.start(NOBODY, "worker_1")
    until(lambda: process_of(server).pid != first.pid and process_of(server).children())
    assert again.code is None


@pytest.mark.slow
def test_a_variable_that_libraries_read_once_makes_another_process_and_other_ones_do_not(server, monkeypatch):
    server.start(NOBODY, "worker_0")
    first = process_of(server).pid
    monkeypatch.setenv("RETRODB_OF_A_TEST", "1")
    server.start(NOBODY, "worker_1")
    assert process_of(server).pid == first
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    server.start(NOBODY, "worker_2")
    assert process_of(server).pid != first


@pytest.mark.slow
def test_each_job_has_the_folder_and_the_variables_of_its_driver_and_workers_of_its_own(
    tmp_path, monkeypatch, importable
):
    told = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        monkeypatch.setenv("RETRODB_OF_A_TEST", name)
        path = str(tmp_path / f"{name}.txt")
        run_local(lambda pipeline, path=path: pipeline | beam.Create([path]) | beam.ParDo(TellWhere()), processes=2)
        pid, *rest = Path(path).read_text(encoding="utf-8").split()
        assert rest == [str(tmp_path / name), name, "1"]
        told.append(int(pid))
    assert len({*told, os.getpid()}) == 3


@pytest.mark.slow
def test_a_job_whose_worker_dies_ends_with_a_word_and_the_next_one_runs(tmp_path, monkeypatch, importable):
    monkeypatch.setattr(local, "_GRACE_SECONDS", 0.2)
    with pytest.raises(WorkerDiedError, match=r"a worker process died \(1 of 2\): killed, or out of memory\?"):
        run_local(lambda pipeline: pipeline | beam.Create([1]) | beam.ParDo(Die()), processes=2)
    path = str(tmp_path / "told.txt")
    run_local(lambda pipeline: pipeline | beam.Create([path]) | beam.ParDo(TellWhere()), processes=2)
    assert Path(path).exists()


@pytest.mark.slow
def test_workers_that_are_expected_come_from_a_process_that_is_starting_already(monkeypatch, tmp_path, tiny_encoder):
    """As soon as a build knows that there is text enough for them, and before it has read it; not where all is done."""
    server = ForkServer(NEEDED_BY_ALL, quiet=True)
    monkeypatch.setattr(local, "_SERVER", server)
    begun: list[bool] = []
    processes: list[int] = []
    begin, source = server.begin, tmp_path / "a.jsonl"

    def counted() -> None:
        begun.append((tmp_path / "db" / "documents").exists())
        begin()
        processes.append(process_of(server).pid)

    monkeypatch.setattr(server, "begin", counted)
    try:
        local.LocalRunner(1).expect()
        assert begun == [], "one worker is this process"
        source.write_text(json.dumps({"text": "a few words " * 10}) + "\n", encoding="utf-8")
        build_here([source], tmp_path / "small", encoder=str(tiny_encoder), workers=2)
        assert begun == []
        lines = [json.dumps({"text": f"{n} other words " * 500}) for n in range(20)]
        source.write_text("\n".join(lines) + "\n", encoding="utf-8")
        for _ in range(2):
            build_here([source], tmp_path / "db", encoder=str(tiny_encoder), workers=2)
            assert begun == [False]
            assert process_of(server).pid == processes[0], "nothing that libraries read at once differs"
    finally:
        server.close()
