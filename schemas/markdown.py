"""The schemas as Markdown, for ``docs/tables.md``: ``python -m retrodb.schemas.markdown``."""

import sys

import pyarrow as pa

from retrodb import schemas

_TITLES = {
    "documents": schemas.documents(),
    "chunks": schemas.chunks(64, "uint16"),
    "chunks of blocks": schemas.blocks(288, "uint16"),
    "block_duplicates": schemas.block_duplicates(),
    "neighbours": schemas.neighbours(20, ranked=True),
    "training": schemas.training(2048, 64, 2, "uint16"),
    "leakage": schemas.leakage(),
    "spans": schemas.spans(),
    "queries": schemas.queries(96, 10, "uint16"),
    "span_quarantine": schemas.span_quarantine(),
    "quarantine": schemas.quarantine(),
    "duplicates": schemas.duplicates(),
    "deleted": schemas.deleted(),
}


def markdown() -> str:
    """One section a table: its description, columns, types."""
    lines = [
        "# The tables, column by column",
        "",
        f"Schema version {schemas.SCHEMA_VERSION}, defaults: m = 64, n = 2048, k = 20, k' = 2, GPT-2.",
        "This page is made from `schemas/` by `python -m retrodb.schemas.markdown`; a test keeps it so.",
        "",
        "Ids are int64 `shard << 32 | row`. Missing values are null elements, never null lists. Padded token slots",
        "hold 0 and are told by the length columns alone. `embeddings/*.npy` are float16 `[rows, d]`; row i belongs",
        "to row i of the chunk shard of the same number. `index/*.faiss` are faiss indexes over chunk ids. A database",
        "of blocks has the vector of the null document in `null/00000.npy`, float16 `[1, d]`; its id among candidates",
        "is 9223372036854775807, which is no row's.",
        "After `retrodb compact` a shard holds the rows that are left, under the ids they had: there are gaps in its",
        "ids, which ascend as before, and a row is found by its id column, not by its place. Row i of `embeddings`",
        "still belongs to row i of `chunks`, and rows of `neighbours` and `leakage` likewise; `sequence_id` counts the",
        "rows of a training shard that is packed anew. Until then what is deleted is named by `deleted` alone.",
        "`manifest.json` lists every shard with its path, rows, bytes and sha256; what it does not list does not",
        "exist.",
    ]
    for name, schema in _TITLES.items():
        lines += ["", f"## {name}", "", "| column | type | |", "|---|---|---|"]
        lines += [f"| `{field.name}` | {_type(field.type)} | {_description(field)} |" for field in schema]
    return "\n".join(lines) + "\n"


def _type(kind: pa.DataType) -> str:
    if pa.types.is_fixed_size_list(kind):
        return f"fixed_size_list<{kind.value_type}>[{kind.list_size}]"
    return str(kind)


def _description(field: pa.Field) -> str:
    return field.metadata[b"description"].decode().replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(markdown())
