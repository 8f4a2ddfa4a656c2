"""``retrodb generate``: a text that a model continues, retrieving as its chunks complete."""

from typing import Annotated, Optional

import typer

from retrodb.cli.echo import echo, echo_json
from retrodb.cli.look import Database, Json, OfVersion
from retrodb.cli.train import Device, Threads, use_threads


def generate(
    database: Database,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue.")],
    checkpoint: Annotated[str, typer.Option("--checkpoint", metavar="CKPT", help="The model.")],
    tokens: Annotated[int, typer.Option(min=1, help="How many more.")] = 100,
    k: Annotated[
        Optional[int], typer.Option("-k", min=0, max=1000, help="Neighbours of a chunk. [the training rows']")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Only so many of the likeliest; 0 for all.")] = 40,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Only the likeliest of so much probability.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of the draws.")] = 0,
    encoder: Annotated[Optional[str], typer.Option(help="Refused if it is not the database's.")] = None,
    device: Device = "auto",
    threads: Threads = None,
    version: OfVersion = None,
    as_json: Json = False,
) -> None:
    """Continue PROMPT with a model, looking up the neighbours of each chunk in DB as it completes."""
    from retrodb import open as open_database  # noqa: PLC0415

    db = open_database(database, version=version)
    use_threads(threads)
    from retrodb.generation import Sampling  # noqa: PLC0415 - imports torch
    from retrodb.generation import generate as run  # noqa: PLC0415
    from retrodb.learning.device import Device as Chosen  # noqa: PLC0415
    from retrodb.model.checkpoint import load_model  # noqa: PLC0415
    from retrodb.model.data import DataSettings  # noqa: PLC0415

    model, found = load_model(checkpoint)
    DataSettings.of(db).check_model(found.data, checkpoint, database)
    sampling = Sampling(temperature, top_k or None, top_p, seed)
    made = run(db, model, prompt, tokens=tokens, sampling=sampling, k=k, encoder=encoder, device=Chosen.choose(device))
    if as_json:
        echo_json(made.as_json())
        return
    echo(made.prompt + made.text)
    for one in made.found:
        titles = [db.document(db.chunk(chunk).document_id) for chunk in one.ids]
        echo(f"chunk {one.chunk}: " + "; ".join(document.title or document.key for document in titles), err=True)
