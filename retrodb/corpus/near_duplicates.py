"""Near-duplicate documents, as RETRO finds them: MinHash over 13-grams, Jaccard similarity of at least 0.8.

Borgeaud et al. 2022, section 2.1: training documents that similar to an evaluation document were removed. Here:

- a document is the set of its 13-grams of words (`retrodb.corpus.shingles`);
- its MinHash signature is cut into bands (`retrodb.corpus.sketches`): documents that share a band are *candidates*;
- candidates are near-duplicates where the similarity of their whole sets, not an estimate, reaches 0.8;
- `clusters` are what near-duplicates connect.

So the sketch decides which pairs are looked at, and never which are near-duplicates: a pair at 0.8 is missed with
probability 5e-5 (25 bands of 5), one at 0.9 never; but where thousands of documents share nearly all of their text, see
`Candidates`. All of it is numpy and Arrow over whole shards.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa

from retrodb.corpus.shingles import FACTOR, mixed
from retrodb.schemas import ID_SHIFT

THRESHOLD: Final = 0.8
NEAR_DUPLICATE: Final = "near_duplicate"
VALIDATION_DUPLICATE: Final = "validation_duplicate"
DEDUP_RULES: Final = (NEAR_DUPLICATE, VALIDATION_DUPLICATE)
"""Names of the rules by which a document is removed: it repeats an earlier one; it repeats a validation document."""

_BUCKET_PAIRS: Final = 2_000_000
"""Pairs of one bucket that are compared at most: all of up to 2,000 different documents. Of a larger bucket, whose
documents share most of their text with thousands of others, each is compared with as many as that leaves, in an order
that differs from band to band; how many documents are in such buckets is counted and told."""
_LEAST_WINDOW: Final = 64


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
    shuffled = mixed((signatures + np.uint64(band)) * FACTOR)
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
