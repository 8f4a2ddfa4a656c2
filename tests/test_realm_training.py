"""REALM's pre-training: a trainer and a refresher that share a database, and what a step is made of."""

import json
import math
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from retrodb.schemas import NULL_ID
from support import Progress, Running, build_here, make_tiny_encoder, manifest_of, retrodb, stamps, write_jsonl
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel

import retrodb as package
from retrodb.config import RunSettings
from retrodb.corpus.quickstart import quickstart_lines
from retrodb.database import Database
from retrodb.errors import DamagedError, InputError, MismatchError, UsageError, WorkerError
from retrodb.learning.interrupt import Interruptions
from retrodb.learning.realm import RealmSettings, RealmTrainer, load_realm, sentence_ends
from retrodb.learning.realm_batches import cloze_batches, holds_answer, masked_batch, texts_of
from retrodb.quality.verify import verify_database
from retrodb.refreshing.exports import hold
from retrodb.storage import Storage

SETTINGS = {"dimension": 16, "steps": 4, "cloze_steps": 3, "batch": 4, "export_every": 2, "log_every": 1, "seed": 1}


@pytest.fixture(scope="module")
def first(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of real text, with randomly masked spans. Do not change it."""
    folder = tmp_path_factory.mktemp("realm")
    lines = [line for line in quickstart_lines() if 2_000 < len(line) < 8_000][:6]
    (folder / "topics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    out = folder / "db"
    build_here([folder / "topics.jsonl"], out, unit="block", metric="ip", encoder=str(tiny_encoder), chunk_tokens=64)
    ran = retrodb("spans", out, "--mask", "random-span", "--workers", 1)
    assert ran.code == 0, ran.err
    return out


@pytest.fixture
def database(first: Path, tmp_path: Path) -> Path:
    """A copy of `first` to be changed."""
    shutil.copytree(first, tmp_path / "db")
    return tmp_path / "db"


def trainer(database: Path, folder: Path, tiny_encoder: Path, **settings: object) -> RealmTrainer:
    made = RealmSettings.make({**SETTINGS, "start": str(tiny_encoder), **settings})
    return RealmTrainer(str(database), str(folder / "ckpt"), str(folder / "exports"), made, Progress())


# -- batches -----------------------------------------------------------------------------------------------------------


def test_a_batch_is_the_queries_with_their_candidates_tokens(first: Path) -> None:
    db = package.open(str(first))
    queries = next(db.queries(batch=5))
    vectors = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    found = db.candidates(vectors, 4, own_chunks=queries.chunk_ids, exclude="self", tokens=True)
    batch = masked_batch(queries, found)
    assert batch.valid.shape == (5, 4)
    for row in range(5):
        n = int(queries.n_tokens[row])
        assert batch.queries.ids[row, :n].tolist() == queries.tokens[row, :n].tolist()
        masked = batch.positions[row][batch.wanted[row]].tolist()
        assert masked == queries.masked_positions[row, : queries.n_masked[row]].tolist()
        assert found.ids[row, 0] == NULL_ID
        assert queries.chunk_ids[row] not in found.ids[row], "the block that the query comes from is none"
        for slot in range(1, 4):
            tokens = db.chunk(int(found.ids[row, slot])).tokens
            at = row * 4 + slot
            assert tuple(batch.bodies.ids[at, : batch.bodies.lengths[at]].tolist()) == tokens
        assert int(batch.bodies.lengths[row * 4]) == int(batch.titles.lengths[row * 4]) == 0


def test_every_pass_of_every_seed_has_an_order_of_its_own(first: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    total = sum(len(batch) for batch in package.open(str(first)).queries(batch=4))
    orders = []
    for seed in (0, 1, 2):
        made = trainer(first, tmp_path / str(seed), tiny_encoder, seed=seed)
        asked = np.empty(0, dtype=np.int64)
        while len(asked) < 3 * total:
            asked = np.concatenate([asked, made._next_queries(made._followed.database).query_ids])
        orders += [tuple(each) for each in asked[: 3 * total].reshape(3, total)]
    assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(orders[0]))}
    assert len(set(orders)) == 9


def test_texts_without_a_token_are_texts() -> None:
    """Where no document has a title, titles are rows of width 0."""
    found = texts_of(np.zeros((2, 4, 0), np.uint16), np.zeros((2, 4), np.int16))
    assert found.ids.shape == (8, 0)
    assert found.lengths.tolist() == [0] * 8


def test_a_candidate_holds_the_answer_where_its_body_has_the_masked_wordpieces_in_order(first: Path) -> None:
    db = package.open(str(first))
    queries = next(db.queries(batch=8))
    vectors = np.random.default_rng(0).normal(size=(8, 32)).astype(np.float32)
    found = db.candidates(vectors, 8, tokens=True)
    holds = holds_answer(queries, found)
    for row in range(8):
        target = queries.target_ids[row, : queries.n_masked[row]].tolist()
        for slot in range(8):
            body = [] if slot == 0 else list(db.chunk(int(found.ids[row, slot])).tokens)
            there = any(body[at : at + len(target)] == target for at in range(len(body) - len(target) + 1))
            assert holds[row, slot] == there


def test_the_warm_start_takes_a_sentence_out_of_its_block(first: Path) -> None:
    db = package.open(str(first))
    stops = tuple(package.open(str(first)).tokenizer._tokenizer.token_to_id(mark) for mark in ".!?")
    bodies = {
        tuple(t[:n])
        for table in db.chunks()
        for t, n in zip(*(table[c].to_pylist() for c in ("tokens", "n_tokens")), strict=True)
    }
    kept = 0
    batches = cloze_batches(db, 4, 0, stops)
    for _ in range(20):
        queries, _, blocks = next(batches)
        for row in range(4):
            query = queries.ids[row, : queries.lengths[row]].tolist()
            block = tuple(blocks.ids[row, : blocks.lengths[row]].tolist())
            if block in bodies:
                kept += 1
                continue
            places = [at for at in range(len(block) + 1) if (*block[:at], *query, *block[at:]) in bodies]
            assert places, "the sentence, put back, makes a block"
    assert 0 < kept < 30


def test_a_warm_start_knows_the_sentences_of_other_scripts(tiny_encoder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_encoder / "tokenizer.json"))
    ends = sentence_ends(str(tiny_encoder / "tokenizer.json"))
    for text in ("It rained. Why? Go!", "北京是首都。上海呢？好！", "राम गया। वह आया॥"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert sum(number in ends for number in ids) == sum(mark in ".?!。？！।॥" for mark in text)


def test_a_warm_start_of_few_blocks_takes_all_there_are(first: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    db = package.open(str(first))
    stops = tuple(db.tokenizer._tokenizer.token_to_id(mark) for mark in ".!?")
    blocks = sum(1 for table in db.chunks() for _ in range(table.num_rows))
    queries, titles, bodies = next(cloze_batches(db, 10_000, 0, stops))
    assert 2 <= len(queries.lengths) == len(titles.lengths) == len(bodies.lengths) <= blocks
    with pytest.raises(InputError, match=r"has 0 blocks of two sentences.*--cloze-steps 0"):
        next(cloze_batches(db, 4, 0, ends=()))


def test_other_spans_of_a_database_with_versions_are_a_version_of_their_own(
    database: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    again = make_tiny_encoder(tmp_path / "again", seed=5)
    assert retrodb("refresh", database, "--encoder", again, "--workers", 1, "--json").json["version"] == 2
    before = stamps(database)
    assert retrodb("spans", database, "--mask", "random-span", "--workers", 1).code == 0
    assert stamps(database) == before, "they are there: nothing to do"
    ran = retrodb("spans", database, "--mask", "random-token", "--workers", 1)
    assert ran.code == 0, ran.err
    assert manifest_of(database)["version"]["made_by"] == "spans"
    for version in (1, 2, 3):
        db = package.open(str(database), version=version)
        assert verify_database(db, 1.0).problems == ()
        masked = {int(n) for batch in db.queries(batch=9) for n in batch.span_ids}
        assert masked == {-1}
    assert {shard["path"].split("/")[0] for shard in manifest_of(database)["tables"]["queries"]["shards"]} == {
        "versions"
    }


@pytest.mark.parametrize("part", ["retriever", "reader"])
def test_a_part_that_does_not_learn_stays_bit_for_bit_and_the_other_learns(
    part: str, first: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    """The ablations: the steps after the warm start, without a refresher, on the vectors that are there."""
    made = trainer(first, tmp_path, tiny_encoder, dimension=32, **{f"train_{part}": False})
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    for _ in range(2):
        made._step(made._followed.database)
    changed = {name for name, value in made.model.state_dict().items() if not torch.equal(value, before[name])}
    other = "reader" if part == "retriever" else "retriever"
    assert {name.split(".")[0] for name in changed} == {other}
    for entry in made.run.log:
        assert entry["gradient_norm"][part] == 0 < entry["gradient_norm"][other]


def test_the_readers_gradient_however_large_takes_nothing_from_the_retrievers_step(
    first: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    found = []
    for name, settings in (("both", {}), ("alone", {"train_reader": False})):
        made = trainer(first, tmp_path / name, tiny_encoder, dimension=32, clip=1e-3, **settings)
        made._step(made._followed.database)
        found.append(made)
    assert found[0].run.log[0]["gradient_norm"]["reader"] > 10 * found[0].run.log[0]["gradient_norm"]["retriever"]
    for one, other in zip(*(made.model.retriever.state_dict().values() for made in found), strict=True):
        assert torch.equal(one, other)


# -- beside a refresher ------------------------------------------------------------------------------------------------


class Interrupted(Interruptions):
    """Ctrl-C is there as soon as somebody looks, or after so many looks."""

    def __init__(self, after: int = 0) -> None:
        super().__init__()
        self.left = after

    @property
    def asked(self) -> bool:
        self.left -= 1
        return self.left < 0

    @asked.setter
    def asked(self, value: bool) -> None:
        pass


def refreshed(database: Path, encoder: Path, step: int | None = None) -> int:
    """The version that the database has after a refresh by hand."""
    from retrodb.pipelines.refresh import refresh

    return refresh(Storage(str(database)), str(encoder), RunSettings(workers=1), Progress(), step).version


def version_for(made: RealmTrainer) -> int | None:
    """What a step would be trained on now; None where the trainer would wait."""
    db = made._followed.newest(made.run.step, Interrupted())
    return None if db is None else db.version


def test_a_version_that_no_export_of_the_run_made_is_waited_out_however_alike_it_is(
    database: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    made = trainer(database, tmp_path, tiny_encoder, dimension=32)
    made._save()
    made._export()
    assert version_for(made) is None, "the encoder of the build has the width of the retriever, and is not it"
    assert version_for(made) is None
    (said,) = made.progress.lines
    assert re.search(rf"version 1 of .* is by .*no export of this run.*retrodb refresh {database} --watch", said)
    assert refreshed(database, tmp_path / "exports" / "step-000000", 0) == 2
    assert version_for(made) == 2
    assert refreshed(database, make_tiny_encoder(tmp_path / "by-hand", seed=5)) == 3
    assert version_for(made) is None
    assert "version 3 of" in made.progress.lines[-1]
    assert refreshed(database, tmp_path / "exports" / "step-000000") == 4, "without its step"
    assert version_for(made) == 4


def test_a_second_run_on_one_database_trains_on_its_own_versions(
    database: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    for number, seed in enumerate((1, 2)):
        settings = {"dimension": 32, "seed": seed, "export_every": 4, "max_staleness": 3}
        made = trainer(database, tmp_path / str(seed), tiny_encoder, **settings)
        made._save()
        made._export()
        assert version_for(made) is None
        assert refreshed(database, made.exports / "step-000000", 0) == 2 + 2 * number
        made.train()
        assert {entry["version"] for entry in made.run.log} == {2 + 2 * number}
        assert refreshed(database, made.exports / "step-000004", 4) == 3 + 2 * number


def test_while_the_refresher_asks_for_it_the_trainer_holds(database: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    made = trainer(database, tmp_path, tiny_encoder)
    made._save()
    made._export()
    refreshed(database, tmp_path / "exports" / "step-000000", 0)
    hold(str(made.exports), True)
    assert version_for(made) is None
    assert "exports/hold is there: the refresher asks for it" in made.progress.lines[-1]
    hold(str(made.exports), False)
    assert version_for(made) == 2


def test_a_wait_is_said_once_and_ends_with_the_first_interruption_and_a_checkpoint(
    database: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrodb.learning.following._POLL_SECONDS", 0.0)
    made = trainer(database, tmp_path, tiny_encoder, steps=8, export_every=4, max_staleness=3)
    made._save()
    made._export()
    refreshed(database, tmp_path / "exports" / "step-000000", 0)
    monkeypatch.setattr("retrodb.learning.realm.Interruptions", lambda: Interrupted(after=12))
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert made.run.step == 4, "the fifth step needs a version that is not there"
    (said,) = [line for line in made.progress.lines if "waiting" in line]
    assert f"more than 3 steps behind: waiting for the next one: retrodb refresh {database} --watch" in said
    assert trainer(database, tmp_path, tiny_encoder, steps=8, export_every=4, max_staleness=3).run.step == 4


def test_exports_of_another_run_are_refused_and_those_of_its_own_go_on(
    first: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    settings = {"dimension": 32, "steps": 3}
    made = trainer(first, tmp_path, tiny_encoder, **settings)
    made._save()
    made._export()
    (made.exports / "done").touch()
    with pytest.raises(MismatchError, match=r"exports holds step-000000, done of another run: this run begins.*Name"):
        RealmTrainer(str(first), str(tmp_path / "other"), str(made.exports), made.settings, Progress())
    assert trainer(first, tmp_path, tiny_encoder, **settings).run.step == 0, "its own"
    shutil.copytree(made.exports / "step-000000", made.exports / "step-000002")
    with pytest.raises(MismatchError, match=r"holds step-000002 of another run: this run's checkpoint is of step 0"):
        trainer(first, tmp_path, tiny_encoder, **settings)
    shutil.rmtree(made.exports)
    other = trainer(first, tmp_path / "2", tiny_encoder, **settings, seed=2)
    other.model.export(made.exports / "step-000000", other._encoder)
    with pytest.raises(MismatchError, match="holds step-000000 of another run"):
        trainer(first, tmp_path, tiny_encoder, **settings)


def test_a_run_that_goes_on_takes_its_done_away_and_exports_what_its_last_checkpoint_had_not_come_to(
    first: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"dimension": 32, "steps": 3}  # of which the last is no multiple of --export-every
    monkeypatch.setattr("retrodb.learning.realm.Interruptions", Interrupted)
    made = trainer(first, tmp_path, tiny_encoder, **settings)
    made._save()
    made._export()
    (made.exports / "done").touch()
    with pytest.raises(KeyboardInterrupt):
        trainer(first, tmp_path, tiny_encoder, **settings).train()
    assert not (made.exports / "done").exists()
    for _ in range(3):
        made._step(made._followed.database)
    made._save()  # and killed
    trainer(first, tmp_path, tiny_encoder, **settings).train()
    assert sorted(path.name for path in made.exports.iterdir()) == ["done", "step-000000", "step-000003"]


def test_the_log_has_null_where_no_query_has_a_candidate_and_leaves_out_those_that_have_none(
    first: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(first, tmp_path, tiny_encoder, dimension=32)
    db = made._followed.database
    whole = db.candidates

    def without(rows: slice) -> None:
        def found(*args: Any, **kwargs: Any) -> Any:
            batch = whole(*args, **kwargs)
            batch.ids[rows, 1:] = -1
            batch.n_valid[rows] = 0
            return batch

        monkeypatch.setattr(db, "candidates", found)

    without(slice(None))
    made._step(db)
    assert (made.run.log[-1]["utility"], made.run.log[-1]["best_utility"]) == (None, None)
    json.dumps(made.run.log, allow_nan=False)
    without(slice(1, None))
    made._step(db)
    assert -100 < made.run.log[-1]["utility"] <= made.run.log[-1]["best_utility"]


def test_a_run_that_diverges_ends_in_words_and_keeps_nothing_that_is_no_number(
    first: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    made = trainer(first, tmp_path, tiny_encoder, dimension=32, learning_rate=1e30)
    with pytest.raises(
        WorkerError, match=r"warm start, step 2: the loss is .*Nothing of this step is kept.*than 1e\+30"
    ):
        made.train()
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == []
    assert not (tmp_path / "exports").exists()
    with pytest.raises(WorkerError, match=r"step 1: the largest number of the query vectors is .*float16"):
        made._step(made._followed.database)
    made = trainer(first, tmp_path, tiny_encoder, dimension=32)
    made.model.reader.bias.register_hook(lambda gradient: gradient * math.inf)
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    with pytest.raises(
        WorkerError, match="step 1: the loss is .*, the gradient's norm .* of the retriever, (nan|inf) of"
    ):
        made._step(made._followed.database)
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())


def test_one_who_waited_for_the_lock_goes_on_from_what_the_other_left(
    database: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    """Two processes were started with the same command; the first one ended before the second had the lock."""
    settings = {"dimension": 32, "steps": 2, "cloze_steps": 0}
    one, other = (trainer(database, tmp_path, tiny_encoder, **settings) for _ in range(2))
    one._save()
    one._export()
    refreshed(database, tmp_path / "exports" / "step-000000", 0)
    one.train()
    left = stamps(tmp_path / "ckpt")
    assert other.train().step == 2
    assert stamps(tmp_path / "ckpt") == left
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"step": -1}, "realm.json is malformed.*step -1 of 4"),
        ({"step": 10**9}, "realm.json is malformed.*step 1000000000 of 4"),
        ({"batches": -5}, "realm.json is malformed.*batch -5"),
        ({"model": {"dimension": 10**12}}, r"retriever.projection.weight has the shape \(16, 32\), and should have"),
        ({"model": {"bert": {"num_hidden_layers": "a"}}}, "realm.json is malformed.*num_hidden_layers"),
    ],
)
def test_a_checkpoint_whose_document_was_changed_is_damaged_in_words(
    changed: dict[str, Any], said: str, first: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        return {**old, **{k: merged(old[k], v) if isinstance(v, dict) else v for k, v in new.items()}}

    trainer(first, tmp_path, tiny_encoder)._save()
    document = tmp_path / "ckpt" / "realm.json"
    document.write_text(json.dumps(merged(json.loads(document.read_text("utf-8")), changed)), encoding="utf-8")
    with pytest.raises(DamagedError, match=said):
        load_realm(str(tmp_path / "ckpt")) if "model" in changed else trainer(first, tmp_path, tiny_encoder)


@pytest.mark.parametrize("name", ["open-qa.json", "checkpoint.json", "thesis.tex"])
def test_a_folder_that_holds_something_else_is_refused_and_loses_nothing(
    name: str, first: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    """Checkpoints of all kinds have step folders: the first save of another kind would remove them."""
    weights = tmp_path / "ckpt" / "step-00000100" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    (tmp_path / "ckpt" / name).touch()
    with pytest.raises(InputError, match=rf"has no realm.json and holds other things \({name}\): name another"):
        trainer(first, tmp_path, tiny_encoder)
    assert weights.exists()


def test_a_short_warm_start_says_how_good_it_is(first: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("retrodb.learning.realm.cloze_accuracy", lambda queries, blocks: 0.5)
    made = trainer(first, tmp_path, tiny_encoder)
    made._warm_up(Interrupted(after=99))
    assert made.progress.lines[-1] == "3 steps, the own block first in 50% of the last"


def test_a_staleness_that_no_export_can_keep_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--max-staleness 8 with --export-every 10: .* Give --max-staleness 9 or"):
        RealmSettings.make({"export_every": 10, "max_staleness": 8})
    RealmSettings.make({"export_every": 10, "max_staleness": 9})
    RealmSettings.make({"export_every": 10, "steps": 5, "max_staleness": 4})


# -- two processes -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_trainer_and_a_refresher_share_a_database_and_either_may_die(
    database: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    exports = tmp_path / "exports"
    flags = ["--exports", exports, "--out", tmp_path / "ckpt", "--start", tiny_encoder, "--threads", 1]
    for name in ("dimension", "cloze_steps", "batch", "seed"):
        flags += [f"--{name.replace('_', '-')}", SETTINGS[name]]
    flags += ["--steps", 12, "--export-every", 4, "--max-staleness", 8]
    training = Running.start("realm", database, *flags)
    refreshing = Running.start("refresh", database, "--watch", exports, "--poll", 0.1, "--workers", 1)
    assert training.wait_for((exports / "step-000004").exists)
    training.kill()
    assert refreshing.wait_for(lambda: manifest_of(database)["version"]["step"] is not None)
    refreshing.kill()
    refreshing = Running.start("refresh", database, "--watch", exports, "--poll", 0.1, "--workers", 1)
    ran = retrodb("realm", database, *flags, "--json")
    assert ran.code == 0, ran.err
    assert refreshing.end() == 0, refreshing.err
    assert ran.json["step"] == 12
    assert manifest_of(database)["version"]["step"] == 12
    assert verify_database(package.open(str(database)), 1.0).problems == ()
    log = [json.loads(line) for line in (tmp_path / "ckpt/step-00000012/log.jsonl").read_text("utf-8").splitlines()]
    assert [entry["step"] for entry in log] == sorted({entry["step"] for entry in log})
    for entry in log:
        assert entry["staleness"]["steps"] <= 8
        assert entry["gradient_norm"]["retriever"] > 0 < entry["gradient_norm"]["reader"]
        assert 0 < entry["null_prior"] < 1
        assert np.isfinite([entry["loss"], entry["utility"], entry["best_utility"]]).all()
    model = load_realm(str(tmp_path / "ckpt"))
    db = package.open(str(database))
    with torch.no_grad():
        null = model.retriever.null().numpy()[0]
    np.testing.assert_allclose(db._candidates.null_vector.astype(np.float32), null, atol=2e-2, rtol=2e-2)
    assert retrodb("realm", database, *flags, "--json").json["step"] == 12, "a second time there is nothing to do"


@pytest.mark.slow
def test_the_commands_of_the_guide_run(
    first: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = (Path(__file__).parents[1] / "docs" / "realm.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "questions.jsonl", [{"question": "What is it?", "answers": ["name", "object", "the"]}])
    names = {
        "wikipedia.jsonl.gz": str(first.parent / "topics.jsonl"),
        "newer.jsonl.gz": str(first.parent / "topics.jsonl"),
        "path/to/encoder": str(tiny_encoder),
        "exports/step-001000": "exports/step-000002",
    }
    fewer = {
        "build": ["--chunk-tokens", "64"],
        "spans": ["--mask", "random-span"],
        "refresh": ["--poll", "0.1"],
        "finetune-qa": ["--steps", "2", "--batch", "1"],
        "realm": ["--start", str(tiny_encoder), "--steps", "2", "--cloze-steps", "1", "--batch", "2"],
    }
    beside: list[Running] = []
    for line in "".join(re.findall(r"```sh\n(.*?)```", guide, re.DOTALL)).splitlines():
        if line.split()[0] == "wait":
            assert [running.end() for running in beside] == [0]
            continue
        words = [names.get(word, word) for word in shlex.split(line, comments=True)[1:]]
        if words[-1] == "&":
            beside.append(Running.start(*words[:-1], *fewer[words[0]]))
            continue
        ran = retrodb(*words, *fewer.get(words[0], []))
        assert ran.code == 0, (line, ran.err)
    assert len(beside) == 1
    assert manifest_of(tmp_path / "wiki")["version"]["step"] == 2
    assert (tmp_path / "answers.jsonl").exists()


def test_what_cannot_be_trained_on_is_refused_in_words(
    first: Path, built: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="no masked queries yet"):
        trainer(built, tmp_path, tiny_encoder)
    with pytest.raises(UsageError, match="--steps 0"):
        RealmSettings.make({"steps": 0})
    with pytest.raises(UsageError, match="neither the retriever nor the reader trains"):
        RealmSettings.make({"train_retriever": False, "train_reader": False})
    with pytest.raises(UsageError, match="is never stale: leave --max-staleness out"):
        RealmSettings.make({"train_retriever": False, "max_staleness": 3})
    with pytest.raises(UsageError, match="--exclude"):
        RealmSettings.make({"exclude": "everything"})
    with pytest.raises(UsageError, match="--learning-rate inf"):
        RealmSettings.make({"learning_rate": math.inf})
    for name in ("dimension", "batch", "cloze_batch", "candidates"):
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} 1000000000000.*less than or equal to"):
            RealmSettings.make({name: 10**12})
    for place, said in ((first / "exports", "--exports .* lies inside the database"), (tmp_path / "ckpt", "are both")):
        with pytest.raises(InputError, match=said):
            RealmTrainer(str(first), str(tmp_path / "ckpt"), str(place), RealmSettings(), Progress())
    foreign = make_tiny_encoder(tmp_path / "foreign")
    tokenizer = foreign / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text("utf-8").replace("##ing", "##gni"), encoding="utf-8")
    with pytest.raises(MismatchError, match=r"own tokenizer .*; --start .*foreign' has another .*Start from a BERT of"):
        trainer(first, tmp_path, tiny_encoder, start=str(foreign))
    short = tmp_path / "short"
    shutil.copytree(tiny_encoder, short)
    BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=128)
    ).save_pretrained(short)
    with pytest.raises(InputError, match="up to 64 wordpieces and a question 96: the reader takes 128 together"):
        trainer(first, tmp_path, tiny_encoder, start=str(short))
    monkeypatch.setattr(Database, "metric", "l2")
    with pytest.raises(MismatchError, match="compares by l2: a retriever learns inner products"):
        trainer(first, tmp_path, tiny_encoder)
    monkeypatch.undo()
    made = trainer(first, tmp_path, tiny_encoder)
    made._save()
    trainer(first, tmp_path, tiny_encoder)
    with pytest.raises(MismatchError, match="its dimension is 16, now it is 8"):
        trainer(first, tmp_path, tiny_encoder, dimension=8)
    (tmp_path / "ckpt" / "realm.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="no checkpoint of retrodb realm"):
        trainer(first, tmp_path, tiny_encoder)
