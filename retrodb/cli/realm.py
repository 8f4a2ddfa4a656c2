"""``retrodb realm``: the reference REALM pre-training, beside a refresher."""

import contextlib
from typing import Annotated, Optional

import typer

from retrodb.cli.echo import echo_json
from retrodb.cli.look import Database, Json
from retrodb.cli.train import Out, use_threads


def realm(
    database: Database,
    out: Out,
    exports: Annotated[
        str, typer.Option("--exports", metavar="DIR", help="Where the retriever goes: what `refresh --watch` follows.")
    ],
    start: Annotated[Optional[str], typer.Option(help="The BERT to start from. [all-MiniLM-L6-v2]")] = None,
    dimension: Annotated[Optional[int], typer.Option(help="Of the vectors. [128]")] = None,
    steps: Annotated[Optional[int], typer.Option(help="Optimiser steps. [1000]")] = None,
    cloze_steps: Annotated[Optional[int], typer.Option(help="Steps of the warm start (Inverse Cloze). [200]")] = None,
    cloze_batch: Annotated[Optional[int], typer.Option(help="Blocks of a step of the warm start. [16]")] = None,
    batch: Annotated[Optional[int], typer.Option(help="Queries of a step. [8]")] = None,
    candidates: Annotated[Optional[int], typer.Option(help="Slots, the null document's among them. [8]")] = None,
    exclude: Annotated[Optional[str], typer.Option(help="No candidate: self, document, neardup. [self]")] = None,
    learning_rate: Annotated[Optional[float], typer.Option(help="Highest learning rate. [0.00005]")] = None,
    export_every: Annotated[Optional[int], typer.Option(help="Steps between exports and checkpoints. [100]")] = None,
    max_staleness: Annotated[
        Optional[int], typer.Option(help="Steps that the version may be behind: else it waits. [any]")
    ] = None,
    seed: Annotated[Optional[int], typer.Option(help="Seed of weights and order. [0]")] = None,
    threads: Annotated[Optional[int], typer.Option(min=1, max=4096, help="Threads of the CPU. [the cores]")] = None,
    as_json: Json = False,
) -> None:
    """Pre-train a REALM on DB's masked queries while `refresh DB --watch DIR` re-embeds it. Run again: it goes on."""
    use_threads(threads)
    from retrodb.cli.progress import make_progress  # noqa: PLC0415
    from retrodb.learning.realm import RealmSettings, RealmTrainer  # noqa: PLC0415 - imports torch

    given = {
        "start": start,
        "dimension": dimension,
        "steps": steps,
        "cloze_steps": cloze_steps,
        "cloze_batch": cloze_batch,
        "batch": batch,
        "candidates": candidates,
        "exclude": exclude,
        "learning_rate": learning_rate,
        "export_every": export_every,
        "max_staleness": max_staleness,
        "seed": seed,
    }
    settings = RealmSettings.make({name: value for name, value in given.items() if value is not None})
    with contextlib.closing(make_progress()) as progress:
        run = RealmTrainer(database, out, exports, settings, progress).train()
    if as_json:
        echo_json({"checkpoint": out, "step": run.step, "log": run.log[-1:]})
