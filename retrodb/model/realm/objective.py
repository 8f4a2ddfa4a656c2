"""Marginal likelihood over the candidates, and what a candidate was worth (section 3.3 and appendix A)."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Marginal:
    """Per query, over its candidates (slot 0 is the null document).

    Attributes:
        nats: float [n], -log p(y | x).
        posterior: float [n, c], p(z | x, y): what the gradient pulls p(z | x) towards.
        prior: float [n, c], p(z | x).
        utility: float [n, c], RU(z | x) = log p(y | z, x) - log p(y | null, x), nan where there is no candidate. It
            comes from the very same forward pass: no second query (V2).
    """

    nats: torch.Tensor
    posterior: torch.Tensor
    prior: torch.Tensor
    utility: torch.Tensor


def marginalise(scores: torch.Tensor, log_likelihood: torch.Tensor, valid: torch.Tensor) -> Marginal:
    """log p(y | x) = log sum_z p(y | z, x) p(z | x), with p(z | x) a softmax of the scores over the candidates.

    A candidate that is missing has no weight and no gradient; slot 0, the null document, always counts.

    Args:
        scores: float [n, c], f(x, z) with live weights.
        log_likelihood: float [n, c], log p(y | z, x).
        valid: bool [n, c].
    """
    valid = valid.clone()
    valid[:, 0] = True
    prior = scores.float().masked_fill(~valid, -torch.inf).log_softmax(-1)
    likelihood = log_likelihood.float().masked_fill(~valid, 0.0)
    joint = (prior + likelihood).masked_fill(~valid, -torch.inf)
    nats = -torch.logsumexp(joint, -1)
    utility = (likelihood - likelihood[:, :1]).masked_fill(~valid, torch.nan)
    return Marginal(nats, (joint + nats[:, None]).exp().detach(), prior.exp().detach(), utility.detach())
