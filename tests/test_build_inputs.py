"""From files to chunks: every container gives the same, bad records are counted, tiny corpora just work."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import (
    build_here,
    corpus,
    digests,
    manifest_of,
    retrodb,
    rows_of,
    strays,
    vectors_of,
    write_bytes,
    write_jsonl,
)

from retrodb.corpus.quickstart import quickstart_lines

pytestmark = pytest.mark.slow

RECORDS: list[dict[str, Any]] = [
    *[record for record in map(json.loads, quickstart_lines()) if len(record["text"]) < 3_000][:6],
    {"id": "unicode", "title": "Ünïcode 🥊", "text": "日本語 🥊 ẞ \u2028 \x85 \r\n tab\t nul\x00 end " * 20},
]
PREFIX = "A sentence with several words in it, and then another one. "


def documents_and_chunks(database: Path) -> list[tuple[Any, ...]]:
    """What was read and how it was cut, whatever the files and shards were."""
    documents = {row["document_id"]: row for row in rows_of(database, "documents")}
    found: dict[int, list[Any]] = {key: [] for key in documents}
    for row in rows_of(database, "chunks"):
        found[row["document_id"]].append((row["position"], row["tokens"], row["n_tokens"], row["start"], row["end"]))
    rows = (
        (row["key"], row["title"], row["text"], row["n_chunks"], row["content_hash"], found[key])
        for key, row in documents.items()
    )
    return sorted(rows, key=lambda row: row[0])


def counts(database: Path) -> dict[str, Any]:
    found = retrodb("info", database, "--json").json["documents"]
    assert found["in"] == found["kept"] + sum(found["dropped"].values()) + found["quarantined"]
    quarantined = rows_of(database, "quarantine") if manifest_of(database)["tables"]["quarantine"]["shards"] else []
    assert len(quarantined) == found["quarantined"]
    assert len(rows_of(database, "documents")) == found["kept"]
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> list[tuple[Any, ...]]:
    folder = tmp_path_factory.mktemp("plain")
    build_here([write_jsonl(folder / "a.jsonl", RECORDS)], folder / "db", until="chunk")
    assert len(rows_of(folder / "db", "chunks")) > len(RECORDS)
    return documents_and_chunks(folder / "db")


# -- containers ------------------------------------------------------------------------------------------------------


def write_parquet(path: Path, records: list[dict[str, Any]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(records), path, **options)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.ndjson", "a.json.gz"])
@pytest.mark.parametrize("shard_bytes", ["2KiB", "1MiB"])
def test_jsonl_gives_the_same_documents_and_chunks_however_compressed_and_cut(tmp_path, expected, name, shard_bytes):
    source = write_jsonl(tmp_path / name, RECORDS)
    build_here([source], tmp_path / "db", until="chunk", shard_bytes=shard_bytes)
    assert documents_and_chunks(tmp_path / "db") == expected
    assert len(manifest_of(tmp_path / "db")["tables"]["chunks"]["shards"]) > (1 if shard_bytes == "2KiB" else 0)


@pytest.mark.parametrize("compression", ["none", "gz", "zst"])
@pytest.mark.parametrize("row_group_size", [1, 100])
def test_parquet_gives_the_same_documents_and_chunks(tmp_path, expected, compression, row_group_size):
    plain = write_parquet(tmp_path / "a.parquet", RECORDS, row_group_size=row_group_size)
    source = (
        plain
        if compression == "none"
        else write_bytes(tmp_path / "in" / f"a.parquet.{compression}", plain.read_bytes())
    )
    build_here([source], tmp_path / "db", until="chunk", shard_bytes="2KiB")
    assert documents_and_chunks(tmp_path / "db") == expected


def test_mixed_containers_in_a_folder_give_the_same_documents_and_chunks(tmp_path, expected):
    write_jsonl(tmp_path / "in" / "z.jsonl.gz", RECORDS[:2])
    write_parquet(tmp_path / "in" / "deep" / "er" / "b.parquet", RECORDS[2:4])
    write_jsonl(tmp_path / "in" / "c.jsonl.zst", RECORDS[4:])
    (tmp_path / "in" / "readme.rst").write_text("not a corpus")
    (tmp_path / "in" / ".hidden.jsonl").write_text('{"text": "hidden"}')
    build_here([tmp_path / "in"], tmp_path / "db", until="chunk")
    assert documents_and_chunks(tmp_path / "db") == expected


def test_a_glob_names_what_it_matches(tmp_path, expected):
    write_jsonl(tmp_path / "in" / "a1.jsonl", RECORDS[:3])
    write_jsonl(tmp_path / "in" / "a2.jsonl", RECORDS[3:])
    write_jsonl(tmp_path / "in" / "b.jsonl", [{"id": "other", "text": "not matched"}])
    build_here([tmp_path / "in" / "a*.jsonl"], tmp_path / "db", until="chunk")
    assert documents_and_chunks(tmp_path / "db") == expected


@pytest.mark.parametrize("ending", ["txt", "md", "txt.gz", "txt.zst"])
def test_a_text_file_is_one_document(tmp_path, ending):
    text = RECORDS[0]["text"] + "\n\n" + "日本語\n"
    source = write_bytes(tmp_path / f"a.{ending}", text.encode())
    build_here([source], tmp_path / "db", until="chunk", shard_bytes="1KiB")
    rows = rows_of(tmp_path / "db", "documents")
    assert [(row["text"], row["key"], row["source"]) for row in rows] == [(text, f"{source}#0", str(source))]


def test_the_order_of_inputs_and_naming_one_twice_change_no_byte(tmp_path, tiny_encoder):
    a = write_jsonl(tmp_path / "a.jsonl", RECORDS[:3])
    b = write_jsonl(tmp_path / "b.jsonl.gz", RECORDS[3:])
    settings = {"encoder": str(tiny_encoder), "shard_bytes": "2KiB"}
    build_here([a, b], tmp_path / "one", **settings)
    build_here([b, a, tmp_path / "*.jsonl", a], tmp_path / "two", **settings)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_a_database_inside_an_input_folder_does_not_read_itself(tmp_path):
    source = write_jsonl(tmp_path / "in" / "a.jsonl", RECORDS)
    out = tmp_path / "in" / "db"
    for _ in range(2):
        ran = retrodb("build", tmp_path / "in", "--out", out, "--until", "chunk", "--json")
        assert ran.code == 0, ran.err
    assert ran.json["done"] == []
    assert [entry["url"] for entry in manifest_of(out)["inputs"]] == [str(source)]


def test_fields_of_other_names_are_guessed_or_named(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"key": 7, "headline": "H", "content": "guessed", "url": "u"}])
    build_here([tmp_path / "a.jsonl"], tmp_path / "guessed", until="chunk")
    row = rows_of(tmp_path / "guessed", "documents")[0]
    assert (row["key"], row["title"], row["text"]) == ("7", "H", "guessed")
    assert json.loads(row["metadata"]) == {"url": "u"}
    named = {"text_field": "url", "id_field": "headline", "title_field": "content"}
    build_here([tmp_path / "a.jsonl"], tmp_path / "named", until="chunk", **named)
    row = rows_of(tmp_path / "named", "documents")[0]
    assert (row["key"], row["title"], row["text"]) == ("H", "guessed", "u")


def test_without_text_the_chunks_and_vectors_are_the_same_and_the_text_is_gone(tmp_path, tiny_encoder):
    source = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    for name, text in (("with", True), ("without", False)):
        build_here([source], tmp_path / name, encoder=str(tiny_encoder), shard_bytes="2KiB", text=text)
    tables = ("chunks", "embeddings", "neighbours", "training", "leakage")
    assert digests(tmp_path / "with", tables) == digests(tmp_path / "without", tables)
    assert all(row["text"] is None for row in rows_of(tmp_path / "without", "documents"))
    assert retrodb("show", tmp_path / "without", 0).code == 0


# -- bad records -----------------------------------------------------------------------------------------------------

BAD_LINES = [
    b"not json",
    b'{"id": "open", "text": "never closed',
    b'{"id": "null", "text": null}',
    b'{"id": "number", "text": 5}',
    b'{"id": "list", "text": ["a"]}',
    b'{"id": "none"}',
    b'["a", "list"]',
    b'"a string"',
    b"\xff\xfe\x00bytes",
    b'{"id": "bytes", "text": "\xe2\x28\xa1"}',
    b'{"id": "half", "text": "\\ud800"}',
]


@pytest.mark.parametrize("shard_bytes", ["1KiB", "1MiB"])
def test_bad_records_are_quarantined_where_they_stand_and_the_good_ones_are_kept(tmp_path, expected, shard_bytes):
    good = [json.dumps(record).encode() for record in RECORDS]
    empties = [b'{"id": "e1", "text": ""}', b'{"id": "e2", "text": " \\n\\t\\u3000"}']
    lines = [*good[:3], *BAD_LINES, b"", b"   ", *empties, *good[3:]]
    data = b"\n".join(lines)
    source = write_bytes(tmp_path / "a.jsonl", data)
    build_here([source], tmp_path / "db", until="chunk", shard_bytes=shard_bytes)
    assert documents_and_chunks(tmp_path / "db") == expected
    found = counts(tmp_path / "db")
    assert (found["in"], found["quarantined"], found["dropped"]) == (
        len(RECORDS) + len(BAD_LINES) + 2,
        len(BAD_LINES),
        {"empty": 2},
    )
    rows = rows_of(tmp_path / "db", "quarantine")
    assert [row["record"] for row in rows] == BAD_LINES
    assert [row["position"] for row in rows] == [data.index(line) for line in BAD_LINES]
    assert all(row["source"] == str(source) and row["reason"] for row in rows)


def test_a_torn_gzip_keeps_every_record_before_the_break_and_quarantines_one(tmp_path):
    data = gzip.compress(
        b"".join(json.dumps({"id": i, "text": f"{i} {hash(i) * 7919}"}).encode() + b"\n" for i in range(2000))
    )
    (tmp_path / "a.jsonl.gz").write_bytes(data[: len(data) // 2])
    build_here([tmp_path / "a.jsonl.gz"], tmp_path / "db", until="chunk")
    found = counts(tmp_path / "db")
    assert found["quarantined"] == 1
    assert [row["key"] for row in rows_of(tmp_path / "db", "documents")] == [str(i) for i in range(found["kept"])]
    assert 500 < found["kept"] < 1500


def test_bad_rows_of_parquet_are_quarantined_by_row_number(tmp_path):
    texts = ["first text", None, "", "second text"]
    pq.write_table(pa.table({"id": ["a", "b", "c", "d"], "text": texts}), tmp_path / "a.parquet")
    build_here([tmp_path / "a.parquet"], tmp_path / "db", until="chunk")
    found = counts(tmp_path / "db")
    assert (found["kept"], found["dropped"], found["quarantined"]) == (2, {"empty": 1}, 1)
    assert [row["position"] for row in rows_of(tmp_path / "db", "quarantine")] == [1]


def test_an_unreadable_file_beside_good_ones_is_quarantined(tmp_path):
    write_jsonl(tmp_path / "in" / "a.jsonl", RECORDS)
    (tmp_path / "in" / "b.parquet").write_bytes(b"PAR1 this is no parquet PAR1")
    (tmp_path / "in" / "c.jsonl.gz").write_bytes(b"this is no gzip")
    (tmp_path / "in" / "d.jsonl").touch()
    build_here([tmp_path / "in"], tmp_path / "db", until="chunk")
    found = counts(tmp_path / "db")
    assert found["kept"] == len(RECORDS)
    assert {Path(row["source"]).name for row in rows_of(tmp_path / "db", "quarantine")} == {"b.parquet", "c.jsonl.gz"}


def test_the_dirty_corpus_is_read_to_its_end_and_counted(tmp_path):
    source = corpus("dirty")
    ran = retrodb("build", source, "--out", tmp_path / "db", "--until", "chunk", "--workers", 2, "--json")
    assert ran.code == 0, ran.err
    found = counts(tmp_path / "db")
    assert ran.json["documents"] == found
    lines = [line for line in gzip.decompress(source.read_bytes()).split(b"\n") if line.strip()]
    assert found["in"] == len(lines)
    texts: dict[str, list[str]] = {}
    for line in lines:
        record = json.loads(line)
        if isinstance(record.get("text"), str) and record["text"].strip():
            texts.setdefault(str(record["id"]), []).append(record["text"])
    kept: dict[str, list[str]] = {}
    for row in rows_of(tmp_path / "db", "documents"):
        kept.setdefault(row["key"], []).append(row["text"])
    assert {key: sorted(some) for key, some in kept.items()} == {key: sorted(some) for key, some in texts.items()}


# -- tiny corpora ----------------------------------------------------------------------------------------------------


@pytest.fixture
def build_records(tmp_path, tiny_encoder):
    """Builds records to the end; returns the database, checked for strays."""

    def build(records: list[dict[str, Any]], **settings: Any) -> Path:
        source = write_jsonl(tmp_path / "in.jsonl", records)
        build_here([source], tmp_path / "db", **{"encoder": str(tiny_encoder), **settings})
        assert strays(tmp_path / "db") == []
        return tmp_path / "db"

    return build


def assert_no_neighbour_at_all(database: Path, k: int = 20) -> None:
    for row in rows_of(database, "neighbours"):
        assert row["n_valid"] == 0
        for name in ("neighbour_ids", "neighbour_document_ids", "distances"):
            assert row[name] == [None] * k
    for row in rows_of(database, "training"):
        assert set(row["neighbour_ids"]) == {None}
        assert set(row["n_valid"]) == {0}
        assert set(row["neighbour_lengths"]) == {0}
        assert not any(row["neighbour_tokens"])


def test_one_document_of_one_word_is_a_database_by_the_command_line(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "word"}])
    ran = retrodb("build", source, "--out", tmp_path / "db", "--json")
    assert ran.code == 0, ran.err
    assert (ran.json["chunks"], ran.json["neighbours"]["recall_at_10"]) == (1, None)
    assert_no_neighbour_at_all(tmp_path / "db")
    assert retrodb("info", tmp_path / "db").code == 0
    shown = retrodb("show", tmp_path / "db", 0, "--json")
    assert shown.json["chunk"]["text"] == "word"
    assert shown.json["neighbours"] == []
    asked = retrodb("query", tmp_path / "db", "word", "--json")
    assert [hit["text"] for hit in asked.json["neighbours"]] == ["word"]
    assert asked.json["neighbours"][0]["distance"] == pytest.approx(0, abs=1e-3)


def test_one_document_of_many_chunks_has_no_neighbour_and_says_so(build_records):
    database = build_records([{"text": PREFIX * 200}])
    assert len(rows_of(database, "chunks")) > 20
    assert_no_neighbour_at_all(database)
    following = sum(row["n_tokens"] for row in rows_of(database, "training"))
    assert following == sum(row["n_tokens"] for row in rows_of(database, "chunks"))


def test_two_documents_have_each_other(build_records):
    database = build_records([{"id": "a", "text": PREFIX * 12}, {"id": "b", "text": "Something else. " * 40}])
    chunks = {row["chunk_id"]: row["document_id"] for row in rows_of(database, "chunks")}
    sizes = {document: list(chunks.values()).count(document) for document in chunks.values()}
    for row in rows_of(database, "neighbours"):
        other = next(document for document in sizes if document != chunks[row["chunk_id"]])
        assert row["n_valid"] == min(20, sizes[other])
        assert set(row["neighbour_document_ids"][: row["n_valid"]]) == {other}


def test_hundreds_of_equal_documents_have_k_neighbours_at_distance_zero_by_ascending_id(build_records):
    database = build_records([{"id": str(i), "text": PREFIX} for i in range(300)], shard_bytes="4KiB")
    assert len(manifest_of(database)["tables"]["chunks"]["shards"]) > 3
    assert len({vector.tobytes() for vector in vectors_of(database)}) == 1
    ids = [row["chunk_id"] for row in rows_of(database, "chunks")]
    for row in rows_of(database, "neighbours"):
        assert row["n_valid"] == 20
        assert row["distances"] == [0.0] * 20
        assert row["neighbour_ids"] == [other for other in ids[:21] if other != row["chunk_id"]][:20]


def test_a_long_document_of_equal_chunks_does_not_crowd_out_the_neighbours_of_others(build_records):
    """A fixed over-fetch finds nothing but the query's own document here."""
    records = [
        {"id": "long", "text": "same " * 64 * 400},
        *({"id": str(i), "text": f"other {i} " * 5} for i in range(25)),
    ]
    database = build_records(records)
    rows = [row for row in rows_of(database, "neighbours") if row["chunk_id"] < 400]
    assert all(row["n_valid"] == 20 for row in rows)


@pytest.mark.parametrize("at_once", [True, False])
def test_documents_of_every_size_around_a_chunk_are_cut_as_counted(build_records, at_once):
    sizes = range(62, 67) if not at_once else range(1, 132)
    database = build_records([{"id": str(n), "text": " word" * n} for n in sizes])
    chunks: dict[int, list[int]] = {}
    for row in rows_of(database, "chunks"):
        chunks.setdefault(row["document_id"], []).append(row["n_tokens"])
    documents = {row["document_id"]: row for row in rows_of(database, "documents")}
    for key, document in documents.items():
        n = int(document["key"])
        assert chunks[key] == [64] * (n // 64) + ([n % 64] if n % 64 else [])
        assert document["n_chunks"] == len(chunks[key])


def test_empty_texts_are_dropped_by_name_between_kept_ones(build_records):
    database = build_records(
        [{"text": ""}, {"text": "kept"}, {"text": " \n "}, {"text": "kept too"}, {"text": "\u2003"}]
    )
    found = counts(database)
    assert (found["in"], found["kept"], found["dropped"], found["quarantined"]) == (5, 2, {"empty": 3}, 0)
    assert [row["text"] for row in rows_of(database, "documents")] == ["kept", "kept too"]


def test_documents_without_an_id_are_keyed_by_source_and_position(build_records, tmp_path):
    database = build_records([{"text": "first"}, {"text": "second"}])
    keys = [row["key"] for row in rows_of(database, "documents")]
    assert keys == [f"{tmp_path}/in.jsonl#0", f"{tmp_path}/in.jsonl#{len(json.dumps({'text': 'first'})) + 1}"]


def test_equal_keys_are_documents_of_their_own(build_records):
    database = build_records([{"id": "same", "text": f"text {i}"} for i in range(3)])
    assert [row["key"] for row in rows_of(database, "documents")] == ["same"] * 3


@pytest.mark.parametrize("tokenizer", ["train:300", "encoder"])
def test_other_tokenizers_cut_the_same_text_and_are_kept_or_found_again(build_records, tokenizer):
    database = build_records(RECORDS, tokenizer=tokenizer, chunk_tokens=16, sequence_tokens=64)
    assert manifest_of(database)["fingerprints"]["tokenizer"]["name"] == tokenizer
    documents = {row["document_id"]: row["text"].encode() for row in rows_of(database, "documents")}
    at: dict[int, int] = dict.fromkeys(documents, 0)
    for row in rows_of(database, "chunks"):
        assert row["start"] >= at[row["document_id"]]
        at[row["document_id"]] = row["end"]
        assert 1 <= row["n_tokens"] <= 16
    if tokenizer != "encoder":
        assert at == {key: len(text) for key, text in documents.items()}
    assert retrodb("show", database, 0).code == 0
