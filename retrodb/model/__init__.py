"""The reference RETRO model (Borgeaud et al. 2022, section 2): small, exact, and no faster than it need be.

    config = ModelConfig.preset("small", vocabulary=50257, chunk_tokens=64)
    model = Retro(config)
    batch = Batch.of(samples, neighbours=2)      # samples of `retrodb.training.TrainingDataset`
    model(batch)                                 # [B, n, d]: what `model.logits` turns into predictions
    model.loss(batch)                            # nats per predicted token

`config` says what a model is; `batch` what may look at what; `layers` are the pieces; `decoder` is the plain model;
`retrieval` the neighbour encoder and the chunked cross-attention; `retro` is Algorithm 1; `checkpoint` is what lies on
disk; `bases` reads other people's decoders. See docs/model.md.
"""

from typing import TYPE_CHECKING, Any

from retrodb.model.config import PRESETS, ModelConfig, RetrievalConfig

if TYPE_CHECKING:
    from retrodb.model.batch import Batch
    from retrodb.model.retro import Retro

__all__ = ["PRESETS", "Batch", "ModelConfig", "RetrievalConfig", "Retro"]

_NEED_TORCH = {"Batch": "batch", "Retro": "retro"}


def __getattr__(name: str) -> Any:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib  # noqa: PLC0415

    return getattr(importlib.import_module(f"{__name__}.{_NEED_TORCH[name]}"), name)
