"""Chunks to vectors: the frozen encoder, known by its fingerprint.

`source` finds an encoder's files without importing torch, and hashes them; `featuriser` turns texts into its token ids;
`encoder` loads the network and turns texts (or the encoder's own token ids) into vectors; `feeding` keeps the network
busy, on a core or on a card of `cards`; `batches` groups texts by length. What made the vectors is an
`EncoderIdentity`: files, pooling, normalisation, length, prompt and precision. A query is embedded by the same one or
refused (invariant 4). Vectors are stored float16.
"""

from retrodb.encoding.batches import chunk_texts, length_batches
from retrodb.encoding.cards import choose_device, count_cards, cuda_precision, own_device
from retrodb.encoding.source import (
    DEFAULT_ENCODER,
    EncoderFiles,
    EncoderIdentity,
    check_weights,
    cpu_precision,
    identify,
    longest_input,
    resolve_encoder,
)

__all__ = [
    "DEFAULT_ENCODER",
    "EncoderFiles",
    "EncoderIdentity",
    "check_weights",
    "choose_device",
    "chunk_texts",
    "count_cards",
    "cpu_precision",
    "cuda_precision",
    "identify",
    "length_batches",
    "longest_input",
    "own_device",
    "resolve_encoder",
]
