"""Where and in which precision a model is computed."""

import contextlib
from dataclasses import dataclass

import torch

from retrodb.encoding import choose_device, cpu_precision, cuda_precision
from retrodb.errors import InputError


@dataclass(frozen=True)
class Device:
    """A device and ``fp32`` or ``bf16``. Weights, optimiser and losses stay float32 in either."""

    name: str
    precision: str

    @staticmethod
    def choose(device: str = "auto", precision: str = "auto") -> "Device":
        """A device by name; ``auto`` is bf16 where that is native: such CUDA cards, CPUs with AMX or AVX512-BF16.

        Raises:
            InputError: there is no such device, or it has no bf16 of its own and bf16 was asked for.
        """
        name = choose_device(device)
        native = (cuda_precision() if name.startswith("cuda") else cpu_precision()) == "bf16"
        if precision == "bf16" and not native:
            raise InputError(f"--precision bf16: the device {name} has none of its own, and would be slower. Use fp32.")
        return Device(name, "bf16" if native and precision == "auto" else precision.replace("auto", "fp32"))

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The context in which a model is run forward."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        kind: contextlib.AbstractContextManager[None] = torch.autocast(self.name.split(":")[0], dtype=torch.bfloat16)
        return kind
