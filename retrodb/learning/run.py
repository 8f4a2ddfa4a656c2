"""A whole run: begun, gone on with, or found finished; from scratch or from a frozen base."""

import hashlib
import json
from typing import Any, Final, Protocol

import torch

from retrodb.database import Database
from retrodb.errors import InputError, MismatchError
from retrodb.learning.device import Device
from retrodb.learning.interrupt import Interruptions
from retrodb.learning.plot import loss_plot
from retrodb.learning.settings import TrainSettings
from retrodb.learning.stream import RowStream
from retrodb.learning.trainer import Trainer
from retrodb.lock import TRAIN, writer_lock
from retrodb.manifest import fingerprint
from retrodb.model.bases import Base, load_base
from retrodb.model.checkpoint import (
    STATE,
    WEIGHTS,
    Checkpoint,
    check_free,
    load_weights,
    read_checkpoint,
    read_file,
    read_tensors,
    tensor_bytes,
    write_checkpoint,
)
from retrodb.model.config import ModelConfig, default_retrieval
from retrodb.model.data import DataSettings
from retrodb.model.retro import Retro
from retrodb.sizes import count_of
from retrodb.storage import Storage

LOG: Final = "log.jsonl"
PLOT: Final = "loss.png"


class Progress(Protocol):
    """Who is told how a run gets on."""

    def begin(self, stage: str, total: int, done: int, unit: str) -> None: ...
    def advance(self, done: int) -> None: ...
    def end(self, summary: str) -> None: ...
    def note(self, text: str) -> None: ...


def train(
    database: Database, out: str, settings: TrainSettings, progress: Progress, device: str = "auto"
) -> Checkpoint:
    """Train a model from scratch into the folder ``out``; go on where there is a checkpoint of the same run.

    Raises:
        InputError: the database has no training rows, or the sizes do not fit each other.
        MismatchError: ``out`` holds another run, or one on another database.
        LockedError: another process trains into ``out``.
        DamagedError: a file of the checkpoint is not what was saved.
        KeyboardInterrupt: after the checkpoint of the last whole step was written.
    """
    data = DataSettings.of(database)
    config = ModelConfig.preset(
        settings.preset,
        vocabulary=data.vocabulary,
        chunk_tokens=data.chunk_tokens,
        retrieval=settings.retrieval,
        overrides=settings.sizes,
    )
    return _run(database, data, Storage(out), settings, config, None, progress, device)


def retrofit(
    database: Database, base: str, out: str, settings: TrainSettings, progress: Progress, device: str = "auto"
) -> Checkpoint:
    """Add retrieval to a plain decoder whose weights stay as they are (the paper's section 4.2).

    Args:
        database: whose rows to train on.
        base: a checkpoint of `train` without retrieval, or a Hugging Face folder or hub name.
        out: folder of the new checkpoint.
        settings: as for `train`; the base gives the sizes.
        progress: who is told.
        device: auto, cpu or cuda.

    Raises:
        As `train` and `retrodb.model.bases.load_base`.
    """
    data = DataSettings.of(database)
    found = load_base(base, data, database.tokenizer, database.storage.url)
    retrieval = default_retrieval(found.config.width, found.config.layers, gated=True)
    config = found.config.model_copy(update={"retrieval": retrieval})
    return _run(database, data, Storage(out), settings, config, found, progress, device)


def _run(
    database: Database,
    data: DataSettings,
    storage: Storage,
    settings: TrainSettings,
    config: ModelConfig,
    base: Base | None,
    progress: Progress,
    device_name: str,
) -> Checkpoint:
    device = Device.choose(device_name, settings.precision)
    database.storage.refuse_inside(storage.url)
    run = {**settings.identity, "precision": device.precision, "base": _base_fingerprint(base)}

    def begun() -> tuple[Checkpoint | None, bool]:
        """What is there of this very run, and whether it is all."""
        kept = read_checkpoint(storage)
        if kept is None:
            check_free(storage)
            return None, False
        _check_same_run(kept, storage, run, config, data, database)
        if kept.step < settings.steps:
            return kept, False
        read_file(storage, kept.files, WEIGHTS)  # who says that nothing is to be done has to have it
        progress.note(f"{storage.url} is trained already: {count_of(kept.step, 'step')}. Nothing to do.")
        return kept, True

    kept, finished = begun()
    if kept is not None and finished:
        return kept
    made = storage.make_root()
    try:
        with writer_lock(storage, TRAIN):
            kept, finished = begun()  # once more: before the lock was ours, another run may have gone on with it
            if kept is not None and finished:
                return kept
            trainer = _make_trainer(database, data, settings, config, base, device)
            if kept is not None:
                _go_on(trainer, storage, kept)
                progress.note(f"going on from step {kept.step:,} of {storage.url}")
            _introduce(trainer, device, progress)
            return _steps(trainer, storage, Checkpoint(config, data, run, {"step": 0}), progress)
    finally:
        storage.unmake(made)


def _make_trainer(
    database: Database,
    data: DataSettings,
    settings: TrainSettings,
    config: ModelConfig,
    base: Base | None,
    device: Device,
) -> Trainer:
    """At step 0."""
    torch.manual_seed(settings.seed)
    try:
        model = Retro(config)
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        raise InputError(
            f"a model of width {config.width} with {config.layers} layers does not fit this machine's memory. Train a"
            " smaller one: --width, --layers, or another --preset."
        ) from error
    if base is not None:
        load_weights(model.decoder, base.weights, base.name)
        model.freeze_base()
    stream = RowStream(database, data.neighbours if config.retrieval is not None else 0, settings.seed)
    return Trainer(model, stream, settings, device)


def _introduce(trainer: Trainer, device: Device, progress: Progress) -> None:
    counts = trainer.model.parameter_counts()
    progress.note(
        f"{counts['decoder']:,} parameters in the decoder, {counts['retrieval']:,} in the retrieval;"
        f" {counts['training']:,} train. {count_of(len(trainer.stream), 'row')} an epoch. {device.name}, "
        f"{device.precision}"
    )


def _steps(trainer: Trainer, storage: Storage, start: Checkpoint, progress: Progress) -> Checkpoint:
    settings, counts = trainer.settings, trainer.counts
    saved = start
    progress.begin("train", settings.steps, counts.step, "steps")
    with Interruptions() as interruptions:
        while not trainer.finished:
            entry = trainer.take_step()
            counts = trainer.counts
            progress.advance(counts.step)
            if entry is not None and counts.step % (settings.log_every * 10) == 0:
                progress.note(
                    f"step {counts.step:,}: loss {entry['loss']:.3f}, {entry['tokens_per_second']:,.0f} tokens/s"
                )
            if interruptions.asked or trainer.finished or counts.step % settings.save_every == 0:
                saved = _save(trainer, storage, start)
            if interruptions.asked and not trainer.finished:
                raise KeyboardInterrupt
    loss = counts.log[-1]["loss"] if counts.log else float("nan")
    progress.end(f"{count_of(counts.step, 'step')}, {count_of(counts.tokens, 'token')}, loss {loss:.3f}")
    return saved


def _save(trainer: Trainer, storage: Storage, start: Checkpoint) -> Checkpoint:
    if not trainer.counts.tokens:
        raise InputError(
            f"{trainer.counts.step:,} steps had no token to predict: a document's first token has no prediction, and"
            " these documents have one token alone, or were deleted. Nothing was learnt, and nothing is kept."
        )
    log = trainer.counts.log
    contents = {
        WEIGHTS: tensor_bytes(dict(trainer.model.state_dict())),
        STATE: tensor_bytes(trainer.state()),
        LOG: b"".join(json.dumps(entry).encode() + b"\n" for entry in log),
    }
    if log:
        contents[PLOT] = loss_plot(log)
    made = Checkpoint(start.model, start.data, start.settings, trainer.progress())
    return write_checkpoint(storage, made, contents)


def _go_on(trainer: Trainer, storage: Storage, kept: Checkpoint) -> None:
    where = storage.describe(kept.files[WEIGHTS].path) if WEIGHTS in kept.files else storage.url
    load_weights(trainer.model, read_tensors(storage, kept.files, WEIGHTS), where)
    log = [json.loads(line) for line in read_file(storage, kept.files, LOG).splitlines()]
    trainer.load(kept.progress, read_tensors(storage, kept.files, STATE), log)


def _base_fingerprint(base: Base | None) -> str | None:
    """sha256 of a base's weights, as a file of them would have."""
    if base is None:
        return None
    return hashlib.sha256(tensor_bytes(base.weights)).hexdigest()


def _check_same_run(
    kept: Checkpoint,
    storage: Storage,
    run: dict[str, Any],
    config: ModelConfig,
    data: DataSettings,
    database: Database,
) -> None:
    data.check_same(kept.data, storage.url, database.storage.url)
    differs = sorted(name for name in run.keys() | kept.settings.keys() if run.get(name) != kept.settings.get(name))
    if differs:
        name = differs[0]
        raise MismatchError(
            f"{storage.url} holds another run (fingerprint {fingerprint(kept.settings)[:16]}, this one"
            f" {fingerprint(run)[:16]}): its {name.replace('_', '-')} is {kept.settings.get(name)!r}, now it is"
            f" {run.get(name)!r} ({count_of(len(differs), 'setting differs', 'settings differ')}). Give it the same, "
            "or name another --out."
        )
    if config != kept.model:
        raise MismatchError(f"{storage.url} holds a model of other sizes: {kept.model!r}. Name another --out.")
