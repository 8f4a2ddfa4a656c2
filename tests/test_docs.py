"""What the documentation says is so: the tables page, and every command of the README."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from retrodb.schemas.markdown import markdown
from support import build_here, make_tiny_encoder, retrodb, write_jsonl

from retrodb.corpus.quickstart import quickstart_lines

ROOT = Path(__file__).parents[1]


def test_the_tables_page_is_made_from_the_schemas():
    assert (ROOT / "docs" / "tables.md").read_text(encoding="utf-8") == markdown()


def test_every_column_is_described():
    from retrodb import schemas

    for schema in (
        schemas.documents(),
        schemas.chunks(64, "uint16"),
        schemas.neighbours(20),
        schemas.training(2048, 64, 2, "uint16"),
        schemas.leakage(),
        schemas.quarantine(),
        schemas.duplicates(),
        schemas.spans(),
        schemas.queries(96, 10, "uint16"),
        schemas.span_quarantine(),
    ):
        assert all(field.metadata[b"description"] for field in schema)


def readme_blocks(language):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def readme_commands():
    lines = [line.split("#")[0].strip() for block in readme_blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line]


def test_every_make_target_of_the_readme_and_the_guide_exists():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    guide = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    named = [line.split()[1] for line in readme_commands() if line.startswith("make")]
    named += re.findall(r"^make ([a-z-]+)", guide, flags=re.MULTILINE)
    assert {"build", "flink-up", "flink-down", "flink-test"} <= set(named) <= set(targets)


FEWER = {
    "train": ["--preset", "tiny", "--steps", "2", "--batch", "1"],
    "retrofit": ["--steps", "2", "--batch", "1"],
    "evaluate": ["--rows", "1", "-k", "1", "--draws", "10"],
    "generate": ["--tokens", "4"],
}
"""What makes a command of the README a matter of seconds."""


@pytest.mark.slow
def test_every_retrodb_command_of_the_readme_runs(built, quickstart_corpus, tiny_encoder, tmp_path, monkeypatch):
    """`my-db` is a copy of the built database; the inputs are small files under the README's names."""
    topics = quickstart_corpus.read_text(encoding="utf-8").splitlines()
    write_jsonl(tmp_path / "held-out.jsonl", topics[:1])
    monkeypatch.chdir(tmp_path)
    shutil.copytree(built, tmp_path / "my-db")
    names = {"corpus.jsonl.gz": str(quickstart_corpus), "more/": str(quickstart_corpus)}
    names["my-checkpoint"] = str(tiny_encoder)
    ran = 0
    for line in readme_commands():
        if not line.startswith("retrodb"):
            continue
        words = [names.get(word, word) for word in shlex.split(line)[1:]]
        if words[0] == "build":
            words += ["--workers", "2", "--shard-bytes", "32KiB"]
        words += FEWER.get(words[0], [])
        done = retrodb(*words)
        assert done.code == 0, (line, done.err)
        ran += 1
    assert ran >= 11


@pytest.mark.slow
def test_the_commands_on_living_databases_run_as_the_versions_page_has_them(tiny_encoder, tmp_path, monkeypatch):
    """One after the other on one small database; following a trainer has tests of its own."""
    lines = [line for line in quickstart_lines() if 2_000 < len(line) < 5_000]
    for name, some in (("corpus.jsonl", lines[:3]), ("more.jsonl", lines[3:4]), ("other.jsonl", lines[4:6])):
        write_jsonl(tmp_path / name, some)
    monkeypatch.chdir(tmp_path)
    build_here([tmp_path / "corpus.jsonl"], tmp_path / "my-db", encoder=str(tiny_encoder), shard_bytes="4KiB")
    make_tiny_encoder(tmp_path / "step-500", seed=5)
    text = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    commands = [line.split("  #")[0] for block in blocks for line in block.splitlines() if "--watch" not in line]
    ran = []
    for line in commands:
        done = retrodb(*shlex.split(line)[1:])
        assert done.code == 0, (line, done.err)
        ran.append(shlex.split(line)[1])
    assert {"refresh", "info", "query", "gc", "add", "delete", "compact", "swap"} == set(ran)
    assert retrodb("verify", "my-db").code == 0


@pytest.mark.slow
def test_the_python_of_the_readme_runs(built, tmp_path):
    (tmp_path / "my-db").symlink_to(built)
    for block in readme_blocks("python"):
        done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") >= 3
