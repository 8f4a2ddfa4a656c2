"""delete: documents are given up, at once for every reader, as a new version beside the old ones (realm.md, C2)."""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from retrodb.pipelines.holding import held, refuse_unfinished
from retrodb.pipelines.progress import Progress

from retrodb import schemas
from retrodb.corpus.selection import Selection
from retrodb.deletions import Deletions
from retrodb.errors import UsageError
from retrodb.manifest import Manifest, Shard, Version, shard_of, shard_path, version_folder
from retrodb.sizes import count_of
from retrodb.storage import Storage
from retrodb.versions import VersionStorage, next_version, now, publish

_ROW_GROUP = 1 << 16


@dataclass(frozen=True)
class Deleted:
    """What a deletion came to: the current version, and the documents and chunks that it took away."""

    version: int
    documents: int
    chunks: int


def delete(out: Storage, selection: Selection, progress: Progress, wait: float | None = None) -> Deleted:
    """Delete documents for every reader at once: one small shard, and a new version that names it.

    Nothing else is written, so the cost is that of finding the documents; their rows stay in the tables. What was
    deleted before is not deleted again; where nothing is left to delete, nothing is changed.

    Args:
        out: the database.
        selection: which documents.
        progress: is told what happens.
        wait: seconds that another writer is waited for; None: not at all.

    Raises:
        UsageError: nothing was asked for.
        InputError: there is no finished database, an id or key does not exist, or no document has a field.
        LockedError: another process changes it.
    """
    if selection.is_empty:
        raise UsageError("say which documents: --ids, --keys, --source or --where.")
    with held(out, progress, wait) as current:
        refuse_unfinished(out, current, "documents are deleted")
        rows = _rows_of(out, current, selection)
        if not rows.num_rows:
            progress.note("no document to delete: nothing was changed")
            return Deleted(current.version.id, 0, 0)
        chunks = int(np.sum(rows["n_chunks"].to_numpy()))
        view = VersionStorage(out.url, next_version(current))
        view.delete_folder(version_folder(view.version))  # of whatever was killed before it was published
        before = current.shards("deleted")
        number = max((shard.number for shard in before), default=-1) + 1
        committed = view.commit_table(shard_path("deleted", number), rows, _ROW_GROUP)
        shard = Shard.of(committed, number, rows.num_rows)
        made = replace(
            current,
            tables={**current.tables, "deleted": (*before, shard)},
            version=Version(view.version, current.version.id, "delete", current.version.step, now()),
            versions=(),
        )
        published = publish(out, current, made, None)
        progress.note(
            f"{count_of(rows.num_rows, 'document')}, {count_of(chunks, 'chunk')} deleted: version "
            f"{published.version.id}"
        )
        return Deleted(published.version.id, rows.num_rows, chunks)


def _rows_of(out: Storage, current: Manifest, selection: Selection) -> pa.Table:
    """The rows of ``deleted`` for what is not deleted yet, by ascending id."""
    gone = Deletions.of(out, current)
    chunks = {shard.number: shard for shard in current.shards("chunks")}
    parts = []
    for found in selection.find(out, current):
        table = found.filter(~gone.of_documents(found["document_id"].to_numpy()))
        if not table.num_rows:
            continue
        ids, counts = table["document_id"].to_numpy(), table["n_chunks"].to_numpy()
        stored = out.read_table(chunks[shard_of(int(ids[0]))], ["chunk_id", "document_id"])
        owners, at = np.unique(stored["document_id"].to_numpy(), return_index=True)
        some = counts > 0
        first = np.zeros(len(ids), dtype=np.int64)
        first[some] = stored["chunk_id"].to_numpy()[at[np.searchsorted(owners, ids[some])]]
        columns = [pa.array(ids), pa.array(first, mask=~some), pa.array(counts)]
        parts.append(pa.table(columns, schema=schemas.deleted()))
    return pa.concat_tables(parts).sort_by("document_id") if parts else schemas.deleted().empty_table()
