"""Texts, questions that are about them, the small BERT, and the databases: by the command line, as anyone would."""

import contextlib
import fcntl
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gain.corpora import write_selection
from gain.plan import Selection

import retrodb
from realm_experiment.plan import RealmExperiment, ZeroShot
from retrodb.encoding import DEFAULT_ENCODER, resolve_encoder
from retrodb.evaluation.questions import DOCUMENT_FIELDS, QuestionSet
from retrodb.evaluation.retrieval import evaluate_retrieval

COPIED = ("*.json", "vocab.txt", "1_Pooling/config.json")
"""All that an encoder's folder says of itself but its weights: how it pools decides what its vectors are worth."""


class Quiet:
    """Progress that nobody looks at."""

    def begin(self, stage: str, total: int, done: int, unit: str) -> None: ...
    def advance(self, done: int) -> None: ...
    def end(self, summary: str) -> None: ...
    def note(self, text: str) -> None: ...


def command(*words: object) -> list[str]:
    """``retrodb`` as a process."""
    return [sys.executable, "-m", "retrodb", *map(str, words)]


def run_command(*words: object) -> None:
    """Run ``retrodb`` to its end. Raises CalledProcessError: it failed."""
    subprocess.run(command(*words), check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=sys.stderr)


@contextlib.contextmanager
def alone(work: Path) -> Iterator[None]:
    """Of several processes that share the work one is here at a time: who comes later finds it done."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def small_bert(experiment: RealmExperiment, work: Path) -> Path:
    """The BERT that all starts from: the first layers of the package's own encoder, unless a plan names one."""
    if experiment.encoder is not None:
        return Path(experiment.encoder)
    folder = work / f"bert-{experiment.layers}"
    with alone(work):
        if not folder.exists():
            _write_first_layers(experiment.layers, folder)
    return folder


def _write_first_layers(layers: int, folder: Path) -> None:
    from transformers import BertModel

    from retrodb.encoding.featuriser import quieten

    quieten()
    files = resolve_encoder(DEFAULT_ENCODER)
    model = BertModel.from_pretrained(files.transformer, add_pooling_layer=False, local_files_only=True)
    model.encoder.layer = model.encoder.layer[:layers]
    model.config.num_hidden_layers = layers
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    for path in (path for pattern in COPIED for path in files.folder.glob(pattern)):
        (part / path.relative_to(files.folder)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, part / path.relative_to(files.folder))
    model.save_pretrained(part, safe_serialization=True)
    part.rename(folder)


def write_questions(
    name: str, corpora: Path, about: Selection, work: Path, called: str, most: int | None = None
) -> Path:
    """The questions whose documents are among the selected ones (all, where questions name none), in an order that
    depends on their ids alone; at most so many."""
    out = work / "questions" / f"{called}.jsonl"
    with alone(work):
        if not out.exists():
            lines = _about(corpora / f"{name}.jsonl.gz", write_selection(about, corpora, work / "texts"))
            _write_whole(out, lines[:most])
    return out


def _about(questions: Path, documents: Path) -> list[bytes]:
    """The lines of all questions about these documents, by the hash of their ids."""
    keys = {json.loads(line)["id"] for line in documents.read_text("utf-8").splitlines()}
    kept = []
    with gzip.open(questions) as lines:
        for line in lines:
            record = json.loads(line)
            gold = [record[field] for field in DOCUMENT_FIELDS if field in record]
            named = {key for one in gold for key in (one if isinstance(one, list) else [one])}
            if not named or named & keys:
                kept.append((hashlib.sha256(record["id"].encode()).digest(), line))
    return [line for _, line in sorted(kept)]


def halves(questions: Path, work: Path) -> tuple[Path, Path]:
    """Questions to learn from and questions to be asked: every other one."""
    learnt, held_out = (questions.with_name(f"{questions.stem}-{name}.jsonl") for name in ("learnt", "held-out"))
    with alone(work):
        if not held_out.exists():
            lines = questions.read_bytes().splitlines(keepends=True)
            _write_whole(learnt, lines[::2])
            _write_whole(held_out, lines[1::2])
    return learnt, held_out


def _write_whole(path: Path, lines: list[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(b"".join(lines))
    part.replace(path)


def build_blocks(
    selection: Selection,
    corpora: Path,
    work: Path,
    name: str,
    chunk_tokens: int | None,
    mask: str | None = None,
    **flags: object,
) -> Path:
    """A database of blocks with inner products, and with masked queries where ``mask`` is given; made once."""
    out = work / "databases" / name
    given = {"unit": "block", "metric": "ip", "workers": 1, "dedup": "off", **flags}
    if chunk_tokens is not None:
        given["chunk_tokens"] = chunk_tokens
    words = [part for key, value in given.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    whole = out.with_name(f"{name}.whole")
    with alone(work):
        if not whole.exists():
            run_command("build", write_selection(selection, corpora, work / "texts"), "--out", out, *words)
            if mask is not None:
                run_command("spans", out, "--mask", mask, "--workers", 1)
            whole.touch()
    return out


def describe(path: Path) -> dict[str, int]:
    """How large a database is."""
    database = retrodb.open(str(path))
    return {"documents": database.manifest.rows("documents"), "blocks": database.manifest.rows("chunks")}


def recall(database: Any, questions: Path, ks: tuple[int, ...], encoder: str | None = None) -> dict[str, Any]:
    """Zero-shot recall by `retrodb evaluate-retrieval`'s own function: its JSON, without where things lie."""
    found = evaluate_retrieval(database, QuestionSet(str(questions)), ks, progress=Quiet(), encoder=encoder).as_json()
    kept = ("criteria", "index_agreement", "chunks")
    told = {"asked": found["questions"]["asked"], "index": found["index"]["key"]}
    return {**{name: found[name] for name in kept}, **told}


def zero_shot(experiment: RealmExperiment, one: ZeroShot, corpora: Path, work: Path) -> dict[str, Any]:
    """Recall of the package's own encoder on a corpus with questions, with an approximate index.

    Built until its neighbours, by which it is settled how many lists are read: an index alone reads all of them.
    """
    options = {"until": "neighbours", "index_key": one.index_key}
    database = build_blocks(one.corpus, corpora, work, f"zero-shot-{one.name}", None, **options)
    questions = write_questions(one.questions, corpora, one.corpus, work, one.name)
    return recall(retrodb.open(str(database)), questions, experiment.zero_shot_ks)
