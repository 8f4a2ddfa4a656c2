"""``retrodb finetune-qa`` and ``answer``: open-domain question answering from a database of blocks."""

import contextlib
from pathlib import Path
from typing import Annotated, Optional

import typer

from retrodb.cli.echo import echo, echo_json
from retrodb.cli.look import Database, Json, OfVersion
from retrodb.cli.train import Out, use_threads
from retrodb.errors import UsageError
from retrodb.sizes import count_of

Questions = Annotated[
    str, typer.Argument(metavar="QUESTIONS", help="JSONL (.gz, .zst), any fsspec URL; fields are found by name.")
]
Threads = Annotated[Optional[int], typer.Option(min=1, max=4096, help="Threads of the CPU. [the cores]")]


def finetune_qa(
    database: Database,
    questions: Questions,
    out: Out,
    start: Annotated[
        Optional[str],
        typer.Option(metavar="CKPT", help="The reader's: of `retrodb realm`, or a BERT. [the database's encoder]"),
    ] = None,
    answers: Annotated[
        Optional[str], typer.Option(help='Which answers to learn, of several kinds: "answers 2016". [the only one]')
    ] = None,
    steps: Annotated[Optional[int], typer.Option(help="Optimiser steps. [1000]")] = None,
    batch: Annotated[Optional[int], typer.Option(help="Questions of a step. [4]")] = None,
    blocks: Annotated[Optional[int], typer.Option(help="Retrieved blocks that are read. [5]")] = None,
    learning_rate: Annotated[Optional[float], typer.Option(help="Highest learning rate. [0.00001]")] = None,
    save_every: Annotated[Optional[int], typer.Option(help="Steps between checkpoints. [100]")] = None,
    seed: Annotated[Optional[int], typer.Option(help="Seed of weights and order. [0]")] = None,
    encoder: Annotated[
        Optional[str], typer.Option(help="Where the database's encoder is now, if not where it was.")
    ] = None,
    threads: Threads = None,
    version: OfVersion = None,
    as_json: Json = False,
) -> None:
    """Fine-tune query encoder and span reader on QUESTIONS; DB's vectors stay as they are. Run again: it goes on."""
    use_threads(threads)
    from retrodb import open as open_database  # noqa: PLC0415
    from retrodb.cli.progress import make_progress  # noqa: PLC0415
    from retrodb.evaluation.questions import QuestionSet  # noqa: PLC0415
    from retrodb.learning.open_qa import OpenQaSettings, OpenQaTrainer  # noqa: PLC0415 - imports torch

    given = {
        "start": start,
        "answers": answers,
        "steps": steps,
        "batch": batch,
        "blocks": blocks,
        "learning_rate": learning_rate,
        "save_every": save_every,
        "seed": seed,
    }
    settings = OpenQaSettings.make({name: value for name, value in given.items() if value is not None})
    with contextlib.closing(make_progress()) as progress:
        trainer = OpenQaTrainer(
            open_database(database, version=version), QuestionSet(questions), out, settings, progress, encoder
        )
        step = trainer.train()
    if as_json:
        echo_json({"checkpoint": out, "step": step, "log": trainer.log[-1:]})


def answer(
    database: Database,
    questions: Questions,
    model: Annotated[str, typer.Option("--model", metavar="CKPT", help="What finetune-qa made.")],
    blocks: Annotated[
        Optional[int], typer.Option(min=1, max=65536, help="Retrieved blocks that are read. [as trained]")
    ] = None,
    predictions: Annotated[
        Optional[str], typer.Option("--predictions", metavar="FILE", help="Write each answer as a line of JSON.")
    ] = None,
    threads: Threads = None,
    version: OfVersion = None,
    as_json: Json = False,
) -> None:
    """Answer QUESTIONS from DB, any of the encoder that the model was fine-tuned with: exact match, with intervals."""
    use_threads(threads)
    import json  # noqa: PLC0415

    from retrodb import open as open_database  # noqa: PLC0415
    from retrodb.cli.progress import make_progress  # noqa: PLC0415
    from retrodb.evaluation.open_qa import Answering  # noqa: PLC0415
    from retrodb.evaluation.questions import QuestionSet  # noqa: PLC0415
    from retrodb.learning.open_qa import FineTuned  # noqa: PLC0415 - imports torch
    from retrodb.remote import absolute_url  # noqa: PLC0415
    from retrodb.storage import Storage  # noqa: PLC0415

    db = open_database(database, version=version)
    if predictions is not None:
        db.storage.refuse_inside(predictions, "predictions")
        if predictions.endswith("/") or Path(predictions).is_dir():
            raise UsageError(f"--predictions {predictions} is a folder: name the file in it, as answers.jsonl.")
        folder, _, name = absolute_url(predictions).rpartition("/")
        place = Storage(folder or "/")
        place.make_root()  # before what may take hours, not after it
    with contextlib.closing(make_progress()) as progress:
        under_way = Answering(db, FineTuned(model), QuestionSet(questions), progress, blocks)
        found = list(under_way.predictions())
    if predictions is not None:
        lines = b"".join(json.dumps(one.as_json(), ensure_ascii=False).encode() + b"\n" for one in found)
        place.commit_bytes(name, lines)
    result = under_way.result
    if as_json:
        echo_json({**result.as_json(), "predictions": predictions})
        return
    for name, count in result.questions.items():
        exact, there = result.exact[name], result.retrieved[name]
        for title, one in (("exact match", exact), ("answer in the blocks", there)):
            low, high = one.interval or (one.value, one.value)
            echo(f"{name + f' ({count:,})':<24}{title:<22}{one.value:.4f}  [{low:.4f}, {high:.4f}]")
    echo(
        f"{count_of(result.about['blocks'], 'block')} a question, version {result.about['version']}; intervals are 95%"
    )
