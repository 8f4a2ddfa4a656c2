"""What experiments keep: files that are whole or not there, the claim on a work folder, the machine they ran on."""

import json
import platform
import sys
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    part.replace(path)


def claim(work: Path, experiment: dict[str, Any]) -> None:
    """Refuse a folder that another experiment was begun in."""
    path, own = work / "experiment.json", json.loads(json.dumps(experiment))
    if path.exists() and json.loads(path.read_text("utf-8")) != own:
        sys.exit(f"{work} holds another experiment (see {path}): name another --work, or remove it.")
    write_json(path, own)


def machine() -> dict[str, str]:
    """Processor, torch and Python."""
    import torch

    cpu = next((ln.split(":")[1].strip() for ln in _cpu_lines() if ln.startswith("model name")), platform.processor())
    return {"cpu": cpu, "torch": torch.__version__, "python": platform.python_version()}


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text("utf-8").splitlines() if path.exists() else []
