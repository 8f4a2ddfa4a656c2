"""The picture of a run's loss."""

import io
from collections.abc import Mapping, Sequence
from typing import Any


def loss_plot(log: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG of the loss in nats per token over the steps; drawn without a display."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - half a second, at the end of a run

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats per token")
    axes.plot([entry["step"] for entry in log], [entry["loss"] for entry in log], linewidth=1)
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
