"""From somebody's files to document shards.

The data model, in the order in which it comes into being:

- `InputFile`: a file that `expand_inputs` found, with its format (by extension) and a cheap ``stamp``.
- `ScannedFile`: what one pass over it found (`scan_file`): compression (by its first bytes), sha256, decompressed
  length, Parquet row groups.
- `Plan` -> `Split` -> `ShardPlan` -> `Segment`: what `plan` makes of the scans. A segment is a range of one file: bytes
  of the decompressed stream for JSONL, rows for Parquet, all of it for text. A record belongs to the segment in which
  its first byte lies. A shard plan lists the segments of one document shard; a split is what one worker reads.
- `Document`, `Dropped`, `Quarantined`: the three things a record can become. Each is judged by itself, and their
  numbers add up to the number of records read.
- `ShardOutput`: the Arrow tables and counts of one shard (`read_split`).

Everything follows from the files and the settings alone: not from workers, the order in which files were named, nor
from how many bytes a read returned. Positions and keys do not depend on the size of the shards either.
Nothing here knows of Beam or of databases.

    files = expand_inputs(["corpus/*.jsonl.gz"]).files
    layout = plan([scan_file(file) for file in files])
    for split in layout.splits:
        for shard in read_split(split, FieldNames()):
            print(shard.number, shard.documents.num_rows, shard.counts)
"""

from retrodb.corpus.listing import TRAIN, VALIDATION, InputFile, Listing, expand_inputs, outside, with_validation
from retrodb.corpus.records import Document, Dropped, FieldNames, Outcome, Quarantined
from retrodb.corpus.scan import RowGroup, ScannedFile, scan_file
from retrodb.corpus.splits import Plan, Segment, ShardPlan, Split, default_shard_bytes, plan
from retrodb.corpus.tables import FractionSplit, ShardOutput, SplitOf, all_train, read_split

__all__ = [
    "TRAIN",
    "VALIDATION",
    "Document",
    "Dropped",
    "FieldNames",
    "FractionSplit",
    "InputFile",
    "Listing",
    "Outcome",
    "Plan",
    "Quarantined",
    "RowGroup",
    "ScannedFile",
    "Segment",
    "ShardOutput",
    "ShardPlan",
    "Split",
    "SplitOf",
    "all_train",
    "default_shard_bytes",
    "expand_inputs",
    "outside",
    "plan",
    "read_split",
    "scan_file",
    "with_validation",
]
