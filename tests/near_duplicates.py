"""Texts whose near-duplicates are known from how they are made, and what holds of a database of them."""

import json
import random
from pathlib import Path
from typing import Any

from support import table_of

import retrodb as package
from retrodb.corpus.quickstart import quickstart_lines
from retrodb.quality.verify import verify_database


def words_of(seed: int, number: int = 300) -> list[str]:
    """Words of a seeded random walk through real text, so that no two seeds share 13 in a row."""
    chance = random.Random(seed)
    vocabulary = sorted({word for line in quickstart_lines() for word in json.loads(line)["text"].split()[:400]})
    return [chance.choice(vocabulary) for _ in range(number)]


def varied(words: list[str], copy: int) -> str:
    """The words with one changed: 13 of some 290 13-grams are others, a Jaccard similarity of 0.91."""
    return " ".join([*words[: 40 + 3 * copy], f"changed{copy}", *words[41 + 3 * copy :]])


def half_new(words: list[str], copy: int) -> str:
    """Half the words are others: far below 0.8."""
    return " ".join([*words[:150], *words_of(9_000 + copy, 150)])


def counts_of(database: Path) -> dict[str, Any]:
    return package.open(str(database)).summary()["documents"]


def assert_conserved(database: Path) -> None:
    counts = counts_of(database)
    assert counts["in"] == counts["kept"] + sum(counts["dropped"].values()) + counts["quarantined"]
    assert counts["kept"] == table_of(database, "documents").num_rows


def verified(database: Path) -> None:
    report = verify_database(package.open(str(database)), sample=1.0)
    assert report.ok, report.problems
