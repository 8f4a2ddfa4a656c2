"""What a killed command has left is gone on from only where it is a beginning of the very same version.

Between the kill and the same command again the database may have changed: another version may be current, spans may
have been drawn, an input mended. The labels are those of the requirements of REALM mode.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from retrodb.pipelines import add as add_module
from retrodb.pipelines import compact as compact_module
from retrodb.pipelines import refresh as refresh_module
from retrodb.pipelines.living import delete
from retrodb.pipelines.spans_stage import build_spans
from retrodb.pipelines.swap import swap_back
from support import Progress, build_here, make_tiny_encoder, manifest_of, rows_of, write_jsonl

import retrodb as package
from retrodb.config import RunSettings
from retrodb.corpus import expand_inputs
from retrodb.corpus.quickstart import quickstart_lines
from retrodb.corpus.selection import Selection
from retrodb.quality.verify import verify_database
from retrodb.spans.settings import SpanSettings
from retrodb.storage import Storage

RUN = RunSettings(workers=1)
LATE = "extend_report"
"""What an addition does last before it publishes, while what it made of the new documents is there."""


class Killed(BaseException):
    """As if by SIGKILL: nothing catches it."""


@pytest.fixture(scope="module")
def first(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six topics of real text. Do not change it."""
    folder = tmp_path_factory.mktemp("killed")
    lines = [line for line in quickstart_lines() if 2_000 < len(line) < 6_000]
    (folder / "topics.jsonl").write_text("\n".join(lines[:6]) + "\n", encoding="utf-8")
    (folder / "more.jsonl").write_text("\n".join(lines[6:8]) + "\n", encoding="utf-8")
    build_here(
        [folder / "topics.jsonl"],
        folder / "db",
        encoder=str(tiny_encoder),
        shard_bytes="8KiB",
        sequence_tokens=256,
        neighbours=3,
    )
    return folder


@pytest.fixture
def database(first: Path, tmp_path: Path) -> Path:
    """A copy of `first`'s database to be changed."""
    return shutil.copytree(first / "db", tmp_path / "db")


def killed_at(module: Any, moment: str, command: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command until it calls the function of its module named ``moment``."""

    def kill(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, moment, kill)
        with pytest.raises(Killed):
            command()


def added(database: Path, *inputs: Path) -> Any:
    return add_module.add(Storage(str(database)), expand_inputs([str(path) for path in inputs]).files, RUN, Progress())


def compacted(database: Path) -> Any:
    return compact_module.compact(Storage(str(database)), RUN, Progress())


def refreshed(database: Path, encoder: Path, **settings: Any) -> Any:
    return refresh_module.refresh(Storage(str(database)), str(encoder), RUN, Progress(), **settings)


def deleted(database: Path, row: int) -> str:
    """Delete the document of a row; its key."""
    victim = rows_of(database, "documents")[row]
    delete(Storage(str(database)), Selection(ids=(victim["document_id"],)), Progress())
    return str(victim["key"])


def back(database: Path, version: int) -> None:
    swap_back(Storage(str(database)), version, Progress())


def keys(database: Path) -> set[str]:
    return {document.key for document in package.open(str(database)).documents()}


def problems(database: Path) -> list[str]:
    return [f"{found.path}: {found.what}" for found in verify_database(package.open(str(database)), 1.0).problems]


def test_add_C2_killed_then_swapped_back_takes_nothing_of_the_version_it_was_killed_on(
    database: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = deleted(database, 0)
    killed_at(add_module, LATE, lambda: added(database, first / "more.jsonl"), monkeypatch)
    back(database, 1)
    assert victim in keys(database)
    assert added(database, first / "more.jsonl").version == 3
    assert victim in keys(database), "version 1 had it, and the addition was to version 1"
    assert manifest_of(database)["version"]["parent"] == 1
    assert problems(database) == []


def test_add_C2_killed_then_swapped_back_has_the_encoder_of_the_version_that_it_joins(
    database: Path, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = manifest_of(database)["fingerprints"]["encoder"]
    refreshed(database, make_tiny_encoder(tmp_path / "other", seed=3))
    killed_at(add_module, LATE, lambda: added(database, first / "more.jsonl"), monkeypatch)
    back(database, 1)
    assert added(database, first / "more.jsonl").version == 3
    now = manifest_of(database)
    assert (now["fingerprints"]["encoder"], now["version"]["parent"]) == (before, 1)
    assert problems(database) == []


def test_add_C2_killed_then_mended_input_is_read_as_it_is_now(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "The very first line of a document that is not in the database yet."
    record = {"id": "new", "text": text}
    path = write_jsonl(tmp_path / "more.jsonl", [record, '{"id": "torn", "te'])
    killed_at(add_module, LATE, lambda: added(database, path), monkeypatch)
    write_jsonl(path, [record])
    assert added(database, path).documents == 1
    now = manifest_of(database)
    assert now["stages"]["corpus"]["counts"]["quarantined"] == 0
    assert now["tables"]["quarantine"]["shards"] == []
    assert problems(database) == []


def test_add_C2_killed_then_spans_are_drawn_draws_those_of_the_new_documents_too(
    database: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(add_module, LATE, lambda: added(database, first / "more.jsonl"), monkeypatch)
    build_spans(Storage(str(database)), SpanSettings(mask="random-token", seed=5), RUN, Progress())
    added(database, first / "more.jsonl")
    asked = {row["document_id"] for row in rows_of(database, "queries")}
    assert asked == {row["document_id"] for row in rows_of(database, "documents")}
    assert problems(database) == []


def test_compact_C2_killed_then_the_encoder_is_found_elsewhere_records_that(
    database: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deleted(database, 0)
    killed_at(compact_module, "publish", lambda: compacted(database), monkeypatch)
    elsewhere = shutil.copytree(tiny_encoder, tmp_path / "elsewhere")
    refreshed(database, elsewhere)
    compacted(database)
    assert manifest_of(database)["config"]["encoder"] == str(elsewhere)
    assert problems(database) == []


def test_refresh_R3_killed_then_the_encoder_is_found_elsewhere_records_that(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make_tiny_encoder(tmp_path / "here", seed=3)
    killed_at(refresh_module, "publish", lambda: refreshed(database, encoder), monkeypatch)
    elsewhere = encoder.rename(tmp_path / "there")
    refreshed(database, elsewhere)
    now = manifest_of(database)
    assert (now["config"]["encoder"], now["fingerprints"]["encoder"]["name"]) == (str(elsewhere), str(elsewhere))
    assert problems(database) == []


def test_refresh_R2_killed_then_swapped_back_names_the_version_it_follows(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders = [make_tiny_encoder(tmp_path / str(seed), seed=seed) for seed in (3, 4)]
    refreshed(database, encoders[0], step=10)
    killed_at(refresh_module, "publish", lambda: refreshed(database, encoders[1], step=20), monkeypatch)
    back(database, 1)
    refreshed(database, encoders[1], step=30)
    found = manifest_of(database)["version"]
    assert (found["id"], found["parent"], found["step"]) == (3, 1, 30)
    assert problems(database) == []
