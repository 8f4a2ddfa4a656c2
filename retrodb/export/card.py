"""The dataset card of a Hugging Face export: the metadata that tells ``datasets`` which files are which, and a page."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
from huggingface_hub import DatasetCard, DatasetCardData

from retrodb._version import __version__
from retrodb.database import Database

CARD_NAME: Final = "README.md"
_SIZES: Final = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")
_LARGER: Final = ("10B<n<100B", "100B<n<1T", "n>1T")
"""The Hub's size categories, by powers of ten from 1,000 on."""
_WHAT: Final = {
    "training": "sequences to train on: each chunk with its neighbours and their continuations, as RETRO joins them",
    "documents": "the documents",
    "chunks": "the documents cut into chunks",
    "neighbours": "the nearest chunks of each chunk in other documents, best first",
}


@dataclass(frozen=True)
class TableFiles:
    """A table that was written: its rows by split, and its columns."""

    table: str
    rows: dict[str, int]
    schema: pa.Schema

    @property
    def splits(self) -> list[str]:
        """Those that have files."""
        return [split for split, rows in self.rows.items() if rows]


def dataset_card(database: Database, files: list[TableFiles], title: str, licence: str | None) -> DatasetCard:
    """The card. Its first table is the default configuration."""
    configs: list[dict[str, Any]] = [
        {
            "config_name": made.table,
            "data_files": [{"split": split, "path": f"{made.table}/{split}-*.parquet"} for split in made.splits],
        }
        for made in files
    ]
    configs[0]["default"] = True
    about = DatasetCardData(
        pretty_name=title,
        license=licence,
        task_categories=["text-generation"],
        size_categories=[_size(max(sum(made.rows.values()) for made in files))],
        tags=["retrieval", "RETRO", "retrodb"],
        configs=configs,
    )
    return DatasetCard(f"---\n{about.to_yaml()}\n---\n\n{_page(database, files, title)}")


def _page(database: Database, files: list[TableFiles], title: str) -> str:
    config, fingerprints = database.manifest.config, database.manifest.fingerprints
    recall = database.summary()["neighbours"]["recall_at_10"]
    made_from = [
        ("chunk", f"{config['chunk_tokens']} tokens"),
        ("sequence", f"{config['sequence_tokens']} tokens"),
        ("tokenizer", _identity(fingerprints["tokenizer"])),
        ("encoder", _identity(fingerprints["encoder"])),
        ("metric", "squared L2" if config["metric"] == "l2" else "inner product"),
        ("neighbours kept", str(config["neighbours"])),
        ("never a neighbour", f"a chunk of the same {config['exclude']}" if config["exclude"] != "none" else "itself"),
        ("recall@10 of the search", f"{recall:.4f}" if recall is not None else "not measured"),
        ("made by", f"retrodb {__version__}"),
    ]
    lines = [
        f"# {title}",
        "",
        "A retrieval database for language models (RETRO, [Borgeaud et al. 2022](https://arxiv.org/abs/2112.04426)).",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        'sequences = load_dataset("path/to/this", "training", split="train")',
        "```",
        "",
        *_table(("table", "train", "validation", ""), [_counted(made) for made in files]),
        "",
        "Validation documents are queries and never neighbours. Token ids are the tokenizer's; padded slots hold 0 and",
        "are told by the length columns alone. A missing neighbour is a null element. Ids join across the tables;",
        "`chunk_id` + 1 is a chunk's continuation if it exists and has the same `document_id`.",
        "",
        "## How it was made",
        "",
        *_table(("", ""), made_from),
    ]
    for made in files:
        lines += ["", f"## {made.table}", "", *_table(("column", "type", ""), _columns(made.schema))]
    return "\n".join(lines) + "\n"


def _identity(recorded: dict[str, Any]) -> str:
    # An encoder or tokenizer may have been a folder of the machine that built this: its last part says enough.
    name = str(recorded["name"]).rstrip("/").rsplit("/", 1)[-1]
    return f"{name}, fingerprint `{recorded['fingerprint'][:16]}`"


def _counted(made: TableFiles) -> tuple[str, ...]:
    return f"`{made.table}`", f"{made.rows['train']:,}", f"{made.rows['validation']:,}", _WHAT[made.table]


def _columns(schema: pa.Schema) -> list[tuple[str, ...]]:
    return [
        (f"`{column.name}`", str(column.type).replace("element: ", "").replace("item: ", ""), _description(column))
        for column in schema
    ]


def _description(column: pa.Field) -> str:
    return (column.metadata or {}).get(b"description", b"").decode()


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [head, tuple("---" for _ in head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in cells]


def _size(rows: int) -> str:
    names = (*_SIZES, *_LARGER)
    return names[min(max(len(str(rows)) - 3, 0), len(names) - 1)]
