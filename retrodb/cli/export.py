"""``retrodb export``: a database in the form that another program reads."""

from enum import StrEnum
from typing import Annotated, Any, Optional

import typer

from retrodb.cli.echo import echo, echo_json
from retrodb.cli.look import Database, Json, OfVersion
from retrodb.errors import UsageError


class Form(StrEnum):
    """What ``--to`` takes."""

    retro_pytorch = "retro-pytorch"
    megatron = "megatron"
    huggingface = "huggingface"


_MEMORY_MAPPED = (Form.retro_pytorch, Form.megatron)


def export(
    database: Database,
    to: Annotated[Form, typer.Option("--to", help="The program that is to read it.")],
    out: Annotated[
        str, typer.Option("--out", metavar="FOLDER", help="New or empty; local, or with huggingface any fsspec URL.")
    ],
    neighbours: Annotated[
        Optional[int], typer.Option(help="Neighbours per chunk. [retro-pytorch: as in training; megatron: all kept]")
    ] = None,
    eos_id: Annotated[
        Optional[int],
        typer.Option(help="Token that ends documents. [GPT-2's; else retro-pytorch: the first beyond the vocabulary]"),
    ] = None,
    keep_ids: Annotated[
        bool, typer.Option("--keep-ids", help="retro-pytorch: do not shift token ids; token 0 is read as padding.")
    ] = False,
    batch_size: Annotated[
        Optional[int], typer.Option(min=1, help="megatron: the global batch size to train with. [1]")
    ] = None,
    name: Annotated[Optional[str], typer.Option(help="huggingface: the card's title. [FOLDER's name]")] = None,
    licence: Annotated[
        Optional[str], typer.Option("--license", help="huggingface: the card's license, as the Hub names it. [none]")
    ] = None,
    version: OfVersion = None,
    as_json: Json = False,
) -> None:
    """Write a database as RETRO-pytorch, Megatron-LM or Hugging Face datasets read it (docs/export.md)."""
    given = {
        "--neighbours": (neighbours, _MEMORY_MAPPED, "neighbours"),
        "--eos-id": (eos_id, _MEMORY_MAPPED, "eos_id"),
        "--keep-ids": (keep_ids or None, (Form.retro_pytorch,), "keep_ids"),
        "--batch-size": (batch_size, (Form.megatron,), "batch_size"),
        "--name": (name, (Form.huggingface,), "name"),
        "--license": (licence, (Form.huggingface,), "licence"),
    }
    options: dict[str, Any] = {}
    for flag, (value, forms, argument) in given.items():
        if value is not None and to not in forms:
            raise UsageError(
                f"{flag} says nothing with --to {to.value}; it is for {' and '.join(f.value for f in forms)}."
            )
        if value is not None:
            options[argument] = value

    from retrodb import export as formats  # noqa: PLC0415
    from retrodb import open as open_database  # noqa: PLC0415
    from retrodb.cli.progress import make_progress  # noqa: PLC0415

    db = open_database(database, version=version)
    write = {
        Form.retro_pytorch: formats.export_retro_pytorch,
        Form.megatron: formats.export_megatron,
        Form.huggingface: formats.export_huggingface,
    }[to]
    total = 2 * db.manifest.rows("chunks")
    if to is Form.huggingface:
        total = sum(db.manifest.rows(table) for table in ("training", "documents", "chunks", "neighbours"))
    progress = make_progress()
    done = 0

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        progress.advance(done)

    progress.begin("export", total, 0, "rows")
    try:
        made = write(db, out, advance=advance, **options)  # type: ignore[operator]
        progress.end(f"{made.path}: {made.bytes:,} bytes")
    finally:
        progress.close()
    if as_json:
        echo_json(made.as_json())
        return
    for what, number in made.counts.items():
        echo(f"{what.replace('_', ' '):<24} {number:,}")
    for what, number in made.left_out.items():
        echo(f"left out: {number:,} {what}")
    for note in made.notes:
        echo(f"note: {note}")
