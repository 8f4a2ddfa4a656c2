"""The command line: ``retrodb build | plan | info | verify | query | show | export | index merge``.

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

from retrodb.__main__ import INTERRUPTED
from retrodb._version import __version__
from retrodb.cli.build import build
from retrodb.cli.echo import echo, echo_json
from retrodb.cli.export import export
from retrodb.cli.index import index_commands
from retrodb.cli.look import info, query, show
from retrodb.cli.plan import plan
from retrodb.cli.verify import verify
from retrodb.errors import RetrodbError

app = typer.Typer(
    name="retrodb",
    help="Turns raw text corpora into retrieval databases for language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (build, plan, info, verify, query, show, export):
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
            echo("\ninterrupted: what is finished is kept; run the same command again to go on.", err=True)
        _leave(code)
    except RetrodbError as error:
        echo(f"error: {error}", err=True)
        if "--json" in sys.argv:
            echo_json({"error": str(error), "exit_code": error.exit_code})
        _leave(error.exit_code)
    except BrokenPipeError:
        _leave(0)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        first = "Free some space: what" if error.errno == errno.ENOSPC else "What"
        echo(f"error: {error.strerror or error}{where}. {first} is finished is kept; run it again.", err=True)
        _leave(1)
    _leave(0)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _leave(code: int) -> None:
    """Exit at once: a pipeline that was cut short leaves threads behind that would wait for ever."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
