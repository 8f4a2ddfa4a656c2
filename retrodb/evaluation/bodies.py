"""The bodies of many chunks at once: their exact text, from the documents' bytes, and whose they are."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from retrodb.database import Database
from retrodb.encoding import chunk_texts
from retrodb.errors import DamagedError
from retrodb.manifest import Shard
from retrodb.schemas import ID_SHIFT


@dataclass(frozen=True)
class Bodies:
    """Of chunk ids int64 [n]: ``texts`` (source slices, widened to whole characters) and their documents' ``keys``."""

    texts: list[str]
    keys: list[str]


def read_bodies(database: Database, chunk_ids: np.ndarray) -> Bodies:
    """The bodies of chunks, int64 [n] ascending and different. One row group of documents is in memory at a time.

    Without documents' text the body is what the tokens decode to.

    Raises:
        DamagedError: a chunk or its document does not exist.
    """
    texts, keys = np.empty(len(chunk_ids), object), np.empty(len(chunk_ids), object)
    for shard, own in _by_shard(chunk_ids):
        recorded = _shard(database, "chunks", shard)
        for places, rows in _rows(database, recorded, "chunk_id", chunk_ids[own]):
            _add(database, rows, own[places], texts, keys)
    return Bodies(texts.tolist(), keys.tolist())


def _add(database: Database, chunks: pa.Table, at: np.ndarray, texts: np.ndarray, keys: np.ndarray) -> None:
    """Put the bodies of some rows of ``chunks`` where they belong."""
    document_ids = chunks["document_id"].to_numpy()
    wanted, which = np.unique(document_ids, return_inverse=True)
    starts, ends = chunks["start"].to_numpy(), chunks["end"].to_numpy()
    for shard, own in _by_shard(wanted):
        for places, documents in _rows(database, _shard(database, "documents", shard), "document_id", wanted[own]):
            numbers = own[places]
            for number, text, key in zip(
                numbers.tolist(), documents["text"].to_pylist(), documents["key"].to_pylist(), strict=True
            ):
                rows = np.flatnonzero(which == number)
                keys[at[rows]] = key
                if text is None:
                    texts[at[rows]] = _decoded(database, chunks.take(pa.array(rows)))
                else:
                    texts[at[rows]] = chunk_texts(text.encode(), starts[rows], ends[rows])


def _decoded(database: Database, chunks: pa.Table) -> list[str]:
    cells = zip(chunks["tokens"].to_pylist(), chunks["n_tokens"].to_pylist(), strict=True)
    return [database.tokenizer.decode(tokens[:count]).decode(errors="replace") for tokens, count in cells]


def _by_shard(ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(shard number, the positions of its ids) of ascending ids."""
    shards = ids >> ID_SHIFT
    for shard in np.unique(shards):
        yield int(shard), np.flatnonzero(shards == shard)


def _shard(database: Database, table: str, number: int) -> Shard:
    found = next((shard for shard in database.manifest.shards(table) if shard.number == number), None)
    if found is None:
        raise DamagedError(f"{database.storage.url} has no shard {number} of {table}, but one of its rows was named.")
    return found


def _rows(database: Database, shard: Shard, column: str, ids: np.ndarray) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """The rows of ascending ``ids`` in a shard, row group by row group, each with its positions in ``ids``."""
    left = np.ones(len(ids), dtype=bool)
    with database.storage.open_parquet(shard) as file:
        for group in range(file.num_row_groups):
            known = file.read_row_group(group, columns=[column], use_threads=False)[column].to_numpy()
            here = np.flatnonzero(np.isin(ids, known))
            if not len(here):
                continue
            left[here] = False
            rows = pa.array(np.searchsorted(known, ids[here]))
            yield here, file.read_row_group(group, use_threads=False).take(rows)
    if left.any():
        raise DamagedError(f"{database.storage.describe(shard)} has no {column} {int(ids[left][0])}. Verify it.")
