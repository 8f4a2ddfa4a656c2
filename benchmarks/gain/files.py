"""What experiments keep: files that are whole or not there, the claim on a work folder, the machine they ran on."""

import argparse
import json
import platform
import re
import sys
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    part.replace(path)


def put_part(page: Path, name: str, text: str) -> None:
    """Write one part of a page that several experiments share; the others stay as they are.

    Args:
        page: the page; it need not be there.
        name: of the part, which begins after a comment that holds it.
        text: Markdown.
    """
    whole = page.read_text("utf-8") if page.exists() else ""
    _, *there = re.split(r"(?m)^<!-- (\w+) -->$", whole)
    parts = dict(zip(there[::2], there[1::2], strict=True)) | {name: text}
    written = page.with_suffix(".part")
    written.write_text(
        "\n\n".join(f"<!-- {one} -->\n\n{its.strip()}" for one, its in parts.items()) + "\n", encoding="utf-8"
    )
    written.replace(page)


def claim(work: Path, experiment: dict[str, Any]) -> None:
    """Refuse a folder that another experiment was begun in."""
    path, own = work / "experiment.json", json.loads(json.dumps(experiment))
    if path.exists() and json.loads(path.read_text("utf-8")) != own:
        sys.exit(f"{work} holds another experiment (see {path}): name another --work, or remove it.")
    write_json(path, own)


def arguments(about: str | None, folder: str, results: Path, page: Path) -> argparse.ArgumentParser:
    """What every experiment takes.

    Args:
        about: the script's docstring.
        folder: the work folder, if none is named.
        results: the committed figures.
        page: the page that is made of them.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, help="folder of the texts")
    parser.add_argument("--work", type=Path, default=Path(folder), help="for databases, models and finished parts")
    parser.add_argument("--quick", action="store_true", help="a small experiment, in minutes")
    parser.add_argument("--report-only", action="store_true", help="write the page of the committed figures anew")
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--page", type=Path, default=page)
    return parser


def given_to(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What was given. A quick experiment's figures and page go into the work folder: they are not the experiment's."""
    given = parser.parse_args()
    if not given.report_only and given.corpora is None:
        parser.error("--corpora is needed: the folder of the texts")
    if given.quick:
        given.work.mkdir(parents=True, exist_ok=True)
        given.results, given.page = given.work / given.results.name, given.work / given.page.name
    return given


def machine() -> dict[str, str]:
    """Processor, torch and Python."""
    import torch

    cpu = next((ln.split(":")[1].strip() for ln in _cpu_lines() if ln.startswith("model name")), platform.processor())
    return {"cpu": cpu, "torch": torch.__version__, "python": platform.python_version()}


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text("utf-8").splitlines() if path.exists() else []
