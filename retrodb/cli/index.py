"""``retrodb index merge``: the index in a form for other programs."""

from pathlib import Path
from typing import Annotated

import typer

from retrodb.cli.echo import echo, echo_json
from retrodb.cli.look import Database, Json, OfVersion
from retrodb.sizes import count_of

index_commands = typer.Typer(help="The index in other forms.", no_args_is_help=True)


@index_commands.callback()
def _index() -> None:
    """The index in other forms."""


@index_commands.command()
def merge(
    database: Database,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="A new local folder, outside the database.")],
    version: OfVersion = None,
    as_json: Json = False,
) -> None:
    """Merge all index shards into one faiss index whose inverted lists stay on disk, for programs that know faiss."""
    from retrodb import open as open_database  # noqa: PLC0415
    from retrodb.errors import InputError  # noqa: PLC0415
    from retrodb.index import IndexFile  # noqa: PLC0415
    from retrodb.index.merged import merge_index  # noqa: PLC0415
    from retrodb.manifest import TEMPLATE_NUMBER  # noqa: PLC0415

    db = open_database(database, version=version)
    state = db.manifest.stages.get("index")
    if state is None:
        raise InputError(f"{database} has no index yet; run the build to its end.")
    db.storage.refuse_inside(str(out))
    shards = {shard.number: shard for shard in db.manifest.shards("index")}
    merged = merge_index(
        db.storage,
        db.storage.read_bytes(shards.pop(TEMPLATE_NUMBER)),
        [IndexFile(shard, shard.rows) for shard in shards.values()],
        int(db.manifest.fingerprints["encoder"]["dimension"]),
        state.details["metric"],
        out,
    )
    if as_json:
        echo_json({"path": str(merged.path), "vectors": merged.vectors, "bytes": merged.bytes})
        return
    echo(f"{merged.path}: {count_of(merged.vectors, 'vector')}, {merged.bytes:,} bytes with its lists")
    echo("open it with faiss.read_index(path, faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY)")
