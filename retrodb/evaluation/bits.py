"""Nats of every chunk's tokens, under each condition, by each model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from retrodb.evaluation.conditions import Condition
from retrodb.evaluation.control import with_random_neighbours
from retrodb.learning.device import Device
from retrodb.model.batch import Batch
from retrodb.model.retro import Retro
from retrodb.training.table import Arrays, TrainingTable


@dataclass(frozen=True)
class ChunkNats:
    """What was measured of C chunks.

    Attributes:
        chunk_ids: int64 ``[C]``.
        document_ids: int64 ``[C]``.
        predicted: int64 ``[C]``: tokens that had a prediction: all but the first of a document in a row.
        tokens: int64 ``[C]``: all tokens.
        first_tokens: int64 ``[C]``: the chunk's first token.
        nats: float64 ``[models, conditions, C]``: sums over the predicted tokens.
    """

    chunk_ids: npt.NDArray[np.int64]
    document_ids: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    first_tokens: npt.NDArray[np.int64]
    nats: npt.NDArray[np.float64]


def measure(
    models: Sequence[Retro],
    table: TrainingTable,
    rows: npt.NDArray[np.int64],
    conditions: Sequence[Condition],
    *,
    batch_rows: int,
    device: Device,
    seed: int,
    advance: Callable[[int], None],
) -> ChunkNats:
    """Predict the rows of a table under every condition.

    Args:
        models: alike in size; on the device.
        table: joined with as many neighbours as any condition wants.
        rows: their numbers in it.
        conditions: what the models get.
        batch_rows: rows computed together; nothing depends on it but the last bits.
        device: where and in which precision.
        seed: of the random neighbours.
        advance: told how many rows are done.
    """
    random = np.random.default_rng(seed)
    retrievable = table.retrievable()
    parts = []
    for start in range(0, len(rows), batch_rows):
        arrays = table.sequences(rows[start : start + batch_rows].tolist())
        control = with_random_neighbours(arrays, table.chunks, retrievable, random)
        parts.append(_measure_rows(models, arrays, control, conditions, device))
        advance(min(start + batch_rows, len(rows)))
    fields = [[getattr(part, name) for part in parts] for name in ChunkNats.__dataclass_fields__]
    return ChunkNats(*(np.concatenate(field, axis=-1) for field in fields))


def _measure_rows(
    models: Sequence[Retro], arrays: Arrays, control: Arrays, conditions: Sequence[Condition], device: Device
) -> ChunkNats:
    most = arrays["neighbour_ids"].shape[-1]
    real, drawn = (Batch.from_columns(_tensors(some), most).to(device.name) for some in (arrays, control))
    used = arrays["chunk_ids"].reshape(-1) >= 0
    nats = np.zeros((len(models), len(conditions), used.size))
    cells = _target_cells(real)
    with torch.inference_mode():
        for place, condition in enumerate(conditions):
            batch = condition.of(real, drawn)
            for number, model in enumerate(models):
                with device.autocast():
                    found = model.nats(batch)
                nats[number, place] = np.bincount(cells, weights=found.double().cpu().numpy(), minlength=used.size)
    return ChunkNats(
        arrays["chunk_ids"].reshape(-1)[used],
        arrays["document_ids"].reshape(-1)[used],
        np.bincount(cells, minlength=used.size)[used],
        arrays["chunk_lengths"].reshape(-1)[used].astype(np.int64),
        arrays["tokens"].reshape(used.size, -1)[used, 0].astype(np.int64),
        nats[:, :, used],
    )


def _target_cells(batch: Batch) -> npt.NDArray[np.int64]:
    """The slot, counted over all rows, that each predicted token lies in."""
    slots = batch.lengths.shape[1]
    rows = torch.arange(len(batch.tokens), device=batch.tokens.device).unsqueeze(1)
    cells = rows * slots + batch.target_places // batch.chunk_tokens
    found: npt.NDArray[np.int64] = cells[batch.predicts].cpu().numpy()
    return found


def _tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(values.astype(np.int64)) for name, values in arrays.items()}
