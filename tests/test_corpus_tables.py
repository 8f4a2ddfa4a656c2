"""Tables: nothing is lost, and nothing depends on how the files were cut."""

import gzip
import hashlib
import itertools
import json
import os
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
import zstandard
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from retrodb import schemas
from retrodb.corpus import FieldNames, Plan, ShardOutput, Split, expand_inputs, lines, plan, read_split, scan_file
from retrodb.corpus.compression import MAGIC_BYTES, detect
from retrodb.corpus.lines import read_lines
from retrodb.errors import InputError

CORPORA = Path(__file__).parents[2] / "shared" / "corpora"


@dataclass
class Read:
    """Everything that was read, in order, with what depends on the shards taken out."""

    documents: list[dict[str, Any]]
    quarantine: list[dict[str, Any]]
    counts: Counter[str]

    @property
    def keys(self) -> list[str]:
        return [document["key"] for document in self.documents]

    @property
    def texts(self) -> list[str]:
        return [document["text"] for document in self.documents]


def make_plan(*inputs: str | Path, shard_bytes: int | None = None) -> Plan:
    return plan([scan_file(file) for file in expand_inputs([str(given) for given in inputs]).files], shard_bytes)


def outputs(made: Plan) -> list[ShardOutput]:
    return [output for split in made.splits for output in read_split(split, FieldNames())]


def read(*inputs: str | Path, shard_bytes: int | None = None) -> Read:
    got = Read([], [], Counter())
    for output in outputs(make_plan(*inputs, shard_bytes=shard_bytes)):
        counts = output.counts
        dropped = sum(count for name, count in counts.items() if name.startswith("dropped."))
        assert counts["in"] == counts["kept"] + dropped + counts["quarantined"]
        assert (counts["kept"], counts["quarantined"]) == (output.documents.num_rows, output.quarantine.num_rows)
        rows = output.documents.to_pylist()
        assert [row.pop("document_id") for row in rows] == [output.number << 32 | row for row in range(len(rows))]
        got.documents += rows
        got.quarantine += output.quarantine.to_pylist()
        got.counts.update(counts)
    return got


def line(text: str, **more: Any) -> bytes:
    return json.dumps({"text": text, **more}).encode()


# -- one shard -----------------------------------------------------------------------------------------------------


def test_a_document_row_has_every_column(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(line("tëxt", id="k", title="T", url="u"))
    (output,) = outputs(make_plan(path))
    assert output.documents.schema.equals(schemas.documents(), check_metadata=True)
    assert output.quarantine.schema.equals(schemas.quarantine(), check_metadata=True)
    assert output.documents.to_pylist() == [
        {
            "document_id": 0,
            "key": "k",
            "source": str(path),
            "title": "T",
            "text": "tëxt",
            "n_chunks": None,
            "content_hash": hashlib.sha256("tëxt".encode()).digest(),
            "metadata": '{"url":"u"}',
            "cluster_id": None,
            "split": "train",
            "sketch": None,
        }
    ]
    assert output.counts == {"in": 1, "kept": 1, "validation": 0, "quarantined": 0, "dropped.empty": 0}


def test_the_split_of_a_document_is_asked_by_its_hash(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(line("x", id="v") + b"\n" + line("y", id="t"))
    (split,) = make_plan(tmp_path).splits

    def split_of(content_hash: bytes) -> str:
        return "validation" if content_hash == hashlib.sha256(b"x").digest() else "train"

    (output,) = read_split(split, FieldNames(), split_of=split_of)
    assert output.documents["split"].to_pylist() == ["validation", "train"]
    assert output.counts["validation"] == 1


def test_good_bad_and_blank_lines_are_told_apart_with_their_offsets(tmp_path: Path) -> None:
    parts = [b"\xef\xbb\xbf" + line("bom"), b"", b"bad", line("crlf") + b"\r", b"  ", line(" "), b"[]", line("last")]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(parts))
    got = read(path)
    offsets = [sum(len(part) + 1 for part in parts[:row]) for row in range(len(parts))]
    assert got.keys == [f"{path}#{offsets[row]}" for row in (0, 3, 7)]
    assert got.texts == ["bom", "crlf", "last"]
    assert [(q["source"], q["position"], q["record"]) for q in got.quarantine] == [
        (str(path), offsets[2], b"bad"),
        (str(path), offsets[6], b"[]"),
    ]
    assert got.counts == {"in": 6, "kept": 3, "validation": 0, "quarantined": 2, "dropped.empty": 1}


def test_text_files_are_one_document_each(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ndocument\n")
    (tmp_path / "b.md.gz").write_bytes(gzip.compress(b"two"))
    (tmp_path / "c.txt").write_bytes(b"")
    (tmp_path / "d.txt").write_bytes(b"\xff")
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b"torn" * 99)[:-9])
    got = read(tmp_path)
    assert got.texts == ["one\ndocument\n", "two"]
    assert got.keys[0] == f"{tmp_path / 'a.txt'}#0"
    assert [os.path.basename(q["source"]) for q in got.quarantine] == ["d.txt", "e.txt.gz"]
    assert got.counts == {"in": 5, "kept": 2, "validation": 0, "quarantined": 2, "dropped.empty": 1}


# -- cuts ----------------------------------------------------------------------------------------------------------


def members(data: bytes) -> bytes:
    """Several gzip members that begin anywhere."""
    third = len(data) // 3
    return b"".join(gzip.compress(part) for part in (data[:third], data[third : third + 1], data[third + 1 :]))


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": members,
    "zstd": zstandard.ZstdCompressor().compress,
}

some_line = (
    st.binary(max_size=30) | st.text(max_size=9).map(line) | st.sampled_from([b"", b"\r", b" ", b"{}", line("")])
)


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS.keys())
@given(parts=st.lists(some_line, max_size=12), shard_bytes=st.integers(1, 200), newline=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
def test_every_line_has_one_outcome_in_order_whatever_the_shard_size(
    tmp_path: Path, pack: Callable[[bytes], bytes], parts: list[bytes], shard_bytes: int, newline: bool
) -> None:
    data = b"\n".join(parts) + (b"\n" if newline else b"")
    assume(detect(data[:MAGIC_BYTES]) is None)
    (tmp_path / "a.jsonl").write_bytes(pack(data))
    (tmp_path / "b.jsonl").write_bytes(line("never alone"))
    got = read(tmp_path, shard_bytes=shard_bytes)
    assert got == read(tmp_path)
    expected, offset = [], 0
    for part in data.split(b"\n"):
        if part.removeprefix(b"\xef\xbb\xbf").strip(b" \t\n\r\x0b\x0c"):
            expected.append((offset, part))
        offset += len(part) + 1
    texts = [json.loads(part)["text"] for _, part in expected if part.startswith(b'{"text"')]
    assert got.texts == [text for text in texts if text.strip()] + ["never alone"]
    assert got.counts["in"] == len(expected) + 1
    assert got.counts["dropped.empty"] == sum(not text.strip() for text in texts)
    bad = [(offset, part) for offset, part in expected if not part.startswith(b'{"text"')]
    assert [(q["position"], q["record"]) for q in got.quarantine] == bad


@given(
    parts=st.lists(st.binary(max_size=9).filter(lambda part: b"\n" not in part), max_size=9),
    cuts=st.lists(st.integers(0, 90), max_size=5),
    blocks=st.integers(1, 20),
)
@settings(deadline=None)
def test_ranges_share_the_lines_out_whatever_the_cuts_and_the_blocks(
    parts: list[bytes], cuts: list[int], blocks: int
) -> None:
    data = b"\n".join(parts)
    bounds = sorted({0, *(cut for cut in cuts if cut < len(data)), len(data)})
    got = []
    for start, stop in itertools.pairwise(bounds):
        before = max(0, start - 1)
        pieces = (data[at : at + blocks] for at in range(before, len(data), blocks))
        end = None if stop == len(data) else stop
        got += [(found.position, found.data) for found in read_lines(pieces, before, start, end)]
    expected = [(sum(len(part) + 1 for part in parts[:row]), part) for row, part in enumerate(parts)]
    assert got == [(position, part) for position, part in expected if position < len(data)]


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS.keys())
def test_shards_that_are_not_wanted_change_nothing_in_the_others(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(pack(b"\n".join(line("x" * (row % 40), n=row) for row in range(200))))
    made = make_plan(tmp_path, shard_bytes=700)
    assert made.shards > 10
    everything = {output.number: output for output in outputs(made)}
    for wanted in ({0}, {3, 4, 9}, {made.shards - 1}, set()):
        some = [output for split in made.splits for output in read_split(split, FieldNames(), wanted)]
        assert {output.number for output in some} == wanted
        assert all(output == everything[output.number] for output in some)


def test_one_split_may_hold_several_ranges_of_a_plain_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(line(f"text {row}") for row in range(9)))
    made = make_plan(tmp_path, shard_bytes=40)
    joined = Split(tuple(shard for split in made.splits for shard in split.shards))
    assert len(joined.shards) > 3
    assert list(read_split(joined, FieldNames())) == outputs(made)


def test_a_range_inside_one_long_line_is_not_read_to_its_end() -> None:
    asked = 0

    def blocks() -> Any:
        nonlocal asked
        for asked in range(1, 1000):  # noqa: B007
            yield b"x" * 100

    assert list(read_lines(blocks(), 4999, 5000, 5250)) == []
    assert asked <= 3


def test_a_50_mb_line_is_read_and_one_beyond_the_limit_costs_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = line("y" * 50_000_000)
    (tmp_path / "a.jsonl").write_bytes(line("a") + b"\n" + long + b"\n" + line("b"))
    assert [len(text) for text in read(tmp_path, shard_bytes=8 << 20).texts] == [1, 50_000_000, 1]
    monkeypatch.setattr(lines.read_lines, "__defaults__", (0, None, 1 << 20))
    tracemalloc.start()
    try:
        got = read(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert got.texts == ["a", "b"]
    (bad,) = got.quarantine
    assert str(len(long)) in bad["reason"]
    assert bad["record"] == long[: 64 << 10]


# -- torn streams --------------------------------------------------------------------------------------------------


def test_a_gzip_truncated_at_any_byte_keeps_every_record_before_the_break(tmp_path: Path) -> None:
    records = [line(f"text {number} {number * 7919}") for number in range(12)]
    data = b"\n".join(records)
    assert data[:210][-1:] != b"}", "the first member is to end inside a record"
    packed = gzip.compress(data[:210]) + gzip.compress(data[210:])
    boundary = len(gzip.compress(data[:210]))
    path = tmp_path / "a.jsonl.gz"
    for length in range(2, len(packed)):
        path.write_bytes(packed[:length])
        (split,) = make_plan(path, shard_bytes=150).splits
        delivered = scan_file(expand_inputs([str(path)]).files[0]).length
        whole = [record for row, record in enumerate(records) if len(b"\n".join(records[: row + 1])) <= delivered]
        got = read(path, shard_bytes=150)
        assert got == read(path)
        assert got.texts == [json.loads(record)["text"] for record in whole]
        (bad,) = got.quarantine
        rest = data[len(b"\n".join(whole)) : delivered].lstrip(b"\n")
        assert bad["record"] == rest
        assert bad["position"] == delivered - len(rest)
        if length != boundary:
            assert "truncated" in bad["reason"]
        assert len(split.shards) == max(1, -(-delivered // 150))


def test_a_break_right_after_a_record_is_marked_by_an_empty_one(tmp_path: Path) -> None:
    for tail in (b"", b"\n", b"\n \n"):
        data = line("a") + b"\n" + line("b") + tail
        (tmp_path / "a.jsonl").write_bytes(gzip.compress(data) + b"garbage")
        got = read(tmp_path)
        assert got.texts == ["a", "b"]
        (bad,) = got.quarantine
        assert (bad["record"], bad["position"]) == (b"", len(data))
        assert "other data" in bad["reason"]


def test_a_truncated_zstd_keeps_every_block_before_the_break(tmp_path: Path) -> None:
    records = [line(os.urandom(500).hex(), id=number) for number in range(1000)]
    packed = zstandard.ZstdCompressor().compress(b"\n".join(records))
    (tmp_path / "a.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    got = read(tmp_path)
    assert got.keys == [str(number) for number in range(len(got.keys))]
    assert 300 < len(got.keys) < 500
    assert got.counts["quarantined"] == 1


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_file_that_vanishes_or_changes_between_scan_and_read_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(line("x"))
    (split,) = make_plan(path).splits
    path.write_bytes(line("longer"))
    with pytest.raises(InputError, match=r"a\.jsonl had 13 bytes .* has 18 now"):
        list(read_split(split, FieldNames()))
    path.unlink()
    with pytest.raises(InputError, match=r"cannot read .*a\.jsonl: FileNotFoundError"):
        list(read_split(split, FieldNames()))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz"])
def test_a_disk_that_fails_is_no_damage_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    data = line("x" * 1000) * 2000
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    (split,) = make_plan(path, shard_bytes=1 << 30).splits

    class Failing:
        def __init__(self) -> None:
            self.size = path.stat().st_size

        def read(self, size: int) -> bytes:
            raise OSError(5, "Input/output error")

        def seek(self, *_: int) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr("builtins.open", lambda *_: Failing())
    with pytest.raises(InputError, match="Input/output error"):
        list(read_split(split, FieldNames()))


def test_other_filesystems_are_read_alike(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    data = b"\n".join(line(f"text {number}") for number in range(50))
    memory.pipe("/reading/a.jsonl", data)
    memory.pipe("/reading/b.jsonl.gz", gzip.compress(data))
    try:
        got = read("memory://reading", shard_bytes=300)
        assert got.texts == [f"text {number}" for number in range(50)] * 2
        assert got.keys[:2] == ["memory:///reading/a.jsonl#0", "memory:///reading/a.jsonl#19"]
    finally:
        memory.rm("/reading", recursive=True)


def test_a_repeated_id_keeps_all_its_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([line("x", id=1), line("x", id=1), line("y", id="1")]))
    assert read(tmp_path).keys == ["1", "1", "1"]


def test_a_shard_is_handed_out_before_the_next_is_read_and_then_forgotten(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n".join([line("z" * 100_000)] * 400), 1))
    (split,) = make_plan(tmp_path, shard_bytes=2 << 20).splits
    assert len(split.shards) > 15
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        for output in read_split(split, FieldNames()):
            assert output.documents.num_rows <= 21
            assert pa.total_allocated_bytes() - before < 3 << 20
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_the_dirty_corpus_is_accounted_for_to_the_last_record() -> None:
    path = CORPORA / "dirty.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    with gzip.open(path) as file:
        records = [json.loads(record) for record in file]
    got = read(path, shard_bytes=500_000)
    good = [record for record in records if record["text"].strip()]
    assert got.keys == [record["id"] for record in good]
    assert got.texts == [record["text"] for record in good]
    assert got.counts == {
        "in": len(records),
        "kept": len(good),
        "validation": 0,
        "quarantined": 0,
        "dropped.empty": len(records) - len(good),
    }
    assert got == read(path)


@pytest.mark.parametrize("name", ["in.jsonl", "in.txt"])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_written_after_its_scan_is_refused_though_it_is_as_long(tmp_path, name, replaced):
    """The checksum that is recorded would be that of other text than the tables hold."""
    path = tmp_path / name
    text = b'{"text": "first"}\n' * 50
    path.write_bytes(text)
    made = make_plan(path, shard_bytes=100)
    os.chmod(path, 0o600)  # none of its bytes
    assert outputs(made)
    new = path.with_name("new") if replaced else path
    new.write_bytes(text.replace(b"first", b"other"))
    new.replace(path)
    with pytest.raises(InputError, match="written or replaced while"):
        outputs(made)
