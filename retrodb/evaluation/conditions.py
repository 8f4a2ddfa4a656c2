"""Which neighbours a model is given: none, the first k, the neighbours or their continuations alone, random ones."""

from collections.abc import Sequence
from dataclasses import dataclass

from retrodb.model.batch import Batch


@dataclass(frozen=True)
class Condition:
    """One way to evaluate a model.

    Attributes:
        k: neighbours of each chunk.
        retrieved: whether N is seen.
        continuations: whether F is.
        random: whether the neighbours are the control's, drawn at random from other documents.
    """

    k: int
    retrieved: bool = True
    continuations: bool = True
    random: bool = False

    @property
    def name(self) -> str:
        """As ``off``, ``k=2``, ``k=2, N only``, ``k=2, random``."""
        if not self.k:
            return "off"
        parts = [f"k={self.k}"]
        if not self.continuations:
            parts.append("N only")
        if not self.retrieved:
            parts.append("F only")
        if self.random:
            parts.append("random")
        return ", ".join(parts)

    def of(self, rows: Batch, control: Batch) -> Batch:
        """The rows as the model sees them; ``control`` are the same rows with random neighbours."""
        chosen = control if self.random else rows
        return chosen.with_neighbours(self.k, retrieved=self.retrieved, continuations=self.continuations)


def conditions(neighbours: Sequence[int], trained: int) -> list[Condition]:
    """Off first; then each k; then N only, F only and random neighbours with the k' of the training rows."""
    found = [Condition(0), *(Condition(k) for k in sorted(set(neighbours)) if k)]
    if Condition(trained) not in found:
        found.append(Condition(trained))
    parts = [{"continuations": False}, {"retrieved": False}, {"random": True}]
    return [*found, *(Condition(trained, **part) for part in parts)]
