"""Documents to chunks: m consecutive tokens of one document, with the UTF-8 byte range they came from.

`tokenizer` turns texts into token ids and token byte ends. With a lossless (byte-level) tokenizer the end of a token
is a cumulative sum over a table of token byte lengths, so exact offsets cost nothing, also where a token boundary cuts
a character. `chunks` cuts one shard's documents into rows of the ``chunks`` table. A chunk never crosses a document
(Borgeaud et al. 2022, section 2.1; the crossing is what made neighbours leak elsewhere).
"""

from retrodb.chunking.chunks import chunk_documents, token_type_for
from retrodb.chunking.tokenizer import (
    DEFAULT_TOKENIZER,
    OWN_TOKENIZER,
    ChunkTokenizer,
    load_tokenizer,
    refuse_other_tokenizer,
)

__all__ = [
    "DEFAULT_TOKENIZER",
    "OWN_TOKENIZER",
    "ChunkTokenizer",
    "chunk_documents",
    "load_tokenizer",
    "refuse_other_tokenizer",
    "token_type_for",
]
