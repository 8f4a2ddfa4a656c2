"""A small database for export tests, and its rows as plain Python: what every export is compared with."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from support import build_here, rows_of, write_jsonl

from retrodb.chunking.tokenizer import ChunkTokenizer, load_gpt2
from retrodb.corpus.quickstart import quickstart_lines

M, N, K = 16, 128, 6
S = N // M


@functools.cache
def gpt2() -> ChunkTokenizer:
    return load_gpt2()


def exact_text(text: str, tokens: int) -> str:
    """The beginning of a text that has just so many tokens."""
    tokenizer = gpt2()
    return next(
        text[:cut] for cut in range(2 * tokens, len(text)) if len(next(tokenizer.tokenize([text[:cut]])).ids) == tokens
    )


def build_small(folder: Path, encoder: Path) -> Path:
    """Documents that end within a chunk, with a full chunk, and with a full sequence; "!" is token 0 of GPT-2."""
    texts = [json.loads(line)["text"] for line in quickstart_lines() if len(line) > 2_000]
    sizes = (1, 15, M, M + 1, 3 * M, N, N + M, 2 * N, 2 * N - 1, 77, 101, 2 * M, 130, 5, 40, 333)
    records = [{"id": f"d{i}", "text": exact_text(texts[i], size)} for i, size in enumerate(sizes)]
    records.append({"id": "zero", "text": "Wow! Oh! " + exact_text(texts[20], 30)})
    held_out = [{"id": f"v{i}", "text": exact_text(texts[30 + i], size)} for i, size in enumerate((3 * M, 50, N, 200))]
    build_here(
        [write_jsonl(folder / "train.jsonl", records)],
        folder / "db",
        encoder=str(encoder),
        validation=[str(write_jsonl(folder / "held.jsonl", held_out))],
        chunk_tokens=M,
        sequence_tokens=N,
        neighbours=K,
        shard_bytes="4KiB",
    )
    return folder / "db"


@dataclass(frozen=True)
class Known:
    """A database's rows: documents' chunks in order by split, tokens, neighbours."""

    tokens: dict[int, list[int]]
    document: dict[int, int]
    neighbours: dict[int, list[int]]
    documents: dict[str, list[list[int]]]

    def continuation(self, chunk: int) -> list[int]:
        """Tokens of the chunk that follows in its document; none behind the last."""
        return self.tokens[chunk + 1] if self.document.get(chunk + 1) == self.document[chunk] else []


def known(database: Path) -> Known:
    split = {row["document_id"]: row["split"] for row in rows_of(database, "documents")}
    chunks = rows_of(database, "chunks")
    documents: dict[int, list[int]] = {}
    for row in chunks:
        documents.setdefault(row["document_id"], []).append(row["chunk_id"])
    by_split: dict[str, list[list[int]]] = {"train": [], "validation": []}
    for document, ids in documents.items():
        by_split[split[document]].append(ids)
    return Known(
        {row["chunk_id"]: row["tokens"][: row["n_tokens"]] for row in chunks},
        {row["chunk_id"]: row["document_id"] for row in chunks},
        {
            row["chunk_id"]: [neighbour for neighbour in row["neighbour_ids"] if neighbour is not None]
            for row in rows_of(database, "neighbours")
        },
        by_split,
    )
