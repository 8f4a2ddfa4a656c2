"""Shared fixtures: the quickstart database, built once by the command line, and an encoder that costs nothing."""

import shutil
import signal
from pathlib import Path

import pytest
from support import make_tiny_encoder, retrodb

from retrodb.corpus.quickstart import quickstart_lines


def pytest_configure() -> None:
    """A run in the background ignores Ctrl-C, and the builds it starts would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def quickstart_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve topics of the Python language reference: real text, enough chunks for worker processes to embed."""
    lines = [line for line in quickstart_lines() if 2_000 < len(line) < 8_000][:12]
    path = tmp_path_factory.mktemp("corpus") / "topics.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def built(quickstart_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole database of `quickstart_corpus`, built by the command line with two workers. Do not change it."""
    out = tmp_path_factory.mktemp("db") / "db"
    ran = retrodb("build", quickstart_corpus, "--out", out, "--workers", 2, "--shard-bytes", "32KiB")
    assert ran.code == 0, ran.err
    return out


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    """A copy of `built` that a test may damage."""
    target = tmp_path / "db"
    shutil.copytree(built, target)
    return target


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random one-layer BERT, for tests to which the vectors' meaning is nothing."""
    return make_tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


@pytest.fixture(scope="session")
def topics_db(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small database with a validation split for the reference model. Do not change it."""
    from models import build_topics

    return build_topics(tmp_path_factory.mktemp("topics"), tiny_encoder)
