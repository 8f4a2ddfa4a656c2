"""A whole evaluation: checkpoints and a database in, figures out."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from retrodb.database import Database
from retrodb.errors import InputError
from retrodb.evaluation.bits import ChunkNats, measure
from retrodb.evaluation.conditions import Condition, conditions
from retrodb.evaluation.intervals import Estimates, by_document, estimate
from retrodb.evaluation.settings import DEFAULT_NEIGHBOURS, EvaluationSettings
from retrodb.learning.device import Device
from retrodb.learning.run import Progress
from retrodb.model.checkpoint import Checkpoint, load_model
from retrodb.model.data import DataSettings
from retrodb.model.retro import Retro
from retrodb.quality.leakage import THRESHOLDS
from retrodb.sizes import count_of
from retrodb.training.table import TrainingTable


@dataclass(frozen=True)
class Evaluated:
    """The figures. ``by_leakage`` holds, for each alpha: chunks with r <= alpha, and their estimates."""

    about: dict[str, Any]
    conditions: list[Condition]
    overall: Estimates
    by_leakage: list[tuple[float, int, Estimates | None]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        def rows(estimates: Estimates | None) -> list[dict[str, Any]]:
            if estimates is None:
                return []
            found = zip(self.conditions, estimates.bits, estimates.gains, strict=True)
            return [{"condition": c.name, "bits_per_byte": b.as_json(), "gain": g.as_json()} for c, b, g in found]

        return {
            **self.about,
            "conditions": rows(self.overall),
            "by_leakage": [
                {"alpha": alpha, "chunks": chunks, "conditions": rows(estimates)}
                for alpha, chunks, estimates in self.by_leakage
            ],
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Measured:
    """What models make of a database's rows, chunk by chunk, before any mean is taken.

    Attributes:
        conditions: what the models were given, ``off`` first.
        chunks: nats of each chunk, model and condition.
        lengths: float64 ``[C]``, bytes of each chunk's predicted tokens.
        leakage: float64 ``[C]``, r(C) of each chunk; None where the database has no such table.
        about: what was measured, for a report.
        notes: what a reader of the figures should know.
    """

    conditions: list[Condition]
    chunks: ChunkNats
    lengths: npt.NDArray[np.float64]
    leakage: npt.NDArray[np.float64] | None
    about: dict[str, Any]
    notes: list[str]

    def below(self, alpha: float) -> npt.NDArray[np.bool_]:
        """bool ``[C]``: which chunks have r(C) <= alpha."""
        if self.leakage is None:
            raise InputError("the database has no leakage table: run the build to its end.")
        found: npt.NDArray[np.bool_] = self.leakage <= alpha
        return found


def evaluate(
    database: Database,
    checkpoints: Sequence[str],
    settings: EvaluationSettings,
    progress: Progress,
    *,
    device: str = "auto",
    cache: str | None = None,
) -> Evaluated:
    """Bits per byte of a database's documents, with its neighbours and without.

    Args and what is raised: as `measure_database`.
    """
    measured = measure_database(database, checkpoints, settings, progress, device=device, cache=cache)
    return _estimated(measured, settings, database.storage.url)


def measure_database(
    database: Database,
    checkpoints: Sequence[str],
    settings: EvaluationSettings,
    progress: Progress,
    *,
    device: str = "auto",
    cache: str | None = None,
) -> Measured:
    """Predict a database's documents, with its neighbours and without.

    Args:
        database: whose rows and neighbours.
        checkpoints: one, or several that differ in their seed alone: intervals are over them, too.
        settings: what is measured.
        progress: who is told.
        device: auto, cpu or cuda.
        cache: a local folder for the memory-mapped tables; None for one that is removed afterwards.

    Raises:
        InputError: there is no such split, more neighbours are asked for than the database keeps, or models differ.
        MismatchError: a model was trained on other tokens, or on chunks of another size.
        DamagedError: a file is not what was recorded.
    """
    data = DataSettings.of(database)
    models, found = _models(checkpoints, data, database)
    kept = int(database.manifest.config["neighbours"])
    wanted = _conditions(models[0], settings, data, kept)
    chosen = Device.choose(device, settings.precision)
    with tempfile.TemporaryDirectory(prefix="retrodb-") as folder:
        most = max(1, *(condition.k for condition in wanted))
        table = TrainingTable(database.storage, database.manifest, cache or folder, most, settings.split)
        rows = _rows(table, settings, database)
        progress.begin("evaluate", len(rows), 0, "rows")
        chunks = measure(
            [model.to(chosen.name) for model in models],
            table,
            rows,
            wanted,
            batch_rows=settings.batch,
            device=chosen,
            seed=settings.seed,
            advance=progress.advance,
        )
    lengths, whole = predicted_bytes(database, chunks)
    about = {
        "database": database.storage.url,
        "checkpoints": list(checkpoints),
        "split": settings.split,
        "sequences": len(rows),
        "documents": len(np.unique(chunks.document_ids)),
        "chunks": len(chunks.chunk_ids),
        "tokens_predicted": int(chunks.predicted.sum()),
        "bytes_predicted": int(lengths.sum()),
        "share_of_bytes": float(lengths.sum() / max(1, whole)),
        "precision": chosen.precision,
        "seed": settings.seed,
    }
    notes = []
    if any(one.data.training_fingerprint != data.training_fingerprint for one in found):
        notes.append("the model was trained on another database than it is evaluated with.")
    progress.end(
        f"{count_of(len(rows), 'sequence')}, {count_of(len(wanted), 'condition')}, {count_of(len(models), 'model')}"
    )
    return Measured(wanted, chunks, lengths, _leakage(database, chunks), about, notes)


def _models(checkpoints: Sequence[str], data: DataSettings, database: Database) -> tuple[list[Retro], list[Checkpoint]]:
    loaded: list[tuple[Retro, Checkpoint]] = []
    for url in checkpoints:
        model, checkpoint = load_model(url)
        data.check_model(checkpoint.data, url, database.storage.url)
        if loaded and checkpoint.model != loaded[0][1].model:
            raise InputError(
                f"{url} is a model of other sizes than {checkpoints[0]}: a mean over both says nothing. Evaluate them"
                " one after the other."
            )
        loaded.append((model, checkpoint))
    return [model for model, _ in loaded], [checkpoint for _, checkpoint in loaded]


def _conditions(model: Retro, settings: EvaluationSettings, data: DataSettings, kept: int) -> list[Condition]:
    asked = settings.neighbours
    if asked is not None and max(asked, default=0) > kept:
        raise InputError(
            f"-k {max(asked)}: the database keeps {count_of(kept, 'neighbour')} a chunk. Ask for at most {kept}, or "
            f"build it with --neighbours {max(asked)}."
        )
    if model.retrieval is None:
        if any(asked or ()):
            raise InputError(f"-k {max(asked or ())}: the model has no retrieval; it can be evaluated without alone.")
        return [Condition(0)]
    return conditions(asked or [k for k in DEFAULT_NEIGHBOURS if k <= kept], data.neighbours)


def _rows(table: TrainingTable, settings: EvaluationSettings, database: Database) -> npt.NDArray[np.int64]:
    if not len(table):
        raise InputError(
            f"{database.storage.url} has no {settings.split} documents. Build it with --validation or"
            " --validation-fraction, or evaluate another --split, and mind what the model was trained on."
        )
    count = min(len(table), settings.rows or len(table))
    return np.arange(count, dtype=np.int64) * len(table) // count


def predicted_bytes(database: Database, measured: ChunkNats) -> tuple[npt.NDArray[np.float64], int]:
    """Bytes of each chunk's predicted tokens, float64 ``[C]``, and all bytes of the chunks.

    With a lossless tokenizer the one token without a prediction has bytes of its own, which are taken off; with another
    it has the chunk's mean.
    """
    ids, sizes = [], []
    for table in database.tables("chunks", ["chunk_id", "start", "end"]):
        own = np.isin(table["chunk_id"].to_numpy(), measured.chunk_ids)
        ids.append(table["chunk_id"].to_numpy()[own])
        sizes.append((table["end"].to_numpy() - table["start"].to_numpy())[own])
    whole = np.concatenate(sizes)[np.searchsorted(np.concatenate(ids), measured.chunk_ids)].astype(np.float64)
    lengths = whole.copy()
    tokenizer = database.tokenizer
    for at in np.flatnonzero(measured.predicted < measured.tokens):
        if tokenizer.lossless:
            lengths[at] -= len(tokenizer.decode([int(measured.first_tokens[at])]))
        else:
            lengths[at] *= measured.predicted[at] / measured.tokens[at]
    return lengths, int(whole.sum())


def _estimated(measured: Measured, settings: EvaluationSettings, url: str) -> Evaluated:
    chunks, lengths, wanted = measured.chunks, measured.lengths, measured.conditions

    def of(some: npt.NDArray[np.bool_]) -> Estimates | None:
        if not some.any():
            return None
        sums = by_document(chunks.document_ids[some], chunks.nats[:, :, some], lengths[some])
        return estimate(*sums, draws=settings.draws, seed=settings.seed)

    overall = of(np.ones(len(lengths), dtype=bool))
    if overall is None:
        raise InputError(f"no token of the {settings.split} documents of {url} has a prediction.")
    evaluated = Evaluated(measured.about, wanted, overall)
    if measured.leakage is None:
        evaluated.notes.append("the database has no leakage table: run the build to its end for figures by leakage.")
    else:
        below = [(alpha, measured.below(alpha)) for alpha in THRESHOLDS]
        evaluated.by_leakage.extend((alpha, int(some.sum()), of(some)) for alpha, some in below)
    for condition, gain in zip(wanted, overall.gains, strict=True):
        if condition.random and gain.interval and gain.interval[0] > 0:
            evaluated.notes.append(
                f"random neighbours gain {gain.value:.4f} bits per byte: so much of each gain is not retrieval's."
            )
    evaluated.notes.extend(measured.notes)
    return evaluated


def _leakage(database: Database, measured: ChunkNats) -> npt.NDArray[np.float64] | None:
    """r(C) of each chunk, float64 ``[C]``; None where the report stage has not run."""
    if not database.manifest.shards("leakage"):
        return None
    tables = list(database.tables("leakage", ["chunk_id", "leakage"]))
    ids = np.concatenate([table["chunk_id"].to_numpy() for table in tables])
    values = np.concatenate([table["leakage"].to_numpy() for table in tables])
    found: npt.NDArray[np.float64] = values[np.searchsorted(ids, measured.chunk_ids)].astype(np.float64)
    return found
