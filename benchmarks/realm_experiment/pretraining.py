"""One pre-training run: the trainer in this process, the refresher in another, and what its versions retrieve."""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import retrodb
from realm_experiment.databases import Quiet, command, recall
from realm_experiment.plan import Condition, RealmExperiment
from retrodb.learning.realm import RealmSettings, RealmTrainer

_NEVER = "0-1:1"
"""The schedule that publishes the export of step 0 alone (and the last, when the trainer is done)."""


def pretrain(
    experiment: RealmExperiment,
    condition: Condition,
    seed: int,
    database: Path,
    bert: Path,
    work: Path,
    questions: Path,
) -> dict[str, Any]:
    """Train a model under a condition; killed, the next call goes on from its checkpoint.

    With ``max_staleness`` below the distance of refreshes the trainer waits for each version, so that what a step sees
    depends on the plan and the seed, not on how busy a machine is.
    """
    folder = work / "runs" / f"{condition.name}-{seed}"
    own = folder / "db"
    if not own.exists():
        part = folder / "db.part"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(database, part)
        part.rename(own)
    every = None if condition.rarer is None else condition.rarer * experiment.refresh_every
    settings = RealmSettings.make(
        {
            "start": str(bert),
            "dimension": experiment.dimension,
            "steps": experiment.steps,
            "cloze_steps": experiment.cloze_steps,
            "cloze_batch": experiment.cloze_batch,
            "batch": experiment.batch,
            "candidates": experiment.candidates,
            "learning_rate": experiment.learning_rate,
            "export_every": min(every or experiment.steps, experiment.steps),
            "max_staleness": None if every is None else every - 1,
            "seed": seed,
            "log_every": 1,
            "train_retriever": condition.retriever,
            "train_reader": condition.reader,
        }
    )
    trainer = RealmTrainer(str(own), str(folder / "ckpt"), str(folder / "exports"), settings, Quiet())
    with _refresher(own, folder / "exports", _NEVER if every is None else "0-:1", experiment.steps + 2):
        run = trainer.train()
    found = {
        "condition": condition.name,
        "seed": seed,
        "log": [_compact(entry) for entry in run.log],
        "versions": _looks(experiment, own, questions),
    }
    shutil.rmtree(folder)
    return found


def _compact(entry: dict[str, Any]) -> dict[str, float | None]:
    names = ("step", "loss", "null_prior", "utility", "best_utility", "answer_in_candidates", "seconds")
    return {
        **{name: None if entry[name] is None else round(entry[name], 6) for name in names},
        "retriever_gradient": round(entry["gradient_norm"]["retriever"], 6),
        "reader_gradient": round(entry["gradient_norm"]["reader"], 6),
        "staleness": entry["staleness"]["steps"],
    }


def _looks(experiment: RealmExperiment, database: Path, questions: Path) -> list[dict[str, Any]]:
    """Recall of the encoder as it was before all, after the warm start, and at evenly spaced steps."""
    steps: dict[int | None, int] = {}
    for kept in retrodb.open(str(database)).manifest.versions:
        with retrodb.open(str(database), version=kept.version.id) as db:
            steps[db.manifest.version.step] = kept.version.id
    published = sorted(step for step in steps if step is not None)
    wanted = [experiment.steps * look / experiment.looks for look in range(experiment.looks + 1)]
    chosen = dict.fromkeys(min(published, key=lambda step, to=to: abs(step - to)) for to in wanted)
    found = []
    for step in (None, *chosen):
        if step in steps:
            with retrodb.open(str(database), version=steps[step]) as db:
                found.append({"step": step, **recall(db, questions, experiment.ks)})
    return found


@contextlib.contextmanager
def _refresher(database: Path, exports: Path, schedule: str, keep: int) -> Iterator[None]:
    """``retrodb refresh --watch`` beside; it ends with the trainer, and should it fail, so does the trainer.

    ``keep`` are all versions that there may be, for they are asked afterwards: the first, that of step 0, one a step.
    """
    exports.mkdir(parents=True, exist_ok=True)
    words = command("refresh", database, "--watch", exports, "--schedule", schedule, "--poll", 0.2)
    process = subprocess.Popen(
        [*words, "--keep", str(keep), "--workers", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=sys.stderr,
        stderr=(exports / "refresher.log").open("wb"),
        preexec_fn=_die_with_parent,  # noqa: PLW1509 - one call of the kernel; a killed experiment leaves nobody behind
    )
    trainer, ended = threading.main_thread(), threading.Event()

    def watch() -> None:
        if process.wait() != 0 and not ended.is_set():
            for _ in range(2):  # the first asks the trainer to end after a step, the second ends its waiting
                signal.pthread_kill(trainer.ident or 0, signal.SIGINT)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
        watching.join()
    except KeyboardInterrupt:
        if process.poll():
            log = (exports / "refresher.log").read_text("utf-8")
            sys.exit(f"the refresher of {database} failed ({process.returncode}): {log[-2000:]}")
        raise
    finally:
        ended.set()
        process.kill()
        process.wait()


def _die_with_parent() -> None:
    with contextlib.suppress(OSError, AttributeError):  # Linux alone has it
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
