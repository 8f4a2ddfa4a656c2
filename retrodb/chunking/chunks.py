"""Cut one shard's documents into the rows of the ``chunks`` table."""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from retrodb import schemas
from retrodb.chunking.tokenizer import ChunkTokenizer, TokenizedText

_MAX_UINT16_VOCABULARY = 1 << 16


def token_type_for(vocabulary_size: int) -> str:
    """``uint16`` where every token id fits, else ``uint32``."""
    return "uint16" if vocabulary_size <= _MAX_UINT16_VOCABULARY else "uint32"


def chunk_documents(
    document_ids: np.ndarray, texts: Iterable[str], tokenizer: ChunkTokenizer, chunk_tokens: int, shard: int
) -> tuple[pa.Table, np.ndarray]:
    """The chunks of a shard's documents, in order.

    Args:
        document_ids: int64 [n].
        texts: n texts.
        tokenizer: gives ids and byte ranges.
        chunk_tokens: m; only the last chunk of a document may be shorter.
        shard: number of the shard; chunk ids are ``shard << 32 | row``.

    Returns:
        The table (`schemas.chunks`), and the number of chunks of each document, int32 [n].
    """
    builder = _Columns(chunk_tokens, np.dtype(token_type_for(tokenizer.vocabulary_size)))
    counts = np.array([builder.add(tokens) for tokens in tokenizer.tokenize(list(texts))], dtype=np.int32)
    return builder.table(np.asarray(document_ids, dtype=np.int64), counts, shard), counts


class _Columns:
    """The columns under construction: arrays a document, joined once at the end."""

    def __init__(self, chunk_tokens: int, token_dtype: np.dtype) -> None:
        self._m = chunk_tokens
        self._dtype = token_dtype
        self._tokens: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []
        self._starts: list[np.ndarray] = []
        self._ends: list[np.ndarray] = []

    def add(self, text: TokenizedText) -> int:
        """Append a document's chunks; returns how many there are."""
        n_tokens, m = len(text.ids), self._m
        n_chunks = -(-n_tokens // m)
        padded = np.zeros(n_chunks * m, dtype=self._dtype)
        padded[:n_tokens] = text.ids
        lengths = np.full(n_chunks, m, dtype=np.int16)
        if n_chunks:
            lengths[-1] = n_tokens - (n_chunks - 1) * m
        first = np.arange(n_chunks) * m
        self._tokens.append(padded)
        self._lengths.append(lengths)
        self._starts.append(text.starts[first])
        self._ends.append(text.ends[first + lengths - 1])
        return n_chunks

    def table(self, document_ids: np.ndarray, counts: np.ndarray, shard: int) -> pa.Table:
        n_rows = int(counts.sum())
        first_rows = np.cumsum(counts) - counts
        schema = schemas.chunks(self._m, self._dtype.name)
        columns = [
            pa.array((np.int64(shard) << schemas.ID_SHIFT) + np.arange(n_rows, dtype=np.int64)),
            pa.array(np.repeat(document_ids, counts)),
            pa.array((np.arange(n_rows) - np.repeat(first_rows, counts)).astype(np.int32)),
            pa.FixedSizeListArray.from_arrays(
                pa.array(_join(self._tokens, self._dtype)), type=schema.field("tokens").type
            ),
            pa.array(_join(self._lengths, np.dtype(np.int16))),
            pa.array(_join(self._starts, np.dtype(np.int64))),
            pa.array(_join(self._ends, np.dtype(np.int64))),
        ]
        return pa.Table.from_arrays(columns, schema=schema)


def _join(arrays: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype=dtype)
