"""A document as the set of its 13-grams of words, in Unicode's form NFKC, letters lower-cased, punctuation and spaces
left out (RETRO, section 2.1)."""

import hashlib
from collections.abc import Iterator
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

NGRAM: Final = 13
FACTOR: Final = np.uint64(0x9E3779B97F4A7C15)

_BATCH_BYTES: Final = 8 << 20
_BATCH_TEXTS: Final = 1 << 13
"""However short they are: what is made of each takes some kilobytes."""
_SEPARATORS: Final = r"[^\pL\pN\pM]+"
_UNSPACED: Final = r"([\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}])"
"""Scripts that are written without spaces: each letter counts as a word."""


def shingles(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The 13-grams of each text, as 64-bit hashes.

    A text of fewer than 13 words is one shingle; a text without any word is its own.

    Args:
        texts: large_string [n], none null.

    Returns:
        Hashes uint64 [s], in order of the text, repeated where the text repeats; and offsets int64 [n + 1] into them.
    """
    words, counts = _words(texts)
    starts = np.concatenate([[0], np.cumsum(counts)])
    grams = np.maximum(counts - (NGRAM - 1), 1)
    offsets = np.concatenate([[0], np.cumsum(grams)])
    found = np.empty(offsets[-1], dtype=np.uint64)
    long = counts >= NGRAM
    if long.any():
        rolled = _rolled(words)
        of = np.repeat(np.arange(len(counts))[long], grams[long])
        within = np.arange(len(of)) - np.repeat(np.concatenate([[0], np.cumsum(grams[long])[:-1]]), grams[long])
        found[offsets[of] + within] = rolled[starts[of] + within]
    short = np.flatnonzero(~long & (counts > 0))
    found[offsets[short]] = _whole(words, starts[short], counts[short])
    for row in np.flatnonzero(counts == 0):
        found[offsets[row]] = _hash64(texts[int(row)].as_py().encode())
    return mixed(found), offsets


def _words(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all words uint64 [w], and the number of each text's, int64 [n]."""
    lowered = pc.utf8_lower(pc.utf8_normalize(texts, form="NFKC"))
    unspaced = pc.match_substring_regex(lowered, _UNSPACED)
    if pc.any(unspaced).as_py():
        lowered = pc.if_else(unspaced, pc.replace_substring_regex(lowered, _UNSPACED, r" \1 "), lowered)
    lists = pc.split_pattern_regex(lowered, _SEPARATORS)
    values, edges = lists.flatten(), lists.offsets.to_numpy()
    is_word = pc.greater(pc.binary_length(values), 0).to_numpy(zero_copy_only=False)
    counts = np.diff(np.concatenate([[0], np.cumsum(is_word)])[edges - edges[0]])
    encoded = values.filter(pa.array(is_word)).dictionary_encode()
    hashes = np.array([_hash64(word.encode()) for word in encoded.dictionary.to_pylist()], dtype=np.uint64)
    return hashes[encoded.indices.to_numpy()], counts.astype(np.int64)


def _hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _rolled(words: np.ndarray) -> np.ndarray:
    """A polynomial of the 13 words from each one on, modulo 2^64: uint64 [w - 12]."""
    result = words[: len(words) - NGRAM + 1].copy()
    for step in range(1, NGRAM):
        result *= FACTOR
        result += words[step : len(words) - NGRAM + 1 + step]
    return result


def _whole(words: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The same polynomial of all words of texts that have fewer than 13: uint64 [t]."""
    result = np.zeros(len(starts), dtype=np.uint64)
    for step in range(int(counts.max(initial=0))):
        there = step < counts
        result[there] = result[there] * FACTOR + words[starts[there] + step]
    return result


def mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every bit of the input reaches every bit of the output."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def batches(texts: pa.ChunkedArray) -> Iterator[pa.Array]:
    """``texts`` in order, some megabytes and some thousands at a time; at least one text each."""
    lengths = pc.binary_length(texts).to_numpy()
    start = size = 0
    for row, length in enumerate(lengths.tolist()):
        if row > start and (size + length > _BATCH_BYTES or row - start >= _BATCH_TEXTS):
            yield _combined(texts.slice(start, row - start))
            start, size = row, 0
        size += length
    if start < len(texts):
        yield _combined(texts.slice(start))


def _combined(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """The share that two sets have in common, of what either has. Both uint64, sorted and distinct, not empty."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)
