"""``--tokenizer train:VOCAB``: a byte-level BPE learnt from a seeded sample of the documents, kept in the database."""

from collections.abc import Iterator
from typing import Final

import numpy as np
from retrodb.pipelines.builder import Builder
from retrodb.pipelines.ingredients import TRAINED_TOKENIZER, tokenizer_identity
from retrodb.pipelines.stages import TokenizerIdentity

from retrodb.chunking.tokenizer import tokenizer_from_json, train_tokenizer

_SAMPLE_CHARACTERS: Final = 32 << 20


def settle_tokenizer(builder: Builder, chunk_fingerprint: str) -> TokenizerIdentity:
    """The tokenizer of this build; learnt first where it has to be.

    A stored one is kept as long as the chunk stage it was learnt for is current and its bytes are the recorded ones.
    """
    if builder.ingredients.tokenizer is not None:
        return builder.ingredients.tokenizer
    state = builder.manifest.stages.get("chunk")
    recorded = builder.manifest.fingerprints.get("tokenizer", {}).get("fingerprint")
    storage = builder.storage
    kept = (
        state is not None
        and state.fingerprint == chunk_fingerprint
        and storage.size(TRAINED_TOKENIZER) is not None
        and storage.sha256(TRAINED_TOKENIZER) == recorded
    )
    if not kept:
        vocabulary = int(builder.config.tokenizer.removeprefix("train:"))
        storage.commit_bytes(TRAINED_TOKENIZER, train_tokenizer(sample_texts(builder), vocabulary))
    tokenizer = tokenizer_from_json(storage.read_bytes(TRAINED_TOKENIZER), builder.config.tokenizer)
    return tokenizer_identity(tokenizer, builder.config.tokenizer, stored=TRAINED_TOKENIZER)


def sample_texts(builder: Builder) -> Iterator[str]:
    """Documents in a seeded random order of shards, and of documents in each, up to a bounded amount of text."""
    generator = np.random.default_rng(builder.config.seed)
    shards = builder.manifest.shards("documents")
    room = _SAMPLE_CHARACTERS
    share = max(1, room // max(1, min(len(shards), 64)))
    for at in generator.permutation(len(shards)):
        texts = builder.storage.read_table(shards[at].path, ["text"])["text"]
        left = min(share, room)
        for row in generator.permutation(len(texts)):
            if left <= 0:
                break
            text = texts[int(row)].as_py()[:left]
            left -= len(text)
            room -= len(text)
            yield text
        if room <= 0:
            return
