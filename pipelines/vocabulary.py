"""``--tokenizer train:VOCAB``: a byte-level BPE learnt from a seeded sample of the documents, kept in the database."""

from collections.abc import Iterator
from typing import Final

import numpy as np
import pyarrow.compute as pc
from retrodb.pipelines.builder import Builder
from retrodb.pipelines.chunk import chunk_inputs, kept_documents
from retrodb.pipelines.ingredients import tokenizer_identity
from retrodb.pipelines.receipts import ReceiptBook
from retrodb.pipelines.stages import TokenizerIdentity

from retrodb.chunking.tokenizer import tokenizer_from_json, train_tokenizer
from retrodb.corpus import TRAIN
from retrodb.manifest import TRAINED_TOKENIZER

_SAMPLE_CHARACTERS: Final = 32 << 20


def settle_tokenizer(builder: Builder, chunk: ReceiptBook) -> TokenizerIdentity:
    """The tokenizer of this build; learnt first where it has to be.

    A learnt one is kept with the chunk stage's receipts until the stage is done, and as ``tokenizer.json`` from then
    on: documents may lose their text while they are chunked, so it cannot always be learnt twice.
    """
    if builder.ingredients.tokenizer is not None:
        return builder.ingredients.tokenizer
    storage = builder.storage
    if not is_stored(builder, chunk):
        kept = f"{chunk.folder}/vocabulary/{TRAINED_TOKENIZER}"
        if storage.size(kept) is None:
            vocabulary = int(builder.config.tokenizer.removeprefix("train:"))
            storage.commit_bytes(kept, train_tokenizer(sample_texts(builder), vocabulary))
        storage.commit_bytes(TRAINED_TOKENIZER, storage.read_bytes(kept))
        state = builder.manifest.stages.get("chunk")
        if state is not None and state.fingerprint == chunk.fingerprint:
            builder.progress.note(f"chunk: {TRAINED_TOKENIZER} was damaged and is learnt again")
            builder.done.append("chunk")
    tokenizer = tokenizer_from_json(storage.read_bytes(TRAINED_TOKENIZER), builder.config.tokenizer)
    return tokenizer_identity(tokenizer, builder.config.tokenizer, stored=TRAINED_TOKENIZER)


def is_stored(builder: Builder, chunk: ReceiptBook) -> bool:
    """Whether the tokenizer this build needs is in place: none of its own, or the recorded one, undamaged."""
    if builder.ingredients.tokenizer is not None:
        return True
    state = builder.manifest.stages.get("chunk")
    recorded = builder.manifest.fingerprints.get("tokenizer", {}).get("fingerprint")
    storage = builder.storage
    return (
        state is not None
        and state.fingerprint == chunk.fingerprint
        and storage.sha256_if_there(TRAINED_TOKENIZER) == recorded
    )


def sample_texts(builder: Builder) -> Iterator[str]:
    """Training documents in a seeded random order of shards, and of documents in each, up to a bounded amount of text.

    Those that are removed are left out, whether they are there still or not: learnt again, it is the same tokenizer.
    """
    generator = np.random.default_rng(builder.config.seed)
    shards = builder.source_documents()
    inputs = chunk_inputs(shards, builder.manifest.shards("duplicates"))
    room = _SAMPLE_CHARACTERS
    share = max(1, room // max(1, min(len(shards), 64)))
    for at in generator.permutation(len(shards)):
        documents = kept_documents(builder.storage, inputs[shards[at].number])
        texts = documents.filter(pc.equal(documents["split"], TRAIN))["text"]
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
