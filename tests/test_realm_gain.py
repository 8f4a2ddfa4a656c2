"""The experiment behind REALM's part of docs/experiments.md: the page follows from its figures; a tiny one runs."""

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).parents[1]
PLACES = ("Ankara", "Bogota", "Cairo", "Dakar", "Evora", "Fez", "Gdansk", "Hanoi")


@pytest.fixture
def realm_gain(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import realm_gain

    return realm_gain


def write_corpora(folder: Path) -> Path:
    """Places with what was built there, at two dates, and questions about both."""
    folder.mkdir()

    def write(name: str, records: list[dict]) -> None:
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as out:
            out.writelines(json.dumps(record) + "\n" for record in records)

    def texts(year: int) -> list[dict]:
        return [
            {
                "id": place,
                "text": f"{place} lies by the sea. The bridge of {place} was built in {year + number}. "
                f"Visitors of {place} like its harbour, and the old mill. The mayor lives by the river.",
            }
            for number, place in enumerate(PLACES)
        ]

    asked = [
        {"id": f"q{n}", "question": f"When was the bridge of {p} built?", "gold_id": p} for n, p in enumerate(PLACES)
    ]
    write("old", texts(1700))
    write("new", texts(1900))
    write("questions", [{**one, "answers": [str(1700 + n)]} for n, one in enumerate(asked)])
    changed = [{"2016": str(1700 + n), "2020": str(1900 + n)} for n in range(len(PLACES))]
    write("changed", [{**one, "answers_by_version": answers} for one, answers in zip(asked, changed, strict=True)])
    return folder


def tiny_experiment(encoder: Path):
    from gain.plan import Selection
    from realm_experiment.plan import REFRESH, RealmExperiment, Swap, ZeroShot

    return RealmExperiment(
        "tiny",
        (replace(REFRESH, mask="random-span"),),
        Swap(Selection("old"), Selection("new"), "changed", chunk_tokens=48, steps=2, batch=2, blocks=2),
        (ZeroShot("zs", "Places", Selection("old"), "questions", "Flat"),),
        Selection("old"),
        "questions",
        encoder=str(encoder),
        chunk_tokens=32,
        dimension=8,
        cloze_steps=2,
        steps=3,
        refresh_every=2,
        batch=2,
        candidates=3,
        seeds=(0, 1),
        ks=(1, 3),
        looks=1,
        zero_shot_ks=(1, 5),
    )


@pytest.mark.slow
def test_a_tiny_experiment_runs_to_its_end_and_goes_on_where_it_was_killed(realm_gain, tiny_encoder, tmp_path):
    corpora, work = write_corpora(tmp_path / "corpora"), tmp_path / "work"
    results, out = tmp_path / "results.json", tmp_path / "page.md"
    experiment = replace(tiny_experiment(tiny_encoder), seeds=(0,))
    realm_gain.run(experiment, corpora, work, results, out)
    figures = json.loads(results.read_text("utf-8"))
    (refreshed,) = figures["runs"]
    assert [entry["staleness"] for entry in refreshed["log"]] == [1, 2, 1], (
        "after each step; each version is waited for"
    )
    assert [look["step"] for look in refreshed["versions"]] == [None, 0, 3]
    assert all(entry["retriever_gradient"] > 0 < entry["reader_gradient"] for entry in refreshed["log"])
    assert figures["databases"]["pretraining"]["documents"] == len(PLACES)
    assert {one["criterion"] for one in figures["swap"][0]["asked"]["new"]} == {"answers 2016", "answers 2020"}
    assert figures["zero_shot"]["zs"]["asked"] == len(PLACES)
    text = out.read_text("utf-8")
    assert text.count("\n## ") == 6
    assert not list((work / "runs").iterdir()), "what a run needed goes when its part is there"

    (work / "parts" / "swap-0.json").unlink()
    realm_gain.run(experiment, corpora, work, results, out, share=(0, 2))
    assert not (work / "parts" / "swap-0.json").exists(), "the second part is the second share's"
    realm_gain.run(experiment, corpora, work, results, out)
    again = json.loads(results.read_text("utf-8"))
    assert again["runs"] == figures["runs"]
    assert untimed(again["swap"]) == untimed(figures["swap"])
    with pytest.raises(SystemExit, match="another experiment"):
        realm_gain.run(replace(experiment, steps=9), corpora, work, results, out)


def untimed(parts: list[dict]) -> list[dict]:
    return [
        {**part, "log": [{key: value for key, value in entry.items() if key != "seconds"} for entry in part["log"]]}
        for part in parts
    ]


def test_the_committed_page_is_what_the_script_makes_of_the_committed_figures(realm_gain, tmp_path):
    shutil.copy(realm_gain.PAGE, tmp_path / "page.md")
    realm_gain.write_page(realm_gain.RESULTS, tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text("utf-8") == realm_gain.PAGE.read_text("utf-8")


def test_the_plan_has_what_was_asked_for(realm_gain):
    """30 x stale differs from never only where a refresh falls into the run; three seeds, for intervals."""
    plan = realm_gain.FULL
    rarest = max(condition.rarer or 0 for condition in plan.conditions) * plan.refresh_every
    assert plan.conditions[0].rarer == 1
    assert max(condition.rarer or 0 for condition in plan.conditions) == 30
    assert 1.25 * rarest <= plan.steps, "a fifth of the steps and more after it"
    assert len(plan.seeds) >= 3
    assert {condition.mask for condition in plan.conditions} == {"salient", "random-span", "random-token"}
    assert {(c.retriever, c.reader) for c in plan.conditions} == {(True, True), (True, False), (False, True)}
    assert set(plan.zero_shot_ks) == {5, 20, 100}


def test_differences_are_paired_by_seed_with_students_interval(realm_gain):
    from realm_experiment.figures import compare, over_seeds

    def part(condition: str, seed: int, value: float) -> dict:
        return {"condition": condition, "seed": seed, "value": value}

    base = [0.1, 0.5, 0.9]
    parts = [part("a", seed, value) for seed, value in enumerate(base)]
    parts += [part("b", seed, value + 0.2) for seed, value in reversed(list(enumerate(base)))]
    found = compare(parts, "b", "a", lambda one: one["value"])
    assert found.value == pytest.approx(0.2)
    assert found.interval == pytest.approx((0.2, 0.2)), "seeds differ by more than the conditions do"
    own = over_seeds(base)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(base), scale=stats.sem(base))
    assert own.interval == pytest.approx((low, high))
    assert over_seeds([0.3]).interval is None


def test_a_verdict_is_given_only_where_the_seeds_tell(realm_gain):
    from realm_experiment.figures import over_seeds
    from realm_experiment.page import _verdict

    assert _verdict(over_seeds([0.2, 0.21, 0.22])).startswith("more, +0.2100 [")
    assert _verdict(over_seeds([-0.2, -0.21, -0.22])).startswith("less, -0.2100 [")
    assert _verdict(over_seeds([0.2, -0.1, 0.1])).startswith("no difference that the seeds show")
    assert _verdict(over_seeds([0.125, 0.125])) == "+0.1250 in every seed, which leaves nothing to tell chance by"
    assert _verdict(over_seeds([0.2])) == "+0.2000 (one seed)"


def test_seeds_that_are_not_done_for_every_condition_are_left_out(realm_gain):
    from realm_experiment.figures import seeds_of

    parts = [{"condition": c, "seed": s} for c, s in (("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2))]
    assert seeds_of(parts) == [0, 1]
