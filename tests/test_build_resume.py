"""Kill it anywhere, change anything, break any file: the next run ends where an undisturbed one ends, byte for byte.

The corpus is small and the encoder tiny, so that what is tested is the driver and not the arithmetic. What must survive
a kill runs as a process of its own; what must be rebuilt, and only that, runs in this one.
"""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from retrodb.pipelines.forking import WORKER_MODULE
from support import (
    DATA_TABLES,
    Progress,
    Running,
    always_use_workers,
    build_here,
    digests,
    make_tiny_encoder,
    manifest_of,
    near_duplicates_of,
    retrodb,
    save_manifest,
    stamps,
    strays,
    write_jsonl,
)

from retrodb.corpus.quickstart import quickstart_lines
from retrodb.errors import DamagedError
from retrodb.manifest import MANIFEST_COPY, MANIFEST_NAME
from retrodb.storage import Storage

pytestmark = pytest.mark.slow

SHARD_BYTES = "2KiB"
SMALL = ("--chunk-tokens", 8, "--sequence-tokens", 64)
"""Chunks of eight tokens are many enough for the embed stage to take worker processes."""

STAGES = ("corpus", "dedup", "chunk", "embed", "index", "neighbours", "training", "report")
TABLES = ("documents", "duplicates", "chunks", "embeddings", "index", "neighbours", "training", "leakage")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Twenty topics, two near-duplicates, a blank and a broken record: about 160 chunks in some ten shards."""
    topics = [line for line in quickstart_lines() if len(line) < 3_000][:20]
    lines = [*topics[:7], '{"id": "blank", "text": " "}', '{"id": "torn', *topics[7:], *near_duplicates_of(topics[:2])]
    return write_jsonl(tmp_path_factory.mktemp("resume") / "in.jsonl", lines)


@pytest.fixture(scope="module")
def clean(source, tiny_encoder, tmp_path_factory) -> Path:
    """The undisturbed build; never to be changed."""
    out = tmp_path_factory.mktemp("clean") / "db"
    again(source, out, tiny_encoder)
    assert len(manifest_of(out)["tables"]["chunks"]["shards"]) >= 8
    return out


@pytest.fixture(scope="module")
def clean_small(source, tiny_encoder, tmp_path_factory) -> Path:
    """The undisturbed build with chunks of eight tokens, `SMALL`; never to be changed."""
    out = tmp_path_factory.mktemp("clean-small") / "db"
    again(source, out, tiny_encoder, chunk_tokens=8, sequence_tokens=64)
    return out


@pytest.fixture
def database(clean, tmp_path) -> Path:
    """A copy of the undisturbed build."""
    shutil.copytree(clean, tmp_path / "db")
    return tmp_path / "db"


def again(source: Path, out: Path, encoder: Path, **settings: Any) -> tuple[str, ...]:
    """A build in this process; the stages that did something."""
    given = {"encoder": str(encoder), "shard_bytes": SHARD_BYTES, "precision": "fp32", **settings}
    return build_here([source], out, **given).done


def arguments(source: Path, out: Path, encoder: Path, *more: object) -> list[object]:
    precision = () if "--precision" in more else ("--precision", "fp32")
    return ["build", source, "--out", out, "--encoder", encoder, "--shard-bytes", SHARD_BYTES, *precision, *more]


def assert_same(made: Path, expected: Path) -> None:
    """Every table byte for byte, and nothing else lying about."""
    assert digests(made, TABLES) == digests(expected, TABLES)
    assert manifest_of(made)["tables"] == manifest_of(expected)["tables"]
    assert manifest_of(made)["stages"] == manifest_of(expected)["stages"]
    assert strays(made) == []


# -- kill -9 ---------------------------------------------------------------------------------------------------------


def reached(out: Path, stage: str, receipts: int) -> bool:
    """Whether a stage has that many finished shards, or is recorded already."""
    folders = list((out / ".build").glob(f"{stage}-*"))
    if sum(1 for folder in folders for name in folder.glob("*.json") if name.name[0] != ".") >= receipts:
        return True
    try:
        return stage in manifest_of(out)["stages"]
    except (OSError, ValueError):
        return False


def killed_on_the_way(
    source: Path, out: Path, encoder: Path, stage: str, receipts: int, wait: float, *more: object
) -> str:
    """Start a build, and kill its whole group a moment after a stage got so far. What it had said."""
    running = Running.start(*arguments(source, out, encoder, *more))
    running.wait_for(lambda: reached(out, stage, receipts))
    time.sleep(wait)
    running.kill()
    return running.err


def test_killed_in_the_first_stage_it_ends_as_an_undisturbed_build(source, clean, tiny_encoder, tmp_path):
    """There is no manifest yet, only shards and receipts: the folder is ours all the same."""
    out = tmp_path / "db"
    killed_on_the_way(source, out, tiny_encoder, "corpus", 2, 0.0, "--workers", 1)
    ran = retrodb(*arguments(source, out, tiny_encoder, "--workers", 1))
    assert ran.code == 0, ran.err
    assert_same(out, clean)


def test_killed_in_every_later_stage_it_ends_as_an_undisturbed_build(source, clean, tiny_encoder, tmp_path):
    chance = random.Random(1)
    out = tmp_path / "db"
    again(source, out, tiny_encoder, until="corpus")
    for stage in STAGES[1:]:
        killed_on_the_way(
            source, out, tiny_encoder, stage, chance.randint(1, 6), chance.random() * 0.05, "--workers", 1
        )
    ran = retrodb(*arguments(source, out, tiny_encoder, "--workers", 1))
    assert ran.code == 0, ran.err
    assert_same(out, clean)


@pytest.mark.parametrize("tokenizer", ["gpt2", "train:300"])
def test_killed_while_the_text_is_being_dropped_it_ends_as_an_undisturbed_build(
    source, tiny_encoder, tmp_path, tokenizer
):
    """Some documents have lost their text already, from which a vocabulary would be learnt again."""
    out, expected = tmp_path / "db", tmp_path / "expected"
    again(source, out, tiny_encoder, until="corpus")
    killed_on_the_way(source, out, tiny_encoder, "chunk", 3, 0.0, "--workers", 1, "--no-text", "--tokenizer", tokenizer)
    again(source, out, tiny_encoder, text=False, tokenizer=tokenizer)
    again(source, expected, tiny_encoder, text=False, tokenizer=tokenizer)
    assert_same(out, expected)


def test_killed_while_worker_processes_embed_it_ends_as_an_undisturbed_build(
    source, clean_small, tiny_encoder, tmp_path
):
    """Three worker processes resume what two began, and end where one ends."""
    more = (*SMALL, "--workers", 2)
    out = tmp_path / "db"
    killed_on_the_way(source, out, tiny_encoder, "embed", 3, 0.0, *more)
    assert "embed" not in manifest_of(out)["stages"]
    ran = retrodb(*arguments(source, out, tiny_encoder, *more[:-1], 3))
    assert ran.code == 0, ran.err
    assert_same(out, clean_small)


def test_what_was_finished_before_a_kill_is_not_done_again(source, clean, tiny_encoder, tmp_path):
    out = tmp_path / "db"
    killed_on_the_way(source, out, tiny_encoder, "embed", 4, 0.0, "--workers", 1)
    if "embed" in manifest_of(out)["stages"]:
        pytest.skip("the kill came after the stage")
    before = {path.name: path.stat().st_mtime_ns for path in (out / "embeddings").glob("[0-9]*")}
    assert len(before) >= 4
    assert again(source, out, tiny_encoder) == ("embed", "index", "neighbours", "training", "report")
    after = {path.name: path.stat().st_mtime_ns for path in (out / "embeddings").iterdir()}
    kept = [name for name, stamp in before.items() if after[name] == stamp]
    assert len(kept) >= 4
    assert_same(out, clean)


def test_a_shard_written_but_not_recorded_before_the_kill_does_not_exist(source, clean, tiny_encoder, database):
    """A half file under a temporary name, an unrecorded shard, and an unknown receipt folder are swept away."""
    manifest = manifest_of(database)
    del manifest["stages"]["training"], manifest["tables"]["training"]
    save_manifest(database, manifest)
    (database / "training" / ".tmp-00000.parquet-0123456789ab").write_bytes(b"half")
    (database / "training" / "00000.parquet").write_bytes(b"not what it should be")
    (database / "training" / "00099.parquet").write_bytes(b"of an earlier corpus")
    (database / ".build" / "training-0123456789abcdef").mkdir(parents=True)
    assert again(source, database, tiny_encoder) == ("training",)
    assert_same(database, clean)


# -- Ctrl-C, and a worker that dies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("module", ["retrodb.cli", "retrodb.config", "retrodb.pipelines.driver", "faiss"])
def test_interrupted_while_it_is_importing_it_exits_130_and_says_so(source, tmp_path, number, module):
    """However early: a signal arrives just when some module is being imported."""
    program = f"""
import builtins, os, sys
real = builtins.__import__
def importing(name, *rest, **more):
    if name == {module!r} and not done:
        done.append(name)
        os.kill(os.getpid(), {int(number)})
    return real(name, *rest, **more)
done = []
from retrodb.__main__ import main
builtins.__import__ = importing
sys.argv = ["retrodb", "build", {str(source)!r}, "--out", {str(tmp_path / "db")!r}]
main()
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert (ran.returncode, "interrupted" in ran.stderr, "Traceback" in ran.stderr) == (130, True, False), ran.stderr


def gone(processes: Callable[[], list[psutil.Process]]) -> bool:
    """Whether there are none within a few seconds: a worker that was just being started ends by itself."""
    end = time.monotonic() + 5
    while processes() and time.monotonic() < end:
        time.sleep(0.1)
    return not processes()


def group_of(leader: int) -> list[psutil.Process]:
    """Living processes of a group."""
    living = []
    for process in psutil.process_iter(["pid", "status"]):
        try:
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
        except (ProcessLookupError, psutil.Error):
            continue
    return living


def worker_processes(leader: int) -> list[psutil.Process]:
    found = []
    for process in group_of(leader):
        try:
            if WORKER_MODULE in process.cmdline() and process.ppid() != leader:  # the driver's own child forks them
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_one_worker_killed_alone_the_build_survives_or_fails_cleanly_and_resumes(
    source, clean_small, tiny_encoder, tmp_path
):
    more = (*SMALL, "--workers", 2)
    out = tmp_path / "db"
    running = Running.start(*arguments(source, out, tiny_encoder, *more))
    assert running.wait_for(lambda: len(worker_processes(running.process.pid)) == 2)
    time.sleep(0.5)
    worker_processes(running.process.pid)[0].kill()
    code = running.end(120)
    assert "Traceback" not in running.err
    assert gone(lambda: group_of(running.process.pid))
    if code != 0:
        assert code == 1
        assert "worker" in running.err
        ran = retrodb(*arguments(source, out, tiny_encoder, *more))
        assert ran.code == 0, ran.err
    assert_same(out, clean_small)


def test_workers_end_with_a_driver_that_was_killed_alone(source, tiny_encoder, tmp_path):
    """An orphan would go on writing into a database that someone else may be building by then."""
    more = (*SMALL, "--workers", 2)
    running = Running.start(*arguments(source, tmp_path / "db", tiny_encoder, *more))
    assert running.wait_for(lambda: len(worker_processes(running.process.pid)) == 2)
    os.kill(running.process.pid, signal.SIGKILL)
    running.process.wait(10)
    end = time.monotonic() + 15
    while (left := group_of(running.process.pid)) and time.monotonic() < end:
        time.sleep(0.2)
    running.signal_group(signal.SIGKILL)
    assert not left


# -- workers ---------------------------------------------------------------------------------------------------------


def test_worker_processes_in_every_stage_give_the_same_bytes(source, clean, tiny_encoder, tmp_path, monkeypatch):
    always_use_workers(monkeypatch)
    again(source, tmp_path / "db", tiny_encoder, workers=2)
    assert_same(tmp_path / "db", clean)


# -- nothing to do ---------------------------------------------------------------------------------------------------


def test_an_unchanged_re_run_by_the_command_line_touches_nothing(source, tiny_encoder, database):
    before = stamps(database)
    ran = retrodb(*arguments(source, database, tiny_encoder, "--json"))
    assert ran.code == 0, ran.err
    assert ran.json["done"] == []
    assert stamps(database) == before
    assert strays(database) == []


@pytest.mark.parametrize(
    "settings",
    [{"workers": 2}, {"device": "cpu"}, {"until": "embed"}, {"memory": "9GB"}, {"min_recall": 0.5}, {"seed": 9}],
    ids=str,
)
def test_settings_that_reach_no_byte_rebuild_nothing(source, tiny_encoder, database, settings):
    before = stamps(database)
    assert again(source, database, tiny_encoder, **settings) == ()
    assert stamps(database) == before


def test_an_input_that_was_touched_or_written_anew_with_the_same_bytes_rebuilds_nothing(source, tiny_encoder, tmp_path):
    own = tmp_path / "in.jsonl"
    shutil.copy(source, own)
    again(own, tmp_path / "db", tiny_encoder)
    before = stamps(tmp_path / "db")
    own.write_bytes(own.read_bytes())
    assert again(own, tmp_path / "db", tiny_encoder) == ()
    after = stamps(tmp_path / "db")
    for name in (MANIFEST_NAME, MANIFEST_COPY):
        del before[name], after[name]
    assert after == before
    assert strays(tmp_path / "db") == []


# -- something changed -----------------------------------------------------------------------------------------------


def untouched(before: dict[str, tuple[int, str]], after: dict[str, tuple[int, str]]) -> set[str]:
    """Tables whose every file is as it was."""
    return {
        table
        for table in TABLES
        if {n: s for n, s in before.items() if n.startswith(f"{table}/")}
        == {n: s for n, s in after.items() if n.startswith(f"{table}/")}
    }


CHANGES = [
    ({"training_neighbours": 1}, "training"),
    ({"neighbours": 10}, "neighbours"),
    ({"metric": "ip"}, "index"),
    ({"index_key": "IVF2,Flat"}, "index"),
    ({"precision": "bf16"}, "embed"),
    ({"chunk_tokens": 32}, "chunk"),
]


@pytest.mark.parametrize(("settings", "first"), CHANGES, ids=str)
def test_a_changed_setting_rebuilds_just_what_depends_on_it_and_changed_back_it_is_as_before(
    source, clean, tiny_encoder, database, tmp_path, settings, first
):
    expected = (
        (first,) if first == "training" else STAGES[STAGES.index(first) :]
    )  # the report is not made from training
    plan_before = stamps(database)
    assert planned(source, database, tiny_encoder, settings) == set(expected)
    assert stamps(database) == plan_before, "a dry run writes nothing"

    assert again(source, database, tiny_encoder, **settings) == expected
    kept = set(TABLES) - {TABLES[STAGES.index(stage)] for stage in expected}
    if first == "chunk":
        kept -= {"documents"}  # holds n_chunks
    assert untouched(plan_before, stamps(database)) >= kept
    assert strays(database) == []

    again(source, tmp_path / "alone", tiny_encoder, **settings)
    assert_same(database, tmp_path / "alone")
    again(source, database, tiny_encoder)
    assert_same(database, clean)


def test_dropping_the_text_embeds_nothing_anew(source, tiny_encoder, database):
    """The vectors depend on the chunks, not on whether the documents' text is kept."""
    before = stamps(database)
    assert again(source, database, tiny_encoder, text=False) == ("chunk",)
    assert untouched(before, stamps(database)) >= {"embeddings", "index", "neighbours", "training", "leakage"}
    assert strays(database) == []


def planned(source: Path, out: Path, encoder: Path, settings: dict[str, Any]) -> set[str]:
    """The stages that a dry run says it would do."""
    from retrodb.pipelines.plan import dry_run

    from retrodb.config import make_config
    from retrodb.corpus import expand_inputs
    from retrodb.storage import Storage

    fixed = {"workers": 1, "encoder": str(encoder), "shard_bytes": SHARD_BYTES, "precision": "fp32"}
    config, run = make_config({}, {**fixed, **settings})
    plan = dry_run(expand_inputs([str(source)]).files, Storage(str(out)), config, run)
    assert [stage["stage"] for stage in plan["stages"]] == list(STAGES)
    assert all(stage["why"] for stage in plan["stages"] if stage["action"] != "up to date")
    return {stage["stage"] for stage in plan["stages"] if stage["action"] != "up to date"}


def test_a_dry_run_leaves_validation_chunks_out_of_the_index_as_the_build_does(source, tiny_encoder, tmp_path):
    """There are too few vectors for the lists asked for, and the key is made as small as those that are indexed."""
    settings = {"validation_fraction": 0.4, "index_key": "IVF64,Flat", "chunk_tokens": 8, "sequence_tokens": 64}
    again(source, tmp_path, tiny_encoder, **settings)
    assert "IVF64" not in manifest_of(tmp_path)["stages"]["index"]["made_from"]["key"]
    assert planned(source, tmp_path, tiny_encoder, settings) == set()
    assert planned(source, tmp_path, tiny_encoder, {**settings, "neighbours": 5}) == {
        "neighbours",
        "training",
        "report",
    }
    assert again(source, tmp_path, tiny_encoder, **settings) == ()


def test_a_dry_run_by_the_command_line_writes_nothing_and_tells_the_plan(source, tiny_encoder, tmp_path, database):
    out = tmp_path / "nothing" / "here"
    ran = retrodb(*arguments(source, out, tiny_encoder, "--dry-run"))
    assert ran.code == 0, ran.err
    assert not out.parent.exists()
    for stage in STAGES:
        assert re.search(rf"\b{stage}\b", ran.out)
    assert "Flat" in ran.out
    assert "shards" in ran.out
    before = stamps(database)
    ran = retrodb(*arguments(source, database, tiny_encoder, "--dry-run", "--json", "--neighbours", 10))
    actions = {stage["stage"]: stage["action"] for stage in ran.json["stages"]}
    assert [stage for stage in STAGES if actions[stage] != "up to date"] == ["neighbours", "training", "report"]
    assert stamps(database) == before


def test_a_changed_encoder_embeds_anew(source, tiny_encoder, database, tmp_path):
    other = shutil.copytree(tiny_encoder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["layer_norm_eps"] = 1e-5
    (other / "config.json").write_text(json.dumps(config))
    assert again(source, database, other) == STAGES[3:]
    moved = shutil.copytree(other, tmp_path / "moved")
    assert again(source, database, moved) == (), "the same encoder in another folder is the same"


def test_a_changed_input_rebuilds_everything_and_changed_back_it_is_as_before(source, tiny_encoder, tmp_path):
    own, out = tmp_path / "in.jsonl", tmp_path / "db"
    shutil.copy(source, own)
    again(own, out, tiny_encoder)
    first = digests(out, TABLES)
    lines = own.read_text().splitlines()
    write_jsonl(own, [*lines[:12], '{"id": "new", "text": "one more document"}'])
    assert again(own, out, tiny_encoder) == STAGES
    assert strays(out) == []
    again(own, tmp_path / "alone", tiny_encoder)
    assert digests(out, TABLES) == digests(tmp_path / "alone", TABLES)
    shutil.copy(source, own)
    assert again(own, out, tiny_encoder) == STAGES
    assert digests(out, TABLES) == first
    assert strays(out) == []


def test_built_stage_by_stage_it_is_the_same_as_at_once(source, clean, tiny_encoder, tmp_path):
    out = tmp_path / "db"
    for stage in STAGES:
        assert again(source, out, tiny_encoder, until=stage) == (stage,)
        assert strays(out) == []
    assert_same(out, clean)


def test_a_then_b_half_way_then_a_again_equals_a_clean_a(source, clean, tiny_encoder, tmp_path):
    """Receipts of one setting must never vouch for shards that another has overwritten, not even of equal size."""
    out = tmp_path / "db"
    half_a = ("--workers", 1)
    half_b = (
        "--workers",
        1,
        "--precision",
        "bf16",
        "--neighbours",
        10,
        "--chunk-tokens",
        128,
        "--sequence-tokens",
        256,
    )
    killed_on_the_way(source, out, tiny_encoder, "neighbours", 4, 0.0, *half_a)
    killed_on_the_way(source, out, tiny_encoder, "neighbours", 3, 0.0, *half_b)
    assert again(source, out, tiny_encoder)
    assert_same(out, clean)


def test_shards_of_equal_size_under_other_settings_are_not_taken_for_finished(source, clean, tiny_encoder, tmp_path):
    """fp32 and bf16 vectors have files of one size: only what made them tells them apart."""
    out = tmp_path / "db"
    killed_on_the_way(source, out, tiny_encoder, "embed", 5, 0.0, "--workers", 1)
    killed_on_the_way(source, out, tiny_encoder, "embed", 3, 0.0, "--workers", 1, "--precision", "bf16")
    again(source, out, tiny_encoder)
    assert_same(out, clean)


# -- damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {"deleted": Path.unlink, "truncated": truncate, "flipped": flip}


@pytest.mark.parametrize(
    ("table", "damage"),
    [
        *(("chunks", damage) for damage in DAMAGES),
        ("documents", "flipped"),
        ("embeddings", "truncated"),
        ("index", "deleted"),
        ("neighbours", "flipped"),
        ("training", "truncated"),
        ("leakage", "flipped"),
        ("quarantine", "deleted"),
    ],
)
def test_any_one_damaged_shard_is_repaired_alone_and_the_bytes_are_the_same(
    source, clean, tiny_encoder, database, table, damage
):
    shards = manifest_of(database)["tables"][table]["shards"]
    path = database / shards[len(shards) // 2]["path"]
    before = stamps(database)
    DAMAGES[damage](path)
    done = again(source, database, tiny_encoder)
    assert done
    after = stamps(database)
    assert {name: digest for name, (_, digest) in after.items()} == {
        name: digest for name, (_, digest) in before.items()
    }
    rewritten = {name for name in after if after[name][0] != before[name][0]}
    number = path.stem
    together = {f"{some}/{number}.parquet" for some in ("documents", "chunks", "quarantine")}
    allowed = {str(path.relative_to(database))} | (
        together if table in ("documents", "chunks", "quarantine") else set()
    )
    assert rewritten <= allowed
    assert strays(database) == []


@pytest.mark.parametrize("damage", ["deleted", "flipped"])
def test_the_trained_quantiser_is_trained_again_to_the_same_bytes(source, tiny_encoder, database, damage):
    again(source, database, tiny_encoder, index_key="IVF2,Flat")
    before = digests(database, TABLES)
    DAMAGES[damage](database / "index" / "quantiser.faiss")
    assert again(source, database, tiny_encoder, index_key="IVF2,Flat") == ("index",)
    assert digests(database, TABLES) == before
    assert strays(database) == []


def test_a_tokenizer_kept_in_the_database_is_learnt_again_to_the_same_bytes(source, tiny_encoder, tmp_path):
    out = tmp_path / "db"
    again(source, out, tiny_encoder, tokenizer="train:300", until="chunk")
    before = stamps(out)
    flip(out / "tokenizer.json")
    again(source, out, tiny_encoder, tokenizer="train:300", until="chunk")
    assert {name: digest for name, (_, digest) in stamps(out).items()} == {name: d for name, (_, d) in before.items()}


def test_several_damaged_shards_of_several_tables_are_repaired_at_once(source, clean, tiny_encoder, database):
    flip(database / "chunks" / "00001.parquet")
    (database / "embeddings" / "00002.npy").unlink()
    truncate(database / "neighbours" / "00003.parquet")
    flip(database / "training" / "00000.parquet")
    truncate(database / "leakage" / "00005.parquet")
    (database / "documents" / "00004.parquet").unlink()
    assert planned(source, database, tiny_encoder, {}) >= {"chunk", "embed", "neighbours", "training", "report"}
    again(source, database, tiny_encoder)
    assert_same(database, clean)


def test_killed_while_repairing_it_is_repaired_by_the_next_run(source, clean, tiny_encoder, database):
    folder = database / "embeddings"
    lost = sorted(folder.iterdir())[:6]
    for path in lost:
        path.unlink()
    running = Running.start(*arguments(source, database, tiny_encoder, "--workers", 1))
    assert running.wait_for(lambda: any(path.exists() for path in lost))
    running.kill()
    again(source, database, tiny_encoder)
    assert_same(database, clean)


@pytest.mark.parametrize("table", ["documents", "chunks", "embeddings"])
def test_without_the_text_damage_is_repaired_from_the_source(source, tiny_encoder, tmp_path, table):
    out = tmp_path / "db"
    again(source, out, tiny_encoder, text=False)
    before = digests(out, TABLES)
    flip(out / manifest_of(out)["tables"][table]["shards"][2]["path"])
    again(source, out, tiny_encoder, text=False)
    assert digests(out, TABLES) == before
    assert strays(out) == []


@pytest.mark.parametrize(
    ("table", "stage"),
    [
        ("documents", "chunk"),
        ("chunks", "embed"),
        ("embeddings", "index"),
        ("index", "neighbours"),
        ("neighbours", "training"),
        ("chunks", "report"),
    ],
)
def test_what_is_damaged_while_a_stage_reads_it_goes_into_nothing(
    source, clean, tiny_encoder, tmp_path, monkeypatch, table, stage
):
    """A bit that flips once the build has begun, in bytes that decode all the same, and before they are read."""
    out, notes = tmp_path / "db", []

    def damage(self: Any, name: str, *rest: object) -> None:
        if name == stage and not notes:
            path = out / manifest_of(out)["tables"][table]["shards"][-1]["path"]
            if table == "embeddings":
                stored = np.load(path)
                stored[0, 0] += 1
                np.save(path, stored)
            else:
                flip(path)
            notes.append(f"flipped {path}")

    monkeypatch.setattr(Progress, "begin", damage)
    monkeypatch.setattr(Progress, "note", lambda self, text: notes.append(text))
    again(source, out, tiny_encoder)
    assert any("Repairing it, and going on" in note for note in notes)
    assert_same(out, clean)


def test_what_an_unfinished_stage_made_from_damaged_bytes_is_not_used(source, clean, tiny_encoder, tmp_path):
    out = tmp_path / "db"
    again(source, out, tiny_encoder, until="chunk")
    killed_on_the_way(source, out, tiny_encoder, "embed", 2, 0.0, "--workers", 1)
    for receipt in (out / ".build").glob("embed-*/*.json"):
        shard = json.loads(receipt.read_text())["shards"]["embeddings"]
        stored = np.load(out / shard["path"]) + np.float16(1)  # as if made from other text
        np.save(out / shard["path"], stored)
        digest = hashlib.sha256((out / shard["path"]).read_bytes()).hexdigest()
        receipt.write_text(receipt.read_text().replace(shard["sha256"], digest))
    flip(out / "chunks" / "00000.parquet")
    again(source, out, tiny_encoder)
    assert_same(out, clean)


def test_a_missing_report_or_a_deleted_table_folder_is_no_riddle(source, clean, tiny_encoder, database):
    shutil.rmtree(database / "neighbours")
    shutil.rmtree(database / "index")
    again(source, database, tiny_encoder)
    assert_same(database, clean)


# -- the manifest ----------------------------------------------------------------------------------------------------


def edit(path: Path) -> None:
    """As by hand: JSON that says something else, and keeps its checksum."""
    path.write_text(path.read_text(encoding="utf-8").replace('"seed": 0', '"seed": 1'), encoding="utf-8")


MANIFEST_DAMAGES = {**DAMAGES, "edited": edit}


@pytest.mark.parametrize("damage", MANIFEST_DAMAGES)
@pytest.mark.parametrize("name", [MANIFEST_NAME, MANIFEST_COPY])
def test_a_damaged_manifest_or_copy_is_written_anew_from_the_other_and_nothing_is_rebuilt(
    source, tiny_encoder, database, name, damage
):
    before = stamps(database)
    MANIFEST_DAMAGES[damage](database / name)
    assert again(source, database, tiny_encoder) == ()
    after = stamps(database)
    assert after.pop(name)[1] == before.pop(name)[1]
    assert after == before
    assert strays(database) == []


@pytest.mark.parametrize(("name", "other"), [(MANIFEST_NAME, MANIFEST_COPY), (MANIFEST_COPY, MANIFEST_NAME)])
def test_the_command_line_finds_an_edited_manifest_or_copy_and_says_that_it_was_written_anew(
    source, tiny_encoder, database, name, other
):
    edit(database / name)
    ran = retrodb("verify", database)
    assert ran.code == 4
    assert name in ran.err
    ran = retrodb(*arguments(source, database, tiny_encoder, "--json"))
    assert (ran.code, ran.json["done"]) == (0, []), ran.err
    assert f"{name} was damaged, missing or out of date: written anew from {other}" in " ".join(ran.err.split())
    assert retrodb("verify", database).code == 0


@pytest.mark.parametrize("damage", ["truncated", "flipped", "edited"])
@pytest.mark.parametrize("copy", MANIFEST_DAMAGES)
def test_a_manifest_that_is_damaged_like_its_copy_is_refused_and_left_alone(
    source, tiny_encoder, database, damage, copy
):
    MANIFEST_DAMAGES[damage](database / MANIFEST_NAME)
    MANIFEST_DAMAGES[copy](database / MANIFEST_COPY)
    before = stamps(database)
    with pytest.raises(DamagedError, match=r"manifest\.json.*copy.*Put a copy of manifest\.json back"):
        again(source, database, tiny_encoder)
    with pytest.raises(DamagedError):
        planned(source, database, tiny_encoder, {})
    assert stamps(database) == before


def test_without_a_whole_manifest_or_copy_the_command_line_exits_4(source, tiny_encoder, database):
    edit(database / MANIFEST_NAME)
    (database / MANIFEST_COPY).unlink()
    for more in ((), ("--dry-run",)):
        ran = retrodb(*arguments(source, database, tiny_encoder, *more))
        assert (ran.code, "Traceback" in ran.err) == (4, False)
        assert "delete the database and build it again" in " ".join(ran.err.split())


@pytest.mark.parametrize("damage", MANIFEST_DAMAGES)
def test_a_dry_run_plans_from_the_copy_and_writes_nothing(source, tiny_encoder, database, damage):
    MANIFEST_DAMAGES[damage](database / MANIFEST_NAME)
    before = stamps(database)
    assert planned(source, database, tiny_encoder, {}) == set()
    assert planned(source, database, tiny_encoder, {"neighbours": 10}) == {"neighbours", "training", "report"}
    assert stamps(database) == before


class KilledError(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("lost", [False, True], ids=["", "and the manifest is lost"])
def test_killed_between_a_manifest_and_its_copy_at_any_save_it_ends_as_an_undisturbed_build(
    source, clean, tiny_encoder, tmp_path, monkeypatch, lost
):
    """Also one that makes a setting's tables again, whose old ones leave the manifest before they leave the disk."""
    out, original = tmp_path / "db", Storage.commit_bytes
    saves = {"left": 0}

    def commit(self: Storage, relative: str, data: bytes) -> Any:
        if relative == MANIFEST_COPY:
            if not saves["left"]:
                raise KilledError
            saves["left"] -= 1
        return original(self, relative, data)

    for settings in ({}, {"neighbours": 10}, {}):
        kills = 0
        while True:
            saves["left"] = min(kills, 1)  # the copy that the kill before left behind is written anew first
            monkeypatch.setattr(Storage, "commit_bytes", commit)
            try:
                again(source, out, tiny_encoder, **settings)
                break
            except KilledError:
                kills += 1
                if lost:
                    (out / MANIFEST_NAME).unlink()
            finally:
                monkeypatch.undo()
        assert kills >= 2
        assert (out / MANIFEST_COPY).read_bytes() == (out / MANIFEST_NAME).read_bytes()
    assert_same(out, clean)


def test_what_a_kill_left_of_a_copy_is_swept_away(source, clean, tiny_encoder, database):
    (database / "reports" / ".tmp-manifest.json-0123456789ab").write_bytes(b"half")
    assert again(source, database, tiny_encoder) == ()
    assert_same(database, clean)


# -- the lock --------------------------------------------------------------------------------------------------------


def test_of_two_builds_at_once_the_second_exits_6_and_names_the_holder(source, clean, tiny_encoder, tmp_path):
    out = tmp_path / "db"
    first = Running.start(*arguments(source, out, tiny_encoder, "--workers", 1))
    assert first.wait_for(lambda: (out / ".lock").exists() and (out / ".lock").stat().st_size > 0)
    first.process.send_signal(signal.SIGSTOP)
    try:
        second = retrodb(*arguments(source, out, tiny_encoder))
    finally:
        first.process.send_signal(signal.SIGCONT)
    assert second.code == 6
    assert str(first.process.pid) in second.err
    assert socket.gethostname() in second.err
    assert "Traceback" not in second.err
    assert first.end() == 0, first.err
    assert_same(out, clean)


def test_a_lock_file_of_a_dead_process_is_taken_over(source, clean, tiny_encoder, tmp_path, database):
    dead = {"host": socket.gethostname(), "pid": 2**22 - 1, "since": "2020-01-01 00:00:00 +0000"}
    (database / ".lock").write_text(json.dumps(dead))
    assert again(source, database, tiny_encoder) == ()
    assert_same(database, clean)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / ".lock").write_text(json.dumps(dead))
    again(source, fresh, tiny_encoder)
    assert_same(fresh, clean)


def test_readers_see_no_table_that_does_not_fit_the_others_while_it_is_rebuilt(source, clean, tiny_encoder, database):
    """The tables that a change undoes leave the manifest before the first of their shards is overwritten."""
    more = ("--workers", 1, "--chunk-tokens", 32, "--sequence-tokens", 64)
    running = Running.start(*arguments(source, database, tiny_encoder, *more))
    assert running.wait_for(lambda: len(list(database.glob(".build/chunk-*/0*.json"))) >= 2)
    running.kill()
    tables = manifest_of(database)["tables"]
    assert not set(tables) & {"embeddings", "index", "neighbours", "training", "leakage"}
    ran = retrodb("query", database, "words")
    assert ran.code == 3
    assert "build" in ran.err
    again(source, database, tiny_encoder)
    assert_same(database, clean)


def test_the_same_corpus_and_settings_give_the_same_bytes_in_another_folder(source, clean, tmp_path):
    """Nothing of the place, the time or the process is in a table: not even with an encoder made anew."""
    encoder = make_tiny_encoder(tmp_path / "encoder")
    again(source, tmp_path / "elsewhere" / "db", encoder)
    assert digests(tmp_path / "elsewhere" / "db", DATA_TABLES) == digests(clean, DATA_TABLES)


def test_a_learnt_tokenizer_that_was_damaged_is_learnt_again_and_that_is_said(source, tiny_encoder, tmp_path):
    out = tmp_path / "db"
    again(source, out, tiny_encoder, tokenizer="train:300")
    learnt = (out / "tokenizer.json").read_bytes()
    (out / "tokenizer.json").write_text("{}")
    assert again(source, out, tiny_encoder, tokenizer="train:300") == ("chunk",)
    assert (out / "tokenizer.json").read_bytes() == learnt
    assert again(source, out, tiny_encoder, tokenizer="train:300") == ()


def test_no_file_of_earlier_settings_stays_beside_the_tables(source, tiny_encoder, tmp_path):
    out = tmp_path / "db"
    again(source, out, tiny_encoder, tokenizer="train:300")
    assert (out / "reports" / "recall.json").exists()
    assert (out / "reports" / "leakage.json").exists()
    again(source, out, tiny_encoder, until="chunk")
    assert not (out / "tokenizer.json").exists()
    assert not (out / "reports" / "recall.json").exists()
    assert not (out / "reports" / "leakage.json").exists()
