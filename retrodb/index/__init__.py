"""The index: one trained quantiser (the *template*) and index shards that all start from it.

- `choose_key` says which kind of index suits the number of vectors and the memory: exact up to 65,536 vectors, beyond
  that autofaiss' choice among inverted-file (IVF) keys, and why.
- `seeded_sample` draws the rows to train on, uniformly over all embedding shards; `train_template` makes the
  template: trained, empty, the same bytes for the same sample.
- `group_shards` says which consecutive chunk shards share one *index shard*; `build_index_shard` adds their vectors to
  a copy of the template under their chunk ids. Shards are built in any order, by any worker, from one template.
- `load_index_shard` opens one and checks it; `search_group` searches it; `merge` joins searches of several. Because
  they share a template the result is that of one big index. `GroupedIndex` does this for a whole database, holding a
  bounded number of shards.

What an index returns are *candidates*: raw distances may be those of a code. `retrodb.neighbours` excludes, re-scores
from the stored vectors, and orders them.
"""

from retrodb.index.engine import Metric, has_exact_codes
from retrodb.index.keys import EXACT_BELOW, KeyChoice, choose_key
from retrodb.index.search import MISSING, GroupedIndex, HeldIndex, IndexFile, merge, open_index_file, search_group
from retrodb.index.shards import (
    build_index_shard,
    bytes_per_vector,
    commit_index_shard,
    group_shards,
    largest_norm,
    load_index_shard,
)
from retrodb.index.template import load_template, seeded_sample, train_template

__all__ = [
    "EXACT_BELOW",
    "MISSING",
    "GroupedIndex",
    "HeldIndex",
    "IndexFile",
    "KeyChoice",
    "Metric",
    "build_index_shard",
    "bytes_per_vector",
    "choose_key",
    "commit_index_shard",
    "group_shards",
    "has_exact_codes",
    "largest_norm",
    "load_index_shard",
    "load_template",
    "merge",
    "open_index_file",
    "search_group",
    "seeded_sample",
    "train_template",
]
