"""Megatron-LM's indexed datasets: ``.bin`` (tokens, one document behind the other) and ``.idx`` (where each begins).

The fields of ``.idx``, as ``megatron/core/datasets/indexed_dataset.py`` reads them, little-endian: ``MMIDIDX``, two
zero bytes, uint64 version 1, uint8 dtype code, uint64 sequences, uint64 document bounds, then int32 lengths [s], int64
byte offsets [s], int64 bounds [d + 1]. Here each document is one sequence, so that the bounds are 0, 1, .., s.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Final

import numpy as np
import numpy.typing as npt

from retrodb.errors import InputError
from retrodb.export.rows import Ints

_MAGIC: Final = b"MMIDIDX\x00\x00"
_VERSION: Final = 1
_CODES: Final = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
_SMALL_VOCABULARY: Final = 65_500
"""Megatron's ``DType.optimal_dtype``: smaller vocabularies are written as uint16."""
_BLOCK: Final = 1 << 20
MOST_TOKENS: Final = np.iinfo(np.int32).max
"""Of one document."""


def token_dtype(vocabulary: int) -> np.dtype:
    """The dtype that Megatron-LM stores a vocabulary in: uint16 or int32."""
    return np.dtype(np.uint16 if vocabulary < _SMALL_VOCABULARY else np.int32)


class IndexedWriter:
    """Writes one indexed dataset; lengths wait in a scratch file, so that memory does not grow with the documents.

    Args:
        prefix: the path without ``.bin`` and ``.idx``.
        dtype: uint16 or int32.
    """

    def __init__(self, prefix: Path, dtype: np.dtype) -> None:
        self._prefix = prefix
        self._dtype = dtype
        self._bin = prefix.with_suffix(".bin").open("wb")
        self._lengths = prefix.with_suffix(".lengths").open("w+b")
        self._documents = 0

    def add(self, tokens: npt.NDArray, lengths: Ints) -> None:
        """Documents: all their tokens, and how many each has. Raises InputError for one beyond int32."""
        if len(lengths) and lengths.max() > MOST_TOKENS:
            raise InputError(f"a document of {lengths.max():,} tokens: Megatron-LM counts them by int32.")
        tokens.astype(self._dtype, copy=False).tofile(self._bin)
        lengths.astype(np.int32).tofile(self._lengths)
        self._documents += len(lengths)

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._write_index()
        self._bin.close()
        self._lengths.close()
        self._prefix.with_suffix(".lengths").unlink()

    def _write_index(self) -> None:
        with self._prefix.with_suffix(".idx").open("wb") as index:
            index.write(index_header(self._dtype, self._documents))
            for lengths in self._blocks():
                lengths.tofile(index)
            first = 0
            for lengths in self._blocks():
                sizes = lengths.astype(np.int64) * self._dtype.itemsize
                (first + np.cumsum(sizes) - sizes).tofile(index)
                first += int(sizes.sum())
            _write_range(index, self._documents + 1)

    def _blocks(self) -> Iterator[npt.NDArray[np.int32]]:
        self._lengths.seek(0)
        while len(block := np.fromfile(self._lengths, np.int32, _BLOCK)):
            yield block


def index_header(dtype: np.dtype, documents: int) -> bytes:
    """The first 34 bytes of an ``.idx`` of as many sequences as documents."""
    return _MAGIC + struct.pack("<QBQQ", _VERSION, _CODES[dtype], documents, documents + 1)


def write_uniform_index(path: Path, dtype: np.dtype, documents: int, length: int) -> None:
    """The ``.idx`` of ``documents`` documents of ``length`` tokens each."""
    with path.open("wb") as index:
        index.write(index_header(dtype, documents))
        for start in range(0, documents, _BLOCK):
            np.full(min(_BLOCK, documents - start), length, np.int32).tofile(index)
        _write_range(index, documents, length * dtype.itemsize)
        _write_range(index, documents + 1)


def _write_range(file: IO[bytes], end: int, step: int = 1) -> None:
    for start in range(0, end, _BLOCK):
        (np.arange(start, min(end, start + _BLOCK), dtype=np.int64) * step).tofile(file)
