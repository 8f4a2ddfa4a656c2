"""Parquet input: any type of column, damage that stays where it is, rows numbered over the whole file."""

import datetime
import decimal
import gzip
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrodb.corpus import FieldNames, Plan, ShardOutput, expand_inputs, parquet, plan, read_split, scan_file
from retrodb.errors import InputError


def make_plan(path: str | Path, shard_bytes: int | None = None) -> Plan:
    return plan([scan_file(file) for file in expand_inputs([str(path)]).files], shard_bytes)


def outputs(made: Plan, **fields: str) -> list[ShardOutput]:
    return [output for split in made.splits for output in read_split(split, FieldNames(**fields))]


def rows(path: str | Path, shard_bytes: int | None = None, **fields: str) -> tuple[list[Any], list[Any]]:
    """Documents and quarantine, without what depends on the shards."""
    read = outputs(make_plan(path, shard_bytes), **fields)
    documents = [row for output in read for row in output.documents.drop_columns(["document_id"]).to_pylist()]
    return documents, [row for output in read for row in output.quarantine.to_pylist()]


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


STRINGS = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "binary": pa.binary(),
}


@pytest.mark.parametrize("kind", STRINGS.values(), ids=STRINGS.keys())
def test_the_text_may_be_any_kind_of_string(tmp_path: Path, kind: pa.DataType) -> None:
    plain = pa.array(["één", None, " ", "két"])
    text = plain.dictionary_encode() if pa.types.is_dictionary(kind) else plain.cast(kind)
    path = write(tmp_path / "a.parquet", {"text": text, "id": [1, 2, 3, 4]})
    (output,) = outputs(make_plan(path))
    assert output.documents["text"].to_pylist() == ["één", "két"]
    assert output.documents["key"].to_pylist() == ["1", "4"]
    assert output.quarantine["position"].to_pylist() == [1]
    assert output.counts == {"in": 4, "kept": 2, "validation": 0, "quarantined": 1, "dropped.empty": 1}


def test_every_type_of_column_finds_its_way_into_the_metadata(tmp_path: Path) -> None:
    at = datetime.datetime(2020, 1, 2, 3, 4, 5)
    columns = {
        "text": ["x"],
        "when": pa.array([at], pa.timestamp("ns")),
        "zoned": pa.array([at], pa.timestamp("us", "Asia/Tokyo")),
        "date": pa.array([at.date()]),
        "year_10000": pa.array([4_000_000], pa.date32()),
        "price": pa.array([decimal.Decimal("1.50")]),
        "raw": pa.array([b"\xff\0"]),
        "lasts": pa.array([1], pa.duration("ns")),
        "nan": [float("nan")],
        "nested": pa.array([{"list": [1, None], "inner": {"raw": b"a"}}]),
        "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
        "nothing": pa.nulls(1),
    }
    ((document,), quarantine) = rows(write(tmp_path / "a.parquet", columns))
    assert quarantine == []
    metadata = json.loads(document["metadata"])
    assert metadata.keys() == columns.keys() - {"text"}
    assert metadata["when"].startswith("2020-01-02 03:04:05")
    assert metadata["zoned"].startswith("2020-01-02 03:04:05")
    assert metadata["date"] == "2020-01-02"
    assert metadata["price"] == "1.50"
    assert metadata["raw"] == "/wA="
    assert metadata["nan"] is None
    assert metadata["nested"] == {"list": [1, None], "inner": {"raw": "YQ=="}}
    assert metadata["map"] == [["k", 1]]


def test_strings_that_are_not_utf8_cost_their_own_row_alone(tmp_path: Path) -> None:
    bad = pa.array([b"ok", b"\xff", b"ok"]).view(pa.string())
    documents, quarantine = rows(write(tmp_path / "a.parquet", {"text": bad}))
    assert [document["text"] for document in documents] == ["ok", "ok"]
    assert [(row["position"], "invalid UTF-8" in row["reason"]) for row in quarantine] == [(1, True)]
    documents, quarantine = rows(write(tmp_path / "b.parquet", {"text": ["a", "b", "c"], "note": bad}))
    assert [json.loads(document["metadata"])["note"] for document in documents] == ["ok", "/w==", "ok"]
    assert quarantine == []


def test_a_field_inside_a_struct_can_be_the_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"data": pa.array([{"text": "x", "n": 1}])})
    ((document,), _) = rows(path, text="data.text")
    assert (document["text"], document["metadata"]) == ("x", '{"data":{"n":1}}')


def test_without_the_text_column_every_row_is_quarantined(tmp_path: Path) -> None:
    documents, quarantine = rows(write(tmp_path / "a.parquet", {"a": [1, 2, 3], "b": ["x"] * 3}))
    assert documents == []
    assert [(row["position"], row["record"]) for row in quarantine] == [
        (number, b'{"a":%d,"b":"x"}' % (number + 1)) for number in range(3)
    ]
    assert all("'a', 'b'" in row["reason"] and "--text-field" in row["reason"] for row in quarantine)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("group_rows", [7, 1000])
def test_rows_keep_their_numbers_whatever_the_shards_and_the_row_groups(
    tmp_path: Path, suffix: str, group_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "BATCH_ROWS", 11)
    path = tmp_path / f"a.parquet{suffix}"
    texts = [f"text {number}" if number % 5 else None for number in range(100)]
    write(path, {"text": texts}, row_group_size=group_rows, use_dictionary=False)
    if suffix:
        path.write_bytes(gzip.compress(path.read_bytes()))
    whole = rows(path)
    assert [row["key"] for row in whole[0]] == [f"{path}#{number}" for number in range(100) if number % 5]
    assert [row["position"] for row in whole[1]] == list(range(0, 100, 5))
    for shard_bytes in (1, 50, 200, 900):
        made = make_plan(path, shard_bytes)
        assert made.shards > 1
        assert rows(path, shard_bytes) == whole
        everything = outputs(made)
        some = [output for split in made.splits for output in read_split(split, FieldNames(), range(1, 999, 2))]
        assert some == everything[1::2]


def test_row_groups_before_the_first_row_wanted_are_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"text": ["x"] * 30}, row_group_size=10)
    with parquet.open_parquet(str(path), None, path.stat().st_size) as file:
        assert [batch.position for batch in parquet.read_batches(str(path), file, 12)] == [10, 20]


def damaged(path: Path, group: int) -> Path:
    """Overwrite the last page of a row group's text column."""
    column = pq.ParquetFile(path).metadata.row_group(group).column(0)
    raw = bytearray(path.read_bytes())
    end = column.data_page_offset + column.total_compressed_size
    raw[end - 400 : end] = b"\xee" * 400
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("shard_bytes", [None, 3000])
def test_a_damaged_page_costs_the_rest_of_its_row_group_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int | None
) -> None:
    monkeypatch.setattr(parquet, "BATCH_ROWS", 50)
    path = tmp_path / "a.parquet"
    texts = [f"{number:05d} " + "x" * 50 for number in range(900)]
    options = {"compression": "snappy", "use_dictionary": False, "data_page_size": 1000, "write_batch_size": 10}
    write(path, {"text": texts}, row_group_size=300, write_page_checksum=True, **options)
    documents, quarantine = rows(damaged(path, 1), shard_bytes)
    numbers = [int(document["text"][:5]) for document in documents]
    (bad,) = quarantine
    assert numbers == [*range(bad["position"]), *range(600, 900)]
    assert 400 <= bad["position"] < 600
    assert f"rows {bad['position']} to 599 of row group 1" in bad["reason"]


@pytest.mark.parametrize("data", [b"PAR1 no footer at all", b"", gzip.compress(b"x" * 99, mtime=0)[:-9]])
def test_what_is_no_parquet_is_one_quarantined_record(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(data)
    write(tmp_path / "b.parquet", {"text": ["good"]})
    documents, (bad,) = rows(tmp_path)
    assert [document["text"] for document in documents] == ["good"]
    assert (bad["position"], bad["record"]) == (0, data)
    assert bad["reason"]


def test_a_parquet_that_was_changed_after_the_scan_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"text": ["x"]})
    made = make_plan(path)
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(InputError, match=r"a\.parquet was readable Parquet when it was scanned"):
        outputs(made)
    path.unlink()
    with pytest.raises(InputError, match=r"cannot read .*a\.parquet"):
        outputs(made)


def test_other_filesystems_are_read_alike(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/parquet/a.parquet", write(tmp_path / "a.parquet", {"text": ["x", "y"]}).read_bytes())
    try:
        documents, _ = rows("memory://parquet/a.parquet")
        assert [document["key"] for document in documents] == [f"memory:///parquet/a.parquet#{row}" for row in (0, 1)]
    finally:
        memory.rm("/parquet", recursive=True)


def test_an_empty_parquet_has_no_records(tmp_path: Path) -> None:
    assert rows(write(tmp_path / "a.parquet", {"text": pa.array([], pa.string())})) == ([], [])
