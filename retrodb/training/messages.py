"""What crosses a runner in the join: requests and answers, as raw little-endian arrays (nothing is pickled)."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from retrodb.errors import DamagedError

_HEADER: Final = struct.Struct("<4sHHqqQ")
"""Magic, bytes of a token, m, query shard, neighbour's shard, n. 32 bytes, so that the arrays behind it are aligned."""

_REQUEST: Final = b"rqs1"
_ANSWER: Final = b"ans1"
_TOKENS: Final[dict[int, np.dtype]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
_MAX_UINT32: Final = (1 << 32) - 1


@dataclass(frozen=True)
class Request:
    """Rows that one chunk shard wants of another (or of itself).

    Attributes:
        query_shard: who asks.
        neighbour_shard: who is asked.
        cells: int64 ``[n]``, flat indices into the asker's ``[N, k']`` neighbour ids.
        rows: int64 ``[n]``, ascending: the low halves of the neighbours' chunk ids.
    """

    query_shard: int
    neighbour_shard: int
    cells: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]

    def to_bytes(self) -> bytes:
        """8 bytes a row and a header of 32."""
        header = _HEADER.pack(_REQUEST, 0, 0, self.query_shard, self.neighbour_shard, len(self.cells))
        return b"".join((header, _packed(self.cells), _packed(self.rows)))

    def cut(self, size: int) -> Iterator["Request"]:
        """This request in parts of at most ``size`` rows."""
        for start in range(0, len(self.rows), size):
            part = slice(start, start + size)
            yield replace(self, cells=self.cells[part], rows=self.rows[part])

    @staticmethod
    def from_bytes(data: bytes) -> "Request":
        """Raises DamagedError where ``data`` is no request or is cut short."""
        _, _, query, neighbour, n = _header(data, _REQUEST)
        _check_size(data, n * 8)
        cells, rows = np.frombuffer(data, "<u4", 2 * n, _HEADER.size).astype(np.int64).reshape(2, n)
        return Request(query, neighbour, cells, rows)


@dataclass(frozen=True)
class Answer:
    """The rows of a request.

    Attributes:
        query_shard: who asked.
        neighbour_shard: who answers.
        cells: int64 ``[n]``, the request's.
        tokens: uint16 or uint32 ``[n, 2, m]``: the neighbour, then its continuation (zeros where there is none).
        lengths: int16 ``[n, 2]``: valid tokens of both.
    """

    query_shard: int
    neighbour_shard: int
    cells: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.unsignedinteger]
    lengths: npt.NDArray[np.int16]

    def to_bytes(self) -> bytes:
        """8 + 2m * (2 or 4) bytes a row and a header of 32."""
        n, _, m = self.tokens.shape
        size = self.tokens.dtype.itemsize
        header = _HEADER.pack(_ANSWER, size, m, self.query_shard, self.neighbour_shard, n)
        tokens = np.ascontiguousarray(self.tokens, dtype=_TOKENS[size])
        lengths = np.ascontiguousarray(self.lengths, dtype="<i2")
        return b"".join((header, _packed(self.cells), lengths.tobytes(), tokens.tobytes()))

    @staticmethod
    def from_bytes(data: bytes) -> "Answer":
        """The answer; its tokens and lengths share the memory of ``data`` and are read-only.

        Raises:
            DamagedError: ``data`` is no answer or is cut short.
        """
        size, m, query, neighbour, n = _header(data, _ANSWER)
        if size not in _TOKENS:
            raise DamagedError(f"an answer of the join has tokens of {size} bytes.")
        _check_size(data, n * (8 + 2 * m * size))
        offset = _HEADER.size
        cells = np.frombuffer(data, "<u4", n, offset).astype(np.int64)
        lengths = np.frombuffer(data, "<i2", 2 * n, offset + 4 * n).reshape(n, 2)
        tokens = np.frombuffer(data, _TOKENS[size], 2 * m * n, offset + 8 * n).reshape(n, 2, m)
        return Answer(query, neighbour, cells, tokens, lengths)


def _packed(values: npt.NDArray[np.int64]) -> bytes:
    assert not values.size or (values.min() >= 0 and values.max() <= _MAX_UINT32), "rows and cells fit 32 bits"
    return values.astype("<u4").tobytes()


def _header(data: bytes, magic: bytes) -> tuple[int, int, int, int, int]:
    if len(data) < _HEADER.size or data[:4] != magic:
        raise DamagedError(f"{len(data)} bytes are not the message {magic.decode()!r} of the join.")
    _, size, m, query, neighbour, n = _HEADER.unpack_from(data)
    return size, m, query, neighbour, n


def _check_size(data: bytes, payload: int) -> None:
    if len(data) != _HEADER.size + payload:
        raise DamagedError(f"a message of the join has {len(data)} bytes where {_HEADER.size + payload} were sent.")
