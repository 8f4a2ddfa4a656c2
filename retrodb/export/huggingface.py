"""A Hugging Face dataset: Parquet files by table and split, and a dataset card that says which are which.

The folder is what ``datasets.load_dataset`` and the Hub read: each table is a configuration of the card's ``configs``,
with its files under ``<table>/<split>-<i>-of-<n>.parquet``. Columns keep their names, values and order, and ids go on
joining. ``content_hash`` becomes ``binary``, since ``datasets`` has no fixed-size binary.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrodb.database import Database
from retrodb.errors import InputError
from retrodb.export.card import CARD_NAME, TableFiles, dataset_card
from retrodb.export.rows import SplitReader, check_built
from retrodb.export.target import Advance, Exported, check_target, new_folder, no_progress
from retrodb.manifest import Shard
from retrodb.schemas import SPLITS
from retrodb.storage import Storage
from retrodb.training.columns import scalars

FORMAT: Final = "huggingface"
TABLES: Final = ("training", "documents", "chunks", "neighbours")
"""The first one is what is loaded when no configuration is named."""
_GROUP_ROWS: Final = {"training": 256, "documents": 1_000, "chunks": 10_000, "neighbours": 10_000}
"""Rows of a row group: some megabytes, so that the Hub's viewer and streaming readers need no whole file."""
_NOT_EXPORTED: Final = ("embeddings", "index", "leakage", "quarantine", "duplicates")


@dataclass(frozen=True)
class _Part:
    """The rows of one shard of a table that belong to one split."""

    shard: Shard
    rows: int


def export_huggingface(
    database: Database,
    out: str,
    *,
    name: str | None = None,
    licence: str | None = None,
    advance: Advance = no_progress,
) -> Exported:
    """Write a database's tables as a Hugging Face dataset.

    Args:
        database: built to its end.
        out: a folder or any fsspec URL, missing or empty.
        name: the card's title; None takes the name of ``out``.
        licence: the card's licence, an identifier of the Hub; None leaves it out, for the database does not know it.
        advance: told of the rows that were written.

    Raises:
        InputError: ``out`` will not do, or a table is not built.
        DamagedError, MismatchError: the database is damaged, or was rebuilt meanwhile.
        UnreachableError: the store does not take a file.
    """
    target = check_target(out, database.storage)
    check_built(database, *TABLES)
    title = name or target.url.rstrip("/").rsplit("/", 1)[-1]
    with _written_whole(target) as (storage, written):
        files = [_write_table(database, storage, table, written, advance) for table in TABLES]
        card = dataset_card(database, files, title, licence)
        written(storage.commit_bytes(CARD_NAME, str(card).encode()).path)  # last: what has a card is whole
        size = sum(storage.size(path) or 0 for path in written.paths)
    counts = {f"{made.table}_{split}": rows for made in files for split, rows in made.rows.items()}
    left_out = {f"rows of {table}": n for table in _NOT_EXPORTED if (n := database.manifest.rows(table))}
    notes = ("documents keep their source and metadata columns: look at them before you publish",)
    return Exported(FORMAT, target.url, counts, size, left_out, notes)


class _Written:
    """Remembers what is to be taken back if the export is cut short."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def __call__(self, path: str) -> None:
        self.paths.append(path)


@contextlib.contextmanager
def _written_whole(target: Storage) -> Iterator[tuple[Storage, _Written]]:
    """Local: a new folder that is renamed. On an object store: what was written is deleted if anything fails."""
    written = _Written()
    if target.is_local:
        with new_folder(Path(target.url)) as folder:
            yield Storage(str(folder)), written
        return
    try:
        yield target, written
    except BaseException:
        target.delete(*written.paths)
        raise


def _write_table(
    database: Database, storage: Storage, table: str, written: Callable[[str], None], advance: Advance
) -> TableFiles:
    """All rows of a table, each shard's rows of a split one file."""
    parts: dict[str, list[_Part]] = {split: [] for split in SPLITS}
    for shard in database.manifest.shards(table):
        validation = _is_validation(database, table, shard)
        for split, rows in zip(SPLITS, (int((~validation).sum()), int(validation.sum())), strict=True):
            if rows:
                parts[split].append(_Part(shard, rows))
    schema = None
    for split, found in parts.items():
        for number, part in enumerate(found):
            rows = _rows_of(database, table, part.shard, split)
            schema = rows.schema
            path = f"{table}/{split}-{number:05d}-of-{len(found):05d}.parquet"
            written(path)
            storage.commit_table(path, rows, _GROUP_ROWS[table])
            advance(len(rows))
    if schema is None:
        raise InputError(f"{database.storage.url} has no rows in {table}: there is nothing to export.")
    return TableFiles(table, {split: sum(part.rows for part in found) for split, found in parts.items()}, schema)


def _rows_of(database: Database, table: str, shard: Shard, split: str) -> pa.Table:
    rows = database.storage.read_table(shard)
    if (at := rows.schema.get_field_index("content_hash")) >= 0:
        field = rows.schema.field(at).with_type(pa.binary())
        rows = rows.set_column(at, field, rows.column(at).cast(pa.binary()))
    if "sketch" in rows.column_names:  # of use to the database alone
        rows = rows.drop_columns(["sketch"])
    validation = _is_validation(database, table, shard)
    mine = validation if split == "validation" else ~validation
    return rows if mine.all() else rows.filter(pa.array(mine))


def _is_validation(database: Database, table: str, shard: Shard) -> npt.NDArray[np.bool_]:
    """bool [rows]: of a shard, by its own ``split``, or that of the documents its chunks were cut from."""
    if table in ("documents", "training"):
        return pc.equal(database.storage.read_table(shard, ["split"])["split"], "validation").to_numpy()
    chunks = {found.number: found for found in database.manifest.shards("chunks")}[shard.number]
    document_ids = scalars(database.storage.read_table(chunks, ["document_id"]), "document_id")
    return SplitReader(database).is_validation(document_ids)
