"""CUDA cards: how many this machine has, and one for each worker process. Asks torch only where there is a driver."""

import fcntl
import os
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Final

from retrodb.errors import InputError

_DRIVERS: Final = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""One of them is there where a card might be; the last under Windows."""
_held: list[int] = []
"""Open lock files: closed, and so given back, when the process ends."""


def choose_device(device: str) -> str:
    """``cuda`` or ``cpu`` for ``auto``.

    Raises:
        InputError: cuda was asked for and there is none (never silently the CPU); or something else was.
    """
    if device not in ("auto", "cpu", "cuda") and not device.startswith("cuda:"):
        raise InputError(f"--device {device}: there is auto, cpu and cuda.")
    if device == "cpu" or (device == "auto" and not _has_driver()):
        return "cpu"
    import torch  # noqa: PLC0415 - a second, which a machine without a card need not spend

    available = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if available else "cpu"
    if not available:
        raise InputError(
            f"--device {device} was asked for, but torch {torch.__version__} sees no CUDA device here. "
            "Use --device cpu, or repair the driver."
        )
    return device


def _has_driver() -> bool:
    """Whether to ask torch: that costs nothing where it is imported already, as in a worker that embeds."""
    return "torch" in sys.modules or any(path.exists() for path in _DRIVERS)


def count_cards() -> int:
    """CUDA cards that torch sees; 0 without a driver."""
    if not _has_driver():
        return 0
    import torch  # noqa: PLC0415 - as above

    return int(torch.cuda.device_count())


def cuda_precision() -> str:
    """bf16 where the card multiplies it natively, else fp16."""
    import torch  # noqa: PLC0415 - as above

    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def own_device(device: str) -> str:
    """The device that this worker process computes on: of several cards one that no other worker holds.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``; ``cuda:1`` is that card.

    Raises:
        InputError: as in `choose_device`.
    """
    chosen = choose_device(device)
    return f"cuda:{_own_card()}" if chosen == "cuda" else chosen


@lru_cache(maxsize=1)
def _own_card() -> int:
    """The number of a card, held until this process ends; a shared one where there are more workers than cards."""
    count = count_cards()
    for number in range(count) if count > 1 else ():
        if _hold(_lock_name(number)):
            return number
    return os.getpid() % max(count, 1)


def _lock_name(number: int) -> str:
    """By the card's own id: processes may see cards under different numbers (``CUDA_VISIBLE_DEVICES``)."""
    import torch  # noqa: PLC0415 - as above

    return str(getattr(torch.cuda.get_device_properties(number), "uuid", number))


def _hold(name: str) -> bool:
    """Lock a card, as the kernel does it: however a process ends, its lock ends with it."""
    folder = Path(tempfile.gettempdir()) / f"retrodb-cards-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return False
    _held.append(lock)
    return True
