"""Versions of a database: refreshed beside the readers, published by one pointer, retired when nobody reads them.

The labels R1 to R7 are those of the requirements of REALM mode.
"""

import contextlib
import gc
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from retrodb.pipelines.holding import held
from support import (
    Progress,
    Running,
    build_here,
    collected,
    make_tiny_encoder,
    manifest_of,
    retrodb,
    save_manifest,
    stamps,
    strays,
    table_of,
)

import retrodb as package
from retrodb.config import RunSettings
from retrodb.corpus.quickstart import quickstart_lines
from retrodb.database import Database
from retrodb.errors import (
    DamagedError,
    EncoderError,
    InputError,
    LockedError,
    MismatchError,
    RecallError,
    UsageError,
    WorkerError,
)
from retrodb.lock import writer_lock
from retrodb.manifest import Manifest
from retrodb.quality.verify import verify_database
from retrodb.refreshing import Follower, Schedule, Staleness, StalenessLimit
from retrodb.storage import Storage
from retrodb.versions import load_version, publish, switch

QUERY = "how are names bound"
TABLES_OF_A_VERSION = ("embeddings", "neighbours", "training", "leakage")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five encoders: what a trainer exports, one after the other."""
    folder = tmp_path_factory.mktemp("exports")
    return [make_tiny_encoder(folder / f"step-{step}", seed=step) for step in range(5)]


@pytest.fixture(scope="module")
def topics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text: four topics of the Python language reference."""
    lines = [line for line in quickstart_lines() if 2_000 < len(line) < 8_000][:4]
    path = tmp_path_factory.mktemp("corpus") / "topics.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def first(topics: Path, encoders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of one version. Do not change it."""
    out = tmp_path_factory.mktemp("db") / "db"
    build_here([topics], out, encoder=str(encoders[0]), shard_bytes="8KiB")
    return out


@pytest.fixture
def database(first: Path, tmp_path: Path) -> Path:
    """A copy of `first` to be changed."""
    shutil.copytree(first, tmp_path / "db")
    return tmp_path / "db"


def refreshed(database: Path, encoder: Path, step: int | None = None) -> int:
    """Refresh in this process; the current version's id."""
    from retrodb.pipelines.refresh import refresh

    return refresh(Storage(str(database)), str(encoder), RunSettings(workers=1), Progress(), step).version


def answers(db: Database) -> list[tuple[int, float]]:
    return [(hit.chunk_id, hit.distance) for hit in db.search(QUERY, k=5)]


def problems(database: Path, version: int | None = None) -> list[str]:
    return [found.path for found in verify_database(package.open(str(database), version=version), 1.0).problems]


# -- R1, R2, R6, R7: refresh -------------------------------------------------------------------------------------------


def test_refresh_R1_readers_keep_their_answers_while_a_version_is_made_beside_theirs(
    database: Path, encoders: list[Path]
) -> None:
    reader = package.open(str(database))
    before, neighbours = answers(reader), reader.neighbours(0)
    seen = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.append((answers(reader), reader.neighbours(0)))

    thread = threading.Thread(target=read)
    thread.start()
    assert refreshed(database, encoders[1]) == 2
    done.set()
    thread.join()
    assert len(seen) > 1
    assert all(one == (before, neighbours) for one in seen)
    assert answers(reader) == before  # and after the switch, with nothing cached
    assert reader.embeddings(0).tobytes() == package.open(str(database), version=1).embeddings(0).tobytes()
    assert answers(package.open(str(database))) != before


def test_refresh_R1_a_version_is_what_a_build_with_that_encoder_would_be(
    database: Path, topics: Path, encoders: list[Path], tmp_path: Path
) -> None:
    text = {table: stamps(database / table) for table in ("documents", "chunks", "duplicates", "quarantine")}
    refreshed(database, encoders[1])
    build_here([topics], tmp_path / "other", encoder=str(encoders[1]), shard_bytes="8KiB")
    for table in TABLES_OF_A_VERSION:
        if table != "embeddings":
            assert table_of(database, table).equals(table_of(tmp_path / "other", table)), table
        assert {shard["path"].split("/")[0] for shard in manifest_of(database)["tables"][table]["shards"]} == {
            "versions"
        }
    assert text == {table: stamps(database / table) for table in text}, "the text is every version's"
    assert problems(database) == problems(database, version=1) == []


def test_publish_R2_a_version_records_what_it_is(database: Path, encoders: list[Path]) -> None:
    refreshed(database, encoders[1], step=500)
    manifest = manifest_of(database)
    version = manifest["version"]
    assert (version["id"], version["parent"], version["made_by"], version["step"]) == (2, 1, "refresh", 500)
    rows = sum(shard["rows"] for shard in manifest["tables"]["chunks"]["shards"])
    facts = version["facts"]
    assert (facts["metric"], facts["dim"], facts["dtype"], facts["rows"]) == ("l2", 32, "float16", rows)
    assert facts["encoder"] == manifest["fingerprints"]["encoder"]["fingerprint"]
    kept = {entry["version"]["id"]: entry["version"] for entry in manifest["versions"]}
    assert set(kept) == {1, 2}
    assert kept[1]["facts"]["corpus"] == facts["corpus"], "the same text"
    assert kept[1]["facts"]["encoder"] != facts["encoder"]
    assert kept[1]["created"] <= kept[2]["created"]


def test_build_R2_the_first_version_records_what_it_is_when_it_is_finished(
    database: Path, topics: Path, encoders: list[Path]
) -> None:
    from retrodb.pipelines.swap import swap_back

    first = manifest_of(database)
    assert first["version"] == {
        "id": 1,
        "parent": None,
        "made_by": "build",
        "step": None,
        "created": None,
        "facts": {
            "corpus": first["version"]["facts"]["corpus"],
            "encoder": first["fingerprints"]["encoder"]["fingerprint"],
            "metric": "l2",
            "dim": 32,
            "dtype": "float16",
            "rows": sum(shard["rows"] for shard in first["tables"]["chunks"]["shards"]),
        },
    }
    before = stamps(database)
    build_here([topics], database, encoder=str(encoders[0]), shard_bytes="8KiB")
    assert stamps(database) == before, "the same build again changes nothing"
    refreshed(database, encoders[1])
    assert manifest_of(database)["versions"][0]["version"]["facts"] == first["version"]["facts"]
    swap_back(Storage(str(database)), 1, Progress())
    assert manifest_of(database)["version"] == first["version"]
    assert problems(database) == []


def test_build_R2_an_unfinished_first_version_records_nothing_of_its_vectors(
    database: Path, topics: Path, encoders: list[Path]
) -> None:
    build_here([topics], database, encoder=str(encoders[1]), shard_bytes="8KiB", until="embed")
    assert manifest_of(database)["version"]["facts"] == {}
    build_here([topics], database, encoder=str(encoders[1]), shard_bytes="8KiB")
    manifest = manifest_of(database)
    assert manifest["version"]["facts"]["encoder"] == manifest["fingerprints"]["encoder"]["fingerprint"]


def test_publish_R2_a_version_without_a_vector_for_each_chunk_is_never_published(
    database: Path, encoders: list[Path]
) -> None:
    refreshed(database, encoders[1])
    storage = Storage(str(database))
    whole = Manifest.load_whole(storage)
    assert whole is not None
    short = whole.tables["embeddings"][1:]
    broken = replace(
        whole, tables={**whole.tables, "embeddings": short}, version=replace(whole.version, id=3), versions=()
    )
    with pytest.raises(DamagedError, match=r"vectors for .* chunks: this version is not published"):
        publish(storage, whole, broken, None)
    assert manifest_of(database)["version"]["id"] == 2


def test_refresh_R6_the_same_encoder_is_nothing_to_do(database: Path, encoders: list[Path]) -> None:
    before = stamps(database)
    assert refreshed(database, encoders[0], step=7) == 1
    assert stamps(database) == before
    refreshed(database, encoders[1])
    before = stamps(database)
    assert refreshed(database, encoders[1]) == 2
    assert stamps(database) == before


def test_refresh_R6_the_same_encoder_at_another_place_is_found_there_from_then_on(
    database: Path, topics: Path, encoders: list[Path], tmp_path: Path
) -> None:
    from retrodb.pipelines.add import add
    from retrodb.pipelines.swap import swap

    from retrodb.corpus import expand_inputs

    more = tmp_path / "more.jsonl"
    more.write_text([line for line in quickstart_lines() if 2_000 < len(line) < 8_000][4] + "\n")
    storage, run, listing = Storage(str(database)), RunSettings(workers=1), expand_inputs([str(more)])
    home = tmp_path / "home"
    for number, encoder in ((1, encoders[0]), (2, encoders[1])):
        if number == 2:
            refreshed(database, encoder)
        home = Path(shutil.copytree(encoder, tmp_path / f"home-{number}"))
        assert refreshed(database, home) == number, "no new version"
        assert manifest_of(database)["config"]["encoder"] == str(home)
        assert problems(database) == []
        before = stamps(database)
        assert refreshed(database, home) == number
        assert stamps(database) == before
    moved = home.rename(tmp_path / "moved")
    remedy = re.escape(f"`retrodb refresh {database} --encoder PLACE` records that")
    for act in (lambda: add(storage, listing.files, run, Progress()), lambda: swap(storage, listing, run, Progress())):
        with pytest.raises(InputError, match=rf"no encoder '{home}'.*{remedy}"):
            act()
    ran = retrodb("refresh", database, "--encoder", moved, "--json")
    assert (ran.json["version"], f"found at {moved} from now on" in ran.err) == (2, True), ran.err
    assert package.open(str(database)).search(QUERY, k=1), "what embeds queries finds it, too"
    assert add(storage, listing.files, run, Progress()).version == 3
    assert problems(database) == []


def test_refresh_R7_answers_carry_the_version(database: Path, encoders: list[Path]) -> None:
    refreshed(database, encoders[1])
    assert package.open(str(database)).version == 2
    for version, flags in ((2, ()), (1, ("--version", 1))):
        assert retrodb("query", database, QUERY, "--json", *flags).json["version"] == version
        assert retrodb("show", database, 0, "--json", *flags).json["version"] == version
        info = retrodb("info", database, "--json", *flags).json
        assert info["version"]["id"] == version
    ran = retrodb("query", database, QUERY, "--version", 9)
    assert ran.code == 3
    assert "has no version 9; there are: 1, 2 (current: 2)" in ran.err


def test_every_command_that_reads_takes_a_version(database: Path, encoders: list[Path], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from retrodb.cli import app

    refreshed(database, encoders[1])
    runner, db = CliRunner(), str(database)
    out, model = ["--out", str(tmp_path / "out")], ["--checkpoint", "ckpt"]
    for command in (
        ["train", db, *out],
        ["retrofit", db, "--base", "base", *out],
        ["evaluate", db, *model],
        ["generate", db, "text", *model],
        ["evaluate-retrieval", db, "questions.jsonl"],
        ["finetune-qa", db, "questions.jsonl", *out],
        ["export", db, "--to", "huggingface", *out],
        ["verify", db],
    ):
        ran = runner.invoke(app, [*command, "--version", "9"])
        assert isinstance(ran.exception, InputError), (command, ran.output)
        assert "has no version 9; there are: 1, 2 (current: 2)" in str(ran.exception)
    for version in (1, 2):
        ran = runner.invoke(
            app, ["export", db, "--to", "huggingface", "--out", str(tmp_path / f"{version}"), "--version", str(version)]
        )
        assert ran.exit_code == 0, ran.output
        rows = pq.read_table(tmp_path / f"{version}" / "neighbours")["neighbour_ids"].to_pylist()
        expected = package.open(db, version=version).neighbours(0)
        assert [found for found in rows[0] if found is not None] == [one.chunk_id for one in expected]


def test_a_refresh_of_what_is_no_finished_database_is_refused(
    topics: Path, encoders: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="is not a retrodb database"):
        refreshed(tmp_path / "nothing", encoders[1])
    build_here([topics], tmp_path / "db", encoder=str(encoders[0]), until="chunk")
    with pytest.raises(InputError, match="is not finished: run its build to the end"):
        refreshed(tmp_path / "db", encoders[1])


def test_a_refresh_from_damaged_text_is_refused_and_publishes_nothing(database: Path, encoders: list[Path]) -> None:
    path = database / manifest_of(database)["tables"]["chunks"]["shards"][0]["path"]
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(DamagedError, match=r"chunks/00000\.parquet .*damaged"):
        refreshed(database, encoders[1])
    assert manifest_of(database)["version"]["id"] == 1


def test_a_refresh_to_no_encoder_leaves_the_database_as_it_was(database: Path, tmp_path: Path) -> None:
    before = stamps(database)
    (tmp_path / "empty").mkdir()
    for encoder in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(InputError):
            refreshed(database, encoder)
    assert stamps(database) == before


def test_another_process_building_is_named(database: Path, encoders: list[Path]) -> None:
    with writer_lock(Storage(str(database))), pytest.raises(LockedError):
        refreshed(database, encoders[1])


def test_a_build_over_several_versions_is_refused(database: Path, topics: Path, encoders: list[Path]) -> None:
    refreshed(database, encoders[1])
    before = stamps(database)
    with pytest.raises(InputError, match=r"has had several versions \(current: 2, made by refresh\)"):
        build_here([topics], database, encoder=str(encoders[0]), shard_bytes="8KiB")
    assert stamps(database) == before


def test_an_earlier_version_is_current_again_by_one_pointer(database: Path, encoders: list[Path]) -> None:
    before = answers(package.open(str(database)))
    refreshed(database, encoders[1])
    after = answers(package.open(str(database)))
    storage = Storage(str(database))
    for version, expected in ((1, before), (2, after), (1, before)):
        with held(storage, Progress()) as current:
            switch(storage, current, version)
        db = package.open(str(database))
        assert (db.version, answers(db)) == (version, expected)
        assert problems(database) == []
    assert refreshed(database, encoders[2]) == 3, "an id is never used again"


# -- R3: killed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["embeddings", "index", "neighbours", "training", "manifest"])
def test_publish_R3_killed_leaves_one_version(database: Path, encoders: list[Path], moment: str) -> None:
    before = answers(package.open(str(database)))
    running = Running.start("refresh", database, "--encoder", encoders[1], "--workers", 1)
    folder = database / "versions" / "2"
    places = {"manifest": database / "versions" / "1", "index": folder / "index"}
    running.wait_for(places.get(moment, folder / moment).exists)
    running.kill()
    db = package.open(str(database))
    assert db.version in (1, 2)
    if db.version == 1:
        assert answers(db) == before
    assert problems(database) == []
    ran = retrodb("refresh", database, "--encoder", encoders[1], "--json")
    assert ran.code == 0, ran.err
    assert ran.json["version"] == 2
    assert problems(database) == []
    assert [name for name in strays(database) if not name.endswith("manifest.json")] == leftovers_of_first(database)
    assert not (folder / ".build").exists()


def test_publish_R3_what_a_writer_killed_after_its_pointer_left_is_removed(
    database: Path, encoders: list[Path]
) -> None:
    shutil.copy(database / "manifest.json", database / "before.json")
    refreshed(database, encoders[1])
    published = manifest_of(database)
    (database / "before.json").rename(database / "reports/manifest.json")  # killed before the copy was written
    begun = [database / ".tmp-manifest.json-0", database / "reports/.tmp-manifest.json-0"]
    for path in begun:
        path.write_bytes(b"{")
    refreshed(database, encoders[1])
    assert [path for path in begun if path.exists()] == []
    assert manifest_of(database) == published == json.loads((database / "reports/manifest.json").read_bytes())


def leftovers_of_first(database: Path) -> list[str]:
    """What the first version still has, and the second names no more."""
    first = json.loads((database / "versions/1/manifest.json").read_text(encoding="utf-8"))
    named = {shard["path"] for table in manifest_of(database)["tables"].values() for shard in table["shards"]}
    own = {shard["path"] for table in first["tables"].values() for shard in table["shards"]}
    reports = {str(p.relative_to(database)) for p in (database / "versions").rglob("reports/*.json")}
    return sorted((own - named) | {path for path in reports if not path.endswith("manifest.json")})


def test_refresh_R3_what_a_killed_refresh_to_another_encoder_left_is_not_taken(
    database: Path, encoders: list[Path], tmp_path: Path
) -> None:
    shutil.copytree(database, tmp_path / "same")
    running = Running.start("refresh", database, "--encoder", encoders[1], "--workers", 1)
    running.wait_for((database / "versions/2/neighbours").exists)
    running.kill()
    assert manifest_of(database)["version"]["id"] == 1
    refreshed(database, encoders[2])
    refreshed(tmp_path / "same", encoders[2])
    for table in ("neighbours", "training"):
        assert table_of(database, table).equals(table_of(tmp_path / "same", table))
    assert problems(database) == []


def test_refresh_R3_a_killed_refresh_goes_on_from_what_it_had(database: Path, encoders: list[Path]) -> None:
    running = Running.start("refresh", database, "--encoder", encoders[1], "--workers", 1)
    running.wait_for((database / "versions/2/index").exists)
    running.kill()
    vectors = stamps(database / "versions/2/embeddings")
    assert refreshed(database, encoders[1]) == 2
    assert stamps(database / "versions/2/embeddings") == vectors


# -- R4: retired -------------------------------------------------------------------------------------------------------


def test_collect_R4_the_newest_three_and_those_in_use_stay(database: Path, encoders: list[Path]) -> None:
    storage = Storage(str(database))
    reader = package.open(str(database))
    before = answers(reader)
    for encoder in encoders[1:]:
        refreshed(database, encoder)
    done = collected(storage)
    assert (done.retired, done.in_use) == ((2,), (1,))
    assert not (database / "versions/2").exists()
    del reader.__dict__["_searcher"]  # nothing kept in memory: all is read anew
    assert answers(reader) == before
    assert problems(database) == []
    reader.close()
    assert collected(storage).retired == (1,)
    assert not (database / "embeddings").exists() or not list((database / "embeddings").iterdir())
    assert [entry["version"]["id"] for entry in manifest_of(database)["versions"]] == [3, 4, 5]
    for version in (3, 4, 5):
        assert problems(database, version=version) == []
    with pytest.raises(InputError, match="has no version 1; there are: 3, 4, 5"):
        package.open(str(database), version=1)
    assert collected(storage) == type(done)((), (), 0, 0), "a second time there is nothing to do"


def test_collect_R4_a_reader_of_the_first_version_holds_it_though_its_manifest_is_written_anew(
    database: Path, encoders: list[Path]
) -> None:
    """As by spans that are drawn, or by an encoder that moved."""
    reader = package.open(str(database))
    moved = shutil.copytree(encoders[0], database.parent / "moved")
    refreshed(database, moved)
    assert manifest_of(database)["config"]["encoder"] == str(moved)
    before = answers(reader)
    for encoder in encoders[1:]:
        refreshed(database, encoder)
    assert collected(Storage(str(database))).in_use == (1,)
    del reader.__dict__["_searcher"]
    assert answers(reader) == before
    reader.close()
    assert collected(Storage(str(database))).retired == (1,)


def test_collect_R4_a_reader_that_is_dropped_holds_its_version_no_longer(database: Path, encoders: list[Path]) -> None:
    """Also one that nobody closed, as a follower's of the version before: at once, whenever the collector comes."""
    gc.disable()
    try:
        reader = package.open(str(database))
        hit = reader.search(QUERY, k=1)[0]
        assert reader.chunk(hit.chunk_id).text
        assert next(reader.chunks()).num_rows
        for encoder in encoders[1:]:
            refreshed(database, encoder)
        assert collected(Storage(str(database))).in_use == (1,)
        del reader
        assert collected(Storage(str(database))).retired == (1,)
    finally:
        gc.enable()


def test_collect_R4_a_reader_in_another_process_holds_its_version(database: Path, encoders: list[Path]) -> None:
    code = (
        "import retrodb, sys; db = retrodb.open(sys.argv[1]); print(db.version, flush=True); sys.stdin.read(); "
        f"print([hit.chunk_id for hit in db.search({QUERY!r}, k=5)])"
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", code, str(database)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == "1\n"
    expected = [chunk_id for chunk_id, _ in answers(package.open(str(database)))]
    for encoder in encoders[1:]:
        refreshed(database, encoder)
    ran = retrodb("gc", database, "--json")
    assert ran.json["in_use"] == [1]
    out, _ = reader.communicate("\n", timeout=60)
    assert json.loads(out) == expected
    assert retrodb("gc", database, "--json").json["retired"] == [1]


def test_collect_R4_the_current_version_stays_however_old_it_is(database: Path, encoders: list[Path]) -> None:
    before = answers(package.open(str(database)))
    for encoder in encoders[1:]:
        refreshed(database, encoder)
    storage = Storage(str(database))
    with held(storage, Progress()) as current:
        switch(storage, current, 1)
    done = collected(storage)
    assert (done.retired, done.in_use) == ((2,), ())
    assert answers(package.open(str(database))) == before
    assert problems(database) == []


def test_collect_R4_on_an_object_store_a_version_stays_for_a_day_after_it_was_replaced(
    database: Path, encoders: list[Path]
) -> None:
    """Nobody can tell there who still reads."""
    for encoder in encoders[1:]:
        refreshed(database, encoder)
    url = f"memory://{database.parent.name}/db"
    fsspec.filesystem("memory").put(str(database), url, recursive=True)
    storage = Storage(url)
    assert (collected(storage).retired, collected(storage).in_use) == ((), (1, 2))
    assert collected(storage, grace=0).retired == (1, 2)
    assert load_version(storage, 3) is not None


def test_collect_R4_fewer_than_three_cannot_be_asked_for(database: Path) -> None:
    with pytest.raises(InputError, match="the newest 3 versions are always kept"):
        collected(Storage(str(database)), keep=2)
    assert retrodb("gc", database, "--keep", 2).code == 2


def test_collect_R4_what_a_killed_collection_left_goes_with_the_next(database: Path, encoders: list[Path]) -> None:
    for encoder in encoders[1:]:
        refreshed(database, encoder)
    storage = Storage(str(database))
    kept = shutil.copytree(database / "versions/2", database.parent / "aside")
    collected(storage)
    shutil.copytree(kept, database / "versions/2", dirs_exist_ok=True)
    assert collected(storage, dry_run=True).files > 0
    assert (database / "versions/2").exists()
    collected(storage)
    assert not list((database / "versions/2").rglob("*.npy"))


def test_collect_R4_a_version_whose_manifest_is_lost_is_put_back_or_given_up(
    database: Path, encoders: list[Path]
) -> None:
    """Which files it named nobody knows: they stay until either is done."""
    for encoder in encoders[1:3]:
        refreshed(database, encoder)
    storage, path = Storage(str(database)), database / "versions/2/manifest.json"
    path.rename(path.with_suffix(".aside"))
    before = stamps(database)
    remedy = rf"version 2 cannot be opened\. Put it back .*`retrodb gc {re.escape(str(database))} --forget` gives it up"
    for refused in (lambda: collected(storage), lambda: package.open(str(database), version=2)):
        with pytest.raises(DamagedError, match=remedy):
            refused()
    assert stamps(database) == before
    path.with_suffix(".aside").rename(path)
    assert collected(storage).retired == ()
    path.unlink()
    assert collected(storage, forget=True).retired == (2,)
    assert not (database / "versions/2").exists()
    assert collected(storage).retired == ()
    assert problems(database) == problems(database, version=1) == []


def test_collect_R4_what_a_killed_writer_of_manifests_had_begun_goes(database: Path, encoders: list[Path]) -> None:
    begun = [database / folder / ".tmp-manifest.json-0123456789ab" for folder in (".", "reports")]
    others = (
        database / "reports" / ".tmp-damage.json-0123456789ab"
    )  # a verification may be writing it: it locks nothing
    for path in (*begun, others):
        path.write_bytes(b"{")
    collected(Storage(str(database)), dry_run=True)
    assert all(path.exists() for path in begun)
    collected(Storage(str(database)))
    assert ([path.exists() for path in begun], others.exists()) == ([False, False], True)
    begun[1].write_bytes(b"{")
    refreshed(database, encoders[1])
    assert not begun[1].exists()


def test_a_retired_version_is_refused_in_words_not_mixed(database: Path, encoders: list[Path]) -> None:
    reader = package.open(str(database))
    reader.close()
    for encoder in encoders[1:]:
        refreshed(database, encoder)
    assert collected(Storage(str(database))).retired == (1, 2)
    with pytest.raises((MismatchError, DamagedError)):
        reader.embeddings(0)


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [1, 2])
def test_verify_names_a_damaged_shard_of_any_version(database: Path, encoders: list[Path], of: int) -> None:
    refreshed(database, encoders[1])
    own = json.loads((database / f"versions/{of}/manifest.json").read_text(encoding="utf-8"))
    path = own["tables"]["embeddings"]["shards"][0]["path"]
    data = bytearray((database / path).read_bytes())
    data[-1] ^= 1
    (database / path).write_bytes(data)
    assert problems(database) == [path]


def test_verify_names_a_version_whose_manifest_is_not_what_was_published(database: Path, encoders: list[Path]) -> None:
    refreshed(database, encoders[1])
    path = database / "versions/1/manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"shard_bytes"', b'"shard_bytez"'))
    assert "versions/1/manifest.json" in problems(database)
    with pytest.raises(DamagedError):
        switch(Storage(str(database)), package.open(str(database)).manifest, 1)
    path.unlink()
    assert "versions/1/manifest.json" in problems(database)


def test_a_manifest_that_numbers_versions_by_nonsense_is_damaged_not_a_traceback(
    database: Path, encoders: list[Path]
) -> None:
    refreshed(database, encoders[1])
    whole = manifest_of(database)
    for nonsense in ({"id": "x"}, {"id": -1}, {"id": None}, [], "2", {"id": 2, "facts": []}, {"unknown": 1}):
        save_manifest(database, {**whole, "version": nonsense})
        with pytest.raises(DamagedError):
            package.open(str(database))
    save_manifest(database, {**whole, "versions": [{"version": {"id": 1}, "bytes": "x", "sha256": 1}]})
    with pytest.raises(DamagedError):
        package.open(str(database))


# -- R5: following a trainer -------------------------------------------------------------------------------------------


def test_schedule_R5_says_at_which_steps_a_refresh_is_due() -> None:
    schedule = Schedule.parse("0-2000:500,3000-:1000")
    assert schedule.is_due(0, None)
    assert schedule.is_due(500, 0)
    assert not schedule.is_due(499, 0)
    assert not schedule.is_due(2500, 1500), "in a gap nothing is due"
    assert not schedule.is_due(3000, 2001)
    assert schedule.is_due(3001, 2001)
    for wrong in ("", "500", "0-100", "0-100:0", "100-50:5", "0-:5,10-:5", "a-b:c"):
        with pytest.raises(UsageError, match="--schedule"):
            Schedule.parse(wrong)


def test_staleness_R5_is_told_in_steps_and_in_seconds() -> None:
    assert StalenessLimit.parse("1500") == StalenessLimit.parse("1500steps") == StalenessLimit(1500, None)
    assert StalenessLimit.parse("10m") == StalenessLimit(None, 600.0)
    assert StalenessLimit.parse("2000,1.5h") == StalenessLimit(2000, 5400.0)
    assert StalenessLimit(10, None).is_passed(Staleness(11, 0.0))
    assert not StalenessLimit(10, 60.0).is_passed(Staleness(10, 60.0))
    assert StalenessLimit(None, 60.0).is_passed(Staleness(0, 61.0))
    for wrong in ("", "x", "1.5steps", "-3", "5 parsecs"):
        with pytest.raises(UsageError, match="--max-staleness"):
            StalenessLimit.parse(wrong)


def export(folder: Path, encoder: Path, step: int) -> None:
    """As a trainer does it: written elsewhere, then named."""
    folder.mkdir(exist_ok=True)
    shutil.copytree(encoder, folder / f".writing-{step}")
    (folder / f".writing-{step}").rename(folder / f"step-{step:06d}")


def watch(database: Path, folder: Path, **settings: object) -> tuple[list[int], list[str]]:
    """Follow `folder` in this process; the versions that were published, and what was said."""
    from retrodb.pipelines.watch import Watch, WatchSettings

    progress = Progress()
    watching = Watch(
        Storage(str(database)), WatchSettings(str(folder), poll=0.05, **settings), RunSettings(workers=1), progress
    )
    watching.run()
    return watching.published, progress.lines


def test_watch_R5_another_runs_steps_say_nothing_of_this_one(
    database: Path, encoders: list[Path], tmp_path: Path
) -> None:
    """A second training begins at step 0 again, on a database that the first one left at its last."""
    for run, encoder in (("a", encoders[1]), ("b", encoders[2])):
        export(tmp_path / run, encoder, 0)
        export(tmp_path / run, encoders[3] if run == "a" else encoders[4], 900 if run == "a" else 40)
        (tmp_path / run / "done").touch()
    assert watch(database, tmp_path / "a")[0] == [2]
    assert watch(database, tmp_path / "b")[0] == [3]
    db = package.open(str(database))
    assert (db.manifest.version.step, db.manifest.config["encoder"]) == (40, str(tmp_path / "b" / "step-000040"))
    assert watch(database, tmp_path / "b")[0] == [], "and goes on where it is"


def test_watch_R5_starts_with_no_export_sleeps_publishes_and_ends_on_the_done_marker(
    database: Path, encoders: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "exports"
    running = Running.start("refresh", database, "--watch", folder, "--poll", 0.1, "--workers", 1)
    time.sleep(3)
    assert running.process.poll() is None, running.err
    export(folder, encoders[1], 100)
    assert running.wait_for(lambda: manifest_of(database)["version"]["id"] == 2)
    (folder / ".writing-200").mkdir()  # an export under way is none
    export(folder, encoders[2], 300)
    assert running.wait_for(lambda: manifest_of(database)["version"]["id"] == 3)
    (folder / "done").touch()
    assert running.end() == 0, running.err
    assert [e["version"]["step"] for e in manifest_of(database)["versions"]] == [None, 100, 300]
    status = json.loads((folder / "refresher.json").read_text(encoding="utf-8"))
    assert (status["version"], status["step"], status["staleness"]["steps"]) == (3, 300, 0)


def test_watch_R5_an_export_of_the_same_weights_counts_as_long_as_they_are_published(
    database: Path, encoders: list[Path], tmp_path: Path
) -> None:
    """Someone goes back to a version of other weights: what is published is no longer of that step."""
    from retrodb.pipelines.watch import Watch, WatchSettings

    folder, storage, seen = tmp_path / "exports", Storage(str(database)), []
    export(folder, encoders[1], 100)

    def sleep(_: float) -> None:
        seen.append(json.loads((folder / "refresher.json").read_text(encoding="utf-8")))
        if len(seen) == 1:
            export(folder, encoders[1], 200)
        elif len(seen) == 2:
            switch(storage, Manifest.load(storage), 1)
        else:
            (folder / "done").touch()

    watching = Watch(storage, WatchSettings(str(folder), poll=60.0), RunSettings(workers=1), Progress(), sleep)
    watching.run()
    assert [(each["version"], each["step"]) for each in seen] == [(2, 100), (2, 200), (3, 200)]
    assert watching.published == [2, 3]


def test_watch_R5_takes_the_newest_that_is_due_and_the_last_one_always(
    database: Path, encoders: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "exports"
    for step, encoder in zip((100, 500, 900), encoders[1:], strict=False):
        export(folder, encoder, step)
    (folder / "done").touch()
    published, _ = watch(database, folder, schedule=Schedule.parse("0-:500"))
    assert published == [2]
    assert manifest_of(database)["version"]["step"] == 900


def test_watch_R5_a_second_refresher_goes_on_where_the_first_one_died(
    database: Path, encoders: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "exports"
    export(folder, encoders[1], 100)
    running = Running.start("refresh", database, "--watch", folder, "--workers", 1)
    running.wait_for((database / "versions/2/embeddings").exists)
    running.kill()
    (folder / "done").touch()
    published, _ = watch(database, folder)
    assert published in ([2], [])  # the kill may have come a moment after the switch
    assert manifest_of(database)["version"]["step"] == 100
    assert watch(database, folder)[0] == []


def test_watch_R5_another_writers_turn_between_publishing_and_retiring_ends_nothing(
    database: Path, encoders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def taken(storage: Storage, progress: object) -> Iterator[Manifest]:
        raise LockedError(f"{storage.url} is being built by another process.")
        yield Manifest()

    exports = tmp_path / "exports"
    export(exports, encoders[1], 5)
    (exports / "done").touch()
    monkeypatch.setattr("retrodb.pipelines.watch.held", taken)
    assert watch(database, exports)[0] == [2]


def test_watch_R5_an_export_that_is_no_encoder_is_said_and_left_out(
    database: Path, encoders: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "exports"
    (folder / "step-50").mkdir(parents=True)
    (folder / "step-50" / "model.safetensors").write_bytes(b"no weights")
    (folder / "done").touch()
    with pytest.raises(InputError, match="the last export cannot be used"):
        watch(database, folder)
    export(folder, encoders[1], 100)
    published, _ = watch(database, folder)
    assert published == [2]
    export(folder, encoders[1], 150)  # the same weights: no new version, and no end of trying
    assert watch(database, folder)[0] == []
    assert manifest_of(database)["version"]["step"] == 100


def spoilt(encoder: Path, folder: Path, weights: str, value: float, row: int | None = None) -> Path:
    """A copy of an encoder, with a value in place of its weights, or of a row of them."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(encoder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[weights][slice(None) if row is None else row] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


LAST_WEIGHTS = "encoder.layer.0.output.LayerNorm.weight"
WORDS = "embeddings.word_embeddings.weight"
THE = 1996
"""The wordpiece "the": in every topic, and not in what an encoder is tried out with."""


@pytest.mark.parametrize(
    ("weights", "value", "row"),
    [(LAST_WEIGHTS, np.nan, None), (LAST_WEIGHTS, 1e9, None), (WORDS, np.nan, THE)],
    ids=["NaN", "beyond float16", "NaN in some chunks"],
)
def test_watch_R5_an_export_whose_vectors_are_not_finite_is_left_out_and_an_earlier_one_published(
    database: Path, encoders: list[Path], tmp_path: Path, weights: str, value: float, row: int | None
) -> None:
    folder = tmp_path / "exports"
    export(folder, encoders[1], 100)
    export(folder, spoilt(encoders[2], tmp_path / "spoilt", weights, value, row), 200)
    (folder / "done").touch()
    with pytest.raises(InputError, match=r"the last export cannot be used: .*step-000200.* NaN, or .* beyond 65,504"):
        watch(database, folder)
    assert manifest_of(database)["version"]["step"] == 100
    assert problems(database) == []


def test_watch_R5_an_export_below_the_recall_gate_or_of_another_tokenizer_is_left_out(
    database: Path, encoders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "exports"
    for step in (100, 200, 300):
        export(folder, encoders[step // 100], step)
    (folder / "done").touch()
    faults = [RecallError("recall@10 is 0.2"), EncoderError("another tokenizer")]

    def faulty(*given: object, **named: object) -> object:
        from retrodb.pipelines.refresh import refresh

        if faults:
            raise faults.pop()
        return refresh(*given, **named)

    monkeypatch.setattr("retrodb.pipelines.watch.refresh", faulty)
    with pytest.raises(InputError, match="the last export cannot be used: another tokenizer"):
        watch(database, folder)
    assert manifest_of(database)["version"]["step"] == 100


@pytest.mark.parametrize("fault", ["unfinished", "no device", "damaged", "disk full"])
def test_watch_R5_a_fault_of_the_database_or_the_machine_ends_it(
    database: Path, encoders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    from retrodb.pipelines.watch import Watch, WatchSettings

    folder, progress, run = tmp_path / "exports", Progress(), RunSettings(workers=1)
    export(folder, encoders[1], 100)
    expected: type[Exception] = InputError
    if fault == "unfinished":
        manifest = manifest_of(database)
        save_manifest(database, {**manifest, "stages": {k: v for k, v in manifest["stages"].items() if k != "index"}})
    elif fault == "no device":
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        run = RunSettings(workers=1, device="cuda")
    elif fault == "damaged":
        expected = DamagedError
        (database / manifest_of(database)["tables"]["chunks"]["shards"][0]["path"]).unlink()
    else:
        expected = WorkerError
        monkeypatch.setattr(
            "retrodb.pipelines.refresh.run_mending", lambda *_: (_ for _ in ()).throw(WorkerError("no space left"))
        )
    with pytest.raises(expected) as ended:
        Watch(Storage(str(database)), WatchSettings(str(folder), poll=0.05), run, progress).run()
    assert not isinstance(ended.value, EncoderError)
    assert not any("left out" in line for line in progress.lines)


def test_watch_R5_nobody_waits_for_an_export_that_is_left_out(
    database: Path, encoders: list[Path], tmp_path: Path
) -> None:
    from retrodb.pipelines.watch import Watch, WatchSettings

    folder = tmp_path / "exports"
    export(folder, spoilt(encoders[1], tmp_path / "spoilt", LAST_WEIGHTS, np.nan), 400)
    held = []

    def sleep(seconds: float) -> None:
        held.append((folder / "hold").exists())
        (folder / "done").touch()

    settings = WatchSettings(str(folder), limit=StalenessLimit(steps=300), on_stale="block", poll=0.01)
    with pytest.raises(InputError, match="the last export cannot be used"):
        Watch(Storage(str(database)), settings, RunSettings(workers=1), Progress(), sleep).run()
    assert held == [False]


def test_refresh_R5_to_vectors_that_are_not_finite_is_bad_input(
    database: Path, encoders: list[Path], tmp_path: Path
) -> None:
    for name, weights, row in (("all", LAST_WEIGHTS, None), ("some", WORDS, THE)):
        encoder = spoilt(encoders[1], tmp_path / name, weights, np.nan, row)
        ran = retrodb("refresh", database, "--encoder", encoder, "--workers", 1)
        assert (ran.code, "which float16 cannot hold" in ran.err) == (3, True), ran.err
    assert manifest_of(database)["version"]["id"] == 1


@pytest.mark.parametrize("on_stale", ["warn", "block"])
def test_watch_R5_more_than_max_staleness_is_said_or_published_out_of_turn_for_the_trainer_that_is_held(
    database: Path, encoders: list[Path], tmp_path: Path, on_stale: Literal["warn", "block"]
) -> None:
    folder = tmp_path / "exports"
    export(folder, encoders[2], 1)
    export(folder, encoders[1], 400)
    before_done = []

    from retrodb.pipelines.watch import Watch, WatchSettings

    settings = WatchSettings(
        str(folder), Schedule.parse("0-:1000"), StalenessLimit.parse("300"), on_stale=on_stale, poll=0.01
    )
    refreshed(database, folder / "step-000001", step=1)  # published: step 1; the export of step 400 is not due
    progress = Progress()

    def sleep(seconds: float) -> None:
        before_done.append((manifest_of(database)["version"]["step"], (folder / "hold").exists()))
        (folder / "done").touch()

    Watch(Storage(str(database)), settings, RunSettings(workers=1), progress, sleep).run()
    assert before_done == [(400 if on_stale == "block" else 1, False)], "a trainer that is held exports nothing more"
    assert any("399 steps" in line and "more than --max-staleness" in line for line in progress.lines)
    assert not (folder / "hold").exists(), "published at the end, and nobody has to wait"
    assert manifest_of(database)["version"]["step"] == 400


def test_watch_R5_staleness_is_told_and_the_trainer_held_while_a_version_is_made(
    database: Path, encoders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it grows, and then alone."""
    from retrodb.pipelines.refresh import RefreshOutcome

    folder = tmp_path / "exports"
    export(folder, encoders[1], 100)
    seen = []

    def told() -> int:
        return int(json.loads((folder / "refresher.json").read_text(encoding="utf-8"))["staleness"]["steps"])

    def slow(*given: object, **named: object) -> RefreshOutcome:
        threads = threading.active_count()
        if not seen:
            export(folder, encoders[2], 900)  # the trainer goes on meanwhile
        end = time.monotonic() + 30
        while not ((folder / "hold").exists() and told() > 300) and time.monotonic() < end:
            time.sleep(0.01)
        seen.append(((folder / "hold").exists(), told(), threads))
        (folder / "done").touch()
        manifest = Manifest.load(Storage(str(database)))
        assert manifest is not None
        return RefreshOutcome(manifest, (), {})

    monkeypatch.setattr("retrodb.pipelines.watch.refresh", slow)
    _, said = watch(database, folder, limit=StalenessLimit(steps=300), on_stale="block")
    assert seen[0][:2] == (True, 900)
    assert sum("more than --max-staleness" in line for line in said) == 1
    assert not (folder / "hold").exists()
    assert threading.active_count() == seen[0][2] - 1, "who told has ended"


def test_watch_R5_what_cannot_be_told_while_a_version_is_made_ends_the_watch(
    database: Path, encoders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrodb.pipelines import watch as module

    folder, tell = tmp_path / "exports", module.write_status
    export(folder, encoders[1], 100)

    def full(*given: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            full.called.set()
            raise OSError("no space left on the device")
        tell(*given)

    full.called = threading.Event()

    def refresh(*given: object, **named: object) -> object:
        assert full.called.wait(30)
        return None

    monkeypatch.setattr(module, "write_status", full)
    monkeypatch.setattr(module, "refresh", refresh)
    with pytest.raises(OSError, match="no space left"):
        watch(database, folder)


def test_follower_R5_blocks_or_warns_until_a_newer_version_is_there(database: Path, encoders: list[Path]) -> None:
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        refreshed(database, encoders[len(waits)], step=500 * len(waits))

    follower = Follower(str(database), StalenessLimit.parse("600"), "block", sleep=sleep)
    assert follower.at(600).version == 1
    assert not waits
    assert follower.at(1_100).version == 2
    assert len(waits) == 1
    assert follower.staleness(1_100).steps == 600
    warning = Follower(str(database), StalenessLimit.parse("600"), "warn")
    with pytest.warns(UserWarning, match="version 2 of .* is 4,500 steps"):
        assert warning.at(5_000).version == 2
    with pytest.raises(TimeoutError, match="is the refresher running"):
        Follower(str(database), StalenessLimit.parse("1"), "block", timeout=0.0, sleep=lambda _: None).at(9_999)


def test_follower_R5_seconds_count_from_when_there_was_something_newer(
    database: Path, encoders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer that has nothing newer waits for nothing but itself."""
    clock = [1_000.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr("retrodb.refreshing.follower.time", SimpleNamespace(monotonic=lambda: clock[0]))
    follower = Follower(str(database), StalenessLimit(seconds=60.0), "block", timeout=0.0, sleep=sleep)
    follower.at(0)
    clock[0] += 3_600  # the version is old, and nothing is newer
    assert follower.at(0).version == follower.at(1).version == 1
    assert follower.staleness(1).seconds == 0.0
    clock[0] += 59
    follower.at(2)
    clock[0] += 2
    with pytest.raises(TimeoutError, match="is still 3 steps and 62 s behind"):
        follower.at(3)
    refreshed(database, encoders[1], step=3)
    assert follower.at(3).version == 2
    clock[0] += 3_600
    assert follower.at(4).version == 2, "the next version's seconds begin anew"


def test_follower_R5_that_knows_the_exports_counts_from_the_oldest_one_that_is_newer(
    database: Path, encoders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, late = tmp_path / "exports", [0.0]
    clock = SimpleNamespace(time=lambda: time.time() + late[0], monotonic=time.monotonic)
    monkeypatch.setattr("retrodb.refreshing.follower.time", clock)
    follower = Follower(
        str(database), StalenessLimit(seconds=600.0), "block", timeout=0.0, exports=str(folder), sleep=lambda _: None
    )
    follower.at(1)
    late[0] = 3_600.0
    assert follower.at(400).version == 1, "it has exported nothing"
    export(folder, encoders[1], 500)
    export(folder, encoders[2], 900)
    with pytest.raises(TimeoutError, match="is the refresher running"):
        follower.at(901)
    refreshed(database, encoders[2], step=900)
    assert (follower.at(901).version, follower.staleness(901)) == (2, Staleness(1, 0.0))


def test_the_command_line_of_refresh_refuses_what_cannot_be_meant(database: Path, encoders: list[Path]) -> None:
    for flags, code, said in (
        ((), 2, "give --encoder CKPT, or --watch DIR"),
        (("--encoder", encoders[1], "--watch", database), 2, "not both"),
        (("--watch", database / "manifest.json"), 3, "is a file; name the folder"),
        (("--watch", "s3://bucket/exports"), 3, "cannot be the exports' folder"),
        (("--watch", database.parent, "--schedule", "often"), 2, "--schedule"),
        (("--watch", database.parent, "--max-staleness", "old"), 2, "--max-staleness"),
        (("--watch", database.parent, "--on-stale", "shout"), 2, "give block or warn"),
    ):
        ran = retrodb("refresh", database, *flags)
        assert (ran.code, said in ran.err) == (code, True), ran.err


def test_the_guide_to_versions_runs(
    database: Path, encoders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = (Path(__file__).parents[1] / "docs" / "versions.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-db").symlink_to(database)
    (tmp_path / "step-500").symlink_to(encoders[1])
    others = [line for line in quickstart_lines() if 2_000 < len(line) < 8_000][4:6]
    for name, line in zip(("more.jsonl", "other.jsonl"), others, strict=True):
        (tmp_path / name).write_text(line + "\n", encoding="utf-8")
    export(tmp_path / "exports", encoders[2], 600)
    (tmp_path / "exports" / "done").touch()
    lines = [line for block in re.findall(r"```sh\n(.*?)```", guide, re.DOTALL) for line in block.splitlines()]
    for line in lines:
        ran = retrodb(*shlex.split(line, comments=True)[1:])
        assert ran.code == 0, (line, ran.err)
    assert [entry["version"]["step"] for entry in manifest_of(database)["versions"]] == [None, 600]
    for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_vectors_of_a_version_are_read_by_numpy_alone(database: Path, encoders: list[Path]) -> None:
    refreshed(database, encoders[1])
    manifest = manifest_of(database)
    for chunks, vectors in zip(
        manifest["tables"]["chunks"]["shards"], manifest["tables"]["embeddings"]["shards"], strict=True
    ):
        assert np.load(database / vectors["path"]).shape == (chunks["rows"], 32)
