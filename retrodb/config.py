"""The settings of a build: parsed once at the edge into one frozen, validated model.

`BuildConfig` holds what shapes the tables (recorded in the manifest and, stage by stage, in the fingerprints);
`RunSettings` holds what does not: workers, runner, device. Changing those never rebuilds anything.
"""

import os
import re
import tomllib
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from retrodb.chunking import DEFAULT_TOKENIZER, OWN_TOKENIZER
from retrodb.encoding import DEFAULT_ENCODER
from retrodb.errors import InputError, UsageError
from retrodb.manifest import STAGES
from retrodb.sizes import parse_duration, parse_size
from retrodb.units import BLOCK_TOKENS, Unit, stages_of

_OPTION: Final = re.compile(r"(?:([a-z]+)\.)?([A-Za-z][\w-]*)=(.*)", re.DOTALL)
_MINIMUM_TRAINED_VOCABULARY: Final = 256

_OF_UNIT: Final = {"chunk": (DEFAULT_TOKENIZER, 64), "block": (OWN_TOKENIZER, BLOCK_TOKENS)}
"""By unit: the tokenizer, and the tokens of a chunk, or of a block with its title and the special tokens."""
_LEAST_BLOCK: Final = 16

_OVERRIDES: Final = {"validation": "validation_fraction", "validation_fraction": "validation"}
"""A flag that stands for another way of the same takes the place of a setting of the file."""
_SWITCHES: Final = ("no_text", "decontaminate")

RERANK_OF: Final = 10
"""Candidates of re-ranking for each neighbour that is kept: 200 for 20, as Megatron-LM searched and kept for RETRO."""

DEFAULT_MEMORY: Final = 16 * 10**9
"""Fixed, not this machine's: the same corpus gets the same index key everywhere."""


def _available_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class BuildConfig(BaseModel):
    """What a database is made with. Defaults are RETRO's (Borgeaud et al. 2022): m = 64, n = 2048, k = 2 of 20."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: Unit = "chunk"
    text_field: str | None = None
    id_field: str | None = None
    title_field: str | None = None
    validation: tuple[str, ...] = ()
    validation_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    dedup: Literal["keep", "drop", "off"] = "keep"
    decontaminate: bool = True
    text: bool = True
    shard_bytes: int | None = Field(default=None, ge=1024)
    tokenizer: str = Field(default_factory=lambda given: _OF_UNIT[given.get("unit", "chunk")][0], min_length=1)
    chunk_tokens: int = Field(default_factory=lambda given: _OF_UNIT[given.get("unit", "chunk")][1], ge=1, le=8192)
    encoder: str = Field(default=DEFAULT_ENCODER, min_length=1)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    metric: Literal["l2", "ip"] = "l2"
    index_key: str | None = None
    memory: int | None = Field(default=None, ge=1 << 20)
    neighbours: int = Field(default=20, ge=1, le=1000)
    exclude: Literal["document", "cluster", "none"] = "document"
    rerank: Literal["none", "overlap", "bm25"] = "none"
    rerank_candidates: int | None = Field(default=None, ge=1, le=10_000)
    min_recall: float = Field(default=0.95, ge=0.0, le=1.0)
    sequence_tokens: int = Field(default=2048, ge=1)
    training_neighbours: int = Field(default=2, ge=1, le=127)
    seed: int = Field(default=0, ge=0, lt=2**31)

    @field_validator("memory", "shard_bytes", mode="before")
    @classmethod
    def _size(cls, value: Any) -> Any:
        return parse_size(value) if isinstance(value, str) else value

    @field_validator("validation", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
            raise ValueError("write a path, or a list of paths")
        return value

    @field_validator("tokenizer")
    @classmethod
    def _trained(cls, value: str) -> str:
        if value.startswith("train:"):
            vocabulary = value.removeprefix("train:")
            if not vocabulary.isdigit() or not _MINIMUM_TRAINED_VOCABULARY < int(vocabulary) <= 1 << 20:
                raise ValueError(f"{value!r}: write train:VOCAB with a vocabulary from 257 to {1 << 20}, as train:8192")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "BuildConfig":
        if self.unit == "block":
            self._check_blocks()
        elif self.sequence_tokens % self.chunk_tokens:
            raise ValueError(
                f"sequence-tokens {self.sequence_tokens} is not a multiple of chunk-tokens {self.chunk_tokens}; "
                f"the nearest that is: {max(1, round(self.sequence_tokens / self.chunk_tokens)) * self.chunk_tokens}"
            )
        if self.training_neighbours > self.neighbours:
            raise ValueError(
                f"training-neighbours {self.training_neighbours} is more than neighbours {self.neighbours}, "
                "the number kept per chunk"
            )
        self._check_reranking()
        if self.validation and self.validation_fraction:
            raise ValueError("give validation inputs or a validation-fraction of the others, not both")
        if self.dedup == "off" and self.exclude == "cluster":
            raise ValueError("exclude cluster needs near-duplicate clusters: give dedup keep or drop, not off")
        if self.dedup == "off" and self.decontaminate and self.has_validation:
            raise ValueError(
                "dedup off finds no near-duplicates of the validation documents: "
                "give dedup keep or drop, or no-decontaminate"
            )
        return self

    def _check_blocks(self) -> None:
        if self.tokenizer != OWN_TOKENIZER:
            raise ValueError(
                f"tokenizer {self.tokenizer}: blocks are made of the encoder's own tokens, for it reads a block with "
                "its title as it is; leave tokenizer out, or say encoder"
            )
        if self.chunk_tokens < _LEAST_BLOCK:
            raise ValueError(f"chunk-tokens {self.chunk_tokens} leaves a block no room: give {_LEAST_BLOCK} or more")

    def _check_reranking(self) -> None:
        if self.rerank_candidates is None:
            return
        if self.rerank == "none":
            raise ValueError("rerank-candidates without re-ranking: give rerank overlap or bm25 as well")
        if self.rerank_candidates < self.neighbours:
            raise ValueError(
                f"rerank-candidates {self.rerank_candidates} is less than neighbours {self.neighbours}, "
                "which are kept of them"
            )

    @property
    def searched_neighbours(self) -> int:
        """Neighbours that are searched for each chunk: those that are kept, or the candidates of re-ranking."""
        if self.rerank == "none":
            return self.neighbours
        return self.rerank_candidates or RERANK_OF * self.neighbours

    @property
    def has_validation(self) -> bool:
        """Whether some documents are set apart for validation."""
        return bool(self.validation or self.validation_fraction)

    @property
    def memory_bytes(self) -> int:
        """Budget for the searched index: as given, else `DEFAULT_MEMORY`."""
        return self.memory or DEFAULT_MEMORY


class RunSettings(BaseModel):
    """How a build is carried out; no table depends on it.

    ``wait`` is how many seconds another writer is waited for; None: it is refused at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    workers: int = Field(default_factory=_available_cores, ge=1)
    runner: Literal["local", "flink", "dataflow", "portable"] = "local"
    runner_option: tuple[str, ...] = ()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    until: Literal[STAGES] | None = None  # type: ignore[valid-type]
    wait: float | None = Field(None, ge=0, allow_inf_nan=False)

    @field_validator("wait", mode="before")
    @classmethod
    def _seconds(cls, value: Any) -> Any:
        return parse_duration(value) if isinstance(value, str) else value

    @field_validator("runner_option", mode="before")
    @classmethod
    def _options(cls, value: Any) -> Any:
        texts = _option_texts(value)
        for text in texts:
            split_option(text)
        return texts


def _option_texts(value: Any) -> tuple[str, ...]:
    """``KEY=VALUE`` texts from such texts, or from a TOML table."""
    if isinstance(value, dict):
        pairs = ((key, one) for key, given in value.items() for one in (given if isinstance(given, list) else [given]))
        return tuple(f"{key}={str(one).lower() if isinstance(one, bool) else one}" for key, one in pairs)
    if isinstance(value, list | tuple) and all(isinstance(one, str) for one in value):
        return tuple(value)
    raise ValueError("write KEY=VALUE texts, or a table")


def split_option(text: str) -> tuple[str | None, str, str]:
    """``embed.machine_type=x`` as (stage or None, key, value).

    Raises:
        ValueError: it is not KEY=VALUE, or STAGE.KEY=VALUE with a stage there is.
    """
    match = _OPTION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not KEY=VALUE, as parallelism=8, or STAGE.KEY=VALUE for one stage")
    stage, key, value = match.groups()
    if stage is not None and stage not in STAGES:
        raise ValueError(f"{text!r}: there is no stage {stage!r}; the stages are {', '.join(STAGES)}")
    return stage, key.replace("-", "_"), value


def read_config_file(path: Path) -> dict[str, Any]:
    """The settings of a TOML file: flags' names, with ``-`` or ``_``.

    Raises:
        InputError: it is missing, or not TOML.
    """
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise InputError(f"cannot read the config file {path}: {error.strerror or error}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"the config file {path} is not valid TOML: {error}.") from error
    settings = {key.replace("-", "_"): value for key, value in table.items()}
    if len(settings) < len(table):
        raise InputError(f"the config file {path} says a setting twice, with - and with _.")
    return settings


def make_config(file_settings: dict[str, Any], flags: dict[str, Any]) -> tuple[BuildConfig, RunSettings]:
    """Settings from a config file and from flags; flags win.

    Raises:
        InputError: the file holds a setting that does not exist or is out of range.
        UsageError: a flag is out of range.
    """
    names = ["no_text", *BuildConfig.model_fields, *RunSettings.model_fields]
    names.remove("text")
    unknown = sorted(set(file_settings) - set(names))
    if unknown:
        known = ", ".join(name.replace("_", "-") for name in names)
        raise InputError(f"the config file holds unknown settings {unknown}. Known: {known}.")
    for name, value in file_settings.items():
        if isinstance(value, bool) != (name in _SWITCHES):
            takes = "takes true or false alone" if name in _SWITCHES else "does not take true or false"
            raise InputError(f"the config file says {name.replace('_', '-')} = {value!r}; this setting {takes}.")
    file_settings = {name: value for name, value in file_settings.items() if _OVERRIDES.get(name) not in flags}
    if isinstance(flags.get("runner_option"), list | tuple) and "runner_option" in file_settings:
        flags = {**flags, "runner_option": _merged_options(file_settings["runner_option"], flags["runner_option"])}
    try:
        config, run = _validated({**file_settings, **flags})
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors() if item["type"] != "default_factory_not_called"]
        raise (UsageError if _is_wrong_alone(flags) else InputError)("; ".join(lines) + ".") from error
    if run.until is not None and run.until not in stages_of(config.unit):
        raise UsageError(
            f"--until {run.until}: a database of {config.unit}s has no such stage; its stages are "
            f"{', '.join(stages_of(config.unit))}."
        )
    return config, run


def _merged_options(of_file: Any, of_flags: Any) -> list[str]:
    """A flag's option replaces the file's of the same name, and leaves its others."""
    try:
        given = {split_option(text)[:2] for text in of_flags}
        return [*(text for text in _option_texts(of_file) if split_option(text)[:2] not in given), *of_flags]
    except ValueError:
        return list(of_flags)  # pydantic will say what is wrong


def _is_wrong_alone(flags: dict[str, Any]) -> bool:
    """Whether the flags, without the file, are refused as well."""
    try:
        _validated(flags)
    except ValidationError:
        return True
    return False


def _validated(settings: dict[str, Any]) -> tuple[BuildConfig, RunSettings]:
    merged = dict(settings)
    run_names = set(RunSettings.model_fields)
    if (no_text := merged.pop("no_text", None)) is not None:
        merged["text"] = not no_text
    run = RunSettings(**{name: value for name, value in merged.items() if name in run_names})
    return BuildConfig(**{name: value for name, value in merged.items() if name not in run_names}), run


def _explain(item: Any) -> str:
    name = ".".join(str(part).replace("_", "-") for part in item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    given = item["input"]
    shown = given if isinstance(given, str) and re.fullmatch(r"\S+", given) else repr(given)
    return f"--{name} {shown}: {message}" if name else message
