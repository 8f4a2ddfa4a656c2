"""What REALM's reviewers asked for, measured: the experiment behind docs/realm-experiments.md.

    python benchmarks/realm_gain.py --corpora FOLDER [--quick] [--work FOLDER]
    python benchmarks/realm_gain.py --report-only

Pre-trains under each condition (refreshed, 30 x rarer, never; salient, random spans, random tokens; retriever or reader
alone), with a refresher in a second process; fine-tunes on the Factbook of 2016 and asks that of 2020; measures
zero-shot recall of four corpora. Writes the figures (``benchmarks/results/realm_gain.json``) and the page that is made
of them (``docs/realm-experiments.md``), anew after each part. Killed at any moment, the same command goes on: finished
parts are kept, a run under way goes on from its checkpoint. ``--quick`` takes minutes, and writes both files into the
work folder: they are not the experiment's.

FOLDER holds the corpora as ``NAME.jsonl.gz``; realm_experiment/plan.py names them.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gain.files import claim, machine, write_json
from realm_experiment.page import page
from realm_experiment.plan import FULL, QUICK, RealmExperiment

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "realm_gain.json"
PAGE = ROOT / "docs" / "realm-experiments.md"


def run(experiment: RealmExperiment, corpora: Path, work: Path, results: Path, out: Path) -> None:
    """The whole experiment, or what of it is left to do.

    Args:
        experiment: what is compared with what.
        corpora: folder of the texts.
        work: folder for texts, databases, runs and finished parts; may be gone on with.
        results: the JSON file of all figures.
        out: the page.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    claim(work, experiment.as_json())
    found: dict[str, Any] = {
        "experiment": experiment.as_json(),
        "machine": machine(),
        "databases": {},
        "runs": [],
        "swap": [],
        "zero_shot": {},
    }
    for change in _parts(experiment, corpora, work):
        change(found)
        write_json(results, found)
        if found["databases"]:
            write_page(results, out)


def _parts(experiment: RealmExperiment, corpora: Path, work: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Each part, done or read, as what it adds to the figures; seed by seed, so that a cut-off run has whole seeds."""
    from gain.corpora import write_selection
    from realm_experiment.databases import (
        build_blocks,
        describe,
        run_command,
        small_bert,
        write_questions,
        zero_shot,
    )
    from realm_experiment.pretraining import pretrain
    from realm_experiment.swapping import swap_seed

    bert = small_bert(experiment, work)
    texts: dict[str, Path] = {}
    for mask in dict.fromkeys(condition.mask for condition in experiment.conditions):
        options = {"encoder": bert, "until": "neighbours"}
        texts[mask] = build_blocks(experiment.corpus, corpora, work, mask, experiment.chunk_tokens, **options)
        run_command("spans", texts[mask], "--mask", mask, "--workers", 1)
    selected = write_selection(experiment.corpus, corpora, work / "texts")
    most = experiment.most_questions
    questions = write_questions(experiment.questions, corpora, selected, work / "questions" / "pretraining.jsonl", most)
    yield lambda found: found["databases"].update(pretraining=describe(texts[experiment.conditions[0].mask]))

    swap = experiment.swap
    for seed in experiment.seeds:
        for condition in experiment.conditions:
            path = work / "parts" / f"run-{condition.name}-{seed}.json"
            make = partial(pretrain, experiment, condition, seed, texts[condition.mask], bert, work, questions)
            yield _adding("runs", _once(path, make))
        if seed == experiment.seeds[0]:
            sides = {"old": swap.old, "new": swap.new}
            factbooks = {
                which: build_blocks(one, corpora, work, f"swap-{which}", swap.chunk_tokens, until="index")
                for which, one in sides.items()
            }
            documents = write_selection(swap.old, corpora, work / "texts")
            changed = write_questions(swap.questions, corpora, documents, work / "questions" / "swap.jsonl")
        path = work / "parts" / f"swap-{seed}.json"
        yield _adding("swap", _once(path, partial(swap_seed, swap, seed, factbooks, bert, changed, work)))
    for one in experiment.zero_shot:
        path = work / "parts" / f"zero-shot-{one.name}.json"
        yield _naming(one.name, _once(path, partial(zero_shot, experiment, one, corpora, work)))


def _once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A part: read where it is there, else made and kept."""
    if not path.exists():
        write_json(path, make())
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def _adding(name: str, part: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    return lambda found: found[name].append(part)


def _naming(name: str, part: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    return lambda found: found["zero_shot"].update({name: part})


def write_page(results: Path, out: Path) -> None:
    """The page of a results file."""
    out.write_text(page(json.loads(results.read_text("utf-8"))), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, help="folder of the texts")
    parser.add_argument("--work", type=Path, default=Path("realm-gain"), help="for databases, runs and finished parts")
    parser.add_argument("--quick", action="store_true", help="a small experiment, in minutes")
    parser.add_argument("--report-only", action="store_true", help="write the page of the committed figures anew")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    if given.report_only:
        write_page(given.results, given.page)
        return
    if given.corpora is None:
        parser.error("--corpora is needed: the folder of the texts")
    if given.quick:
        given.work.mkdir(parents=True, exist_ok=True)
        given.results, given.page = given.work / "realm_gain.json", given.work / "realm-experiments.md"
    run(QUICK if given.quick else FULL, given.corpora, given.work, given.results, given.page)


if __name__ == "__main__":
    main()
