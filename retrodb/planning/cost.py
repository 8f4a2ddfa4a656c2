"""What a build would cost on rented machines: hours of `retrodb.planning.scale` times list prices.

An estimate, never a bill: the hours are measured on other machines or cited, and the prices are data with a date.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from retrodb.planning.scale import Scale

PRICES_OF: Final = "us-central1, January 2025"
_LIST: Final = f"Google Cloud's price list of Dataflow (batch), {PRICES_OF}, as quoted publicly; not read today"


@dataclass(frozen=True)
class Price:
    """US dollars per ``unit``, and where that is from."""

    usd: float
    unit: str
    source: str = _LIST


PRICES: Final[Mapping[str, Price]] = {
    "vcpu_hour": Price(0.056, "vCPU-hour"),
    "gb_hour": Price(0.003557, "GB-hour of memory"),
    "disk_gb_hour": Price(0.000054, "GB-hour of standard disk"),
    "l4_hour": Price(0.672, "hour of an NVIDIA L4"),
    "shuffle_gb": Price(0.011, "GB shuffled"),
}
"""What Dataflow bills for batch jobs. Not in here: storage, network, the driver's own machine, discounts, taxes."""

START_HOURS: Final = 0.1
"""Of one machine for each part of a build: to start, pull a 6 GB image, and end. Assumed, not measured."""

L4_TO_A100: Final = 121 / 312
"""Peak dense bfloat16 TFLOPS of the two cards, by NVIDIA's data sheets."""

_MACHINE: Final = re.compile(r"(?P<family>[a-z]\d+[a-z]?)-(?P<kind>standard|highmem|highcpu)-(?P<cores>\d+)")
_GB_PER_CORE: Final = {"standard": 4.0, "highmem": 8.0, "highcpu": 1.0}
_GB_PER_CORE_N1: Final = {"standard": 3.75, "highmem": 6.5, "highcpu": 0.9}


@dataclass(frozen=True)
class Machine:
    """A machine type of Compute Engine: ``n2-highmem-8`` has 8 cores and 64 GB."""

    name: str
    cores: int
    memory_gb: float
    disk_gb: float = 0.0
    l4: int = 0

    @staticmethod
    def parse(name: str) -> "Machine | None":
        """From its name; None where the name does not tell."""
        found = _MACHINE.fullmatch(name)
        if found is None:
            return None
        per_core = _GB_PER_CORE_N1 if found["family"] == "n1" else _GB_PER_CORE
        return Machine(name, int(found["cores"]), int(found["cores"]) * per_core[found["kind"]])

    def usd_per_hour(self, prices: Mapping[str, Price]) -> float:
        parts = {"vcpu_hour": self.cores, "gb_hour": self.memory_gb, "disk_gb_hour": self.disk_gb, "l4_hour": self.l4}
        return sum(prices[name].usd * amount for name, amount in parts.items())


@dataclass(frozen=True)
class Effort:
    """The work of a build, by the stage that does most of it: hours of one core, hours of an A100 for embedding, and
    bytes shuffled. ``chunk`` stands for all stages but embedding and the search."""

    core_hours: Mapping[str, float]
    a100_hours: float
    shuffled_bytes: float

    @staticmethod
    def of(scale: Scale, stages: Collection[str]) -> "Effort":
        """What is left of a plan where only these stages are made."""
        hours = {
            "chunk": ("all else", set(stages) - {"embed", "neighbours"}),
            "embed": ("embedding without a GPU", set(stages) & {"embed"}),
            "neighbours": ("search", set(stages) & {"neighbours"}),
        }
        shuffles = {"neighbours", "training", "report"} & set(stages)
        return Effort(
            {stage: scale.value("time", name) for stage, (name, wanted) in hours.items() if wanted},
            scale.value("time", "embedding, A100-hours") if "embed" in stages else 0.0,
            sum(scale.value("shuffle", name) for name in scale.sections["shuffle"] if name.split(",")[0] in shuffles),
        )


@dataclass(frozen=True)
class CostPart:
    """One part of a build: machine hours and dollars."""

    name: str
    machine: str
    hours: float
    usd: float


@dataclass(frozen=True)
class Cost:
    """What a build would cost, and the prices that say so."""

    parts: tuple[CostPart, ...]
    shuffled_bytes: float
    prices: Mapping[str, Price]

    @property
    def shuffle_usd(self) -> float:
        return self.shuffled_bytes / 1e9 * self.prices["shuffle_gb"].usd

    @property
    def usd(self) -> float:
        return sum(part.usd for part in self.parts) + self.shuffle_usd

    def as_json(self) -> dict[str, Any]:
        return {
            "usd": round(self.usd, 4),
            "parts": [
                {"part": p.name, "machine": p.machine, "hours": round(p.hours, 4), "usd": round(p.usd, 4)}
                for p in self.parts
            ],
            "shuffle": {"bytes": round(self.shuffled_bytes), "usd": round(self.shuffle_usd, 4)},
            "prices": {
                name: {"usd": price.usd, "per": price.unit, "source": price.source}
                for name, price in self.prices.items()
            },
        }

    def in_words(self) -> str:
        """One line for people."""
        parts = [f"{p.name} ${p.usd:,.2f} ({p.hours:,.2f} h of {p.machine})" for p in self.parts]
        given = [name for name, price in self.prices.items() if price.source != _LIST]
        own = f"; prices given: {', '.join(given)}" if given else ""
        return (
            f"about ${self.usd:,.2f}: {', '.join(parts)}, shuffle ${self.shuffle_usd:,.2f}. "
            f"An estimate from list prices ({PRICES_OF}{own}), never measured"
        )


def estimate_cost(effort: Effort, machines: Mapping[str, Machine], prices: Mapping[str, Price]) -> Cost:
    """Hours times prices, and the start of each part.

    Args:
        effort: what is to be done.
        machines: by the stages of ``effort``; each core runs one worker process, and one card embeds.
        prices: `PRICES`, or some of them replaced.
    """
    return Cost(tuple(_parts(effort, machines, prices)), effort.shuffled_bytes, prices)


def _parts(effort: Effort, machines: Mapping[str, Machine], prices: Mapping[str, Price]) -> Iterable[CostPart]:
    for stage, core_hours in effort.core_hours.items():
        machine = machines[stage]
        on_cards = stage == "embed" and machine.l4
        hours = effort.a100_hours / L4_TO_A100 / machine.l4 if on_cards else core_hours / machine.cores
        hours += START_HOURS
        name = "other stages" if stage == "chunk" else stage
        yield CostPart(name, machine.name, hours, hours * machine.usd_per_hour(prices))


def prices_with(given: Mapping[str, float]) -> dict[str, Price]:
    """`PRICES` with some replaced by those of the user's own contract or region, in dollars."""
    return {
        name: replace(price, usd=given[name], source="given") if name in given else price
        for name, price in PRICES.items()
    }
