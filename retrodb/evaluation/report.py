"""An evaluation as people read it: a table in Markdown, a picture, and JSON."""

import io
from typing import Final

from retrodb.evaluation.intervals import Estimate, Estimates
from retrodb.evaluation.run import Evaluated
from retrodb.sizes import count_of
from retrodb.storage import Storage

JSON_NAME: Final = "evaluation.json"
TABLE_NAME: Final = "evaluation.md"
PLOT_NAME: Final = "evaluation.png"


def write_report(evaluated: Evaluated, out: str) -> list[str]:
    """Write all three into a folder; returns their full names."""
    storage = Storage(out)
    storage.commit_json(JSON_NAME, evaluated.as_json())
    storage.commit_bytes(TABLE_NAME, markdown(evaluated).encode())
    storage.commit_bytes(PLOT_NAME, plot(evaluated))
    return [storage.describe(name) for name in (JSON_NAME, TABLE_NAME, PLOT_NAME)]


def markdown(evaluated: Evaluated) -> str:
    """The table: overall, then by leakage."""
    about = evaluated.about
    lines = [
        "# Bits per byte",
        "",
        f"{count_of(about['documents'], about['split'] + ' document')}, {count_of(about['chunks'], 'chunk')}, "
        f"{about['bytes_predicted']:,} bytes predicted ({about['share_of_bytes']:.1%} of all); "
        f"{count_of(len(about['checkpoints']), 'checkpoint')}. Intervals are 95%, over documents and checkpoints. "
        "Gain: fewer bits than without retrieval.",
        "",
        "| neighbours | bits per byte | gain |",
        "|---|---|---|",
    ]
    for condition, bits, gain in _rows(evaluated, evaluated.overall):
        lines.append(f"| {condition} | {_shown(bits)} | {_shown(gain) if condition != 'off' else ''} |")
    if evaluated.by_leakage:
        names = [condition.name for condition in evaluated.conditions]
        lines += ["", "Chunks with r(C) <= alpha alone (RETRO, section 2.6):", ""]
        lines += ["| alpha | chunks | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
        for alpha, chunks, estimates in evaluated.by_leakage:
            cells = [f"{bits.value:.4f}" for bits in estimates.bits] if estimates else ["" for _ in names]
            lines.append(f"| {alpha:.1%} | {chunks:,} | " + " | ".join(cells) + " |")
    lines += ["", *(f"Note: {note}" for note in evaluated.notes)]
    return "\n".join(lines).rstrip() + "\n"


def _rows(evaluated: Evaluated, estimates: Estimates) -> list[tuple[str, Estimate, Estimate]]:
    names = [condition.name for condition in evaluated.conditions]
    return list(zip(names, estimates.bits, estimates.gains, strict=True))


def _shown(estimate: Estimate) -> str:
    if estimate.interval is None:
        return f"{estimate.value:.4f}"
    return f"{estimate.value:.4f} [{estimate.interval[0]:.4f}, {estimate.interval[1]:.4f}]"


def plot(evaluated: Evaluated) -> bytes:
    """A PNG: the gain of each condition with its interval, and bits per byte by leakage."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - half a second, at the end of a run

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = _rows(evaluated, evaluated.overall)[1:]
    values = [gain.value for _, _, gain in rows]
    errors = [
        [max(0.0, gain.value - (gain.interval or (gain.value,))[0]) for _, _, gain in rows],
        [max(0.0, (gain.interval or (gain.value,))[-1] - gain.value) for _, _, gain in rows],
    ]
    left.barh(range(len(rows)), values, xerr=errors if rows else None)
    left.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    left.invert_yaxis()
    left.set_xlabel("gain over no retrieval, bits per byte")
    found = [(alpha, estimates) for alpha, _, estimates in evaluated.by_leakage if estimates]
    for place, condition in enumerate(evaluated.conditions):
        right.plot(
            [alpha for alpha, _ in found], [e.bits[place].value for _, e in found], marker="o", label=condition.name
        )
    right.set_xlabel("chunks with r(C) at most")
    right.set_ylabel("bits per byte")
    if found:
        right.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
