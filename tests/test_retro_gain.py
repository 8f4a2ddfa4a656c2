"""The experiment behind docs/experiments.md: its page follows from its figures; a tiny one runs to its end."""

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from models import topics

ROOT = Path(__file__).parents[1]


@pytest.fixture
def retro_gain(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import retro_gain

    return retro_gain


def write_corpora(folder: Path) -> Path:
    """Two versions of the same texts under the same ids."""
    folder.mkdir()
    for name, first in (("old", 0), ("new", 3)):
        lines = [json.dumps({**one, "id": f"t{number}"}) for number, one in enumerate(topics(40, first))]
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as out:
            out.write("\n".join(lines) + "\n")
    return folder


def tiny_experiment(encoder: Path):
    from gain.plan import Experiment, Selection, Setting

    setting = Setting(
        name="topics",
        title="Topics",
        database_names=("old", "old and new"),
        smaller=(Selection("old"),),
        larger=(Selection("new", but=4),),
        trained_on="larger",
        validation=(Selection("new", every=4),),
        steps=4,
        decontaminate=False,
        about="Few words in many orders.",
    )
    return Experiment(
        "tiny",
        (setting,),
        encoder=str(encoder),
        vocabulary=300,
        chunk_tokens=16,
        sequence_tokens=64,
        width=16,
        heads=2,
        batch=2,
        seeds=(0, 1),
        rows=12,
    )


@pytest.mark.slow
def test_a_tiny_experiment_runs_to_its_end_and_goes_on_where_it_was_killed(retro_gain, tiny_encoder, tmp_path):
    corpora, work = write_corpora(tmp_path / "corpora"), tmp_path / "work"
    results, out = tmp_path / "results.json", tmp_path / "page.md"
    experiment = tiny_experiment(tiny_encoder)
    retro_gain.run(experiment, corpora, work, results, out)
    first = results.read_bytes()
    figures = json.loads(first)
    assert [(part["seed"], part["model"]) for part in figures["parts"]] == [
        (seed, model) for seed in (0, 1) for model in ("base", "retro", "retrofit", "base-middle", "base-longer")
    ]
    spent = figures["costs"]["topics"]
    cost = {name: spent["flops_per_token"][name] * spent["steps"][name] for name in ("base", "retro", "retrofit")}
    a_step = max(spent["flops_per_token"].values())
    assert abs(cost["base"] + cost["retrofit"] - cost["retro"]) <= a_step
    assert abs(spent["flops_per_token"]["base"] * spent["steps"]["base-longer"] - cost["retro"]) <= a_step
    by_model = {part["model"]: part["measured"]["larger"]["buckets"]["all"] for part in figures["parts"][:5]}
    assert by_model["retrofit"]["nats"][0] == by_model["base"]["nats"][0], "RETROfit without neighbours is its base"
    text = out.read_text("utf-8")
    assert "RETRO, at equal compute" in text
    assert text.count("[") > 50

    (work / "parts" / "topics-1-retro.json").unlink()
    retro_gain.run(experiment, corpora, work, results, out)
    again = json.loads(results.read_bytes())
    for old, new in zip(figures["parts"], again["parts"], strict=True):
        assert new["measured"] == old["measured"]
    with pytest.raises(SystemExit, match="another experiment"):
        retro_gain.run(replace(experiment, rows=3), corpora, work, results, out)


def test_the_committed_page_is_what_the_script_makes_of_the_committed_figures(retro_gain, tmp_path):
    shutil.copy(retro_gain.PAGE, tmp_path / "page.md")
    retro_gain.write_page(retro_gain.RESULTS, tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text("utf-8") == retro_gain.PAGE.read_text("utf-8")


def test_experiments_share_a_page_and_each_writes_its_own_part(tmp_path):
    from gain.files import put_part

    page = tmp_path / "page.md"
    put_part(page, "one", "# One\n\n<!-- a comment that begins no part -->\n")
    put_part(page, "two", "# Two\n")
    put_part(page, "one", "# One, anew\n")
    assert page.read_text("utf-8") == "<!-- one -->\n\n# One, anew\n\n<!-- two -->\n\n# Two\n"


def test_a_gain_is_paired_by_document_and_by_seed(retro_gain):
    """Documents and seeds differ by far more than what is gained on each: the interval is as narrow as the gain is."""
    import numpy as np
    from gain.figures import Bucket, Series

    random = np.random.default_rng(0)
    n_bytes = random.uniform(500, 1500, 30)
    base = n_bytes * random.uniform(1, 3, 30) + np.array([[0.0], [400.0], [900.0]])
    one, other = Series("base"), Series("retro", "k=1")
    bucket = Bucket(9, n_bytes, {one: base, other: base - 0.1 * np.log(2) * n_bytes})
    gain = bucket.gain(one, other)
    assert gain.value == pytest.approx(0.1)
    assert gain.interval == pytest.approx((0.1, 0.1))
    assert bucket.gain(one, Series("retrofit")) is None


def test_models_measured_on_other_texts_are_never_compared(retro_gain):
    from gain.figures import bucket

    def part(model: str, n_bytes: float) -> dict:
        found = {"all": {"chunks": 1, "bytes": [n_bytes], "nats": [[1.0]]}}
        measured = {"larger": {"conditions": ["off"], "documents": ["a"], "buckets": found}}
        return {"setting": "s", "seed": 0, "model": model, "measured": measured}

    with pytest.raises(ValueError, match="other documents or bytes"):
        bucket([part("base", 10.0), part("retro", 11.0)], "s", "larger", "all", [0])


def test_selections_of_two_versions_hold_the_same_documents(retro_gain, tmp_path):
    from gain.corpora import documents
    from gain.plan import Selection

    corpora = write_corpora(tmp_path / "corpora")

    def ids(selection: Selection) -> set[str]:
        return {json.loads(line)["id"] for line in documents(selection, corpora)}

    held_out = ids(Selection("new", every=4))
    assert 0 < len(held_out) < 40
    assert held_out == ids(Selection("old", every=4))
    assert ids(Selection("new", but=4)) == {f"t{number}" for number in range(40)} - held_out
