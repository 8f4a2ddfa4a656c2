"""``retrodb add``, ``swap``, ``delete`` and ``compact``: documents taken in, exchanged, given up, and their space
returned."""

import contextlib
import dataclasses
from typing import Annotated, Optional

import typer

from retrodb.cli.echo import echo, echo_json
from retrodb.cli.look import Database, Json
from retrodb.cli.running import Device, Runner, RunnerOption, Wait, Workers, run_settings


def add(
    database: Database,
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Files, folders, globs, any fsspec URL.")],
    workers: Workers = None,
    device: Device = None,
    runner: Runner = None,
    runner_option: RunnerOption = None,
    wait: Wait = None,
    as_json: Json = False,
) -> None:
    """Add documents as the next version, at a cost that follows what is new: readers keep theirs meanwhile."""
    from retrodb.cli.progress import make_progress  # noqa: PLC0415
    from retrodb.corpus import expand_inputs  # noqa: PLC0415
    from retrodb.pipelines.add import add as run_add  # noqa: PLC0415
    from retrodb.storage import Storage  # noqa: PLC0415

    run = run_settings(workers, runner, runner_option, device, wait)
    listing = expand_inputs(inputs)
    with contextlib.closing(make_progress()) as progress:
        done = run_add(Storage(database), listing.files, run, progress)
    if as_json:
        echo_json(dataclasses.asdict(done))


def delete(
    database: Database,
    ids: Annotated[Optional[str], typer.Option(metavar="ID,..", help="Document ids.")] = None,
    keys: Annotated[
        Optional[list[str]], typer.Option("--keys", "--key", metavar="KEY", help="A key; may be given again.")
    ] = None,
    source: Annotated[
        Optional[list[str]],
        typer.Option(metavar="GLOB", help="All documents of a source, besides; may be given again."),
    ] = None,
    where: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="CONDITION",
            help="Alone: as lang=de, year>=2020, 'title ~ ^List'; several must all hold.",
        ),
    ] = None,
    wait: Wait = None,
    as_json: Json = False,
) -> None:
    """Delete documents, at once for every reader: search, neighbours, training. `compact` returns their space."""
    from retrodb.cli.progress import make_progress  # noqa: PLC0415
    from retrodb.corpus.selection import Condition, Selection  # noqa: PLC0415
    from retrodb.pipelines.living import delete as run_delete  # noqa: PLC0415
    from retrodb.storage import Storage  # noqa: PLC0415

    selection = Selection(
        ids=_numbers(ids or ""),
        keys=tuple(keys or ()),
        sources=tuple(source or ()),
        where=tuple(Condition.parse(text) for text in where or ()),
    )
    run = run_settings(wait=wait)
    with contextlib.closing(make_progress()) as progress:
        done = run_delete(Storage(database), selection, progress, run.wait)
    if as_json:
        echo_json(dataclasses.asdict(done))


def swap(
    database: Database,
    inputs: Annotated[
        Optional[list[str]], typer.Argument(metavar="INPUT...", help="The new corpus, as `build` takes it.")
    ] = None,
    to: Annotated[
        Optional[int], typer.Option(metavar="VERSION", help="No new corpus: go to a version that is kept.")
    ] = None,
    workers: Workers = None,
    device: Device = None,
    runner: Runner = None,
    runner_option: RunnerOption = None,
    wait: Wait = None,
    as_json: Json = False,
) -> None:
    """Put another corpus in place of the current one, as the next version, under the same settings and encoder."""
    from retrodb.cli.progress import make_progress  # noqa: PLC0415
    from retrodb.corpus import expand_inputs  # noqa: PLC0415
    from retrodb.errors import UsageError  # noqa: PLC0415
    from retrodb.pipelines.swap import swap as run_swap  # noqa: PLC0415
    from retrodb.pipelines.swap import swap_back  # noqa: PLC0415
    from retrodb.storage import Storage  # noqa: PLC0415

    if bool(inputs) == (to is not None):
        raise UsageError("give the new corpus, or --to VERSION, and not both.")
    run = run_settings(workers, runner, runner_option, device, wait)
    storage = Storage(database)
    with contextlib.closing(make_progress()) as progress:
        done = (
            run_swap(storage, expand_inputs(inputs), run, progress)
            if inputs
            else swap_back(storage, to or 0, progress, run.wait)
        )
    if as_json:
        echo_json(dataclasses.asdict(done))


def compact(
    database: Database,
    workers: Workers = None,
    device: Device = None,
    runner: Runner = None,
    runner_option: RunnerOption = None,
    wait: Wait = None,
    as_json: Json = False,
) -> None:
    """Return the space of deleted documents, as the next version: what held something deleted is written without it."""
    from retrodb.cli.progress import make_progress  # noqa: PLC0415
    from retrodb.cli.render import size_text  # noqa: PLC0415
    from retrodb.pipelines.compact import compact as run_compact  # noqa: PLC0415
    from retrodb.storage import Storage  # noqa: PLC0415

    run = run_settings(workers, runner, runner_option, device, wait)
    with contextlib.closing(make_progress()) as progress:
        done = run_compact(Storage(database), run, progress)
    if as_json:
        echo_json(dataclasses.asdict(done))
    elif done.documents:
        echo(f"the tables take {size_text(done.bytes_after)} now, {size_text(done.bytes_before)} before")


def _numbers(text: str) -> tuple[int, ...]:
    from retrodb.errors import UsageError  # noqa: PLC0415

    try:
        found = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        found = (-1,)
    if any(not 0 <= number < 1 << 63 for number in found):
        raise UsageError(f"--ids {text!r}: write document ids, as 12 or 12,4294967296.")
    return found
