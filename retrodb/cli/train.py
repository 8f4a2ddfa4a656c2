"""``retrodb train`` and ``retrofit``: the reference model from a database's training rows."""

import contextlib
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from retrodb.cli.echo import echo_json
from retrodb.cli.look import Database, Json, OfVersion

Out = Annotated[str, typer.Option("--out", metavar="CKPT", help="The checkpoint: a folder, outside the database.")]
Config = Annotated[Optional[Path], typer.Option("--config", metavar="FILE", help="TOML settings; flags win.")]
Number = Optional[str]
Steps = Annotated[Number, typer.Option(metavar="<int>", help="Optimiser steps. [2000]")]
BatchRows = Annotated[Number, typer.Option(metavar="<int>", help="Rows computed together. [8]")]
Accumulate = Annotated[Number, typer.Option(metavar="<int>", help="Batches that make one step. [1]")]
Rate = Annotated[Number, typer.Option(metavar="<float>", help="Highest learning rate. [0.001]")]
Warmup = Annotated[Number, typer.Option(metavar="<int>", help="Steps of its rise. [100, a tenth of few steps]")]
Decay = Annotated[Number, typer.Option(metavar="<float>", help="Weight decay of matrices. [0.1]")]
Clip = Annotated[Number, typer.Option(metavar="<float>", help="Largest norm of the gradient. [1]")]
Seed = Annotated[Number, typer.Option(metavar="<int>", help="Seed of weights and order. [0]")]
Precision = Annotated[Optional[str], typer.Option(help="auto (bf16 where native), fp32, bf16. [auto]")]
SaveEvery = Annotated[Number, typer.Option(metavar="<int>", help="Steps between checkpoints. [250]")]
LogEvery = Annotated[Number, typer.Option(metavar="<int>", help="Steps between entries of the log. [10]")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda.")]
Threads = Annotated[Optional[int], typer.Option(min=1, max=4096, help="Threads of the CPU. [the cores]")]


def train(
    context: typer.Context,
    database: Database,
    out: Out,
    config: Config = None,
    preset: Annotated[Optional[str], typer.Option(help="Size: tiny, small, medium, retro-172m. [small]")] = None,
    width: Annotated[Number, typer.Option(metavar="<int>", help="Width of the decoder. [the preset's]")] = None,
    layers: Annotated[Number, typer.Option(metavar="<int>", help="Its layers. [the preset's]")] = None,
    heads: Annotated[Number, typer.Option(metavar="<int>", help="Heads of its attention. [the preset's]")] = None,
    retrieval: Annotated[Optional[bool], typer.Option(help="With RETRO's retrieval or without. [with]")] = None,
    steps: Steps = None,
    batch: BatchRows = None,
    accumulate: Accumulate = None,
    learning_rate: Rate = None,
    warmup: Warmup = None,
    weight_decay: Decay = None,
    clip: Clip = None,
    seed: Seed = None,
    precision: Precision = None,
    save_every: SaveEvery = None,
    log_every: LogEvery = None,
    device: Device = "auto",
    threads: Threads = None,
    version: OfVersion = None,
    as_json: Json = False,
) -> None:
    """Train a RETRO model from scratch on DB's training rows. Run again: it goes on, or does nothing."""
    _train(context, None)


def retrofit(
    context: typer.Context,
    database: Database,
    base: Annotated[
        str, typer.Option("--base", metavar="CKPT", help="A checkpoint without retrieval, or a Hugging Face folder.")
    ],
    out: Out,
    config: Config = None,
    steps: Steps = None,
    batch: BatchRows = None,
    accumulate: Accumulate = None,
    learning_rate: Rate = None,
    warmup: Warmup = None,
    weight_decay: Decay = None,
    clip: Clip = None,
    seed: Seed = None,
    precision: Precision = None,
    save_every: SaveEvery = None,
    log_every: LogEvery = None,
    device: Device = "auto",
    threads: Threads = None,
    version: OfVersion = None,
    as_json: Json = False,
) -> None:
    """Add retrieval to a plain decoder, whose weights stay as they are bit for bit. Run again: it goes on."""
    _train(context, base)


def _train(context: typer.Context, base: str | None) -> None:
    """What Typer made of the command line is in ``context``, by the names of the parameters above."""
    flags: dict[str, Any] = dict(context.params)
    database, out, config, device = (flags.pop(name) for name in ("database", "out", "config", "device"))
    threads, version, as_json = (flags.pop(name) for name in ("threads", "version", "as_json"))
    flags.pop("base", None)
    from retrodb import open as open_database  # noqa: PLC0415
    from retrodb.cli.progress import make_progress  # noqa: PLC0415
    from retrodb.config import read_config_file  # noqa: PLC0415
    from retrodb.learning import make_settings  # noqa: PLC0415

    given = {name: value for name, value in flags.items() if value is not None}
    settings = make_settings(read_config_file(config) if config else {}, given)
    db = open_database(database, version=version)
    use_threads(threads)
    from retrodb.learning import run  # noqa: PLC0415 - imports torch

    with contextlib.closing(make_progress()) as progress:
        if base is None:
            done = run.train(db, out, settings, progress, device)
        else:
            done = run.retrofit(db, base, out, settings, progress, device)
    if as_json:
        shown = {key: done.progress[key] for key in ("step", "tokens", "seconds")}
        echo_json({"checkpoint": out, **shown, "files": {name: file.path for name, file in done.files.items()}})


def use_threads(threads: int | None) -> None:
    """Give torch that many threads."""
    if threads is not None:
        import torch  # noqa: PLC0415

        torch.set_num_threads(threads)
