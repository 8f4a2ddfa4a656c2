"""One figure of a plan, beside where it comes from; and the measured and cited ones that the others follow from."""

from dataclasses import dataclass
from typing import Final

BUILD: Final = "measured: docs/scale.md, Calibration"
CODE: Final = "follows from the code"
INSTRUCT_RETRO: Final = "cited: InstructRetro (Wang et al. 2023)"
BENCHMARKS: Final = "measured: docs/benchmarks.md"


@dataclass(frozen=True)
class Figure:
    """A value in ``unit`` (``bytes``, ``GB``, ``hours``, ..., or none) and its ``source``."""

    value: float | str
    unit: str
    source: str

    def as_json(self) -> dict[str, float | str]:
        return {"value": self.value, "unit": self.unit, "source": self.source}


# Sizes: fitted to the builds of docs/scale.md. English text under GPT-2's BPE; bytes as they lie on disk (zstd 1).
BYTES_PER_TOKEN: Final = 4.59
DOCUMENT_TOKENS: Final = 1_000
RECORD_OVERHEAD: Final = 1.04
"""An input record against its text: its other fields."""
DOCUMENT_COMPRESSION: Final = 0.46
BYTES_PER_DOCUMENT: Final = 330
"""Of key, hash and metadata 120; of the sketch 210."""
BYTES_PER_FILE: Final = 2_000
"""Of a Parquet file, besides its rows; three times as much in training, which has more columns."""
BYTES_PER_STORED_TOKEN: Final = 1.68
BYTES_PER_CHUNK_ROW: Final = 9.0
BYTES_PER_NEIGHBOUR: Final = 2.5
BYTES_PER_ID_BIT: Final = 0.2
"""Of each of a neighbour's two ids, for each bit that the number of chunks has."""
BYTES_PER_TRAINING_TOKEN: Final = 1.9
BYTES_PER_LEAKAGE_ROW: Final = 5.0

# Effort.
BERT_LARGE_CHUNKS_PER_GPU_HOUR: Final = 6.22e6
BERT_LARGE_PARAMETERS: Final = 302.3e6
"""Of the layers alone; look-ups of embeddings take no multiplications."""
MINILM_CHUNKS_PER_CORE_SECOND: Final = 55.0
MINILM_PARAMETERS: Final = 10.6e6
PAIR_SECONDS: Final = 1 / (2_630 * 19_205)
"""Of one core, to compare a query with one vector of 384 dimensions: 2,630 queries/s over 19,205."""
PROBED_SHARE: Final = 64 / 1024
"""Of the inverted lists, that 68,566 chunks needed for recall 0.95."""
PROBED_AT_MOST: Final = 256
TEXT_BYTES_PER_CORE_SECOND: Final = 0.35e6
"""Reading, sketching, tokenising, chunking, joining and reporting together: 5.6 MB in 16 s on two cores, half of
which was start-up."""

# Memory.
WORKER_BYTES: Final = 250e6
"""A worker with Beam, Arrow and faiss loaded, and nothing in hand."""
TOKENIZER_BYTES: Final = 50e6
"""GPT-2's."""
TORCH_BYTES: Final = 1000e6
"""With the code that oneDNN keeps for the shapes of batches, which differs by processor: 650e6 were measured on one and
1,000e6 on another. What has to suffice is the larger."""
COMBINE_BYTES: Final = 1_000 * (256 << 10)
SELECT_BYTES: Final = 64 << 20
