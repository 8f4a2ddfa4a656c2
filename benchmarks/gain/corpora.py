"""The texts: chosen documents of real corpora, and the databases made of them with ``retrodb build``."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import retrodb
from gain.plan import LARGER, SMALLER, Experiment, Selection, Setting
from retrodb.database import Database


def documents(selection: Selection, folder: Path) -> Iterator[bytes]:
    """The lines of the selected documents, in the file's order."""
    with gzip.open(folder / f"{selection.corpus}.jsonl.gz") as lines:
        for line in lines:
            number = hashlib.sha256(json.loads(line)["id"].encode()).digest()[0]
            if number % selection.every == 0 and (selection.but is None or number % selection.but):
                yield line


def write_selection(selection: Selection, corpora: Path, folder: Path) -> Path:
    """A JSON Lines file of the selected documents; one that is there is kept."""
    but = f"-but-{selection.but}" if selection.but else ""
    path = folder / f"{selection.corpus}-every-{selection.every}{but}.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_bytes(b"".join(documents(selection, corpora)))
        part.replace(path)
    return path


def build_databases(setting: Setting, experiment: Experiment, corpora: Path, work: Path) -> dict[str, Path]:
    """Both databases of a setting; what is built already is left as it is.

    The tokenizer is learnt from the training corpus, and the other database is built with the same one.
    """
    other = LARGER if setting.trained_on == SMALLER else SMALLER
    texts = work / "texts"
    validation = [write_selection(one, corpora, texts) for one in setting.validation]
    found = {}
    for which in (setting.trained_on, other):
        chosen = setting.smaller + (setting.larger if which == LARGER else ())
        inputs = [write_selection(one, corpora, texts) for one in chosen]
        out = work / "databases" / f"{setting.name}-{which}"
        if which == setting.trained_on:
            tokenizer = f"train:{experiment.vocabulary}"
        else:
            tokenizer = str(found[setting.trained_on] / "tokenizer.json")
        _build(inputs, validation, out, tokenizer, setting, experiment)
        found[which] = out
    return found


def _build(
    inputs: Iterable[Path], validation: Iterable[Path], out: Path, tokenizer: str, setting: Setting, of: Experiment
) -> None:
    flags = {
        "--tokenizer": tokenizer,
        "--chunk-tokens": of.chunk_tokens,
        "--sequence-tokens": of.sequence_tokens,
        "--neighbours": of.kept_neighbours,
        "--training-neighbours": of.training_neighbours,
        "--workers": 1,
    }
    if of.encoder is not None:
        flags["--encoder"] = of.encoder
    command = [sys.executable, "-m", "retrodb", "build", *map(str, inputs), "--out", str(out)]
    command += [part for name, value in flags.items() for part in (name, str(value))]
    command += [part for path in validation for part in ("--validation", str(path))]
    command += [] if setting.decontaminate else ["--no-decontaminate"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=sys.stderr)


def open_database(path: Path) -> Database:
    """The database in a folder."""
    return retrodb.open(str(path))


def describe(path: Path) -> dict[str, Any]:
    """What the page tells of a database."""
    database = open_database(path)
    config = database.manifest.config
    read = {name: database.storage.read_json(f"reports/{name}.json") for name in ("recall", "leakage")}
    splits = {}
    for split in ("train", "validation"):
        found = read["leakage"]["splits"][split]
        splits[split] = {"chunks": found["chunks"], "mean": round(found["mean"], 4), "above": found["share_above"]}
    tokens, n_bytes = 0, 0
    for table in database.tables("chunks", ["n_tokens", "start", "end"]):
        tokens += int(table["n_tokens"].to_numpy().sum())
        n_bytes += int((table["end"].to_numpy() - table["start"].to_numpy()).sum())
    return {
        "documents": sum(shard.rows for shard in database.manifest.shards("documents")),
        "tokens": tokens,
        "bytes": n_bytes,
        "training_rows": sum(table.num_rows for table in database.tables("training", ["sequence_id"])),
        "encoder": config["encoder"],
        "recall_at_10": read["recall"].get("recall_at_10"),
        "leakage": splits,
    }
