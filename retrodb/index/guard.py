"""Before faiss reads a file: is it one of the few kinds that retrodb writes?

faiss reads whatever the file says it is. Inverted lists "on disk" name another file by its path, which faiss opens and
maps; other kinds hold indexes within indexes. What a database may hold is one short grammar of faiss' own type marks,
and anything else is refused before it is acted upon (invariant 10). A vector is never longer than its file.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import IO, Any, Final

import faiss

from retrodb.errors import DamagedError
from retrodb.index.engine import untyped

_MARK: Final = re.compile(rb"[A-Za-z0-9]{4}")
_EXACT: Final = b"IxMp IxSQ"
_KINDS: Final = re.compile(rb"(IxPT LTra )?(IwFl|IwPQ|IwSq|Iwrq)( IHNf)? (IxF2|IxFI) ilar")
_LONGEST: Final = 8
_BLOCK: Final = 1 << 20
_FLAGS: Final = faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE


def refuse_foreign(file: IO[bytes], where: str) -> None:
    """Refuse a faiss file of a kind that no database holds. Reads it as far as its inverted lists or codes.

    Args:
        file: the faiss file, at its start.
        where: its name, for messages.

    Raises:
        DamagedError: it is of another kind, or is none.
    """
    marks: list[bytes] = []

    def read(wanted: int) -> bytes:
        if marks and (marks[-1] in (b"ilar", b"IxSQ") or len(marks) > _LONGEST):
            return b""  # enough is known: faiss gives up here
        block = file.read(wanted)
        if wanted == 4 and _MARK.fullmatch(block):  # faiss reads a type mark, and few other things, as four bytes
            marks.append(block)
        return block

    with contextlib.suppress(RuntimeError, MemoryError):
        untyped.read_index(untyped.PyCallbackIOReader(read, _BLOCK), _FLAGS)
    found = b" ".join(marks)
    if found != _EXACT and not _KINDS.fullmatch(found):
        kind = found.decode() or "no faiss index"
        raise DamagedError(f"{where} is no index that retrodb writes ({kind}): refused. Run the build again.")


@contextlib.contextmanager
def vectors_within(limit: int) -> Iterator[Any]:
    """faiss allocates at most ``limit`` bytes for one vector it reads, however long a file says it is."""
    before = untyped.get_deserialization_vector_byte_limit()
    untyped.set_deserialization_vector_byte_limit(max(limit, 1))
    try:
        yield
    finally:
        untyped.set_deserialization_vector_byte_limit(before)
