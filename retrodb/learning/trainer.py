"""One optimiser step after another, and all that a resumed run needs to take the very same ones."""

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from retrodb.errors import DamagedError, WorkerError
from retrodb.learning.device import Device
from retrodb.learning.schedule import learning_rate
from retrodb.learning.settings import TrainSettings
from retrodb.learning.stream import RowStream
from retrodb.model.retro import Retro

Tensors = dict[str, torch.Tensor]
_BETAS = (0.9, 0.95)


@dataclass
class Counts:
    """What a run has done so far."""

    step: int = 0
    tokens: int = 0
    """Predicted ones."""
    seconds: float = 0.0
    log: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """A model, its optimiser and its rows.

    AdamW (Loshchilov and Hutter 2019) on all that requires a gradient; decay on matrices alone. Gradients of
    ``accumulate`` batches are weighted by their predictions, so that the step is that of one large batch.
    """

    def __init__(self, model: Retro, stream: RowStream, settings: TrainSettings, device: Device) -> None:
        self.model, self.stream, self.settings, self.device = model.to(device.name), stream, settings, device
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = [p for p in self._named.values() if p.dim() > 1]
        others = [p for p in self._named.values() if p.dim() <= 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=settings.learning_rate,
            betas=_BETAS,
            eps=1e-8,
        )
        self.counts = Counts()
        self._since: list[tuple[float, int, float, float]] = []
        """(nats, tokens, seconds, seconds of loading) of each step since the last entry of the log."""

    @property
    def finished(self) -> bool:
        """Whether all steps are taken."""
        return self.counts.step >= self.settings.steps

    def take_step(self) -> dict[str, Any] | None:
        """One optimiser step. Returns an entry of the log where one is due.

        Raises:
            WorkerError: the loss is not finite.
        """
        begun = time.monotonic()
        rate = self._set_rate()
        batches = [self.stream.batch(self.settings.batch).to(self.device.name) for _ in range(self.settings.accumulate)]
        loading = time.monotonic() - begun
        predicted = sum(int(batch.predicts.sum()) for batch in batches)
        self.model.train()
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for batch in batches:
            with self.device.autocast():
                loss = self.model.nats(batch).sum() / max(1, predicted)
            loss.backward()
            total += float(loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(self._named.values(), self.settings.clip))
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise WorkerError(
                f"step {self.counts.step + 1}: the loss is {total}, the gradient's norm {norm}. Train with a lower"
                f" --learning-rate than {self.settings.learning_rate}, from the last checkpoint on in another --out."
            )
        self._optimizer.step()
        seconds = time.monotonic() - begun
        self.counts.step += 1
        self.counts.tokens += predicted
        self.counts.seconds += seconds
        self._since.append((total * predicted, predicted, seconds, loading))
        if self.counts.step % self.settings.log_every and not self.finished:
            return None
        return self._log(rate, norm)

    def _set_rate(self) -> float:
        rate = learning_rate(
            self.counts.step,
            steps=self.settings.steps,
            warmup=self.settings.warmup,
            peak=self.settings.learning_rate,
            final_share=self.settings.final_rate,
        )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _log(self, rate: float, norm: float) -> dict[str, Any]:
        """Mean loss in nats per token since the entry before, and how fast it went."""
        nats, tokens, seconds, loading = (sum(column) for column in zip(*self._since, strict=True))
        self._since = []
        entry = {
            "step": self.counts.step,
            "epoch": int(self.stream.state_dict()["epoch"]),
            "tokens": self.counts.tokens,
            "loss": nats / max(1, tokens),
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
            "loading_share": round(loading / max(seconds, 1e-9), 5),
            "seconds": round(self.counts.seconds, 3),
        }
        self.counts.log.append(entry)
        return entry

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def progress(self) -> dict[str, Any]:
        """What JSON holds of the state: counts, the position in the stream, what is not logged yet."""
        return {
            "step": self.counts.step,
            "tokens": self.counts.tokens,
            "seconds": self.counts.seconds,
            "position": self.stream.state_dict(),
            "since": self._since,
        }

    def state(self) -> Tensors:
        """What safetensors hold of it: Adam's averages, by parameter."""
        found = {}
        for name, parameter in self._named.items():
            for key, value in self._optimizer.state[parameter].items():
                found[f"{name}/{key}"] = value
        return found

    def load(self, progress: dict[str, Any], state: Tensors, log: list[dict[str, Any]]) -> None:
        """Go on from there. The weights are the model's already.

        Raises:
            MismatchError: the position is of another stream.
            DamagedError: the state is not this model's.
        """
        try:
            position = progress["position"]
            self._since = [(float(n), int(t), float(s), float(lo)) for n, t, s, lo in progress["since"]]
            self.counts = Counts(int(progress["step"]), int(progress["tokens"]), float(progress["seconds"]), log=log)
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"the checkpoint does not say how far its run had got: {error!r}.") from error
        self.stream.load_state_dict(position)
        for name, parameter in self._named.items():
            try:
                own = {key: state[f"{name}/{key}"] for key in ("exp_avg", "exp_avg_sq", "step")}
            except KeyError as error:
                raise DamagedError(f"the optimiser's state lacks {error}: it is of another model.") from error
            self._optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in own.items()
            }
