"""What re-ranking the neighbours is worth to a model: the same rows predicted with one database and with others.

    python benchmarks/rerank_gain.py --checkpoint CKPT --plain DB --reranked DB [-k 1] [-k 2] [--rows N]

The databases are builds of one text with one encoder that differ in ``--rerank`` alone: copy the folder and build it
again with ``--rerank bm25``, which makes neighbours, training and report anew. Documents and chunks are the same, so
that differences are paired by document (and by checkpoint, where several are given that differ in their seed), with
95% intervals as `retrodb evaluate` makes them. Prints Markdown.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from gain.models import Said, use_one_thread

import retrodb
from retrodb.evaluation.intervals import Estimate, Estimates, by_document, estimate
from retrodb.evaluation.run import Measured, measure_database
from retrodb.evaluation.settings import EvaluationSettings

ALPHA = 0.125
DRAWS = 1000


def measured(path: str, checkpoints: list[str], settings: EvaluationSettings) -> Measured:
    """What the models make of a database's rows."""
    with tempfile.TemporaryDirectory(prefix="rerank-gain-") as cache:
        return measure_database(retrodb.open(path), checkpoints, settings, Said(f"{path}: "), device="cpu", cache=cache)


def refuse_others(plain: str, others: list[str]) -> None:
    """End with a message where chunks or vectors are not the same: nothing could be paired."""

    def of(path: str) -> list[str]:
        manifest = retrodb.open(path).manifest
        return [shard.sha256 for table in ("chunks", "embeddings") for shard in manifest.shards(table)]

    for path in others:
        if of(path) != of(plain):
            sys.exit(f"{path} is not {plain} with other neighbours: its chunks or vectors are others.")


def name_of(path: str) -> str:
    """How a database's neighbours were chosen, in words."""
    made = retrodb.open(path).manifest.stages["neighbours"].made_from
    if "rerank" not in made:
        return "distance"
    return f"{made['rerank']} of {made['rerank_candidates']}"


def estimates(parts: list[tuple[Measured, str]], some: np.ndarray) -> Estimates | None:
    """Bits per byte of (database, condition) pairs over some of the chunks, and gains over the first pair."""
    first = parts[0][0]
    nats = np.stack([m.chunks.nats[:, [c.name for c in m.conditions].index(name)] for m, name in parts], axis=1)
    sums = by_document(first.chunks.document_ids[some], nats[:, :, some], first.lengths[some])
    return estimate(*sums, draws=DRAWS, seed=0)


def written(found: Estimate) -> str:
    """A figure and its interval."""
    interval = f" [{found.interval[0]:.4f}, {found.interval[1]:.4f}]" if found.interval else ""
    return f"{found.value:.4f}{interval}"


def table(found: dict[str, Measured], below: np.ndarray, title: str) -> list[str]:
    """One row a number of neighbours: bits per byte with each database, and what each gains over the first."""
    names = list(found)
    plain = found[names[0]]
    heads = [*names, *(f"gain of {name} over {names[0]}" for name in names[1:])]
    lines = [f"{title}: {int(below.sum())} chunks", "", f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for condition in [one.name for one in plain.conditions]:
        compared = estimates([(one, condition) for one in found.values()], below)
        if compared is not None:
            cells = [*map(written, compared.bits), *map(written, compared.gains[1:])]
            lines.append(f"| {condition} | {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description="What re-ranking the neighbours is worth to a model.")
    parser.add_argument("--checkpoint", action="append", required=True)
    parser.add_argument("--plain", required=True)
    parser.add_argument("--reranked", action="append", required=True)
    parser.add_argument("-k", type=int, action="append", help="neighbours; may be given again [1, 2]")
    parser.add_argument("--rows", type=int, help="validation rows, evenly spaced [all]")
    given = parser.parse_args()
    use_one_thread()
    refuse_others(given.plain, given.reranked)
    asked = (0, *(given.k or [1, 2]))
    settings = EvaluationSettings(neighbours=asked, rows=given.rows, batch=2, precision="fp32")
    found = {name_of(path): measured(path, given.checkpoint, settings) for path in (given.plain, *given.reranked)}
    plain = next(iter(found.values()))
    everything = np.ones(len(plain.lengths), dtype=bool)
    lines = table(found, everything, "All chunks")
    lines += table(found, plain.below(ALPHA), f"Chunks with r(C) <= {ALPHA:.1%} with the first database")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
