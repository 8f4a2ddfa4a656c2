"""What a build tells whoever watches it. The command line draws it; a program may listen or be silent."""

from typing import Protocol


class Progress(Protocol):
    """Called by the driver, on its own thread; `note` from other threads, too."""

    def begin(self, stage: str, total: int, done: int, unit: str) -> None:
        """A stage starts: ``total`` units of weight (bytes or chunks), of which ``done`` are there already."""

    def advance(self, done: int) -> None:
        """So many units of the running stage are done."""

    def end(self, summary: str) -> None:
        """The running stage is done."""

    def note(self, text: str) -> None:
        """Something worth a line."""


class Silent:
    """No display."""

    def begin(self, stage: str, total: int, done: int, unit: str) -> None:
        pass

    def advance(self, done: int) -> None:
        pass

    def end(self, summary: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass
