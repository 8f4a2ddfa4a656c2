"""``retrodb evaluate``: what a database is worth to a model, in bits per byte."""

import contextlib
from typing import Annotated, Any, Optional

import typer

from retrodb.cli.echo import echo, echo_json
from retrodb.cli.look import Database, Json, OfVersion
from retrodb.cli.train import Device, Precision, Threads, use_threads

Number = Optional[str]


def evaluate(
    database: Database,
    checkpoint: Annotated[
        list[str], typer.Option("--checkpoint", metavar="CKPT", help="A model; again for the same with another seed.")
    ],
    k: Annotated[
        Optional[list[int]], typer.Option("-k", help="Neighbours of a chunk; may be given again. [0, 1, 2, 4, 8]")
    ] = None,
    split: Annotated[Optional[str], typer.Option(help="validation or train. [validation]")] = None,
    rows: Annotated[Number, typer.Option(metavar="<int>", help="Sequences, evenly spaced. [all]")] = None,
    batch: Annotated[Number, typer.Option(metavar="<int>", help="Rows computed together. [4]")] = None,
    draws: Annotated[Number, typer.Option(metavar="<int>", help="Bootstrap samples of the intervals. [1000]")] = None,
    seed: Annotated[Number, typer.Option(metavar="<int>", help="Seed of random neighbours and samples. [0]")] = None,
    precision: Precision = None,
    out: Annotated[
        Optional[str], typer.Option("--out", metavar="FOLDER", help="For table and plot. [CKPT/reports]")
    ] = None,
    cache: Annotated[
        Optional[str], typer.Option(metavar="FOLDER", help="Memory-mapped tables, kept for the next time. [removed]")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    version: OfVersion = None,
    as_json: Json = False,
) -> None:
    """Bits per byte on and off retrieval, by k, N and F, with random neighbours as the control, and by leakage."""
    from retrodb import open as open_database  # noqa: PLC0415
    from retrodb.cli.progress import make_progress  # noqa: PLC0415
    from retrodb.evaluation import make_settings  # noqa: PLC0415

    given = {
        "neighbours": tuple(k) if k else None,
        "split": split,
        "rows": rows,
        "batch": batch,
        "draws": draws,
        "seed": seed,
        "precision": precision,
    }
    settings = make_settings({name: value for name, value in given.items() if value is not None})
    db = open_database(database, version=version)
    target = out or f"{checkpoint[0].rstrip('/')}/reports"
    for name, folder in (("out", target), ("cache", cache)):
        if folder is not None:
            _check_folder(db.storage, name, folder)
    use_threads(threads)
    from retrodb.evaluation.report import markdown, write_report  # noqa: PLC0415 - imports torch
    from retrodb.evaluation.run import evaluate as run  # noqa: PLC0415

    with contextlib.closing(make_progress()) as progress:
        evaluated = run(db, checkpoint, settings, progress, device=device, cache=cache)
    files = write_report(evaluated, target)
    if as_json:
        echo_json({**evaluated.as_json(), "files": files})
        return
    echo(markdown(evaluated))
    echo(", ".join(files))


def _check_folder(storage: Any, name: str, folder: str) -> None:
    """Refuse, before hours of work, a folder in the database, or a file in its place."""
    from retrodb.errors import InputError  # noqa: PLC0415
    from retrodb.storage import Storage  # noqa: PLC0415

    storage.refuse_inside(folder, name)
    if Storage(folder).is_a_file():
        raise InputError(f"--{name} {folder} is a file; name a folder.")
