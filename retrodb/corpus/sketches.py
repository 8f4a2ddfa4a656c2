"""What of each document decides which others it is compared with: its MinHash signature, cut into bands.

A sketch is kept with its document (the column ``sketch``), so that documents that join a database are compared with
those that are there without anybody reading their texts. Signatures are `rensa`'s.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa

from retrodb.corpus.shingles import FACTOR, batches, mixed, shingles
from retrodb.errors import DamagedError
from retrodb.schemas import SKETCH_BYTES

BANDS: Final = 25

_BAND_ROWS: Final = 5
_PERMUTATIONS: Final = 128
_SEED: Final = 13
_WORDS: Final = SKETCH_BYTES // 8
_PROBES: Final = (
    "",
    "ONE two; three, four, \ufb01ve, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen.",
    "\u4e2d\u6587\u6ca1\u6709\u7a7a\u683c\u6240\u4ee5\u6bcf\u4e2a\u5b57\u90fd\u662f\u4e00\u4e2a\u8bcd\u8bed",
)
_FEWEST_BITS: Final = 16
_MOST_BITS: Final = 24
_PLACES_FOR_ONE: Final = 512


@dataclass(frozen=True)
class Sketches:
    """The sketches of some documents.

    Attributes:
        bands: uint64 [BANDS, n], a hash of each band of the signature.
        signatures: uint64 [n], a hash of the whole signature: equal for equal sets.
    """

    bands: np.ndarray
    signatures: np.ndarray

    def as_column(self) -> pa.Array:
        """As they are kept: `retrodb.schemas.SKETCH_BYTES` a document, little-endian uint64: what sketched it
        (`sketcher`), the bands, the signature."""
        rows = np.empty((len(self.signatures), _WORDS), dtype="<u8")
        rows[:, 0] = sketcher()
        rows[:, 1:-1] = self.bands.T
        rows[:, -1] = self.signatures
        return pa.Array.from_buffers(pa.binary(SKETCH_BYTES), len(rows), [None, pa.py_buffer(rows.tobytes())])

    def put(self, rows: np.ndarray, others: "Sketches") -> "Sketches":
        """These with ``others`` int64 [k] in ``rows``."""
        bands, signatures = self.bands.copy(), self.signatures.copy()
        bands[:, rows], signatures[rows] = others.bands, others.signatures
        return Sketches(bands, signatures)

    def take(self, rows: np.ndarray) -> "Sketches":
        """Those of ``rows``, bool [n] or int64 [k]."""
        return Sketches(self.bands[:, rows], self.signatures[rows])


def kept_sketches(column: pa.ChunkedArray) -> tuple[Sketches, np.ndarray]:
    """The sketches of a column ``sketch``, and bool [n]: which are there, and comparable with those of `sketch`.

    The others, of documents that were never sketched or that other libraries sketched, mean nothing.

    Raises:
        DamagedError: these are no sketches.
    """
    if column.type != pa.binary(SKETCH_BYTES):
        raise DamagedError(f"a column sketch of {column.type} holds no sketches. Verify the database.")
    parts = [_words_of(chunk) for chunk in column.chunks]
    rows = np.concatenate([np.empty((0, _WORDS), dtype="<u8"), *parts])
    sketches = Sketches(np.ascontiguousarray(rows[:, 1:-1].T), rows[:, -1].copy())
    return sketches, column.is_valid().to_numpy() & (rows[:, 0] == sketcher())


def _words_of(chunk: pa.Array) -> np.ndarray:
    """uint64 [n, _WORDS] of one chunk of the column; anything where it is null."""
    data = chunk.buffers()[1]
    if data is None:  # nothing but nulls
        return np.zeros((len(chunk), _WORDS), dtype="<u8")
    return np.frombuffer(data, "<u8", len(chunk) * _WORDS, chunk.offset * SKETCH_BYTES).reshape(-1, _WORDS)


@functools.cache
def sketcher() -> int:
    """A 64-bit hash of what sketches here: other libraries that would give other sketches have another one."""
    probes = sketch(pa.chunked_array([pa.array(_PROBES, pa.large_string())]))
    return int(_folded(np.concatenate([probes.bands.ravel(), probes.signatures])[None])[0])


def sketch(texts: pa.ChunkedArray) -> Sketches:
    """The sketches of a shard's documents.

    Args:
        texts: large_string [n], none null.
    """
    bands, whole = np.empty((BANDS, len(texts)), dtype=np.uint64), np.empty(len(texts), dtype=np.uint64)
    first = 0
    for batch in batches(texts):
        signatures = _signatures(batch)
        rows = slice(first, first + len(batch))
        for band in range(BANDS):
            bands[band, rows] = _folded(signatures[:, band * _BAND_ROWS : (band + 1) * _BAND_ROWS])
        whole[rows] = _folded(signatures)
        first += len(batch)
    return Sketches(bands, whole)


def _signatures(texts: pa.Array) -> np.ndarray:
    """MinHash signatures uint64 [n, 128]."""
    from rensa import RMinHash  # noqa: PLC0415 - only a worker that sketches pays for it

    values, offsets = shingles(texts)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(values, offsets.astype(np.uint64), _PERMUTATIONS, _SEED)
    return np.array(matrix.to_rows(), dtype=np.uint64).reshape(len(texts), _PERMUTATIONS)


def _folded(rows: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each row of uint64 [n, r]."""
    result = np.zeros(len(rows), dtype=np.uint64)
    for column in rows.T:
        result = mixed(result * FACTOR + column)
    return result


class BandFilter:
    """Tells which documents may share a band with any of some others: all that do, and few that do not.

    A bit for each of 2^b buckets of each band: 200 kB for ten others, 52 MB at most, for 32,768 and more. Of those that
    share none one in 20 passes, and more of them the more others there are beyond that.
    """

    def __init__(self, others: Iterable[Sketches], count: int) -> None:
        """``count`` is how many the others are."""
        self._bits = int(np.clip((_PLACES_FOR_ONE * max(1, count) - 1).bit_length(), _FEWEST_BITS, _MOST_BITS))
        self._there = np.zeros((BANDS, 1 << (self._bits - 3)), dtype=np.uint8)
        for sketches in others:
            for band, places in enumerate(self._places(sketches)):
                marked = np.zeros(1 << self._bits, dtype=bool)
                marked[places] = True
                self._there[band] |= np.packbits(marked, bitorder="little")

    def __call__(self, sketches: Sketches) -> np.ndarray:
        """bool [n]."""
        found = np.zeros(len(sketches.signatures), dtype=bool)
        for there, places in zip(self._there, self._places(sketches), strict=True):
            found |= (there[places >> 3] >> (places & 7).astype(np.uint8) & 1).astype(bool)
        return found

    def _places(self, sketches: Sketches) -> np.ndarray:
        """int64 [BANDS, n]: the buckets of documents."""
        places: np.ndarray = (mixed(sketches.bands) >> np.uint64(64 - self._bits)).astype(np.int64)
        return places
