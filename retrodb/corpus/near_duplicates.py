"""Near-duplicate documents, as RETRO finds them: MinHash over 13-grams, Jaccard similarity of at least 0.8.

Borgeaud et al. 2022, section 2.1: training documents that similar to an evaluation document were removed. Here:

- a document is the set of its 13-grams of words (`shingles`), in Unicode's form NFKC, letters lower-cased, punctuation
  and spaces left out;
- `sketch` gives its MinHash signature, cut into bands: documents that share a band are *candidates*;
- candidates are near-duplicates where the `jaccard` similarity of their whole sets, not an estimate, reaches 0.8;
- `clusters` are what near-duplicates connect.

So the sketch decides which pairs are looked at, and never which are near-duplicates: a pair at 0.8 is missed with
probability 5e-5 (25 bands of 5), one at 0.9 never; but where thousands of documents share nearly all of their text, see
`Candidates`. All of it is numpy and Arrow over whole shards; signatures are
`rensa`'s.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrodb.schemas import ID_SHIFT

NGRAM: Final = 13
THRESHOLD: Final = 0.8
BANDS: Final = 25
NEAR_DUPLICATE: Final = "near_duplicate"
VALIDATION_DUPLICATE: Final = "validation_duplicate"
DEDUP_RULES: Final = (NEAR_DUPLICATE, VALIDATION_DUPLICATE)
"""Names of the rules by which a document is removed: it repeats an earlier one; it repeats a validation document."""

_BAND_ROWS: Final = 5
_PERMUTATIONS: Final = 128
_SEED: Final = 13
_BUCKET_PAIRS: Final = 2_000_000
"""Pairs of one bucket that are compared at most: all of up to 2,000 different documents. Of a larger bucket, whose
documents share most of their text with thousands of others, each is compared with as many as that leaves, in an order
that differs from band to band; how many documents are in such buckets is counted and told."""
_LEAST_WINDOW: Final = 64
_BATCH_BYTES: Final = 8 << 20
_SEPARATORS: Final = r"[^\pL\pN\pM]+"
_UNSPACED: Final = r"([\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}])"
"""Scripts that are written without spaces: each letter counts as a word."""
_FACTOR: Final = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Sketches:
    """What of each document decides which others it is compared with.

    Attributes:
        bands: uint64 [BANDS, n], a hash of each band of the signature.
        signatures: uint64 [n], a hash of the whole signature: equal for equal sets.
    """

    bands: np.ndarray
    signatures: np.ndarray


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
    return _mixed(found), offsets


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
        result *= _FACTOR
        result += words[step : len(words) - NGRAM + 1 + step]
    return result


def _whole(words: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The same polynomial of all words of texts that have fewer than 13: uint64 [t]."""
    result = np.zeros(len(starts), dtype=np.uint64)
    for step in range(int(counts.max(initial=0))):
        there = step < counts
        result[there] = result[there] * _FACTOR + words[starts[there] + step]
    return result


def _mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every bit of the input reaches every bit of the output."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def batches(texts: pa.ChunkedArray) -> Iterator[pa.Array]:
    """``texts`` in order, some megabytes at a time; at least one text each."""
    lengths = pc.binary_length(texts).to_numpy()
    start = size = 0
    for row, length in enumerate(lengths.tolist()):
        if row > start and size + length > _BATCH_BYTES:
            yield _combined(texts.slice(start, row - start))
            start, size = row, 0
        size += length
    if start < len(texts):
        yield _combined(texts.slice(start))


def _combined(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array


def sketch(texts: pa.ChunkedArray) -> Sketches:
    """The sketches of a shard's documents.

    Args:
        texts: large_string [n], none null.
    """
    signatures = [_signatures(batch) for batch in batches(texts)]
    matrix = np.concatenate(signatures) if signatures else np.empty((0, _PERMUTATIONS), np.uint64)
    bands = np.empty((BANDS, len(matrix)), dtype=np.uint64)
    for band in range(BANDS):
        bands[band] = _folded(matrix[:, band * _BAND_ROWS : (band + 1) * _BAND_ROWS])
    return Sketches(bands, _folded(matrix))


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
        result = _mixed(result * _FACTOR + column)
    return result


@dataclass(frozen=True)
class Candidates:
    """Pairs of documents to compare.

    Attributes:
        pairs: int64 [p, 2], the smaller id first, without repetition.
        cut: documents of buckets too large for all their pairs.
    """

    pairs: np.ndarray
    cut: int


BandsOf = Callable[[np.ndarray], np.ndarray]
"""Buckets of documents in every band, uint64 [BANDS, k], by their ids int64 [k], ascending."""


def candidate_pairs(
    buckets: np.ndarray, ids: np.ndarray, signatures: np.ndarray, band: int, bands_of: BandsOf
) -> Candidates:
    """The pairs of documents to compare, of those that share a bucket of one band.

    Documents of one signature are each compared with the first of them alone, for they are (nearly always) the same
    set; those of different signatures with each other.

    Args:
        buckets: uint64 [n], of the band.
        ids: int64 [n], distinct.
        signatures: uint64 [n].
        band: the band.
        bands_of: asked about the documents of large buckets, whose many pairs are named by one band alone.
    """
    # Where a bucket is cut, another order in each band gives every pair another chance.
    shuffled = _mixed((signatures + np.uint64(band)) * _FACTOR)
    order = np.lexsort((ids, shuffled, buckets))
    buckets, ids, shuffled = buckets[order], ids[order], shuffled[order]
    fresh = np.ones(len(ids), dtype=bool)
    fresh[1:] = (np.diff(buckets) != 0) | (np.diff(shuffled) != 0)
    heads = np.flatnonzero(fresh)
    mine = heads[np.cumsum(fresh) - 1]
    found = [np.stack([ids[mine[~fresh]], ids[~fresh]], axis=1)]
    own, bucket = ids[heads], buckets[heads]
    for step in range(1, min(_LEAST_WINDOW + 1, len(own))):
        together = bucket[step:] == bucket[:-step]
        if not together.any():
            break
        found.append(np.stack([own[:-step][together], own[step:][together]], axis=1))
    cut = 0
    edges = np.flatnonzero(np.concatenate([[True], np.diff(bucket) != 0, [True]]))
    for at in np.flatnonzero(np.diff(edges) > _LEAST_WINDOW + 1):
        members = own[edges[at] : edges[at + 1]]
        window = max(_LEAST_WINDOW, _BUCKET_PAIRS // len(members))
        cut += len(members) if window < len(members) - 1 else 0
        found += _further_pairs(members, window, band, bands_of)
    return Candidates(unique_pairs(np.concatenate(found)), cut)


def _further_pairs(members: np.ndarray, window: int, band: int, bands_of: BandsOf) -> Iterator[np.ndarray]:
    """Each document of a large bucket with those behind the first few, but whom it meets in an earlier band."""
    order = np.argsort(members)
    bands = np.empty((band, len(members)), dtype=np.uint64)
    bands[:, order] = bands_of(members[order])[:band]
    for step in range(_LEAST_WINDOW + 1, min(window + 1, len(members))):
        met = (bands[:, step:] == bands[:, :-step]).any(axis=0)
        yield np.stack([members[:-step][~met], members[step:][~met]], axis=1)


def unique_pairs(pairs: np.ndarray) -> np.ndarray:
    """int64 [p, 2]: each pair once, the smaller id first, in order."""
    if not len(pairs):
        return pairs.reshape(0, 2)
    return np.unique(np.sort(pairs, axis=1), axis=0)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """The share that two sets have in common, of what either has. Both uint64, sorted and distinct, not empty."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def clusters(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What near-duplicates connect.

    Args:
        pairs: int64 [p, 2] of document ids.

    Returns:
        Document ids int64 [n], ascending, of every document that has a near-duplicate; and int64 [n], for each the
        smallest id of its cluster.
    """
    from scipy.sparse import coo_array  # noqa: PLC0415 - only the driver, and only where there are duplicates
    from scipy.sparse.csgraph import connected_components  # noqa: PLC0415

    if not len(pairs):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    ids, flat = np.unique(pairs, return_inverse=True)
    ends = flat.reshape(-1, 2)
    graph = coo_array((np.ones(len(ends), np.int8), (ends[:, 0], ends[:, 1])), shape=(len(ids), len(ids)))
    _, labels = connected_components(graph, directed=False)
    first = np.full(int(labels.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, labels, ids)
    return ids, first[labels]


def removals(
    labels: np.ndarray, validation: np.ndarray, drop: bool, decontaminate: bool, there: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Which documents of clusters are removed from the database, and why.

    A training document is removed where its cluster holds a validation document (with ``decontaminate``), or an earlier
    training document that stays (with ``drop``). What is in a database already stays, so that a validation document
    that joins it is removed where it repeats a training document that is ``there``; otherwise validation documents
    always stay.

    Args:
        labels: int64 [n], clusters of documents in ascending order of their ids.
        validation: bool [n].
        drop: keep one training document of a cluster.
        decontaminate: keep none that repeats a validation document.
        there: bool [n], which are in the database already; None for none.

    Returns:
        bool [n], removed as `NEAR_DUPLICATE`; bool [n], removed as `VALIDATION_DUPLICATE`.
    """
    there = np.zeros(len(labels), dtype=bool) if there is None else there
    trained_on, times = np.unique(labels[there & ~validation], return_counts=True)
    # With ``drop`` one that joins two clusters would leave both of their documents in one.
    late = validation & ~there & np.isin(labels, trained_on if decontaminate else trained_on[(times > 1) & drop])
    contaminated = ~validation & ~there & np.isin(labels, labels[validation & ~late]) & decontaminate
    staying = np.flatnonzero(~validation & ~contaminated)
    repeats = np.zeros(len(labels), dtype=bool)
    if drop:
        _, firsts = np.unique(labels[staying], return_index=True)
        repeats[staying] = True
        repeats[staying[firsts]] = False
    return repeats & ~there, contaminated | late


def without_removed(documents: pa.Table, duplicates: pa.Table) -> pa.Table:
    """A shard's documents without those that are removed, numbered anew, with their clusters.

    Args:
        documents: as they were read.
        duplicates: the shard's rows of `retrodb.schemas.duplicates`.
    """
    row = duplicates["row"].to_numpy()
    removed = duplicates["removed"].is_valid().to_numpy()
    stays = np.ones(documents.num_rows, dtype=bool)
    stays[row[removed]] = False
    alone = duplicates["cluster_kept"].to_numpy() < 2
    cluster = np.zeros(documents.num_rows, dtype=np.int64)
    cluster[row] = duplicates["cluster_id"].to_numpy()
    of_one = np.ones(documents.num_rows, dtype=bool)
    of_one[row] = alone
    kept = documents.filter(pa.array(stays))
    shard = documents["document_id"][0].as_py() >> ID_SHIFT if documents.num_rows else 0
    columns = {
        "document_id": pa.array((shard << ID_SHIFT) + np.arange(kept.num_rows, dtype=np.int64)),
        "cluster_id": pa.array(cluster[stays], mask=of_one[stays]),
    }
    return pa.table({name: columns.get(name, kept[name]) for name in kept.column_names}, schema=kept.schema)
