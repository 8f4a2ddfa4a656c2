"""The models: what each may spend, its training, and what it makes of the validation rows of a database."""

import gc
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from gain.corpora import open_database
from gain.plan import BASE, FITTED, LONGER, MIDDLE, RETRO, Experiment, Setting
from retrodb.database import Database
from retrodb.evaluation import EvaluationSettings
from retrodb.evaluation.intervals import by_document
from retrodb.evaluation.run import Measured, measure_database
from retrodb.learning import make_settings
from retrodb.learning.run import retrofit, train
from retrodb.learning.settings import TrainSettings
from retrodb.learning.stream import RowStream
from retrodb.model import ModelConfig, Retro
from retrodb.model.config import default_retrieval
from retrodb.model.data import DataSettings
from retrodb.quality.leakage import THRESHOLDS


@dataclass(frozen=True)
class Costs:
    """Floating point operations of a token in a training step, and the steps that follow from them.

    RETRO and the base take the same steps: equal tokens. The *longer* base takes as many as RETRO's compute pays for.
    RETROfit takes what is left of that compute behind its base: base and RETROfit together cost what RETRO costs, and
    what the longer base costs. The *middle* base sees as many tokens as base and RETROfit together.
    """

    plain: float
    retro: float
    fitted: float
    steps: dict[str, int]

    @staticmethod
    def of(experiment: Experiment, steps: int, data: DataSettings, rows: Any) -> "Costs":
        """Counted by torch, forwards and backwards, over real rows (their numbers are the same whatever they hold)."""
        plain, retro, fitted = (_operations(experiment, data, rows, kind) for kind in (BASE, RETRO, FITTED))
        fit = max(1, round(steps * (retro - plain) / fitted))
        longer = round(steps * retro / plain)
        return Costs(
            plain, retro, fitted, {BASE: steps, RETRO: steps, FITTED: fit, MIDDLE: steps + fit, LONGER: longer}
        )

    def as_json(self) -> dict[str, Any]:
        return {"flops_per_token": {BASE: self.plain, RETRO: self.retro, FITTED: self.fitted}, "steps": self.steps}


def _operations(experiment: Experiment, data: DataSettings, rows: Any, kind: str) -> float:
    config = ModelConfig.preset(
        "tiny",
        vocabulary=data.vocabulary,
        chunk_tokens=data.chunk_tokens,
        retrieval=False,
        overrides={"width": experiment.width, "layers": experiment.layers, "heads": experiment.heads},
    )
    if kind != BASE:
        retrieval = default_retrieval(config.width, config.layers, gated=kind == FITTED)
        config = config.model_copy(update={"retrieval": retrieval})
    model = Retro(config)
    if kind == FITTED:
        model.freeze_base()
    counter = FlopCounterMode(display=False)
    with counter:
        model.loss(rows).backward()
    return float(counter.get_total_flops() / rows.tokens.numel())


def costs(experiment: Experiment, setting: Setting, database: Database) -> Costs:
    """The costs of a setting's models on a database's rows."""
    data = DataSettings.of(database)
    return Costs.of(experiment, setting.steps, data, RowStream(database, data.neighbours, 0).batch(experiment.batch))


def train_model(
    experiment: Experiment, kind: str, seed: int, database: Database, folder: Path, steps: int
) -> dict[str, Any]:
    """Train a model; go on with one that was begun; leave a finished one. Returns what a report tells of it."""
    settings = _settings(experiment, kind, seed, steps)
    out = folder / f"{kind}-{seed}"
    started = time.monotonic()
    if kind == FITTED:
        made = retrofit(database, str(folder / f"{BASE}-{seed}"), str(out), settings, Said(f"{out.name}: "), "cpu")
    else:
        made = train(database, str(out), settings, Said(f"{out.name}: "), "cpu")
    log = [json.loads(line) for line in (out / made.files["log.jsonl"].path).read_text("utf-8").splitlines()]
    gc.collect()
    last = log[-1]
    return {
        "steps": made.step,
        "tokens": made.progress["tokens"],
        "seconds": round(made.progress["seconds"], 1),
        "places": made.step * experiment.batch * experiment.sequence_tokens,
        "last_loss": round(last["loss"], 4),
        "loading_share": last["loading_share"],
        "wall": round(time.monotonic() - started, 1),
    }


def _settings(experiment: Experiment, kind: str, seed: int, steps: int) -> TrainSettings:
    given = {
        "steps": steps,
        "batch": experiment.batch,
        "learning_rate": experiment.learning_rate,
        "seed": seed,
        "precision": "fp32",
        "save_every": 200,
    }
    if kind != FITTED:
        sizes = {"width": experiment.width, "layers": experiment.layers, "heads": experiment.heads}
        given |= {"preset": "tiny", "retrieval": kind == RETRO, **sizes}
    return make_settings({}, given)


def measure_model(
    experiment: Experiment, checkpoint: Path, database: Path, kind: str, *, sweep: bool, cache: Path
) -> dict[str, Any]:
    """What a model makes of the validation rows of a database: raw sums, by document and by leakage.

    Args:
        experiment: how many rows, which numbers of neighbours.
        checkpoint: the model.
        database: whose neighbours.
        kind: one of `MODELS`.
        sweep: whether all numbers of neighbours are tried, else only the number of the training rows.
        cache: for the memory-mapped tables.
    """
    opened = open_database(database)
    asked: tuple[int, ...] | None = None
    if kind in (RETRO, FITTED):
        asked = experiment.neighbours if sweep else (0, experiment.training_neighbours)
    settings = EvaluationSettings(neighbours=asked, rows=experiment.rows, batch=2, precision="fp32")
    said = Said(f"{checkpoint.name} with {database.name}: ")
    measured = measure_database(opened, [str(checkpoint)], settings, said, device="cpu", cache=str(cache))
    return summed(measured, keys(opened))


def summed(measured: Measured, names: dict[int, str]) -> dict[str, Any]:
    """Sums over each document's chunks with r(C) <= alpha, for each alpha, and over all of them (``all``).

    Returns:
        ``conditions``, ``documents`` (their keys), and for each bucket ``chunks``, ``bytes`` [D] and ``nats``
        [conditions][D], where a document without such a chunk has 0 of either.
    """
    chunks = measured.chunks
    documents = np.unique(chunks.document_ids)
    found: dict[str, Any] = {
        "conditions": [condition.name for condition in measured.conditions],
        "documents": [names[int(document)] for document in documents],
        "buckets": {},
    }
    every = np.ones(len(measured.lengths), dtype=bool)
    for name, some in [("all", every), *((f"{alpha:g}", measured.below(alpha)) for alpha in THRESHOLDS)]:
        nats, n_bytes = by_document(chunks.document_ids, chunks.nats[0] * some, measured.lengths * some)
        found["buckets"][name] = {
            "chunks": int(some.sum()),
            "bytes": [round(float(value), 2) for value in n_bytes],
            "nats": [[round(float(value), 2) for value in row] for row in nats],
        }
    return found


def keys(database: Database) -> dict[int, str]:
    """The key of each document, by id: ids of the same document differ between databases."""
    tables = database.tables("documents", ["document_id", "key"])
    return {number: key for one in tables for number, key in _pairs(one)}


def _pairs(table: Any) -> Iterator[tuple[int, str]]:
    return zip(table["document_id"].to_pylist(), table["key"].to_pylist(), strict=True)


def use_one_thread() -> None:
    """These models are too small for threads, which wait for each other where cores are shared."""
    torch.set_num_threads(1)


class Said:
    """Progress as lines on stderr."""

    def __init__(self, of: str) -> None:
        self._of = of

    def begin(self, stage: str, total: int, done: int, unit: str) -> None:
        self.note(f"{stage} {total:,} {unit}, {done:,} done")

    def advance(self, done: int) -> None:
        pass

    def end(self, summary: str) -> None:
        self.note(summary)

    def note(self, text: str) -> None:
        print(time.strftime("%H:%M:%S"), self._of + text, file=sys.stderr, flush=True)
