"""``retrodb spans``: salient spans and masked queries, as tables of the database."""

import contextlib
from typing import Annotated, Optional

import typer

from retrodb.cli.echo import echo, echo_json
from retrodb.cli.look import Database, Json
from retrodb.cli.running import Runner, RunnerOption, Wait, Workers, run_settings


def spans(
    database: Database,
    tagger: Annotated[
        Optional[list[str]],
        typer.Option(
            help="ner (needs retrodb[spans]), ner:PACKAGE, dates, import:FILE; several by commas or again. [ner,dates]"
        ),
    ] = None,
    mask: Annotated[str, typer.Option(help="salient; or, to compare with: random-span, random-token.")] = "salient",
    seed: Annotated[int, typer.Option(min=0, help="Which span of a sentence is masked.")] = 0,
    encoder: Annotated[
        Optional[str], typer.Option(help="Where the encoder is now, whose tokenizer is used, if not where it was.")
    ] = None,
    workers: Workers = None,
    runner: Runner = None,
    runner_option: RunnerOption = None,
    wait: Wait = None,
    as_json: Json = False,
) -> None:
    """Find named entities and dates, and draw one masked query from each sentence that has one (REALM)."""
    from retrodb.cli.progress import make_progress  # noqa: PLC0415
    from retrodb.errors import UsageError  # noqa: PLC0415
    from retrodb.manifest import SPANS_STAGE  # noqa: PLC0415
    from retrodb.pipelines.spans_stage import build_spans, describe_counts  # noqa: PLC0415 - imports Beam
    from retrodb.spans import MASKS, SpanSettings  # noqa: PLC0415
    from retrodb.spans.taggers import DEFAULT_TAGGERS  # noqa: PLC0415
    from retrodb.storage import Storage  # noqa: PLC0415

    found = next((known for known in MASKS if known == mask), None)
    if found is None:
        raise UsageError(f"--mask {mask}: there are {', '.join(MASKS)}.")
    if tagger and found != "salient":
        raise UsageError(f"--mask {mask} draws what it masks at random: --tagger has no part in it.")
    specs = tuple(spec.strip() for given in tagger or () for spec in given.split(",")) or DEFAULT_TAGGERS
    settings = SpanSettings(specs if found == "salient" else (), found, seed)
    run = run_settings(workers, runner, runner_option, wait=wait)
    storage = Storage(database)
    with contextlib.closing(make_progress()) as progress:
        outcome = build_spans(storage, settings, run, progress, encoder)
    state = outcome.manifest.stages[SPANS_STAGE]
    if as_json:
        echo_json({"database": storage.url, "done": list(outcome.done), "counts": state.counts, **state.made_from})
    elif outcome.done:
        echo(f"{storage.url}: {describe_counts(state.counts)}")
    else:
        echo(f"{storage.url}: its spans are up to date, nothing to do ({describe_counts(state.counts)}).")
