"""In which order Megatron-LM's ``GPTDataset`` takes the documents of a file, and the samples of that text.

Its neighbours are numbered by sample, and its samples come from shuffles that are drawn anew from the seed
(``megatron/core/datasets/gpt_dataset.py``: the document index, then the shuffle index, from one
``numpy.random.RandomState``). So an export draws them too, and puts each sequence where the shuffle takes it from: the
text comes out in the database's own order, and the token that follows a sequence is the one that follows it there.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class SampleOrder:
    """One split of ``samples`` sequences, in memory 8 bytes a sequence (Megatron-LM holds the same).

    Attributes:
        documents: int32 [samples + 1]: the document of the file that is read as sequence 0, 1, ..; the last one follows
            the last sequence, for the token after it.
        sample_of: uint32 [samples]: the sample that sequence 0, 1, .. becomes.
    """

    documents: npt.NDArray[np.int32]
    sample_of: npt.NDArray[np.uint32]


def sample_order(samples: int, first_document: int, seed: int) -> SampleOrder:
    """The order for a split of ``samples + 1`` documents of n tokens each, of which one epoch is asked for.

    That is ``((samples + 1) * n - 1) // n`` samples, just as many, and no second epoch is begun.
    """
    random = np.random.RandomState(seed)
    documents = np.arange(first_document, first_document + samples + 1, dtype=np.int32)
    random.shuffle(documents)
    shuffled = np.arange(samples, dtype=np.uint32)
    random.shuffle(shuffled)
    sample_of = np.empty(samples, np.uint32)
    sample_of[shuffled] = np.arange(samples, dtype=np.uint32)
    return SampleOrder(documents, sample_of)
