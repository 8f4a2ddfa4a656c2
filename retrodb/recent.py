"""What was loaded last, kept up to so many bytes."""

import inspect
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Kept = TypeVar("Kept")


class Recent(Generic[Kept]):
    """Loads by number, and keeps what was used last; at least one.

    Args:
        load: makes what a number stands for. A method is not kept alive: the object that it is of holds this one, and
            the circle would keep both, and the version that they read, until Python's collector comes by.
        size: its bytes.
        budget: bound on the bytes kept.
    """

    def __init__(self, load: Callable[[int], Kept], size: Callable[[Kept], int], budget: int) -> None:
        self._load = weakref.WeakMethod(load) if inspect.ismethod(load) else lambda: load
        self._size = size
        self._budget = budget
        self._kept: OrderedDict[int, Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, number: int) -> bool:
        """Whether it is here, and need not be loaded."""
        return number in self._kept

    def get(self, number: int) -> Kept:
        """What ``number`` stands for, loaded if it is not here any more. Raises what ``load`` does."""
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        load = self._load()
        assert load is not None, "whoever asks holds the object"
        self._kept[number] = load(number)
        while len(self._kept) > 1 and sum(map(self._size, self._kept.values())) > self._budget:
            self._kept.popitem(last=False)
        return self._kept[number]
