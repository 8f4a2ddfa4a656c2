"""What the documentation says is so: the tables page, and every command of the README."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from retrodb.schemas.markdown import markdown
from support import retrodb, write_jsonl

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
            words += ["--workers", "1", "--shard-bytes", "32KiB"]
        words += FEWER.get(words[0], [])
        done = retrodb(*words)
        assert done.code == 0, (line, done.err)
        ran += 1
    assert ran >= 11


@pytest.mark.slow
def test_the_python_of_the_readme_runs(built, tmp_path):
    (tmp_path / "my-db").symlink_to(built)
    for block in readme_blocks("python"):
        done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") >= 3
