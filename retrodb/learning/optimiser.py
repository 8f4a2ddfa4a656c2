"""What a resumed run needs of an AdamW, as tensors by the names of parameters; and the norm of a part's gradient."""

import math

import torch

from retrodb.model.checkpoint import Tensors

_KEPT = ("exp_avg", "exp_avg_sq", "step")


def state_tensors(model: torch.nn.Module, optimiser: torch.optim.AdamW) -> Tensors:
    """``<parameter>/<quantity>``, of parameters that were stepped."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimiser.state.get(parameter, {}).items()
    }


def load_state(model: torch.nn.Module, optimiser: torch.optim.AdamW, tensors: Tensors) -> None:
    """Put back what `state_tensors` gave."""
    for name, parameter in model.named_parameters():
        names = {key: f"{name}/{key}" for key in _KEPT}
        if kept := {key: tensors[full] for key, full in names.items() if full in tensors}:
            optimiser.state[parameter] = kept


def gradient_norm(part: torch.nn.Module) -> float:
    """Of all its parameters together; 0 where none has a gradient."""
    squares = [p.grad.detach().float().square().sum() for p in part.parameters() if p.grad is not None]
    return math.sqrt(float(torch.stack(squares).sum())) if squares else 0.0
