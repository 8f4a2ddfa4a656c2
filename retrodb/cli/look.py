"""``retrodb info``, ``query`` and ``show``: look at what was built."""

import dataclasses
from typing import Annotated, Any, Optional

import typer

from retrodb.cli.echo import echo_json

Database = Annotated[str, typer.Argument(metavar="DB", help="The database: a folder, or any fsspec URL.")]
OfVersion = Annotated[
    Optional[int], typer.Option("--version", metavar="N", min=1, help="A kept version. [the current one]")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def info(database: Database, version: OfVersion = None, as_json: Json = False) -> None:
    """What a database is: counts per stage, fingerprints, recall, sizes, versions."""
    from retrodb import open as open_database  # noqa: PLC0415
    from retrodb.cli.render import print_info  # noqa: PLC0415
    from retrodb.manifest import taken_from  # noqa: PLC0415

    summary = open_database(database, version=version).summary()
    if as_json:
        echo_json(summary)
        return
    with taken_from(f"the manifest of {database}"):
        print_info(summary)


def query(
    database: Database,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to look for.")],
    k: Annotated[int, typer.Option("-k", min=1, help="How many neighbours.")] = 5,
    metric: Annotated[Optional[str], typer.Option(help="Refused if it is not the database's.")] = None,
    encoder: Annotated[Optional[str], typer.Option(help="Refused if it is not the database's.")] = None,
    version: OfVersion = None,
    as_json: Json = False,
) -> None:
    """Embed TEXT with the database's encoder, search, and print the nearest chunks with text, score and source."""
    from retrodb import open as open_database  # noqa: PLC0415
    from retrodb.cli.render import print_hits  # noqa: PLC0415
    from retrodb.errors import UsageError  # noqa: PLC0415

    if not text.strip():
        raise UsageError("TEXT is blank: nothing to look for.")
    db = open_database(database, version=version)
    found = db.search(text, k, metric=metric, encoder=encoder)
    hits = [_described(db, hit) for hit in found]
    if as_json:
        answer = {"query": text, "k": k, "metric": db.metric, "version": db.version, "neighbours": hits}
        echo_json(answer)
    else:
        print_hits(hits)


def show(
    database: Database,
    chunk_id: Annotated[int, typer.Argument(metavar="CHUNK_ID", help="A chunk's id.")],
    version: OfVersion = None,
    as_json: Json = False,
) -> None:
    """A chunk, its neighbours and their continuations, side by side."""
    from retrodb import open as open_database  # noqa: PLC0415
    from retrodb.cli.render import print_chunk  # noqa: PLC0415

    db = open_database(database, version=version)
    chunk = db.chunk(chunk_id)
    rows = []
    for neighbour in db.neighbours(chunk_id):
        following = db.continuation(neighbour.chunk_id)
        rows.append(
            {
                **_described(db, neighbour),
                "continuation_id": following.chunk_id if following else None,
                "continuation": following.text if following else None,
            }
        )
    described = {**dataclasses.asdict(chunk), **_place(db, chunk.document_id)}
    shown = {"chunk": described, "neighbours": rows, "version": db.version}
    if as_json:
        echo_json(shown)
    else:
        print_chunk(shown)


def _place(db: Any, document_id: int) -> dict[str, Any]:
    document = db.document(document_id)
    return {"key": document.key, "source": document.source, "title": document.title}


def _described(db: Any, neighbour: Any) -> dict[str, Any]:
    chunk = db.chunk(neighbour.chunk_id)
    return {
        "chunk_id": neighbour.chunk_id,
        "document_id": neighbour.document_id,
        "distance": neighbour.distance,
        **_place(db, neighbour.document_id),
        "position": chunk.position,
        "text": chunk.text,
    }
