"""What a database is worth to a model: the experiment behind docs/experiments.md.

    python benchmarks/retro_gain.py --corpora FOLDER [--quick] [--work FOLDER] [--only SETTING]
    python benchmarks/retro_gain.py --report-only

Builds the databases, trains the models (base, RETRO from scratch, RETROfit, and bases of as many tokens and of as much
compute), measures each with either database, and writes the figures (``benchmarks/results/retro_gain.json``) and the
page that is made of them (``docs/experiments.md``), anew after each seed. Killed at any moment, the same command goes
on from there. ``--quick`` takes minutes, and writes both files into the work folder: they are not the experiment's.
With ``--only docs`` and ``--only wiki`` two processes share the work, a core each; neither writes figures or page,
which the command without it then does.

FOLDER holds the corpora as ``NAME.jsonl.gz``, with ``id`` and ``text`` in each line; gain/plan.py names them.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gain.files import arguments, claim, given_to, machine, put_part, write_json
from gain.page import page
from gain.plan import FULL, LARGER, MODELS, QUICK, RETRO, Experiment, Setting

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "retro_gain.json"
PAGE = ROOT / "docs" / "experiments.md"


def run(experiment: Experiment, corpora: Path, work: Path, results: Path, out: Path, only: str | None = None) -> None:
    """The whole experiment, or what of it is left to do.

    Args:
        experiment: what is compared with what.
        corpora: folder of the texts.
        work: folder for texts, databases, models and finished parts; may be gone on with.
        results: the JSON file of all figures.
        out: the page.
        only: name of the one setting to work on, without writing figures and page.
    """
    from gain.corpora import build_databases, describe, open_database
    from gain.models import costs, use_one_thread

    use_one_thread()
    claim(work, experiment.as_json())
    found: dict[str, Any] = {"experiment": experiment.as_json(), "machine": machine(), "databases": {}, "costs": {}}
    parts: list[dict[str, Any]] = []
    built: dict[str, dict[str, Path]] = {}
    spent = {}
    for seed in experiment.seeds:
        for setting in (one for one in experiment.settings if only in (None, one.name)):
            if setting.name not in built:
                built[setting.name] = build_databases(setting, experiment, corpora, work)
                found["databases"][setting.name] = {w: describe(path) for w, path in built[setting.name].items()}
                spent[setting.name] = costs(experiment, setting, open_database(built[setting.name][setting.trained_on]))
                found["costs"][setting.name] = spent[setting.name].as_json()
            for kind in MODELS:
                steps = spent[setting.name].steps[kind]
                parts.append(_part(experiment, setting, kind, seed, built[setting.name], work, steps))
            if only is None:
                write_json(results, {**found, "parts": parts})
                write_page(results, out)


def _part(
    experiment: Experiment, setting: Setting, kind: str, seed: int, built: dict[str, Path], work: Path, steps: int
) -> dict[str, Any]:
    """A model, trained and measured with both databases; what was done before is read."""
    from gain.corpora import open_database
    from gain.models import measure_model, train_model

    path = work / "parts" / f"{setting.name}-{seed}-{kind}.json"
    if path.exists():
        done: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return done
    models = work / "models" / setting.name
    trained = train_model(experiment, kind, seed, open_database(built[setting.trained_on]), models, steps)
    measured = {
        which: measure_model(
            experiment,
            models / f"{kind}-{seed}",
            database,
            kind,
            sweep=kind == RETRO and which == LARGER,
            cache=work / "cache",
        )
        for which, database in built.items()
    }
    part = {"setting": setting.name, "model": kind, "seed": seed, "training": trained, "measured": measured}
    write_json(path, part)
    return part


def write_page(results: Path, out: Path) -> None:
    """This experiment's part of the page, from a results file."""
    put_part(out, "retro_gain", page(json.loads(results.read_text("utf-8"))))


def main() -> None:
    parser = arguments(__doc__, "retro-gain", RESULTS, PAGE)
    parser.add_argument("--only", choices=[setting.name for setting in FULL.settings], help="one setting alone")
    given = given_to(parser)
    if given.report_only:
        write_page(given.results, given.page)
        return
    run(QUICK if given.quick else FULL, given.corpora, given.work, given.results, given.page, given.only)


if __name__ == "__main__":
    main()
