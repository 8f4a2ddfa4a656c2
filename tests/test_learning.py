"""Training: deterministic, resumable bit for bit, interruptible; RETROfit leaves its base as it is."""

import errno
import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from models import build_topics, make_batch, make_model
from support import Progress, Running, build_here, retrodb, write_jsonl

import retrodb as package
from retrodb.errors import DamagedError, InputError, LockedError, MismatchError, UsageError
from retrodb.learning import TrainSettings, make_settings
from retrodb.learning.device import Device
from retrodb.learning.run import retrofit, train
from retrodb.learning.schedule import learning_rate
from retrodb.lock import TRAIN, writer_lock
from retrodb.model.checkpoint import WEIGHTS, load_model, open_checkpoint
from retrodb.storage import Storage

SETTINGS = {"preset": "tiny", "width": 32, "layers": 2, "heads": 2, "steps": 12, "warmup": 2, "batch": 3}


@pytest.fixture(scope="module")
def database(topics_db):
    return package.open(str(topics_db))


def settings(**changes) -> TrainSettings:
    return make_settings({}, {**SETTINGS, "precision": "fp32", **changes})


def run(database, out, **changes):
    return train(database, str(out), settings(**changes), Progress(), "cpu")


def weights(folder) -> dict[str, torch.Tensor]:
    return load_model(str(folder))[0].state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def undisturbed(database, tmp_path_factory):
    """A finished run of 12 steps."""
    out = tmp_path_factory.mktemp("run") / "ckpt"
    run(database, out)
    return out


@pytest.fixture(scope="module")
def plain(database, tmp_path_factory):
    """A finished run without retrieval: a base."""
    out = tmp_path_factory.mktemp("plain") / "ckpt"
    run(database, out, retrieval=False)
    return out


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_learns_and_leaves_a_log_and_a_plot(undisturbed):
    storage, checkpoint = open_checkpoint(str(undisturbed))
    log = [json.loads(line) for line in storage.read_bytes(checkpoint.files["log.jsonl"].path).splitlines()]
    assert [entry["step"] for entry in log] == [10, 12]
    assert log[1]["loss"] < log[0]["loss"]
    assert 0 < log[0]["loading_share"] < 1
    assert storage.read_bytes(checkpoint.files["loss.png"].path).startswith(b"\x89PNG")
    assert checkpoint.step == 12
    assert sorted(path.name for path in undisturbed.iterdir()) == ["checkpoint.json", "step-00000012"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_others(database, undisturbed, tmp_path):
    run(database, tmp_path / "again")
    run(database, tmp_path / "other", seed=1)
    assert same(weights(undisturbed), weights(tmp_path / "again"))
    assert not same(weights(undisturbed), weights(tmp_path / "other"))


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 5, 11])
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(database, undisturbed, tmp_path, monkeypatch, at):
    """Interrupted after some step, also within an epoch and between log entries, and gone on with."""
    interrupt_at_step(monkeypatch, at)
    with pytest.raises(KeyboardInterrupt):
        run(database, tmp_path)
    assert open_checkpoint(str(tmp_path))[1].step == at
    monkeypatch.undo()
    run(database, tmp_path)
    assert same(weights(undisturbed), weights(tmp_path))
    ours, theirs = (open_checkpoint(str(folder))[1] for folder in (tmp_path, undisturbed))
    assert ours.progress["tokens"] == theirs.progress["tokens"]
    assert ours.progress["position"] == theirs.progress["position"]
    assert ours.files["state.safetensors"].sha256 == theirs.files["state.safetensors"].sha256


def interrupt_at_step(monkeypatch, at: int) -> None:
    """Ctrl-C in the middle of that step."""
    from retrodb.learning.trainer import Trainer

    original = Trainer.take_step

    def take_step(self):
        if self.counts.step + 1 == at:
            signal.raise_signal(signal.SIGINT)
        return original(self)

    monkeypatch.setattr(Trainer, "take_step", take_step)


@pytest.mark.slow
def test_a_finished_run_does_nothing(database, undisturbed):
    before = (undisturbed / "checkpoint.json").stat().st_mtime_ns
    run(database, undisturbed)
    assert (undisturbed / "checkpoint.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_accumulated_batches_are_one_large_batch(database, tmp_path):
    run(database, tmp_path / "one", batch=4, steps=1, warmup=0)
    run(database, tmp_path / "two", batch=2, accumulate=2, steps=1, warmup=0)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    moments = [open_checkpoint(str(tmp_path / name))[1].progress["tokens"] for name in ("one", "two")]
    assert moments[0] == moments[1]
    assert all(torch.allclose(one[name], two[name], atol=3e-4) for name in one)


@pytest.mark.slow
def test_validation_rows_are_never_trained_on(database, tmp_path, monkeypatch):
    from retrodb.learning.stream import RowStream

    seen = set()
    original = RowStream.batch

    def batch(self, rows):
        made = original(self, rows)
        seen.update(made.documents.unique().tolist())
        return made

    monkeypatch.setattr(RowStream, "batch", batch)
    run(database, tmp_path)
    splits = {document.document_id: document.split for document in database.documents()}
    assert {splits[document] for document in seen if document >= 0} == {"train"}
    assert sum(split == "validation" for split in splits.values()) == 8


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_run_in_the_same_place_is_refused(database, undisturbed):
    with pytest.raises(MismatchError, match="holds another run .*: its steps is 12, now it is 13"):
        run(database, undisturbed, steps=13)


@pytest.mark.slow
def test_another_database_is_refused_and_both_fingerprints_are_named(database, undisturbed, tiny_encoder, tmp_path):
    other = package.open(str(build_topics(tmp_path / "same-tokenizer", tiny_encoder, training_neighbours=1)))
    fingerprints = [db.manifest.stages["training"].fingerprint[:16] for db in (database, other)]
    with pytest.raises(MismatchError, match=f"fingerprint {fingerprints[0]}; those of .* have {fingerprints[1]}"):
        run(other, undisturbed)
    other = package.open(str(build_topics(tmp_path / "other-tokenizer", tiny_encoder, tokenizer="train:300")))
    fingerprints = [db.manifest.fingerprints["tokenizer"]["fingerprint"][:16] for db in (database, other)]
    with pytest.raises(MismatchError, match=f"{fingerprints[0]}.*{fingerprints[1]}"):
        run(other, undisturbed)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "ckpt")
    path = tmp_path / "ckpt" / "step-00000012" / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DamagedError, match=r"model\.safetensors is missing, or not what was saved"):
        load_model(str(tmp_path / "ckpt"))
    (tmp_path / "ckpt" / "checkpoint.json").write_text('{"format": {"name": "retrodb-model", "version": 1}}')
    with pytest.raises(DamagedError, match=r"checkpoint\.json is malformed"):
        load_model(str(tmp_path / "ckpt"))
    with pytest.raises(InputError, match=r"is no checkpoint: it has no checkpoint\.json"):
        load_model(str(tmp_path))


def changed(folder: Path, **changes) -> None:
    """Change settings in ``checkpoint.json``, as ``model={"width": 3}``."""
    path = folder / "checkpoint.json"
    found = json.loads(path.read_text("utf-8"))
    for name, values in changes.items():
        found[name].update(values)
    path.write_text(json.dumps(found), "utf-8")


@pytest.mark.slow
def test_a_finished_run_that_has_lost_its_weights_is_not_called_finished(database, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "ckpt")
    (tmp_path / "ckpt" / "step-00000012" / WEIGHTS).unlink()
    with pytest.raises(DamagedError, match=r"model\.safetensors is missing"):
        run(database, tmp_path / "ckpt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"width": 10**9}}, "malformed: width"),
        ({"model": {"width": 1 << 17, "head_width": 1 << 16, "layers": 64}}, "does not hold this model's weights"),
        ({"model": {"layers": 10**9}}, "malformed: layers"),
        ({"model": {"vocabulary": 10**12}}, "malformed: vocabulary"),
        ({"model": {"chunk_tokens": 8}}, "chunks of 8 and 16 tokens"),
        ({"progress": {"step": -5}}, "step -5"),
    ],
    ids=str,
)
def test_a_checkpoint_that_contradicts_itself_is_named_and_takes_no_memory(undisturbed, tmp_path, changes, words):
    shutil.copytree(undisturbed, tmp_path / "ckpt")
    changed(tmp_path / "ckpt", **changes)
    with pytest.raises(DamagedError, match=words):
        load_model(str(tmp_path / "ckpt"))


@pytest.mark.slow
def test_a_checkpoint_that_does_not_say_how_far_it_is_is_not_gone_on_with(database, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "ckpt")
    changed(tmp_path / "ckpt", progress={"step": 3, "since": "x"})
    with pytest.raises(DamagedError, match="does not say how far"):
        run(database, tmp_path / "ckpt")


@pytest.mark.slow
def test_documents_in_which_nothing_is_predicted_teach_nothing(tiny_encoder, tmp_path):
    letters = write_jsonl(tmp_path / "letters.jsonl", [{"id": letter, "text": letter} for letter in "abcdefgh"])
    sizes = {"chunk_tokens": 16, "sequence_tokens": 64, "neighbours": 4, "dedup": "off"}
    build_here([letters], tmp_path / "db", encoder=str(tiny_encoder), **sizes)
    with pytest.raises(InputError, match="no token to predict"):
        run(package.open(str(tmp_path / "db")), tmp_path / "ckpt", steps=2)
    assert not (tmp_path / "ckpt").exists()


def test_a_model_that_does_not_fit_the_memory_is_refused_in_words(database, tmp_path, monkeypatch):
    def too_large(config):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 160000000000 bytes")

    monkeypatch.setattr("retrodb.learning.run.Retro", too_large)
    with pytest.raises(InputError, match="width 32 with 2 layers does not fit this machine's memory"):
        run(database, tmp_path / "ckpt")


def test_a_device_that_there_is_not_is_named():
    with pytest.raises(InputError, match="--device tpu: there is auto, cpu and cuda"):
        Device.choose("tpu")


@pytest.mark.parametrize(("name", "value"), [("clip", "inf"), ("width", 10**9), ("layers", 10**9), ("heads", 10**9)])
def test_numbers_beyond_all_bounds_name_their_flag(name, value):
    with pytest.raises(UsageError, match=f"--{name}"):
        make_settings({}, {name: value})


@pytest.mark.slow
def test_a_place_with_other_things_is_left_alone(database, tmp_path):
    (tmp_path / "work" / "step-1").mkdir(parents=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"holds other things \(step-1\)"):
        run(database, tmp_path / "work")
    with pytest.raises(InputError, match="is a file; name a folder"):
        run(database, tmp_path / "file")
    assert (tmp_path / "work" / "step-1").exists()


@pytest.mark.slow
def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(database, undisturbed, tmp_path, monkeypatch):
    original = Storage.commit_bytes

    def commit_bytes(self, relative, data):
        if relative == f"step-00000008/{WEIGHTS}":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), relative)
        return original(self, relative, data)

    monkeypatch.setattr(Storage, "commit_bytes", commit_bytes)
    with pytest.raises(OSError, match="No space left"):
        run(database, tmp_path, save_every=4)
    assert open_checkpoint(str(tmp_path))[1].step == 4
    assert load_model(str(tmp_path))
    monkeypatch.undo()
    run(database, tmp_path, save_every=4)
    assert same(weights(undisturbed), weights(tmp_path))


@pytest.mark.slow
def test_a_second_run_into_the_same_checkpoint_is_refused_and_a_finished_one_needs_no_lock(
    database, undisturbed, tmp_path
):
    out = tmp_path / "new" / "ckpt"
    out.mkdir(parents=True)
    with writer_lock(Storage(str(out)), TRAIN), pytest.raises(LockedError, match=r"being trained by process \d+"):
        run(database, out)
    run(database, out)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.json", "step-00000012"], "no lock stays behind"
    with writer_lock(Storage(str(out)), TRAIN):
        run(database, out)


@pytest.mark.slow
def test_a_run_that_another_finished_meanwhile_is_not_begun_from_the_start(
    database, undisturbed, tmp_path, monkeypatch
):
    """It saw an empty folder, waited in line for a moment, and then holds the lock of a finished checkpoint."""
    from retrodb.learning import run as module

    original = module.writer_lock

    def late(storage, work):
        shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
        return original(storage, work)

    monkeypatch.setattr(module, "writer_lock", late)
    assert run(database, tmp_path).step == 12
    assert same(weights(undisturbed), weights(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    "at", ["step-00000004/model.safetensors", "checkpoint.json", "step-00000008/state.safetensors"]
)
def test_a_run_killed_while_it_writes_a_checkpoint_is_gone_on_with(database, undisturbed, tmp_path, monkeypatch, at):
    """As SIGKILL leaves it: a file half written under its temporary name, and nothing tidied up."""
    original = Storage.commit_bytes

    def commit_bytes(self, relative, data):
        if relative == at:
            folder = Path(self.path(relative)).parent
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f".tmp-{Path(relative).name}-0123456789ab").write_bytes(data[: len(data) // 2])
            raise Killed
        return original(self, relative, data)

    monkeypatch.setattr(Storage, "commit_bytes", commit_bytes)
    with pytest.raises(Killed):
        run(database, tmp_path, save_every=4)
    monkeypatch.undo()
    run(database, tmp_path, save_every=4)
    assert same(weights(undisturbed), weights(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.json", "step-00000012"]
    left = [path.name for path in (tmp_path / "step-00000012").iterdir()]
    assert sorted(left) == ["log.jsonl", "loss.png", "model.safetensors", "state.safetensors"]


class Killed(BaseException):
    """Stands for the end of the process."""


def test_settings_are_checked_and_the_database_s_own_are_refused():
    with pytest.raises(UsageError, match="--steps 0: Input should be greater than or equal to 1"):
        make_settings({}, {"steps": 0})
    with pytest.raises(InputError, match="sets chunk-tokens: data settings come from the database alone"):
        make_settings({"chunk_tokens": 32}, {})
    for name, value in {"learning_rate": "inf", "weight_decay": "nan", "batch": 10**9, "clip": 0}.items():
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} "):
            make_settings({}, {name: value})
    with pytest.raises(InputError, match="--speed 3: Extra inputs"):
        make_settings({"speed": 3}, {})
    assert make_settings({"steps": 50, "seed": 3}, {"seed": "4"}).seed == 4
    assert make_settings({}, {"steps": "50"}).warmup == 5


def test_the_learning_rate_rises_and_falls_by_half_a_cosine():
    rates = [learning_rate(step, steps=110, warmup=10, peak=1.0, final_share=0.1) for step in range(110)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert 0.1 <= rates[-1] < 0.101


def test_bf16_is_used_where_it_is_native_alone(monkeypatch):
    from retrodb.learning import device

    monkeypatch.setattr(device, "cpu_precision", lambda: "bf16")
    assert Device.choose("cpu").precision == "bf16"
    assert Device.choose("cpu", "fp32").precision == "fp32"
    monkeypatch.setattr(device, "cpu_precision", lambda: "fp32")
    assert Device.choose("cpu").precision == "fp32"
    with pytest.raises(InputError, match="has none of its own"):
        Device.choose("cpu", "bf16")


def test_a_step_in_bf16_is_close_to_one_in_fp32():
    model, batch = make_model(), make_batch()
    with torch.no_grad():
        exact = model.loss(batch)
        with Device("cpu", "bf16").autocast():
            rough = model.loss(batch)
    assert rough.dtype == torch.float32
    assert 0 < abs(float(exact - rough)) < 0.1 * float(exact)


# -- RETROfit ----------------------------------------------------------------------------------------------------------


def test_a_gate_at_zero_makes_it_its_base_exactly_and_lets_it_learn():
    model, batch = make_model(gated=True), make_batch()
    with torch.no_grad():
        assert torch.equal(model(batch), model(batch.with_neighbours(0)))
    model.freeze_base()
    model.loss(batch).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == {name for name, _ in model.named_parameters() if name.endswith("gate")}


@pytest.mark.slow
def test_retrofit_keeps_the_base_bit_for_bit_and_starts_as_it(database, plain, tmp_path):
    retrofit(database, str(plain), str(tmp_path), settings(), Progress(), "cpu")
    base, fitted = weights(plain), weights(tmp_path)
    decoder = {name: value for name, value in fitted.items() if name.startswith("decoder.")}
    assert same(base, decoder)
    gates = [value for name, value in fitted.items() if name.endswith("gate")]
    assert all((gate != 0).any() for gate in gates)
    again = tmp_path / "again"
    with pytest.raises(InputError, match="has retrieval already"):
        retrofit(database, str(tmp_path), str(again), settings(), Progress(), "cpu")


@pytest.mark.slow
def test_retrofit_of_a_hugging_face_base_keeps_it_bit_for_bit(database, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    card = GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    theirs = GPT2LMHeadModel(card)
    theirs.save_pretrained(tmp_path / "gpt2", safe_serialization=True)
    retrofit(database, str(tmp_path / "gpt2"), str(tmp_path / "out"), settings(steps=3), Progress(), "cpu")
    fitted = weights(tmp_path / "out")
    assert torch.equal(fitted["decoder.embedding.weight"], theirs.transformer.wte.weight)
    assert torch.equal(fitted["decoder.blocks.1.inner.up.weight"], theirs.transformer.h[1].mlp.c_fc.weight.T)
    assert any((value != 0).any() for name, value in fitted.items() if name.endswith("gate"))


@pytest.mark.slow
def test_a_resumed_retrofit_equals_an_undisturbed_one(database, plain, tmp_path, monkeypatch):
    def fit(out):
        return retrofit(database, str(plain), str(out), settings(), Progress(), "cpu")

    fit(tmp_path / "whole")
    interrupt_at_step(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut")
    monkeypatch.undo()
    fit(tmp_path / "cut")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_keeps_a_checkpoint_and_the_same_command_goes_on(topics_db, tmp_path):
    flags = ["--preset", "tiny", "--steps", 4000, "--batch", 2, "--save-every", 5, "--threads", 1]
    running = Running.start("train", topics_db, "--out", tmp_path / "ckpt", *flags)
    assert running.wait_for((tmp_path / "ckpt" / "checkpoint.json").exists)
    running.signal_group(signal.SIGINT)
    assert running.end() == 130
    assert "run the same command again" in running.err
    step = open_checkpoint(str(tmp_path / "ckpt"))[1].step
    assert step > 0
    done = retrodb("train", topics_db, "--out", tmp_path / "ckpt", *flags[:2], "--steps", 7, "--json")
    assert done.code == 3
    assert "its batch is 2, now it is 8" in done.json["error"]


@pytest.mark.slow
def test_train_says_what_is_wrong(topics_db, tmp_path):
    out = tmp_path / "ckpt"
    assert retrodb("train", topics_db, "--out", out, "--steps", 0).code == 2
    assert retrodb("train", tmp_path, "--out", out).code == 3
    inside = retrodb("train", topics_db, "--out", topics_db / "ckpt", "--preset", "tiny")
    assert inside.code == 3
    assert "lies inside the database" in inside.err
    assert not out.exists()
