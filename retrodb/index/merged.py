"""All index shards as one faiss index on disk, for programs that know faiss and not retrodb.

Two files: ``merged.faiss`` (the quantiser, and where the lists are) and ``merged.ivfdata`` (the inverted lists). They
lie beside a database, never in it: the first stores a path, and opening a database follows no path. `open_merged`
looks for the second beside the first, whatever path is stored.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import faiss
from faiss.contrib.ondisk import merge_ondisk

from retrodb.errors import DamagedError, InputError
from retrodb.index.engine import Metric, check_index, faiss_threads, first_line, ivf_of
from retrodb.index.search import IndexFile
from retrodb.index.template import load_template
from retrodb.sizes import count_of
from retrodb.storage import Storage

MERGED_INDEX: Final = "merged.faiss"
MERGED_LISTS: Final = "merged.ivfdata"
_ON_DISK: Final = faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY
"""With IO_FLAG_MMAP, which plain shards are read with, faiss 1.15 crashes on an index whose lists are on disk."""


@dataclass(frozen=True)
class MergedIndex:
    """What was merged: the index file, its vectors, and the bytes of both files."""

    path: Path
    vectors: int
    bytes: int


def merge_index(
    storage: Storage, template: bytes, files: Sequence[IndexFile], dimension: int, metric: Metric, folder: Path
) -> MergedIndex:
    """Merge index shards into two files in ``folder``. Inverted lists are copied from map to map, never held in memory.

    Args:
        storage: the database.
        template: the trained quantiser.
        files: the index shards.
        dimension: d.
        metric: ``l2`` or ``ip``.
        folder: local; made where it is missing.

    Raises:
        InputError: the index is exact, or ``folder`` holds something already.
        DamagedError: a shard is missing, or what was merged is not all of them.
    """
    index = load_template(template, dimension, metric)
    if ivf_of(index) is None:
        raise InputError(
            "the index is exact: it has no inverted lists to merge. Read the vectors themselves (embeddings/*.npy), or "
            "build with an --index-key such as IVF1024,Flat."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already and not an empty folder; name another with --out.")
    folder.mkdir(parents=True, exist_ok=True)
    vectors = sum(file.vectors for file in files)
    try:
        with faiss_threads(1), contextlib.ExitStack() as copies:
            paths = [str(copies.enter_context(storage.local_copy(file.path))) for file in files]
            merge_ondisk(index, paths, str(folder / MERGED_LISTS))
            check_index(index, dimension, metric, vectors, str(folder))
            faiss.write_index(index, str(folder / MERGED_INDEX))
    except FileNotFoundError as error:
        raise DamagedError(f"{error.filename} is missing. Run the build again to repair it.") from error
    except RuntimeError as error:
        raise DamagedError(f"cannot merge {count_of(len(files), 'index shard')}: {first_line(error)}.") from error
    del index  # closes the lists, so that all of them are in the file
    open_merged(folder / MERGED_INDEX, dimension, metric, vectors)
    return MergedIndex(
        folder / MERGED_INDEX, vectors, sum((folder / name).stat().st_size for name in (MERGED_INDEX, MERGED_LISTS))
    )


def open_merged(path: Path, dimension: int, metric: Metric, vectors: int) -> Any:
    """The merged index, its lists memory-mapped from the file beside it.

    Raises:
        DamagedError: it is not the index expected.
    """
    try:
        with faiss_threads(1):
            index = faiss.read_index(str(path), _ON_DISK)
    except (RuntimeError, MemoryError) as error:
        raise DamagedError(f"cannot read {path}: {first_line(error)}. Merge the index again.") from error
    check_index(index, dimension, metric, vectors, str(path))
    return index
