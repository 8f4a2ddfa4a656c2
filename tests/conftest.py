"""Shared fixtures: the quickstart database, built once by the command line, and an encoder that costs nothing."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from support import make_tiny_encoder, retrodb

from retrodb.corpus.quickstart import quickstart_lines

LONGEST = (
    "test_flink",
    "test_build_resume",
    "test_dedup",
    "test_versions",
    "test_memory",
    "test_faults",
    "test_living_remote",
    "test_realm_training",
    "test_docs",
    "test_add_duplicates",
    "test_object_storage",
    "test_living",
    "test_search_rounds",
    "test_object_storage_faults",
    "test_soak",
    "test_sketches",
    "test_realm_gain",
    "test_build_inputs",
    "test_add_cost",
    "test_compaction",
    "test_runners",
)
"""The files whose tests take longest together, longest first."""


def pytest_configure() -> None:
    """Before anything is imported. gcsfs looks at its variable then, and else asks over gRPC what kind a bucket is, for
    half a minute where there is no network; a run in the background ignores Ctrl-C, as the builds it starts would."""
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under xdist's ``loadfile`` one process runs a file, so that what its tests share is made once and not by every
    process; the longest files begin first, so that none is left alone at the end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def made_once(name: str, make: Callable[[Path], object], factory: pytest.TempPathFactory) -> Path:
    """A folder that the processes of one run share: the first that asks ``make``s it, the others wait for it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = factory.mktemp(name)
        make(folder)
        return folder
    folder = factory.getbasetemp().parent / name
    made = folder.with_suffix(".made")
    with FileLock(folder.with_suffix(".lock")):
        if not made.exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def quickstart_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve topics of the Python language reference: real text, enough chunks for worker processes to embed."""

    def make(folder: Path) -> None:
        lines = [line for line in quickstart_lines() if 2_000 < len(line) < 8_000][:12]
        (folder / "topics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    return made_once("corpus", make, tmp_path_factory) / "topics.jsonl"


@pytest.fixture(scope="session")
def built(quickstart_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole database of `quickstart_corpus`, built by the command line with two workers. Do not change it."""

    def make(folder: Path) -> None:
        ran = retrodb("build", quickstart_corpus, "--out", folder / "db", "--workers", 2, "--shard-bytes", "32KiB")
        assert ran.code == 0, ran.err

    return made_once("built", make, tmp_path_factory) / "db"


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    """A copy of `built` that a test may damage."""
    target = tmp_path / "db"
    shutil.copytree(built, target)
    return target


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random one-layer BERT, for tests to which the vectors' meaning is nothing."""
    return made_once("encoder", lambda folder: make_tiny_encoder(folder / "tiny"), tmp_path_factory) / "tiny"


@pytest.fixture(scope="session")
def topics_db(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small database with a validation split for the reference model. Do not change it."""
    from models import build_topics

    return made_once("topics", lambda folder: build_topics(folder, tiny_encoder), tmp_path_factory) / "db"


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes find the modules beside this one."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
