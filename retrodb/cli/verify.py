"""``retrodb verify``: proves that a database is what its manifest says."""

from typing import Annotated, Optional

import typer

from retrodb.cli.echo import echo_json
from retrodb.cli.look import Database, Json, OfVersion


def verify(
    database: Database,
    sample: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of shards recomputed from the source text.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Which shards are recomputed.")] = 0,
    encoder: Annotated[
        Optional[str], typer.Option(help="Where the encoder is now, if not where it was. Refused if it is another.")
    ] = None,
    version: OfVersion = None,
    as_json: Json = False,
) -> None:
    """Prove counts, checksums, joins, continuations, exclusion; exit 4 and the shard's name if anything is off."""
    from retrodb import open as open_database  # noqa: PLC0415
    from retrodb.cli.render import print_verdict  # noqa: PLC0415
    from retrodb.errors import DamagedError  # noqa: PLC0415
    from retrodb.quality.verify import verify_database  # noqa: PLC0415

    db = open_database(database, version=version)
    report = verify_database(db, sample=sample, seed=seed, encoder=encoder)
    if as_json:
        echo_json(report.as_json())
    else:
        print_verdict(report)
    if report.problems:
        raise typer.Exit(DamagedError.exit_code)
