"""The settings of an evaluation. Imports no torch."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from retrodb.errors import UsageError

DEFAULT_NEIGHBOURS = (0, 1, 2, 4, 8)


class EvaluationSettings(BaseModel):
    """What is measured. ``neighbours`` None is `DEFAULT_NEIGHBOURS` as far as the database keeps so many."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: Literal["validation", "train"] = "validation"
    neighbours: tuple[int, ...] | None = None
    rows: int | None = Field(default=None, ge=1)
    """Sequences to measure, evenly spaced; None for all."""
    batch: int = Field(default=4, ge=1)
    draws: int = Field(default=1000, ge=1, le=10**6)
    """Bootstrap samples."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    precision: Literal["auto", "fp32", "bf16"] = "auto"

    @field_validator("neighbours")
    @classmethod
    def _counts(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and any(k < 0 for k in value):
            raise ValueError("numbers of neighbours are 0 or more")
        return value


def make_settings(flags: dict[str, Any]) -> EvaluationSettings:
    """Settings from flags. Raises UsageError, which names the flag, for one that is out of range."""
    try:
        return EvaluationSettings(**flags)
    except ValidationError as error:
        item = error.errors()[0]
        name = str(item["loc"][0]).replace("_", "-")
        raise UsageError(f"--{name} {item['input']!r}: {item['msg'].removeprefix('Value error, ')}.") from error
