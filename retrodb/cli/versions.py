"""``retrodb refresh`` and ``gc``: versions of a database, made and retired."""

import contextlib
from typing import Annotated, Any, Literal, Optional

import typer

from retrodb.cli.echo import echo, echo_json
from retrodb.cli.look import Database, Json
from retrodb.cli.running import Device, Runner, RunnerOption, Wait, Workers, run_settings
from retrodb.sizes import count_of


def refresh(
    database: Database,
    encoder: Annotated[
        Optional[str], typer.Option(metavar="CKPT", help="The new encoder: a folder, or a hub name.")
    ] = None,
    step: Annotated[Optional[int], typer.Option(min=0, help="The checkpoint's training step, to be recorded.")] = None,
    watch: Annotated[
        Optional[str], typer.Option(metavar="DIR", help="Follow a trainer's exports (DIR/step-<n>) until DIR/done.")
    ] = None,
    schedule: Annotated[
        str, typer.Option(metavar="START-END:EVERY,...", help="With --watch: at which steps. [every export]")
    ] = "0-:1",
    max_staleness: Annotated[
        Optional[str], typer.Option(metavar="N|TIME", help="With --watch: steps, as 1500, or a time, as 10m, or both.")
    ] = None,
    on_stale: Annotated[str, typer.Option(help="With --watch: warn, or block (DIR/hold is there meanwhile).")] = "warn",
    poll: Annotated[float, typer.Option(min=0.05, help="With --watch: seconds between looks.")] = 2.0,
    keep: Annotated[int, typer.Option(min=3, help="With --watch: so many of the newest versions are kept.")] = 3,
    workers: Workers = None,
    device: Device = None,
    runner: Runner = None,
    runner_option: RunnerOption = None,
    wait: Wait = None,
    as_json: Json = False,
) -> None:
    """Embed the text with another encoder, and publish that as the next version: readers keep theirs meanwhile."""
    from retrodb.cli.progress import make_progress  # noqa: PLC0415
    from retrodb.errors import UsageError  # noqa: PLC0415
    from retrodb.pipelines.refresh import refresh as run_refresh  # noqa: PLC0415
    from retrodb.storage import Storage  # noqa: PLC0415

    if (encoder is None) == (watch is None):
        raise UsageError("give --encoder CKPT, or --watch DIR, and not both.")
    run = run_settings(workers, runner, runner_option, device, wait)
    storage = Storage(database)
    with contextlib.closing(make_progress()) as progress:
        if encoder is not None:
            outcome = run_refresh(storage, encoder, run, progress, step=step)
            answer = {"version": outcome.version, "done": list(outcome.done), "published": bool(outcome.done)}
        else:
            settings = _watch_settings(watch or "", schedule, max_staleness, on_stale, poll, keep)
            published = _watch(storage, settings, run, progress)
            answer = {"published": published}
    if as_json:
        echo_json(answer)


def _watch_settings(
    folder: str, schedule: str, max_staleness: str | None, on_stale: str, poll: float, keep: int
) -> Any:
    from retrodb.errors import UsageError  # noqa: PLC0415
    from retrodb.pipelines.watch import WatchSettings  # noqa: PLC0415
    from retrodb.refreshing import Schedule, StalenessLimit  # noqa: PLC0415

    kinds: dict[str, Literal["block", "warn"]] = {"block": "block", "warn": "warn"}
    if on_stale not in kinds:
        raise UsageError(f"--on-stale {on_stale}: give block or warn.")
    limit = StalenessLimit.parse(max_staleness) if max_staleness else StalenessLimit()
    return WatchSettings(folder, Schedule.parse(schedule), limit, kinds[on_stale], poll, keep)


def _watch(storage: Any, settings: Any, run: Any, progress: Any) -> list[int]:
    from retrodb.pipelines.watch import Watch  # noqa: PLC0415

    watch = Watch(storage, settings, run, progress)
    watch.run()
    return watch.published


def gc(
    database: Database,
    keep: Annotated[int, typer.Option(min=3, help="So many of the newest versions are kept.")] = 3,
    grace: Annotated[
        float, typer.Option(min=0.0, help="Hours that a version stays on an object store, where readers are unseen.")
    ] = 24.0,
    forget: Annotated[
        bool, typer.Option("--forget", help="Retire the newest too, as far as they hold a document that is deleted.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and do nothing.")] = False,
    wait: Wait = None,
    as_json: Json = False,
) -> None:
    """Retire old versions, never one in use, and remove files that no version names."""
    from retrodb.cli.progress import make_progress  # noqa: PLC0415
    from retrodb.pipelines.holding import held  # noqa: PLC0415
    from retrodb.retiring import collect  # noqa: PLC0415
    from retrodb.storage import Storage  # noqa: PLC0415

    storage = Storage(database)
    run = run_settings(wait=wait)
    with contextlib.closing(make_progress()) as progress, held(storage, progress, run.wait) as current:
        done = collect(storage, current, keep, grace * 3600, forget=forget, dry_run=dry_run)
    _tell_collected(done, dry_run, as_json)
    if forget and done.in_use:
        from retrodb.errors import LockedError  # noqa: PLC0415

        why = "open in a reader" if storage.is_local else f"replaced less than {grace:g} hours ago, and may be open"
        remedy = "" if storage.is_local else " with --grace 0"
        echo(
            f"error: {storage.url}: what is deleted is still in version {', '.join(map(str, done.in_use))}, {why}. "
            f"End who reads it, and run the same command again{remedy}.",
            err=True,
        )
        raise typer.Exit(LockedError.exit_code)


def _tell_collected(done: Any, dry_run: bool, as_json: bool) -> None:
    from retrodb.cli.render import size_text  # noqa: PLC0415

    if as_json:
        echo_json(
            {"retired": list(done.retired), "in_use": list(done.in_use), "files": done.files, "bytes": done.bytes}
        )
        return
    what = ", ".join(map(str, done.retired)) or "none"
    verb = "would be removed" if dry_run else "removed"
    echo(f"versions retired: {what}; {count_of(done.files, 'file')}, {size_text(done.bytes)} {verb}")
    if done.in_use:
        echo(f"kept, since they are in use: {', '.join(map(str, done.in_use))}")
