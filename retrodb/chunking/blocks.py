"""Cut one shard's documents into blocks: whole sentences with their title (Guu et al. 2020), in the ``chunks`` table.

Sentences are packed greedily while title, body and special tokens together stay within the budget. A sentence that no
block can hold begins a block of its own and is split at token boundaries; what is left of it begins the next block,
and sentences follow it there. A title takes half of the budget at most, so that a body always has room.

Tokens are those of the whole text, cut and never made anew: those of a document's blocks, one after the other, are the
document's. A token belongs to the sentence that its last byte lies in.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from retrodb import schemas
from retrodb.chunking.chunks import token_type_for
from retrodb.chunking.sentences import sentences
from retrodb.chunking.tokenizer import ChunkTokenizer, TokenizedText


@dataclass(frozen=True)
class Room:
    """How long a block may be.

    Attributes:
        budget: tokens of title, body and special tokens together.
        special_tokens: 3 for a BERT.
    """

    budget: int
    special_tokens: int

    @property
    def title(self) -> int:
        """Tokens of a title at most."""
        return (self.budget - self.special_tokens) // 2

    def body(self, title_tokens: int) -> int:
        """Tokens of the body at most, beside a title of so many."""
        return self.budget - self.special_tokens - title_tokens


@dataclass(frozen=True)
class Cut:
    """A block of a document: tokens ``first`` to before ``last``, and its byte range in the text."""

    first: int
    last: int
    start: int
    end: int
    split_sentence: bool


def packed(tokens: TokenizedText, spans: np.ndarray, room: int) -> Iterator[Cut]:
    """The blocks of one document, in order.

    Args:
        tokens: of its whole text.
        spans: int64 [n, 2], the byte ranges of its sentences.
        room: tokens of a block's body at most; 1 or more.
    """
    open_cut: Cut | None = None
    for sentence in _sentence_cuts(tokens, spans):
        if open_cut is not None and sentence.last - open_cut.first > room:
            yield open_cut
            open_cut = None
        if open_cut is None:
            *whole, open_cut = _pieces(sentence, tokens, room)
            yield from whole
        else:
            open_cut = replace(open_cut, last=sentence.last, end=sentence.end)
    if open_cut is not None:
        yield open_cut


def _sentence_cuts(tokens: TokenizedText, spans: np.ndarray) -> Iterator[Cut]:
    """The sentences as cuts of the text's tokens; one without a token belongs to the one before it."""
    if not len(tokens.ids):
        return
    if not len(spans):  # tokens of blanks alone, as some tokenizers have
        spans = np.array([[tokens.starts[0], tokens.ends[-1]]])
    owner = np.maximum(np.searchsorted(spans[:, 0], tokens.ends - 1, side="right") - 1, 0)
    edges = np.searchsorted(np.maximum.accumulate(owner), np.arange(len(spans) + 1))
    some = np.flatnonzero(np.diff(edges))
    starts = spans[some, 0]
    starts[0] = spans[0, 0]
    ends = spans[np.append(some[1:], len(spans)) - 1, 1]
    for columns in zip(edges[some].tolist(), edges[some + 1].tolist(), starts.tolist(), ends.tolist(), strict=True):
        yield Cut(*columns, split_sentence=False)


def _pieces(sentence: Cut, tokens: TokenizedText, room: int) -> list[Cut]:
    """A sentence split at token boundaries, where it is longer than ``room``."""
    if sentence.last - sentence.first <= room:
        return [sentence]
    firsts = range(sentence.first, sentence.last, room)
    pieces = [
        Cut(
            first,
            first + room,
            int(tokens.starts[first]),
            int(tokens.ends[min(first + room, len(tokens.ids)) - 1]),
            True,
        )
        for first in firsts
    ]
    pieces[0] = replace(pieces[0], start=sentence.start)
    pieces[-1] = replace(pieces[-1], last=sentence.last, end=sentence.end)
    return pieces


def uid_of(title: str, body: bytes) -> bytes:
    """What tells equal blocks: the first 16 bytes of sha256 over the title's length in bytes (8, little-endian), the
    title and the body, in UTF-8."""
    name = title.encode()
    return hashlib.sha256(len(name).to_bytes(8, "little") + name + body).digest()[: schemas.UID_BYTES]


def block_documents(
    document_ids: np.ndarray,
    titles: Sequence[str | None],
    texts: Sequence[str],
    tokenizer: ChunkTokenizer,
    room: Room,
    shard: int,
) -> tuple[pa.Table, np.ndarray]:
    """The blocks of a shard's documents, in order.

    Args:
        document_ids: int64 [n].
        titles: n titles; None for none.
        texts: n texts.
        tokenizer: the encoder's own.
        room: how long a block may be.
        shard: number of the shard; ids are ``shard << 32 | row``.

    Returns:
        The table (`schemas.blocks`), and the number of blocks of each document, int32 [n].
    """
    columns = _Columns(room.budget, np.dtype(token_type_for(tokenizer.vocabulary_size)))
    names = [title or "" for title in titles]
    counts = []
    for document_id, name, text, title, tokens in zip(
        document_ids.tolist(), names, texts, tokenizer.tokenize(names), tokenizer.tokenize(texts), strict=True
    ):
        kept = title.ids[: room.title]
        cuts = list(packed(tokens, sentences(text), room.body(len(kept))))
        columns.add(document_id, tokens, cuts, kept, len(kept) < len(title.ids))
        data = text.encode()
        columns.uids += [uid_of(name, data[cut.start : cut.end]) for cut in cuts]
        counts.append(len(cuts))
    return columns.table(shard), np.array(counts, dtype=np.int32)


@dataclass
class _Columns:
    """The columns under construction."""

    budget: int
    dtype: np.dtype
    document_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    bodies: list[np.ndarray] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    uids: list[bytes] = field(default_factory=list)
    titles: list[np.ndarray] = field(default_factory=list)
    split: list[bool] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)

    def add(self, document_id: int, tokens: TokenizedText, cuts: list[Cut], title: np.ndarray, truncated: bool) -> None:
        self.document_ids += [document_id] * len(cuts)
        self.positions += range(len(cuts))
        self.bodies += [tokens.ids[cut.first : cut.last] for cut in cuts]
        self.starts += [cut.start for cut in cuts]
        self.ends += [cut.end for cut in cuts]
        self.titles += [title.astype(self.dtype)] * len(cuts)
        self.split += [cut.split_sentence for cut in cuts]
        self.truncated += [truncated] * len(cuts)

    def table(self, shard: int) -> pa.Table:
        rows = len(self.bodies)
        schema = schemas.blocks(self.budget, self.dtype.name)
        lengths = np.array([len(body) for body in self.bodies], dtype=np.int16)
        padded = np.zeros((rows, self.budget), dtype=self.dtype)
        if rows:
            padded[np.arange(self.budget) < lengths[:, None]] = np.concatenate(self.bodies)
        values: dict[str, object] = {
            "chunk_id": (np.int64(shard) << schemas.ID_SHIFT) + np.arange(rows, dtype=np.int64),
            "document_id": self.document_ids,
            "position": self.positions,
            "n_tokens": lengths,
            "start": self.starts,
            "end": self.ends,
            "uid": self.uids,
            "title_tokens": self.titles,
            "split_sentence": self.split,
            "truncated_title": self.truncated,
        }
        tokens = pa.FixedSizeListArray.from_arrays(pa.array(padded.reshape(-1)), type=schema.field("tokens").type)
        columns = [
            tokens if column.name == "tokens" else pa.array(values[column.name], column.type) for column in schema
        ]
        return pa.Table.from_arrays(columns, schema=schema)
