"""Training rows: sequences of whole chunks, joined with the tokens of their neighbours.

The data model. A *sequence* of n tokens is n/m *slots*; each holds one chunk, with k' neighbours, each with its
continuation (Borgeaud et al. 2022, section 2.1: N and F). Chunk shard s becomes training shard s:

    packed = pack(chunk_ids, document_ids, n_tokens, is_validation, slots=n // m)   which chunk is in which slot

    requests(neighbour_ids, s)      {shard: Request}    rows wanted of each neighbour's shard
    answer(request, chunks)         Answer              those rows and their continuations
    assemble(packed, chunks, neighbour_ids, answers, s) the rows of the training shard

    write_training(storage, path, table)

All of it is pure functions over arrays; `retrodb.pipelines` makes a shuffle of it. To read the rows:

    for sample in TrainingDataset(storage, manifest, rank=0, world_size=8, shuffle=True):
        sample["tokens"], sample["neighbour_tokens"], neighbour_mask(sample), ...

or, by number and with any number of neighbours up to the stored k, ``TrainingTable(storage, manifest, cache)[i]``.
`TrainingDataset` and `TrainingTable` need torch, which is imported when they are asked for and not before.
"""

from typing import TYPE_CHECKING, Any

from retrodb.training.join import (
    CHUNK_COLUMNS,
    MISSING,
    NEIGHBOUR_COLUMNS,
    ChunkArrays,
    answer,
    assemble,
    neighbour_ids,
    requests,
)
from retrodb.training.messages import Answer, Request
from retrodb.training.sequences import Packed, pack
from retrodb.training.shards import TRAINING_ROW_GROUP, VALIDATION_ROWS, write_training

if TYPE_CHECKING:
    from retrodb.training.dataset import TrainingDataset, neighbour_mask, token_mask
    from retrodb.training.table import TrainingTable, join_on_the_fly

__all__ = [
    "CHUNK_COLUMNS",
    "MISSING",
    "NEIGHBOUR_COLUMNS",
    "TRAINING_ROW_GROUP",
    "VALIDATION_ROWS",
    "Answer",
    "ChunkArrays",
    "Packed",
    "Request",
    "TrainingDataset",
    "TrainingTable",
    "answer",
    "assemble",
    "join_on_the_fly",
    "neighbour_ids",
    "neighbour_mask",
    "pack",
    "requests",
    "token_mask",
    "write_training",
]

_NEED_TORCH = {
    "TrainingDataset": "dataset",
    "neighbour_mask": "dataset",
    "token_mask": "dataset",
    "TrainingTable": "table",
    "join_on_the_fly": "table",
}


def __getattr__(name: str) -> Any:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib  # noqa: PLC0415

    return getattr(importlib.import_module(f"{__name__}.{_NEED_TORCH[name]}"), name)
