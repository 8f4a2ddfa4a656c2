"""The Inverse Cloze Task (Lee et al. 2019, section 4): the retriever's warm start.

A sentence of a block is the query, the rest of the block is what it is to find among the blocks of its batch. In one of
ten cases the sentence stays in the block, so that the retriever also learns to match words.
"""

import torch

KEPT_SHARE = 0.1
"""How often the sentence stays in its block (Lee et al. 2019, section 9.2: removed in 90%)."""


def cloze_loss(queries: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Mean -log of the softmax over the batch's blocks, in nats.

    Args:
        queries: float [n, d]; row i belongs to block i.
        blocks: float [n, d].
    """
    scores = queries @ blocks.T
    return torch.nn.functional.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def cloze_accuracy(queries: torch.Tensor, blocks: torch.Tensor) -> float:
    """Share of the queries whose own block scores best in the batch."""
    best = (queries @ blocks.T).argmax(-1)
    return float((best == torch.arange(len(best), device=best.device)).float().mean())
