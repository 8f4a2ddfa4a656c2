"""Plans side by side, as the table of ``docs/scale.md``."""

from collections.abc import Sequence
from typing import Final

from retrodb.planning.figures import Figure
from retrodb.planning.scale import Scale

_UNITS: Final = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
_THOUSANDS: Final = ("", " thousand", " million", " billion", " trillion")


def shown(figure: Figure) -> str:
    """A figure as a person reads it, to three digits."""
    if isinstance(figure.value, str):
        return figure.value
    if figure.unit == "bytes":
        return _scaled(figure.value, _UNITS, " ")
    if figure.value < 1e6:
        number = f"{figure.value:,.0f}" if figure.value >= 100 or figure.value == 0 else f"{figure.value:.3g}"
    else:
        number = _scaled(figure.value, _THOUSANDS, "")
    return f"{number} {figure.unit}".strip()


def _scaled(value: float, units: Sequence[str], space: str) -> str:
    step = 0
    while value >= 999.5 and step < len(units) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.3g}{space}{units[step]}"


def scale_table(plans: Sequence[Scale]) -> str:
    """Markdown: a row a figure, a column a plan."""
    heads = [f"{plan.assumed.tokens:.3g} tokens".replace("e+0", "e").replace("e+", "e") for plan in plans]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(plans) + 1) + "|"]
    for section, figures in plans[0].sections.items():
        lines.append(f"| **{section}** |" + " |" * len(plans))
        for name in figures:
            cells = " | ".join(shown(plan.sections[section][name]) for plan in plans)
            lines.append(f"| {name} | {cells} |")
    return "\n".join(lines) + "\n"
