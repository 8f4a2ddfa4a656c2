"""Sketches of documents, as the steps of a build leave them for one another: by document, in files of two columns,
``document_id`` and ``sketch``, which finished document shards have as well.

    sketch    a document shard that was read           -> the sketches of its documents                 a task a shard
    narrow    a document shard that is there already   -> the sketches that share a band with new ones  a task a shard
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Final

import apache_beam as beam
import numpy as np
import pyarrow as pa
from retrodb.pipelines.receipts import Receipt, ReceiptBook
from retrodb.pipelines.shards import as_read
from retrodb.pipelines.tasks import DealOut, DoTasks, Task
from retrodb.schemas import SKETCH_BYTES

from retrodb.corpus.sketches import BandFilter, Sketches, kept_sketches, sketch, sketcher
from retrodb.deletions import Deletions
from retrodb.errors import MismatchError
from retrodb.formats import File
from retrodb.manifest import WORK_FOLDER, Shard
from retrodb.storage import Storage

SKETCH_FOLDER: Final = f"{WORK_FOLDER}/sketches"
"""Where sketches wait for the chunk stage, which finishes the documents, until a run ends: the next one makes them
anew where it has to."""
NARROWED: Final = "narrowed"
"""Key of a receipt's counts: documents that share a band with new ones, perhaps."""
_ROW_GROUP: Final = 1 << 14
_COLUMNS: Final = ["document_id", "sketch"]


def read_sketches(storage: Storage, file: File) -> tuple[np.ndarray, Sketches]:
    """Ids of documents int64 [n], ascending, and their sketches, of a file that a step has left.

    Raises:
        MismatchError: the libraries of another worker sketch otherwise than those here.
    """
    table = storage.read_table(file, _COLUMNS)
    sketches, comparable = kept_sketches(table["sketch"])
    if not comparable.all():
        raise _other_libraries(f"{storage.describe(file)} was sketched by other libraries")
    return table["document_id"].to_numpy(), sketches


def _other_libraries(what: str) -> MismatchError:
    return MismatchError(
        f"{what} than this worker has (rensa {version('rensa')}, pyarrow {pa.__version__}): install the same versions "
        "everywhere."
    )


def _commit(storage: Storage, path: str, ids: np.ndarray, sketches: Sketches) -> None:
    table = pa.table(dict(zip(_COLUMNS, (pa.array(ids), sketches.as_column()), strict=True)))
    storage.commit_table(path, table, _ROW_GROUP)


# -- sketch ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToSketch:
    """A document shard as it was read, and where the sketches of its documents belong."""

    documents: File
    path: str


def sketch_path(documents: Shard) -> str:
    """Where the sketches of documents wait that were read: by their content, so that those of others never pass for
    them."""
    return f"{SKETCH_FOLDER}/{documents.sha256[:32]}.parquet"


def _sketch(storage: Storage, expected: int, task: Task) -> Iterator[Receipt]:
    item: ToSketch = task.payload
    if sketcher() != expected:
        raise _other_libraries("the driver has other libraries for sketches")
    documents = storage.read_table(item.documents, ["document_id", "text"])
    _commit(storage, item.path, documents["document_id"].to_numpy(), sketch(documents["text"]))
    yield Receipt(task.number)


def sketch_tasks(documents: Sequence[Shard]) -> list[Task]:
    """One task a document shard."""
    return [Task(s.number, ToSketch(as_read(s), sketch_path(s)), weight=s.bytes) for s in documents]


def sketch_pipeline(pipeline: beam.Pipeline, book: ReceiptBook, tasks: Sequence[Task]) -> beam.PCollection:
    """Sketch documents, as the driver would."""
    work = functools.partial(_sketch, book.storage, sketcher())
    return pipeline | DealOut(tasks) | "sketch" >> beam.ParDo(DoTasks(book, work))


def with_sketches(storage: Storage, documents: pa.Table, path: str) -> pa.Table:
    """A shard's documents as they were read, with their sketches: made anew where none wait in ``path``."""
    if storage.size(path) is not None:
        column = storage.read_table(path, ["sketch"])["sketch"]
    else:
        column = pa.chunked_array([sketch(documents["text"]).as_column()])
    return documents.set_column(documents.column_names.index("sketch"), documents.schema.field("sketch"), column)


# -- narrow ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NarrowSettings:
    """The sketches of documents that join, how many these are, and what is deleted of those that are there."""

    joining: tuple[str, ...]
    count: int
    deleted: tuple[Shard, ...]


def narrowed_path(book: ReceiptBook, number: int) -> str:
    """The sketches of a shard's documents that share a band with new ones."""
    return f"{book.folder}/{number:05d}.parquet"


class NarrowDown(DoTasks):
    """Task (a document shard) -> the sketches of those that share a band with a document that joins, as they are kept;
    only what was not sketched is sketched."""

    def __init__(self, book: ReceiptBook, settings: NarrowSettings) -> None:
        super().__init__(book, self._narrow)
        self._settings = settings

    def setup(self) -> None:
        super().setup()
        others = (read_sketches(self._storage, path)[1] for path in self._settings.joining)
        self._may_be_alike = BandFilter(others, self._settings.count)
        self._gone = Deletions.of_shards(self._storage, self._settings.deleted)

    def _narrow(self, task: Task) -> Iterator[Receipt]:
        table = self._storage.read_table(task.payload, _COLUMNS)
        ids = table["document_id"].to_numpy()
        never = pa.chunked_array([pa.nulls(len(ids), pa.binary(SKETCH_BYTES))])  # of an earlier retrodb
        sketches, known = kept_sketches(table["sketch"] if "sketch" in table.column_names else never)
        if not known.all():
            unknown = np.flatnonzero(~known)
            texts = self._storage.read_table(task.payload, ["text"])["text"].take(pa.array(unknown))
            sketches = sketches.put(unknown, sketch(texts))
        wanted = self._may_be_alike(sketches) & ~self._gone.of_documents(ids)
        if wanted.any():
            _commit(self._storage, narrowed_path(self._book, task.number), ids[wanted], sketches.take(wanted))
        yield Receipt(task.number, counts={NARROWED: int(wanted.sum())})


def narrow_tasks(documents: Sequence[Shard]) -> list[Task]:
    """One task a document shard."""
    return [Task(shard.number, shard, weight=shard.rows) for shard in documents]


def narrow_pipeline(
    pipeline: beam.Pipeline, book: ReceiptBook, tasks: Sequence[Task], settings: NarrowSettings
) -> beam.PCollection:
    """Find the documents that new ones may have to be compared with."""
    return pipeline | DealOut(tasks) | "narrow" >> beam.ParDo(NarrowDown(book, settings))
