"""How an encoder reads a title with a body: ``[CLS] title [SEP] body [SEP]``, by token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from retrodb.errors import InputError


@dataclass(frozen=True)
class PairTemplate:
    """The special tokens around two texts, as the encoder's own ``tokenizer.json`` puts them.

    Attributes:
        prefix, middle, suffix: token ids before the first text, between the two, and after the second.
        typed: whether the second text, and what follows it, has token type 1; else all have type 0.
    """

    prefix: tuple[int, ...]
    middle: tuple[int, ...]
    suffix: tuple[int, ...]
    typed: bool

    @property
    def special_tokens(self) -> int:
        """How many special tokens a pair has: 3 for a BERT."""
        return len(self.prefix) + len(self.middle) + len(self.suffix)

    def wrap(self, title: Sequence[int], body: Sequence[int] | np.ndarray) -> list[int]:
        """The token ids of a pair; of two empty ones, the null document's: ``[CLS] [SEP] [SEP]``."""
        return [*self.prefix, *map(int, title), *self.middle, *map(int, body), *self.suffix]

    def second(self, title: Sequence[int]) -> int:
        """Where the second text begins."""
        return len(self.prefix) + len(title) + len(self.middle)

    @staticmethod
    def load(transformer: Path) -> "PairTemplate":
        """Of an encoder's ``tokenizer.json``.

        Args:
            transformer: the folder it lies in.

        Raises:
            InputError: there is none, or it does not say how two texts are put together.
        """
        path = transformer / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_buffer(path.read_bytes())
        except FileNotFoundError as error:
            raise InputError(
                f"blocks need the encoder's own tokenizer, and {transformer} has no tokenizer.json."
            ) from error
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(f"{path} is not a tokenizer.json ({error}).") from error
        return _template(tokenizer, str(path))


def _template(tokenizer: Tokenizer, where: str) -> PairTemplate:
    tokenizer.no_padding()
    tokenizer.no_truncation()
    found = tokenizer.encode("a", "a")
    ids, types = np.array(found.ids), np.array(found.type_ids)
    of = np.array([-1 if sequence is None else sequence for sequence in found.sequence_ids])
    first, second = np.flatnonzero(of == 0), np.flatnonzero(of == 1)
    if not len(first) or not len(second) or first[-1] > second[0]:
        raise InputError(f"{where} does not say how a title is put before a text.")
    typed = bool(types.any())
    if typed and not np.array_equal(types, np.arange(len(ids)) >= second[0]):
        raise InputError(f"{where} gives the two texts of a pair token types other than 0 and 1: not supported.")
    prefix, middle, suffix = (
        tuple(part.tolist()) for part in (ids[: first[0]], ids[first[-1] + 1 : second[0]], ids[second[-1] + 1 :])
    )
    return PairTemplate(prefix, middle, suffix, typed)
