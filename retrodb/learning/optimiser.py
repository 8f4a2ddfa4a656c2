"""What a resumed run needs of an AdamW, as tensors by the names of parameters; and whether there still are numbers."""

import math
from collections.abc import Mapping

import numpy as np
import torch

from retrodb.errors import WorkerError
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


def refuse_divergence(what: str, loss: float, norms: Mapping[str, float], rate: float) -> None:
    """Refuse to take a step that would leave weights which are no numbers: a checkpoint would keep them.

    Args:
        what: the step, as a message begins with it.
        loss: of the step.
        norms: of its gradients, by part.
        rate: the highest learning rate of the run.

    Raises:
        WorkerError: the loss or a norm is not finite.
    """
    if not all(map(math.isfinite, (loss, *norms.values()))):
        told = ", ".join(f"{norm:.4g} of the {part}" for part, norm in norms.items())
        raise WorkerError(f"{what}: the loss is {loss:.4g}, the gradient's norm {told}. {_remedy(rate)}")


def as_queries(what: str, vectors: torch.Tensor, rate: float) -> np.ndarray:
    """float32 [q, d]: vectors of live weights as a database can be asked with them.

    Raises:
        WorkerError: one is not finite, or beyond what the float16 of stored vectors can hold.
    """
    asked: np.ndarray = vectors.detach().float().numpy()
    largest = float(np.abs(asked).max(initial=0.0))
    if not largest <= np.finfo(np.float16).max:  # NaN is not either
        raise WorkerError(
            f"{what}: the largest number of the query vectors is {largest:.4g}, which float16 cannot hold. "
            f"{_remedy(rate)}"
        )
    return asked


def _remedy(rate: float) -> str:
    return (
        f"Nothing of this step is kept. Train with a lower --learning-rate than {rate:g}, and into another --out where "
        "this one has a checkpoint."
    )
