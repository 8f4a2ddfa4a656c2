"""``--runner-option KEY=VALUE``: what a runner takes besides, for all stages or (``embed.KEY=VALUE``) for one."""

import argparse
import contextlib
import difflib
import io
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from apache_beam.options.pipeline_options import PipelineOptions

from retrodb.config import split_option
from retrodb.errors import InputError

_OURS: Final = {
    "runner": "give --runner",
    "streaming": "a build is a batch job",
    "job_name": "retrodb names its jobs after the stage and the database",
    "save_main_session": "the pipelines are installed on the workers",
    "resource_hint": "stages carry their own",
    "resource_hints": "stages carry their own",
}


@dataclass(frozen=True)
class RunnerOptions:
    """Options as they were given: (stage or None, key, value)."""

    given: tuple[tuple[str | None, str, str], ...]

    @staticmethod
    def parse(texts: Iterable[str]) -> "RunnerOptions":
        """From ``KEY=VALUE`` texts.

        Raises:
            InputError: an option is retrodb's to set.
        """
        given = tuple(split_option(text) for text in texts)
        for _, key, _ in given:
            if key in _OURS:
                raise InputError(f"--runner-option {key}: not an option of yours to set; {_OURS[key]}.")
        return RunnerOptions(given)

    def keys(self) -> list[str]:
        return sorted({key for _, key, _ in self.given})

    def stages(self) -> list[str]:
        """The stages that options are given for alone."""
        return sorted({stage for stage, _, _ in self.given if stage is not None})

    def of(self, stage: str | None) -> dict[str, list[str]]:
        """The options of one stage: what is given for it alone replaces what is given for all."""
        values: dict[str, list[str]] = {}
        for wanted in (None, stage) if stage else (None,):
            own: dict[str, list[str]] = {}
            for where, key, value in self.given:
                if where == wanted:
                    own.setdefault(key, []).append(value)
            values |= own
        return values

    def one(self, key: str, stage: str | None = None) -> str | None:
        """The last value of an option, or None."""
        return self.of(stage).get(key, [None])[-1]

    def check_values(self, ours: Collection[str] = ()) -> None:
        """Refuse a value that Beam cannot read, of all stages or of one; ``ours`` are options that it is not given.

        Raises:
            InputError: a value is not of the option's type.
        """
        for stage in (None, *self.stages()):
            arguments({key: values for key, values in self.of(stage).items() if key not in ours})

    def refuse_unknown(self, runner: str, more: Collection[str] = ()) -> None:
        """Refuse what neither Beam nor the runner (``more``) knows.

        Raises:
            InputError: names the unknown options, and what they may have been meant for.
        """
        known = {name.removeprefix("--") for name in _beam_options()} | set(more)
        for key in self.keys():
            if key not in known:
                near = difflib.get_close_matches(key, known, 3)
                meant = f" Did you mean {', '.join(near)}?" if near else ""
                raise InputError(f"--runner-option {key}: the runner {runner!r} has no option of this name.{meant}")


def pipeline_options(options: Mapping[str, Iterable[str]], job_name: str) -> PipelineOptions:
    """The options of one job, as Beam has them.

    Raises:
        InputError: a value is not of the option's type.
    """
    return PipelineOptions([*arguments(options), f"--job_name={job_name}"])


def arguments(options: Mapping[str, Iterable[str]]) -> list[str]:
    """Options as Beam's command line has them; its switches are given as ``KEY=true``.

    Raises:
        InputError: a value is not of the option's type.
    """
    known = _beam_options()
    found: list[str] = []
    for key, values in options.items():
        action = known.get(f"--{key}")
        given = list(values)
        if action is None or action.nargs != 0:
            found += [f"--{key}={value}" for value in given]
        elif given[-1].lower() not in ("true", "false"):
            raise InputError(f"--runner-option {key}={given[-1]}: it is a switch; give true or false.")
        elif given[-1].lower() == "true":
            found.append(f"--{key}")
        else:
            found += _opposite(action, known)
    _parse(found)
    return found


def _opposite(action: Any, known: Mapping[str, Any]) -> list[str]:
    """The switch that says no, where Beam has one: ``--no_use_public_ips``."""
    others = (name for name, other in known.items() if other.dest == action.dest and other.const is (not action.const))
    return list(others)[:1]


def _parse(texts: list[str]) -> None:
    """Let Beam read the options once, so that a wrong value is our error and not the end of the process."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            PipelineOptions(texts).get_all_options(retain_unknown_options=True)
    except SystemExit as error:
        why = said.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        raise InputError(f"--runner-option: {why}.") from error


def _beam_options() -> dict[str, Any]:
    """argparse's actions of every option Beam itself knows, by ``--name``."""
    parser: Any = argparse.ArgumentParser(add_help=False, conflict_handler="resolve")
    for group in PipelineOptions.__subclasses__():
        group._add_argparse_args(parser)
    return dict(parser._option_string_actions)
