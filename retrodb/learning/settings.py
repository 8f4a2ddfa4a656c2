"""The settings of a training run: frozen, validated, recorded in the checkpoint. Imports no torch."""

from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from retrodb.errors import InputError, UsageError
from retrodb.model.config import LARGEST_WIDTH, MOST_LAYERS

DATA_SETTINGS: Final = ("tokenizer", "chunk_tokens", "sequence_tokens", "neighbours", "training_neighbours")
"""What follows from the database alone."""

Settings = TypeVar("Settings", bound=BaseModel)

LARGEST_BATCH: Final = 1 << 16
"""Rows: what is beyond is a slip of the finger, and would fill the memory before anything is computed."""


class TrainSettings(BaseModel):
    """How a model is trained. What a resumed run must have the same; the device and threads are no part of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str = "small"
    width: int | None = Field(default=None, ge=2, le=LARGEST_WIDTH)
    layers: int | None = Field(default=None, ge=1, le=MOST_LAYERS)
    heads: int | None = Field(default=None, ge=1, le=LARGEST_WIDTH)
    retrieval: bool = True
    steps: int = Field(default=2000, ge=1)
    batch: int = Field(default=8, ge=1, le=LARGEST_BATCH)
    """Rows that are computed together."""
    accumulate: int = Field(default=1, ge=1, le=LARGEST_BATCH)
    """Batches whose gradients make one step."""
    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    final_rate: float = Field(default=0.1, ge=0, le=1)
    """Share of the learning rate that is left at the last step."""
    warmup: int = Field(default=100, ge=0)
    """Steps in which the learning rate rises to its full height."""
    weight_decay: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    clip: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Largest norm of the gradient."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    log_every: int = Field(default=10, ge=1)
    save_every: int = Field(default=250, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> "TrainSettings":
        if self.warmup > self.steps:
            raise ValueError(f"warmup {self.warmup} is more than steps {self.steps}")
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """What the preset is told otherwise."""
        given = {"width": self.width, "layers": self.layers, "heads": self.heads}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def identity(self) -> dict[str, Any]:
        """All that the weights depend on: how often something is logged or saved is nothing to them."""
        return self.model_dump(exclude={"log_every", "save_every"})


def make_settings(file_settings: dict[str, Any], flags: dict[str, Any]) -> TrainSettings:
    """Settings from a TOML file and from flags; flags win. A run shorter than the default warm-up has a shorter one.

    Raises:
        InputError: the file holds a setting that does not exist, or is the database's to say, or out of range.
        UsageError: a flag is out of range.
    """
    fixed = sorted(set(file_settings) & set(DATA_SETTINGS))
    if fixed:
        raise InputError(
            f"the config file sets {', '.join(name.replace('_', '-') for name in fixed)}: data settings come from the"
            " database alone. Build it with them."
        )
    merged = {**file_settings, **flags}
    if "warmup" not in merged and str(merged.get("steps", "")).isdigit():
        merged["warmup"] = min(TrainSettings.model_fields["warmup"].default, int(merged["steps"]) // 10)
    try:
        return TrainSettings(**merged)
    except ValidationError as error:
        said = "; ".join(_explain(item) for item in error.errors())
        of_flags = any(item["loc"] and item["loc"][0] in flags for item in error.errors())
        raise (UsageError if of_flags else InputError)(f"{said}.") from error


def from_flags(kind: type[Settings], given: dict[str, Any]) -> Settings:
    """Settings that flags alone make. Raises UsageError: one is out of range."""
    try:
        return kind(**given)
    except ValidationError as error:
        raise UsageError("; ".join(_explain(item) for item in error.errors()) + ".") from error


def _explain(item: Any) -> str:
    name = ".".join(str(part).replace("_", "-") for part in item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    return f"--{name} {item['input']!r}: {message}" if name else message
