"""retrodb: raw text corpora in, retrieval databases for language models out.

    import retrodb

    db = retrodb.open("my-db")              # any fsspec URL
    db.search("who wrote the first novel?", k=5)
    for row in db.training(split="train"):  # a PyTorch iterable dataset of training sequences
        ...

A *document* is cut into *chunks* of 64 tokens; a frozen *encoder* embeds each chunk; an *index* finds each chunk's
*neighbours* in other documents; and *training* rows join 2,048-token sequences with their chunks' neighbours and the
neighbours' *continuations* (Borgeaud et al. 2022, section 2).
"""

from typing import TYPE_CHECKING, Any

from retrodb._version import __version__

if TYPE_CHECKING:
    from retrodb.database import Database

__all__ = ["__version__", "open"]


def open(url: str, **options: Any) -> "Database":
    """Open a database for reading: see `retrodb.database.Database`.

    Args:
        url: a folder, or any fsspec URL of one.
        options: passed on to `Database.open`.

    Raises:
        retrodb.errors.InputError: there is no database at ``url``.
    """
    from retrodb.database import Database  # noqa: PLC0415 - keeps `import retrodb` light

    return Database.open(url, **options)
