"""What REALM's reviewers asked for, measured: the experiment behind docs/experiments.md.

    python benchmarks/realm_gain.py --corpora FOLDER [--quick] [--work FOLDER]
    python benchmarks/realm_gain.py --report-only

Pre-trains under each condition (refreshed, 30 x rarer, never; salient, random spans, random tokens; retriever or reader
alone), with a refresher in a second process; fine-tunes on the Factbook of 2016 and asks that of 2020; measures
zero-shot recall of four corpora. Writes the figures (``benchmarks/results/realm_gain.json``) and the page that is made
of them (``docs/experiments.md``), anew after each part. Killed at any moment, the same command goes on: finished
parts are kept, a run under way goes on from its checkpoint. ``--quick`` takes minutes, and writes both files into the
work folder: they are not the experiment's. With ``--share 1/2`` and ``--share 2/2`` two processes share the work, a
core each; neither writes figures or page, which the command without it then does.

FOLDER holds the corpora as ``NAME.jsonl.gz``; realm_experiment/plan.py names them.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gain.files import arguments, claim, given_to, machine, put_part, write_json
from realm_experiment.page import page
from realm_experiment.plan import FULL, QUICK, Condition, RealmExperiment

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "realm_gain.json"
PAGE = ROOT / "docs" / "experiments.md"


def run(
    experiment: RealmExperiment,
    corpora: Path,
    work: Path,
    results: Path,
    out: Path,
    share: tuple[int, int] | None = None,
) -> None:
    """The whole experiment, or what of it is left to do.

    Args:
        experiment: what is compared with what.
        corpora: folder of the texts.
        work: folder for texts, databases, runs and finished parts; may be gone on with.
        results: the JSON file of all figures.
        out: the page.
        share: (which, of how many) of the parts to make, without writing figures and page.
    """
    import torch
    from realm_experiment.databases import alone

    torch.set_num_threads(1)  # a part is the same whether it shares the machine or not
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with alone(work):
        claim(work, experiment.as_json())
    plan = Parts(experiment, corpora, work)
    if share is not None:
        for number, part in enumerate(plan.all()):
            if number % share[1] == share[0]:
                part.made(work)
        return
    found: dict[str, Any] = {
        "experiment": experiment.as_json(),
        "machine": machine(),
        "databases": {"pretraining": plan.described()},
        "runs": [],
        "swap": [],
        "zero_shot": {},
    }
    for part in plan.all():
        made = part.made(work)
        if part.kind == "zero_shot":
            found["zero_shot"][part.name] = made
        else:
            found[part.kind].append(made)
        write_json(results, found)
        write_page(results, out)


@dataclass(frozen=True)
class Part:
    """A piece of the experiment that is kept once it is done: of ``runs``, ``swap`` or ``zero_shot``."""

    kind: str
    name: str
    make: Callable[[], dict[str, Any]]

    def made(self, work: Path) -> dict[str, Any]:
        """Read where it is there, else made and kept."""
        path = work / "parts" / f"{self.kind}-{self.name}.json"
        if not path.exists():
            write_json(path, self.make())
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return found


class Parts:
    """What there is to do, on databases that are built when they are needed."""

    def __init__(self, experiment: RealmExperiment, corpora: Path, work: Path) -> None:
        self.experiment, self.corpora, self.work = experiment, corpora, work

    def all(self) -> Iterator[Part]:
        """Seed by seed, so that what was cut off has whole seeds; the rest last."""
        from realm_experiment.databases import zero_shot

        experiment = self.experiment
        for seed in experiment.seeds:
            for condition in experiment.conditions:
                yield Part("runs", f"{condition.name}-{seed}", partial(self._pretrained, condition, seed))
            yield Part("swap", f"{seed}", partial(self._swapped, seed))
        for one in experiment.zero_shot:
            yield Part("zero_shot", one.name, partial(zero_shot, experiment, one, self.corpora, self.work))

    def described(self) -> dict[str, int]:
        """How large the corpus of pre-training is."""
        from realm_experiment.databases import describe

        return describe(self._masked(self.experiment.conditions[0].mask))

    def _masked(self, mask: str) -> Path:
        """The corpus of pre-training with masked queries."""
        from realm_experiment.databases import build_blocks, small_bert

        experiment = self.experiment
        return build_blocks(
            experiment.corpus,
            self.corpora,
            self.work,
            mask,
            experiment.chunk_tokens,
            mask,
            encoder=small_bert(experiment, self.work),
            until="neighbours",
        )

    def _pretrained(self, condition: Condition, seed: int) -> dict[str, Any]:
        from realm_experiment.databases import small_bert, write_questions
        from realm_experiment.pretraining import pretrain

        experiment, work = self.experiment, self.work
        questions = write_questions(
            experiment.questions, self.corpora, experiment.corpus, work, "pretraining", experiment.most_questions
        )
        bert = small_bert(experiment, work)
        return pretrain(experiment, condition, seed, self._masked(condition.mask), bert, work, questions)

    def _factbooks(self) -> dict[str, Path]:
        from realm_experiment.databases import build_blocks

        swap = self.experiment.swap
        return {
            which: build_blocks(one, self.corpora, self.work, f"swap-{which}", swap.chunk_tokens, until="index")
            for which, one in (("old", swap.old), ("new", swap.new))
        }

    def _swapped(self, seed: int) -> dict[str, Any]:
        from realm_experiment.databases import small_bert, write_questions
        from realm_experiment.swapping import swap_seed

        swap, bert = self.experiment.swap, small_bert(self.experiment, self.work)
        questions = write_questions(swap.questions, self.corpora, swap.old, self.work, "swap")
        return swap_seed(swap, seed, self._factbooks(), bert, questions, self.work)


def write_page(results: Path, out: Path) -> None:
    """This experiment's part of the page, from a results file."""
    put_part(out, "realm_gain", page(json.loads(results.read_text("utf-8"))))


def main() -> None:
    parser = arguments(__doc__, "realm-gain", RESULTS, PAGE)
    parser.add_argument("--share", metavar="N/M", help="the Nth of M shares of the work alone")
    given = given_to(parser)
    if given.report_only:
        write_page(given.results, given.page)
        return
    share = None
    if given.share is not None:
        which, _, of = given.share.partition("/")
        if not (which.isdigit() and of.isdigit() and 1 <= int(which) <= int(of)):
            parser.error(f"--share {given.share}: write 1/2 or 2/2")
        share = (int(which) - 1, int(of))
    run(QUICK if given.quick else FULL, given.corpora, given.work, given.results, given.page, share)


if __name__ == "__main__":
    main()
