"""What a database is made of: chunks, RETRO's unit, or blocks, REALM's; and what each of the two has."""

from collections.abc import Mapping
from typing import Any, Final, Literal, get_args

from retrodb.errors import InputError
from retrodb.manifest import STAGES, TABLES, Manifest

Unit = Literal["chunk", "block"]
UNITS: Final[tuple[Unit, ...]] = get_args(Unit)

BLOCK_TOKENS: Final = 288
"""Wordpieces of a block with its title and the special tokens (Guu et al. 2020)."""

_OF_CHUNKS_ALONE: Final = ("training", "report")
"""Sequences of consecutive chunks with their neighbours, and what those give away: RETRO's, not REALM's."""
_TABLES_OF_CHUNKS: Final = ("training", "leakage")
_TABLES_OF_BLOCKS: Final = ("block_duplicates", "null")


def unit_of(config: Mapping[str, Any]) -> Unit:
    """The unit in the recorded settings of a database, or of its chunk stage; earlier versions do not name it."""
    return "block" if config.get("unit") == "block" else "chunk"


def stages_of(unit: Unit) -> tuple[str, ...]:
    """The stages of a database of this unit, in order."""
    return STAGES if unit == "chunk" else tuple(stage for stage in STAGES if stage not in _OF_CHUNKS_ALONE)


def tables_of(unit: Unit) -> tuple[str, ...]:
    """The tables of a database of this unit."""
    others = _TABLES_OF_BLOCKS if unit == "chunk" else _TABLES_OF_CHUNKS
    return tuple(table for table in TABLES if table not in others)


def refuse_table(manifest: Manifest, table: str, url: str) -> None:
    """Say that a table is of the other unit, where it is.

    Raises:
        InputError: a database of this unit never has it.
    """
    unit = unit_of(manifest.config)
    if table not in tables_of(unit):
        other = "chunk" if unit == "block" else "block"
        raise InputError(
            f"{url} is a database of {unit}s and has no {table}, which belongs to {other}s: "
            f"build one with --unit {other}."
        )


def is_complete(manifest: Manifest) -> bool:
    """Whether all stages of a database are done."""
    return all(stage in manifest.stages for stage in stages_of(unit_of(manifest.config)))
