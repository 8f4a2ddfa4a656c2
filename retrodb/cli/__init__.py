"""The command line, one small module a command: ``retrodb build | refresh | add | swap | delete | compact | gc | plan |
info | verify | query | show | export | index merge``, and ``train | retrofit | evaluate | generate`` of the reference
model.

One small module a command. Only these modules print. Nothing heavy is imported before a command runs, so that
``--help`` is immediate.
"""

import contextlib
import errno
import logging
import os
import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from retrodb._version import __version__
from retrodb.cli.build import build
from retrodb.cli.echo import echo, echo_json
from retrodb.cli.evaluate import evaluate
from retrodb.cli.evaluate_retrieval import evaluate_retrieval
from retrodb.cli.export import export
from retrodb.cli.generate import generate
from retrodb.cli.index import index_commands
from retrodb.cli.living import add, compact, delete, swap
from retrodb.cli.look import info, query, show
from retrodb.cli.open_qa import answer, finetune_qa
from retrodb.cli.plan import plan
from retrodb.cli.realm import realm
from retrodb.cli.spans import spans
from retrodb.cli.train import retrofit, train
from retrodb.cli.verify import verify
from retrodb.cli.versions import gc, refresh
from retrodb.errors import INTERRUPTED, RetrodbError, UsageError

app = typer.Typer(
    name="retrodb",
    help="Turns raw text corpora into retrieval databases for language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    build,
    refresh,
    add,
    swap,
    delete,
    compact,
    gc,
    plan,
    info,
    verify,
    query,
    show,
    export,
    train,
    retrofit,
    evaluate,
    generate,
    evaluate_retrieval,
    spans,
    realm,
    finetune_qa,
    answer,
):
    app.command()(command)
app.add_typer(index_commands, name="index")


def _version(wanted: bool) -> None:
    if wanted:
        echo(f"retrodb {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version),
    ] = False,
) -> None:
    """Turns raw text corpora into retrieval databases for language models."""


def main() -> None:
    """Run the command line and exit: 0 done, 2 usage, 3 refused, 4 damaged, 5 recall, 6 locked, 130 interrupted."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    logging.getLogger().addHandler(logging.NullHandler())  # libraries' advice is not for the user's screen
    try:
        app(standalone_mode=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code == INTERRUPTED:  # what Typer makes of KeyboardInterrupt
            _fail(code, "interrupted: what is finished is kept; run the same command again to go on.", before="\n")
        if code == UsageError.exit_code:  # Typer's own words are on stderr by now
            _answer(code, "a wrong flag or argument: see stderr, and --help.")
        _leave(code)
    except RetrodbError as error:
        _fail(error.exit_code, str(error), before="error: ")
    except BrokenPipeError:
        _leave(0)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        first = "Free some space: what" if error.errno == errno.ENOSPC else "What"
        _fail(1, f"{error.strerror or error}{where}. {first} is finished is kept; run it again.", before="error: ")
    _leave(0)


def _fail(code: int, message: str, before: str) -> None:
    """Say why, for people and, where JSON was asked for, for programs, and exit."""
    with contextlib.suppress(OSError):
        echo(f"{before}{message}", err=True)
    _answer(code, message)
    _leave(code)


def _answer(code: int, message: str) -> None:
    if "--json" in sys.argv:
        with contextlib.suppress(OSError):  # nobody reads it any more
            echo_json({"error": message, "exit_code": code})


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _leave(code: int) -> None:
    """Exit at once: a pipeline that was cut short leaves threads behind that would wait for ever."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
