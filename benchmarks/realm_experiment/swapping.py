"""The corpus swap: fine-tuned with one corpus, asked with two, without any training in between."""

import shutil
from pathlib import Path
from typing import Any

import retrodb
from realm_experiment.databases import Quiet, halves
from realm_experiment.plan import Swap
from retrodb.evaluation.open_qa import Answering
from retrodb.evaluation.questions import QuestionSet
from retrodb.learning.open_qa import FineTuned, OpenQaSettings, OpenQaTrainer


def swap_seed(
    swap: Swap, seed: int, databases: dict[str, Path], bert: Path, questions: Path, work: Path
) -> dict[str, Any]:
    """Fine-tune on half of the questions with the old corpus, and ask the other half of both."""
    learnt, held_out = halves(questions, work)
    folder = work / "runs" / f"swap-{seed}"
    settings = OpenQaSettings.make(
        {
            "start": str(bert),
            "answers": swap.learnt,
            "steps": swap.steps,
            "batch": swap.batch,
            "blocks": swap.blocks,
            "learning_rate": swap.learning_rate,
            "save_every": max(1, swap.steps // 4),
            "seed": seed,
            "log_every": 1,
        }
    )
    trainer = OpenQaTrainer(
        retrodb.open(str(databases["old"])), QuestionSet(str(learnt)), str(folder), settings, Quiet()
    )
    trainer.train()
    tuned = FineTuned(str(folder))
    asked = {}
    for which, path in databases.items():
        answering = Answering(retrodb.open(str(path)), tuned, QuestionSet(str(held_out)), Quiet())
        for _ in answering.predictions():
            pass
        asked[which] = answering.result.as_json()["criteria"]
    names = ("step", "loss", "answer_in_blocks", "seconds")
    log = [{name: round(entry[name], 6) for name in names} for entry in trainer.log]
    shutil.rmtree(folder)
    return {"seed": seed, "log": log, "asked": asked}
