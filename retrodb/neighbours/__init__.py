"""Neighbours: over-fetch, exclusion, exact re-score, top k.

For one query shard (the chunks of one chunk shard, or of another corpus) `find_neighbours` asks a `CandidateSource`
(the index) for more than it needs; drops by **id** what is not allowed (`Exclusion`: the chunk itself always, its
document, what a hook says); scores the rest from the stored float16 vectors (`VectorSource`), pair by pair in float32;
and orders by (distance, chunk id). The over-fetch doubles, query by query, until k are allowed and nothing as near as
the k-th can have been left out, or the index is exhausted; then the row says how many there are (``n_valid``).

`select` is the step in the middle, for a shuffle that searches groups of index shards on different workers and
merges. `rerank` keeps of more neighbours those whose tokens have most in common with the query's. `Neighbours` holds
the result as arrays; `to_table` and `from_table` convert it to and from rows. `retrodb.neighbours.joining` is for
vectors that join others: whom they may come near, and who is nearest then.
"""

from retrodb.neighbours.asking import Ask, SearchedIndex, initial_candidates
from retrodb.neighbours.exclusion import (
    NO_CLUSTER,
    ClusterSource,
    Exclude,
    ExcludedPairs,
    Exclusion,
    SameBlock,
    SameCluster,
    UidSource,
    document_ranges,
)
from retrodb.neighbours.rerank import Reranking, Tokens, TokenSource, rerank, surface_scores
from retrodb.neighbours.select import Selection, find_neighbours, pair_scores, rescore, select
from retrodb.neighbours.sources import (
    CandidateSource,
    DocumentSource,
    StoredClusters,
    StoredDocuments,
    StoredTokens,
    StoredUids,
    StoredVectors,
    VectorSource,
    by_shard,
    clusters_of,
)
from retrodb.neighbours.table import Neighbours, from_table, to_table

__all__ = [
    "NO_CLUSTER",
    "Ask",
    "CandidateSource",
    "ClusterSource",
    "DocumentSource",
    "Exclude",
    "ExcludedPairs",
    "Exclusion",
    "Neighbours",
    "Reranking",
    "SameBlock",
    "SameCluster",
    "SearchedIndex",
    "Selection",
    "StoredClusters",
    "StoredDocuments",
    "StoredTokens",
    "StoredUids",
    "StoredVectors",
    "TokenSource",
    "Tokens",
    "UidSource",
    "VectorSource",
    "by_shard",
    "clusters_of",
    "document_ranges",
    "find_neighbours",
    "from_table",
    "initial_candidates",
    "pair_scores",
    "rerank",
    "rescore",
    "select",
    "surface_scores",
    "to_table",
]
