"""Token rows side by side: ``[CLS] a [SEP] b [SEP]`` for whole batches at once, without a loop over rows."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Texts:
    """A batch of texts as token ids without special tokens.

    Attributes:
        ids: int64 [n, L], padded with anything.
        lengths: int64 [n], valid ones.
    """

    ids: torch.Tensor
    lengths: torch.Tensor

    @property
    def valid(self) -> torch.Tensor:
        """bool [n, L]."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]

    def repeated(self, times: int) -> "Texts":
        """Each row ``times`` times, one after the other: [n * times, L]."""
        return Texts(self.ids.repeat_interleave(times, 0), self.lengths.repeat_interleave(times, 0))

    @staticmethod
    def of(rows: list[list[int]]) -> "Texts":
        """From lists of token ids."""
        width = max((len(row) for row in rows), default=0)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        for at, row in enumerate(rows):
            ids[at, : len(row)] = torch.tensor(row, dtype=torch.int64)
        return Texts(ids, torch.tensor([len(row) for row in rows], dtype=torch.int64))

    @staticmethod
    def empty(n: int, device: torch.device | str = "cpu") -> "Texts":
        """``n`` texts of no token."""
        return Texts(torch.zeros(n, 0, dtype=torch.int64, device=device), torch.zeros(n, dtype=torch.int64).to(device))


@dataclass(frozen=True)
class Packed:
    """What a BERT reads.

    Attributes:
        ids: int64 [n, T], padded with 0.
        types: int64 [n, T]: 1 for the second text and what follows it.
        mask: int64 [n, T]: 1 for valid positions.
        second: int64 [n]: where the second text begins.
    """

    ids: torch.Tensor
    types: torch.Tensor
    mask: torch.Tensor
    second: torch.Tensor


def pack(first: Texts, second: Texts | None, cls: int, sep: int) -> Packed:
    """``[CLS] first [SEP]``, or ``[CLS] first [SEP] second [SEP]``; two empty ones are the null document's
    ``[CLS] [SEP] [SEP]``."""
    n, device = len(first.lengths), first.ids.device
    after = first.lengths + 2
    totals = after if second is None else after + second.lengths + 1
    width = int(totals.max()) if n else 0
    ids = torch.zeros(n, width, dtype=torch.int64, device=device)
    rows = torch.arange(n, device=device)
    ids[:, 0] = cls
    _write(ids, first, torch.ones_like(after))
    ids[rows, first.lengths + 1] = sep
    places = torch.arange(width, device=device)
    types = torch.zeros_like(ids)
    if second is not None:
        _write(ids, second, after)
        ids[rows, totals - 1] = sep
        types = ((places >= after[:, None]) & (places < totals[:, None])).long()
    return Packed(ids, types, (places < totals[:, None]).long(), after)


def _write(ids: torch.Tensor, texts: Texts, start: torch.Tensor) -> None:
    rows, columns = texts.valid.nonzero(as_tuple=True)
    ids[rows, start[rows] + columns] = texts.ids[rows, columns]
