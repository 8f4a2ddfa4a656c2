"""Scans and plans: what a file is, and how files are laid out over shards."""

import gzip
import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from retrodb.corpus import (
    InputFile,
    Plan,
    RowGroup,
    ScannedFile,
    Segment,
    Split,
    default_shard_bytes,
    expand_inputs,
    plan,
    scan_file,
)
from retrodb.corpus.compression import Compression
from retrodb.corpus.listing import Format
from retrodb.errors import InputError

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}


def scan(path: Path) -> ScannedFile:
    (file,) = expand_inputs([str(path)]).files
    return scan_file(file)


# -- scans ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "gzip", "zstd"])
def test_a_scan_tells_hash_length_and_compression_whatever_the_name_says(tmp_path: Path, name: str) -> None:
    data = b'{"text": "x"}\n' * 9999
    raw = PACKERS[name](data)
    path = tmp_path / "misnamed.jsonl.zst"
    path.write_bytes(raw)
    got = scan(path)
    assert (got.compression or "plain") == name
    assert (got.size, got.length, got.sha256) == (len(raw), len(data), hashlib.sha256(raw).hexdigest())
    assert (got.damage, got.row_groups, got.format) == (None, (), "jsonl")


def test_a_torn_stream_is_scanned_to_the_break_and_hashed_to_the_end(tmp_path: Path) -> None:
    raw = gzip.compress(b"x" * 1000) + b"garbage" * 100_000
    (tmp_path / "a.jsonl.gz").write_bytes(raw)
    got = scan(tmp_path / "a.jsonl.gz")
    assert (got.length, got.sha256) == (1000, hashlib.sha256(raw).hexdigest())
    assert got.damage is not None


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_parquet_scan_has_the_row_groups(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.parquet{suffix}"
    pq.write_table(pa.table({"text": ["x" * 1000] * 25}), path, row_group_size=10)
    if suffix:
        path.write_bytes(gzip.compress(path.read_bytes()))
    got = scan(path)
    assert [group.rows for group in got.row_groups] == [10, 10, 5]
    assert all(group.bytes > 0 for group in got.row_groups)
    assert got.damage is None


@pytest.mark.parametrize("data", [b"PAR1 no footer", b"", gzip.compress(b"PAR1", mtime=0)[:-3]])
def test_what_is_no_parquet_is_scanned_all_the_same(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(data)
    got = scan_file(InputFile(str(tmp_path / "a.parquet"), "parquet", len(data), ""))
    assert got.row_groups == ()
    assert got.damage
    assert got.sha256 == hashlib.sha256(data).hexdigest()


def test_a_scan_travels_as_json_and_as_pickle(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x"] * 3}), tmp_path / "a.parquet", row_group_size=2)
    got = scan(tmp_path / "a.parquet")
    assert ScannedFile.from_json(json.loads(json.dumps(got.as_json()))) == got
    assert pickle.loads(pickle.dumps(got)) == got


def test_a_file_that_vanished_or_grew_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n")
    (file,) = expand_inputs([str(path)]).files
    path.write_bytes(b"{}\n{}\n")
    with pytest.raises(InputError, match=r"a\.jsonl had 3 bytes"):
        scan_file(file)
    path.unlink()
    with pytest.raises(InputError, match=r"cannot read .*a\.jsonl"):
        scan_file(file)


def test_other_filesystems_are_scanned() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/scanning/a.jsonl", b"{}\n")
    try:
        (file,) = expand_inputs(["memory://scanning/a.jsonl"]).files
        assert scan_file(file).length == 3
    finally:
        memory.rm("/scanning", recursive=True)


# -- plans ---------------------------------------------------------------------------------------------------------


def fake(
    url: str,
    length: int,
    kind: Format = "jsonl",
    compression: Compression | None = None,
    groups: tuple[tuple[int, int], ...] = (),
    damage: str | None = None,
) -> ScannedFile:
    row_groups = tuple(RowGroup(*group) for group in groups)
    return ScannedFile(url, kind, compression, length, "", "", length, row_groups, damage)


def layout(made: Plan) -> list[list[list[tuple[str, int, int | None]]]]:
    """Splits, shards, segments as (url, start, end)."""
    return [
        [[(part.url, part.start, part.end) for part in shard.segments] for shard in split.shards]
        for split in made.splits
    ]


@pytest.mark.parametrize(
    ("total", "size"),
    [
        (0, 64 * KIB),
        (1, 64 * KIB),
        (64 * MIB, MIB),
        (100 * GIB, 16 * MIB),
        (2 * TIB, 128 * MIB),
        (99 * TIB, 512 * MIB),
    ],
)
def test_default_shards_are_some_64_and_then_16_mib_and_then_16384(total: int, size: int) -> None:
    assert default_shard_bytes(total) == size


def test_small_files_are_packed_whole_in_order_and_large_ones_cut() -> None:
    files = [fake("a", 40), fake("b", 50), fake("c", 30), fake("d", 250), fake("e", 100), fake("f", 1)]
    made = plan(files, 100)
    assert layout(made) == [
        [[("a", 0, None), ("b", 0, None)]],
        [[("c", 0, None)]],
        [[("d", 0, 83)]],
        [[("d", 83, 166)]],
        [[("d", 166, None)]],
        [[("e", 0, None)]],
        [[("f", 0, None)]],
    ]
    assert (
        [shard.number for split in made.splits for shard in split.shards] == list(range(7)) == list(range(made.shards))
    )
    assert made.bytes == 471


def test_a_compressed_file_is_one_split_of_several_shards() -> None:
    made = plan([fake("a", 250, compression="gzip"), fake("b", 10)], 100)
    assert layout(made) == [
        [[("a", 0, 83)], [("a", 83, 166)], [("a", 166, None)]],
        [[("b", 0, None)]],
    ]


def test_a_text_file_is_never_cut() -> None:
    assert layout(plan([fake("a", 5), fake("t", 1000, "text"), fake("z", 5)], 100)) == [
        [[("a", 0, None)]],
        [[("t", 0, None)]],
        [[("z", 0, None)]],
    ]


def test_parquet_is_cut_by_row_groups_and_a_huge_group_by_rows_in_one_split() -> None:
    groups = ((10, 60), (10, 30), (10, 30), (7, 250), (5, 20))
    expected = [
        [[("p", 0, 20)]],
        [[("p", 20, 30)]],
        [[("p", 30, 32)], [("p", 32, 34)], [("p", 34, 37)]],
        [[("p", 37, 42)]],
    ]
    assert layout(plan([fake("p", 1, "parquet", groups=groups)], 100)) == expected
    packed = layout(plan([fake("p", 1, "parquet", "gzip", groups)], 100))
    assert packed == [[shard for split in expected for shard in split]]


def test_a_broken_parquet_is_one_segment_that_says_why() -> None:
    ((shard,),) = (split.shards for split in plan([fake("p", 9999, "parquet", damage="no footer")], 100).splits)
    assert shard.segments == (Segment("p", "parquet", None, 9999, damage="no footer"),)


def test_an_empty_file_has_no_segment_but_an_empty_stream_has() -> None:
    assert plan([fake("a", 0)], 100).shards == 0
    empty_gzip = ScannedFile("a", "jsonl", "gzip", 20, "", "", 0)
    assert plan([empty_gzip], 100).shards == 1


def test_a_shard_size_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="0 bytes"):
        plan([fake("a", 1)], 0)


scans = st.builds(
    fake,
    st.text("abc", min_size=1, max_size=3),
    st.integers(0, 5000),
    st.sampled_from(["jsonl", "text"]),
    st.sampled_from([None, "gzip", "zstd"]),
) | st.builds(
    fake,
    st.just("p"),
    st.integers(1, 100),
    st.just("parquet"),
    st.sampled_from([None, "gzip"]),
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 900)), max_size=5).map(tuple),
)


@given(files=st.lists(scans, max_size=8, unique_by=lambda file: file.url), target=st.none() | st.integers(20, 2000))
@settings(deadline=None)
def test_every_plan_covers_every_file_once_and_in_order(files: list[ScannedFile], target: int | None) -> None:
    made = plan(files, target)
    assert made == plan(files, target)
    assert Plan.from_json(json.loads(json.dumps(made.as_json()))) == made
    assert all(Split.from_json(json.loads(json.dumps(split.as_json()))) == split for split in made.splits)
    shards = [shard for split in made.splits for shard in split.shards]
    assert [shard.number for shard in shards] == list(range(len(shards)))
    segments = [segment for shard in shards for segment in shard.segments]
    seen = list(dict.fromkeys(segment.url for segment in segments))
    assert seen == [file.url for file in files if file.format != "jsonl" or file.size]
    for file in files:
        parts = [segment for segment in segments if segment.url == file.url]
        ends = [part.end for part in parts]
        rows = sum(group.rows for group in file.row_groups)
        assert [part.start for part in parts] == [0, *ends[:-1]][: len(parts)]
        assert not parts or ends[-1] in (None, rows)
        splits = [split for split in made.splits if any(p.url == file.url for s in split.shards for p in s.segments)]
        assert len(splits) <= 1 or file.compression is None
