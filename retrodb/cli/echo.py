"""Printing what databases and files hold: nothing of it reaches the terminal as a command."""

import json
import re
from typing import Any, Final

import typer

_UNSAFE: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
"""Control characters but tab and newline, marks that reorder what is shown, and lone surrogates."""


def printable(text: str) -> str:
    """``text`` with control characters written as ``\\x1b`` or ``\\u202e``."""
    return _UNSAFE.sub(_escaped, text)


def _escaped(match: "re.Match[str]") -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}"


def echo(text: str = "", err: bool = False) -> None:
    """Print a line for people."""
    typer.echo(printable(text), err=err)


def echo_json(value: Any) -> None:
    """Print one line of JSON, its text readable, control characters escaped as JSON does."""
    text = json.dumps(value, ensure_ascii=False)
    typer.echo(_UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text))
