"""How a command that makes a version is carried out: the flags that `build` has as well, of the same names."""

from typing import Annotated, Any, Optional

import typer

Workers = Annotated[Optional[str], typer.Option(metavar="<int>", help="Worker processes. [the cores]")]
Device = Annotated[Optional[str], typer.Option(help="auto, cpu, cuda. [auto]")]
Runner = Annotated[Optional[str], typer.Option(help="local, flink, dataflow, portable. [local]")]
RunnerOption = Annotated[
    Optional[list[str]], typer.Option(metavar="KEY=VALUE", help="What the runner takes besides. [none]")
]
Wait = Annotated[
    Optional[str],
    typer.Option(metavar="DURATION", help="While another process writes it: wait so long, as 30s or 10m. [exit 6]"),
]


def run_settings(
    workers: Workers = None,
    runner: Runner = None,
    runner_option: RunnerOption = None,
    device: Device = None,
    wait: Wait = None,
) -> Any:
    """`retrodb.config.RunSettings` of these flags.

    Raises:
        UsageError: one is out of range.
    """
    from retrodb.config import make_config  # noqa: PLC0415 - only a real run pays for imports

    flags = {
        "workers": workers,
        "runner": runner,
        "runner_option": runner_option or None,
        "device": device,
        "wait": wait,
    }
    return make_config({}, {name: value for name, value in flags.items() if value is not None})[1]
