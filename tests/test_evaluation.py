"""Bits per byte: the right tokens over the right bytes, honest controls, intervals that mean something."""

import json

import numpy as np
import pytest
import torch
from models import build_topics
from support import Progress, retrodb, rows_of, table_of

import retrodb as package
from retrodb.errors import InputError, MismatchError, UsageError
from retrodb.evaluation import EvaluationSettings, make_settings
from retrodb.evaluation.conditions import Condition, conditions
from retrodb.evaluation.control import with_random_neighbours
from retrodb.evaluation.intervals import by_document, estimate
from retrodb.evaluation.report import markdown, write_report
from retrodb.evaluation.run import evaluate
from retrodb.learning import make_settings as train_settings
from retrodb.learning.run import train
from retrodb.model import Batch
from retrodb.model.checkpoint import load_model
from retrodb.training import TrainingTable

SIZES = {"preset": "tiny", "width": 32, "layers": 2, "heads": 2, "steps": 20, "warmup": 2, "precision": "fp32"}


@pytest.fixture(scope="module")
def database(topics_db):
    return package.open(str(topics_db))


@pytest.fixture(scope="module")
def checkpoints(database, tmp_path_factory):
    """Two seeds with retrieval, and one model without."""
    folder = tmp_path_factory.mktemp("ckpt")
    for name, changes in (("a", {}), ("b", {"seed": 1}), ("plain", {"retrieval": False})):
        train(database, str(folder / name), train_settings({}, {**SIZES, **changes}), Progress(), "cpu")
    return {name: str(folder / name) for name in ("a", "b", "plain")}


@pytest.fixture(scope="module")
def evaluated(database, checkpoints):
    settings = EvaluationSettings(neighbours=(0, 1, 2, 8), draws=200)
    return evaluate(database, [checkpoints["a"], checkpoints["b"]], settings, Progress(), device="cpu")


def bits(evaluated) -> dict[str, float]:
    return {row["condition"]: row["bits_per_byte"]["value"] for row in evaluated.as_json()["conditions"]}


@pytest.mark.slow
def test_bits_per_byte_are_those_of_the_tables_read_with_nothing_of_ours(database, topics_db, checkpoints, evaluated):
    """Rows from Parquet, one document's part of a row at a time, bytes from the documents' texts."""
    texts = {row["document_id"]: row["text"].encode() for row in rows_of(topics_db, "documents")}
    chunks = {row["chunk_id"]: row for row in rows_of(topics_db, "chunks")}
    nats, n_bytes = 0.0, 0
    models = [load_model(checkpoints[name])[0] for name in ("a", "b")]
    for row in rows_of(topics_db, "training"):
        if row["split"] != "validation":
            continue
        parts: dict[int, list[int]] = {}
        for slot, (chunk, document) in enumerate(zip(row["chunk_ids"], row["document_ids"], strict=True)):
            if chunk is not None:
                parts.setdefault(document, []).append(slot)
        for document, slots in parts.items():
            ids = [row["chunk_ids"][slot] for slot in slots]
            tokens = [t for c in ids for t in chunks[c]["tokens"][: chunks[c]["n_tokens"]]]
            first = len(database.tokenizer.decode(tokens[:1]))
            text = texts[document][chunks[ids[0]]["start"] : chunks[ids[-1]]["end"]]
            n_bytes += len(text) - first
            padded = torch.zeros(1, len(slots), 16, dtype=torch.int64)
            padded.view(-1)[: len(tokens)] = torch.tensor(tokens)
            lengths = torch.tensor([[chunks[c]["n_tokens"] for c in ids]])
            none = torch.zeros(1, len(slots), 0, 2, 16), torch.zeros(1, len(slots), 0, 2)
            batch = Batch.made(padded, lengths, torch.zeros_like(lengths), *none)
            for model in models:
                with torch.no_grad():
                    logits = model.logits(model(batch))[0, : len(tokens) - 1]
                found = logits.log_softmax(-1)[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])]
                nats -= float(found.sum()) / 2
    assert evaluated.about["bytes_predicted"] == n_bytes
    assert bits(evaluated)["off"] == pytest.approx(nats / np.log(2) / n_bytes, rel=1e-5)
    assert evaluated.about["share_of_bytes"] == pytest.approx(
        n_bytes / sum(len(texts[d]) for d in {c["document_id"] for c in chunks.values()} & validation_of(topics_db))
    )


def validation_of(folder) -> set[int]:
    return {row["document_id"] for row in rows_of(folder, "documents") if row["split"] == "validation"}


@pytest.mark.slow
def test_every_condition_is_there_with_its_interval_and_all_chunks_are_at_alpha_one(evaluated):
    rows = evaluated.as_json()["conditions"]
    names = ["off", "k=1", "k=2", "k=8", "k=2, N only", "k=2, F only", "k=2, random"]
    assert [row["condition"] for row in rows] == names
    for row in rows:
        low, high = row["bits_per_byte"]["interval"]
        assert low < row["bits_per_byte"]["value"] < high
    assert len({round(row["bits_per_byte"]["value"], 9) for row in rows}) == len(names)
    at_one = evaluated.as_json()["by_leakage"][-1]
    assert at_one["alpha"] == 1.0
    assert at_one["conditions"] == rows


@pytest.mark.slow
def test_leakage_buckets_hold_the_chunks_the_table_says(topics_db, evaluated):
    own = {row["chunk_id"] for row in rows_of(topics_db, "chunks") if row["document_id"] in validation_of(topics_db)}
    leakage = [row["leakage"] for row in rows_of(topics_db, "leakage") if row["chunk_id"] in own]
    for bucket in evaluated.as_json()["by_leakage"]:
        assert bucket["chunks"] == sum(r <= bucket["alpha"] for r in leakage)


@pytest.mark.slow
def test_the_stored_neighbours_of_the_rows_and_those_joined_here_give_the_same(database, checkpoints, evaluated):
    """k' = 2 of the training rows, streamed, against k = 2 of 8 that were joined for the evaluation."""
    models = [load_model(checkpoints[name])[0] for name in ("a", "b")]
    samples = list(database.training(split="validation"))
    with torch.no_grad():
        nats = [float(model.nats(Batch.of(samples, 2)).sum()) for model in models]
    total = bits(evaluated)["k=2"] * evaluated.about["bytes_predicted"] * np.log(2)
    assert np.mean(nats) == pytest.approx(total, rel=1e-5)


@pytest.mark.slow
def test_the_same_again_and_by_other_batches(database, checkpoints, evaluated):
    chosen = [checkpoints["a"], checkpoints["b"]]
    for batch in (4, 3):
        settings = EvaluationSettings(neighbours=(0, 1, 2, 8), draws=200, batch=batch)
        again = evaluate(database, chosen, settings, Progress(), device="cpu")
        if batch == 4:
            assert again.as_json() == evaluated.as_json()
        else:
            without = {name: value for name, value in bits(again).items() if "random" not in name}
            assert without == pytest.approx({name: bits(evaluated)[name] for name in without}, rel=1e-6)


@pytest.mark.slow
def test_random_neighbours_are_as_many_and_of_other_documents_of_the_training_split(database, tmp_path):
    for split in ("train", "validation"):
        table = TrainingTable(database.storage, database.manifest, str(tmp_path), 8, split)
        rows = table.sequences(range(len(table)))
        drawn = with_random_neighbours(rows, table.chunks, table.retrievable(), np.random.default_rng(0))
        there = drawn["neighbour_ids"] >= 0
        assert np.array_equal(there, rows["neighbour_ids"] >= 0)
        chunks = {row["chunk_id"]: row for row in table_of(tmp_path_of(database), "chunks").to_pylist()}
        validation = validation_of(tmp_path_of(database))
        for row, slot, k in np.argwhere(there):
            chunk = chunks[drawn["neighbour_ids"][row, slot, k]]
            assert chunk["document_id"] != rows["document_ids"][row, slot]
            assert chunk["document_id"] not in validation
            assert drawn["neighbour_tokens"][row, slot, k, 0].tolist() == chunk["tokens"]
            assert drawn["neighbour_lengths"][row, slot, k, 0] == chunk["n_tokens"]
        assert not np.array_equal(drawn["neighbour_ids"], rows["neighbour_ids"])


def tmp_path_of(database):
    from pathlib import Path

    return Path(database.storage.url)


@pytest.mark.slow
def test_a_report_is_a_table_a_picture_and_json(evaluated, tmp_path):
    names = [path.rsplit("/", 1)[-1] for path in write_report(evaluated, str(tmp_path))]
    assert names == ["evaluation.json", "evaluation.md", "evaluation.png"]
    assert json.loads((tmp_path / "evaluation.json").read_text()) == json.loads(json.dumps(evaluated.as_json()))
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    text = markdown(evaluated)
    assert f"| k=2, random | {bits(evaluated)['k=2, random']:.4f} [" in text
    assert "| 12.5% |" in text


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_cannot_be_measured_is_refused(database, checkpoints, tiny_encoder, tmp_path):
    def attempt(db, *names, **settings):
        return evaluate(db, [checkpoints[name] for name in names], EvaluationSettings(**settings), Progress())

    with pytest.raises(InputError, match="-k 9: the database keeps 8 neighbours a chunk"):
        attempt(database, "a", neighbours=(0, 9))
    with pytest.raises(InputError, match="has no retrieval; it can be evaluated without alone"):
        attempt(database, "plain", neighbours=(2,))
    with pytest.raises(InputError, match="is a model of other sizes than"):
        attempt(database, "a", "plain")
    assert list(bits(attempt(database, "plain", rows=2))) == ["off"]
    other = package.open(str(build_topics(tmp_path / "a", tiny_encoder, tokenizer="train:300")))
    with pytest.raises(MismatchError, match="was trained with the tokenizer 'train:400' .*'train:300'"):
        attempt(other, "a")


@pytest.mark.slow
def test_no_validation_split_and_no_leakage_table(checkpoints, tiny_encoder, topics_db, tmp_path):
    tokenizer = str(topics_db / "tokenizer.json")
    folder = build_topics(tmp_path, tiny_encoder, validation=[], tokenizer=tokenizer, until="training")
    database = package.open(str(folder))
    with pytest.raises(InputError, match="has no validation documents. Build it with --validation"):
        evaluate(database, [checkpoints["a"]], EvaluationSettings(), Progress())
    found = evaluate(database, [checkpoints["a"]], EvaluationSettings(split="train", rows=3), Progress())
    assert found.by_leakage == []
    assert any("has no leakage table" in note for note in found.notes)
    assert any("trained on another database" in note for note in found.notes)
    assert found.about["sequences"] == 3


def test_settings_out_of_range_name_their_flag():
    with pytest.raises(UsageError, match="--rows 0: Input should be greater"):
        make_settings({"rows": 0})
    with pytest.raises(UsageError, match="--split 'test'"):
        make_settings({"split": "test"})


@pytest.mark.slow
def test_evaluate_from_the_command_line(topics_db, checkpoints, tmp_path):
    ran = retrodb("evaluate", topics_db, "--checkpoint", checkpoints["a"], "-k", 2, "--out", tmp_path, "--json")
    assert ran.code == 0, ran.err
    assert [row["condition"] for row in ran.json["conditions"]][:2] == ["off", "k=2"]
    assert (tmp_path / "evaluation.md").exists()


@pytest.mark.parametrize("flag", ["--out", "--cache"])
def test_nothing_is_written_into_the_database_nor_in_the_place_of_a_file(flag, topics_db, tmp_path):
    """Before anything is measured: there is no such checkpoint."""
    from typer.testing import CliRunner

    from retrodb.cli import app

    (tmp_path / "file").write_text("mine")
    for place, words in ((topics_db / "there", "lies inside the database"), (tmp_path / "file", "is a file")):
        given = ["evaluate", str(topics_db), "--checkpoint", str(tmp_path / "none"), flag, str(place)]
        error = CliRunner().invoke(app, given).exception
        assert isinstance(error, InputError)
        assert f"{flag} {place} {words}" in str(error)
    assert not (topics_db / "there").exists()


# -- intervals ---------------------------------------------------------------------------------------------------------


def test_sums_by_document():
    nats = np.array([[[1.0, 2.0, 4.0, 8.0]]])
    summed, lengths = by_document(np.array([5, 9, 5, 9]), nats, np.array([1.0, 2.0, 3.0, 4.0]))
    assert summed.tolist() == [[[5.0, 10.0]]]
    assert lengths.tolist() == [4.0, 6.0]


def test_an_interval_covers_the_truth_about_nineteen_times_of_twenty():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        lengths = random.integers(50, 150, 60).astype(float)
        nats = lengths * np.log(2) * (1 + 0.2 * random.standard_normal((1, 1, 60)))
        low, high = estimate(nats, lengths, draws=300, seed=0).bits[0].interval
        covered += low <= 1 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_gains_are_paired_and_several_models_widen_the_interval():
    random = np.random.default_rng(1)
    lengths = np.full(40, 100.0)
    hard = random.uniform(50, 150, 40)
    off_and_on = np.stack([hard, hard - 10])[None]
    found = estimate(off_and_on, lengths, draws=300, seed=0)
    assert found.gains[1].value == pytest.approx(0.1 / np.log(2))
    assert found.gains[1].interval == pytest.approx((0.1 / np.log(2),) * 2)
    alone = estimate(off_and_on, lengths, draws=300, seed=0).bits[0].interval
    seeds = np.concatenate([off_and_on - 30, off_and_on, off_and_on + 30])
    several = estimate(seeds, lengths, draws=300, seed=0).bits[0].interval
    assert several[1] - several[0] > 1.5 * (alone[1] - alone[0])


def test_one_document_has_no_interval_and_no_bytes_no_estimate():
    assert estimate(np.ones((1, 2, 1)), np.array([10.0]), draws=10, seed=0).bits[0].interval is None
    assert estimate(np.zeros((1, 2, 0)), np.array([]), draws=10, seed=0) is None


def test_the_conditions_are_off_each_k_and_the_controls():
    assert [c.name for c in conditions([4, 0, 4, 1], trained=2)] == [
        "off",
        "k=1",
        "k=4",
        "k=2",
        "k=2, N only",
        "k=2, F only",
        "k=2, random",
    ]
    assert Condition(0, random=True).name == "off"
