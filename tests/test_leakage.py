"""r(C) of RETRO, section 2.6: the longest common substring, its figures, and the report that every build writes."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    always_use_workers,
    build_here,
    digests,
    manifest_of,
    retrodb,
    rows_of,
    sha256,
    shards_of,
    stamps,
    strays,
    write_jsonl,
)

import retrodb as retrodb_package
from retrodb.corpus.quickstart import quickstart_lines
from retrodb.errors import DamagedError
from retrodb.manifest import Shard
from retrodb.quality import leakage
from retrodb.quality.leakage import (
    best_neighbours,
    distribution,
    histograms,
    in_words,
    longest_overlap,
    merged_histograms,
    overlaps,
    shared_run,
    worst_rows,
)
from retrodb.quality.verify import verify_database

REPORT = "reports/leakage.json"

# -- the longest common substring --------------------------------------------------------------------------------------


def naive(one: list[int], other: list[int]) -> int:
    """The longest common substring, by the textbook's table."""
    best, above = 0, [0] * (len(other) + 1)
    for token in one:
        row = [0] * (len(other) + 1)
        for at, another in enumerate(other):
            row[at + 1] = above[at] + 1 if token == another else 0
        best, above = max(best, *row), row
    return best


def strings(neighbours: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    """[k, 2, m] tokens and [k, 2] lengths as k lists without padding."""
    return [
        [int(token) for side in (0, 1) for token in cell[side, : length[side]]]
        for cell, length in zip(neighbours, lengths, strict=True)
    ]


@st.composite
def chunks_and_neighbours(draw: st.DrawFn) -> tuple[np.ndarray, ...]:
    """Few different tokens, so that much is shared; short chunks, missing neighbours, and anything as padding."""
    n, k, m = draw(st.integers(0, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind, most = draw(st.sampled_from([("uint16", 2), ("uint16", 65_535), ("uint32", 3), ("uint32", 2**32 - 1)]))
    alphabet = np.array([0, 1, most, most - 1], dtype=kind)
    tokens, neighbours = rng.choice(alphabet, (n, m)), rng.choice(alphabet, (n, k, 2, m))
    first = rng.choice([0, m, m, m, rng.integers(0, m + 1)], (n, k))
    following = np.where(first == m, rng.integers(0, m + 1, (n, k)), 0)
    lengths = np.stack([first, following], axis=-1).astype(np.int16)
    return tokens, rng.integers(1, m + 1, n).astype(np.int16), neighbours, lengths


@given(chunks_and_neighbours())
def test_the_overlap_is_the_longest_common_substring_and_its_neighbour_the_nearest_of_equals(case):
    tokens, n_tokens, neighbours, lengths = case
    overlap, columns = longest_overlap(*case)
    assert (overlap.dtype, overlap.shape, columns.shape) == (np.int16, (len(tokens),), (len(tokens),))
    for row in range(len(tokens)):
        own = tokens[row, : n_tokens[row]].tolist()
        found = [naive(own, other) for other in strings(neighbours[row], lengths[row])]
        assert overlap[row] == max(found)
        assert columns[row] == (found.index(max(found)) if max(found) else -1)


def one_pair(tokens: list[int], n: int, near: list[int], after: list[int], lengths: tuple[int, int]) -> int:
    found, _ = longest_overlap(
        np.array([tokens], dtype=np.uint16),
        np.array([n], dtype=np.int16),
        np.array([[[near, after]]], dtype=np.uint16),
        np.array([[lengths]], dtype=np.int16),
    )
    return int(found[0])


def test_a_substring_may_cross_from_the_neighbour_into_its_continuation():
    assert one_pair([7, 1, 2, 3], 4, [9, 9, 7, 1], [2, 3, 9, 9], (4, 4)) == 4


def test_padding_matches_neither_padding_nor_the_token_zero():
    assert one_pair([5, 0, 0, 0], 1, [6, 0, 0, 0], [0, 0, 0, 0], (1, 0)) == 0
    assert one_pair([0, 0, 0, 0], 4, [6, 0, 0, 0], [0, 0, 0, 0], (1, 0)) == 0
    assert one_pair([5, 0, 0, 0], 1, [0, 0, 0, 0], [0, 0, 0, 0], (4, 4)) == 0
    assert one_pair([0, 0, 0, 0], 4, [0, 0, 0, 0], [0, 0, 0, 0], (4, 4)) == 4
    assert one_pair([0, 0, 0, 0], 4, [0, 0, 0, 0], [0, 0, 0, 0], (0, 0)) == 0


def test_pairs_of_many_blocks_and_overlaps_beyond_a_byte_are_counted_as_well(monkeypatch):
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 3, (30, 300), dtype=np.uint16)
    neighbours = np.concatenate([tokens[::-1], tokens], axis=1).reshape(30, 2, 300)
    neighbours[5] = np.stack([np.roll(tokens[5], 7)] * 2)  # in common: 293 tokens, and across the border all 300
    monkeypatch.setattr(leakage, "_BLOCK_CELLS", 4 * 300)
    full = np.full((30, 2), 300, dtype=np.int16)
    found = overlaps(tokens, full[:, 0], np.arange(30), neighbours, full)
    assert found.tolist() == [300] * 30
    full[5] = (300, 0)
    assert overlaps(tokens, full[:, 0], np.arange(30), neighbours, full)[5] == 293


def test_the_nearest_of_equals_is_named_and_none_where_nothing_is_shared():
    overlap, columns = best_neighbours(np.array([[0, 3, 3], [0, 0, 0], [2, 1, 5]], dtype=np.int16))
    assert (overlap.tolist(), columns.tolist()) == ([3, 0, 5], [1, -1, 2])


def test_what_is_shared_is_the_first_run_of_that_length_and_must_be_there():
    assert shared_run((1, 2, 3, 9, 5), (9, 5, 0, 2, 3), 2) == (2, 3)
    with pytest.raises(DamagedError, match="3 consecutive tokens"):
        shared_run((1, 2, 3), (1, 2, 4), 3)


# -- figures -----------------------------------------------------------------------------------------------------------


def test_histograms_count_every_chunk_once_in_its_split():
    overlap = np.array([0, 4, 1, 1, 4, 2], dtype=np.int16)
    validation = np.array([False, True, False, True, False, False])
    first = histograms(overlap, validation, 4)
    assert first == {"train": [1, 1, 1, 0, 1], "validation": [0, 1, 0, 0, 1]}
    second = histograms(overlap[:1], validation[:1], 4)
    assert merged_histograms([second, first]) == {"train": [2, 1, 1, 0, 1], "validation": [0, 1, 0, 0, 1]}
    assert merged_histograms([second]) == {"train": [1, 0, 0, 0, 0]}, "no validation chunks, no such figures"


def test_shares_are_of_chunks_with_r_above_alpha_and_the_mean_is_of_r():
    found = distribution([2, 1, 3, 0, 4])
    assert found == {
        "chunks": 10,
        "mean": (1 + 6 + 16) / 40,
        "share_above": {"0.125": 0.8, "0.25": 0.7, "0.5": 0.4, "0.75": 0.4, "1.0": 0.0},
        "share_whole": 0.4,
    }
    assert in_words({"train": found}) == "r > 0.5 for 40.0% of training chunks, mean 0.57"
    nothing = distribution([0, 0, 0])
    assert (nothing["chunks"], nothing["mean"], nothing["share_whole"]) == (0, None, None)
    assert in_words({"train": nothing}) == "no chunks"


def test_the_worst_are_one_of_each_document_and_equals_by_chunk_id():
    overlap = np.array([9, 9, 0, 7, 8, 9, 0], dtype=np.int16)
    documents = np.array([1, 1, 1, 2, 3, 4, 5])
    assert worst_rows(overlap, np.arange(7) + 10, documents, 9).tolist() == [0, 5, 4, 3]
    assert worst_rows(overlap, np.arange(7) + 10, documents, 2).tolist() == [0, 5]
    assert worst_rows(overlap[:0], documents[:0], documents[:0], 2).tolist() == []


# -- the stage ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve topics, one of them twice."""
    topics = [json.loads(line) for line in quickstart_lines() if 2_000 < len(line) < 6_000][:12]
    again = {**topics[4], "id": "again", "title": "The same again"}
    return write_jsonl(tmp_path_factory.mktemp("leakage") / "in.jsonl", [*topics, again])


def build(source: Path, out: Path, encoder: Path, **settings: Any) -> tuple[str, ...]:
    given = {"encoder": str(encoder), "shard_bytes": "8KiB", "precision": "fp32", "sequence_tokens": 512, **settings}
    return build_here([source], out, **given).done


@pytest.fixture(scope="module")
def whole(source, tiny_encoder, tmp_path_factory) -> Path:
    """A database of several shards that nobody changes."""
    out = tmp_path_factory.mktemp("whole") / "db"
    assert build(source, out, tiny_encoder)[-1] == "report"
    assert len(shards_of(out, "leakage")) > 2
    return out


@pytest.fixture
def database(whole, tmp_path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(whole, tmp_path / "db"))


def report_of(database: Path) -> dict[str, Any]:
    return json.loads((database / REPORT).read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_document_that_stands_twice_leaks_whole(whole):
    twice = {row["document_id"] for row in rows_of(whole, "documents") if row["key"] == "again"}
    chunks = [row for row in rows_of(whole, "chunks") if row["document_id"] in twice and row["n_tokens"] == 64]
    found = {row["chunk_id"]: row for row in rows_of(whole, "leakage")}
    assert chunks
    for chunk in chunks:
        assert (found[chunk["chunk_id"]]["overlap"], found[chunk["chunk_id"]]["leakage"]) == (64, 1.0)


@pytest.mark.slow
def test_the_report_is_what_the_table_says(whole):
    overlap = np.array([row["overlap"] for row in rows_of(whole, "leakage")])
    report = report_of(whole)
    assert (report["neighbours"], report["chunk_tokens"]) == (10, 64)
    assert set(report["splits"]) == {"train"}
    train = report["splits"]["train"]
    assert train["chunks"] == sum(train["histogram"]) == len(overlap)
    assert train["histogram"] == np.bincount(overlap, minlength=65).tolist()
    assert train["mean"] == pytest.approx(overlap.mean() / 64)
    assert train["share_above"] == {str(a): np.mean(overlap / 64 > a) for a in (0.125, 0.25, 0.5, 0.75, 1.0)}
    assert train["share_whole"] == np.mean(overlap == 64)


@pytest.mark.slow
def test_the_worst_pairs_are_there_to_read(whole):
    rows = {row["chunk_id"]: row for row in rows_of(whole, "leakage")}
    chunks = {row["chunk_id"]: row for row in rows_of(whole, "chunks")}
    documents = {row["document_id"]: row for row in rows_of(whole, "documents")}
    neighbours = {row["chunk_id"]: row for row in rows_of(whole, "neighbours")}
    worst = report_of(whole)["worst"]
    assert [(-pair["overlap"], pair["chunk_id"]) for pair in worst] == sorted(
        (-pair["overlap"], pair["chunk_id"]) for pair in worst
    )
    assert worst[0]["leakage"] == 1.0
    queries = [chunks[pair["chunk_id"]]["document_id"] for pair in worst]
    assert len(set(queries)) == len(queries) == min(20, len(documents)), "one of each document"
    for pair in worst:
        row, found = rows[pair["chunk_id"]], neighbours[pair["chunk_id"]]
        assert (pair["overlap"], pair["neighbour_id"]) == (row["overlap"], row["neighbour_id"])
        assert pair["distance"] == found["distances"][found["neighbour_ids"].index(pair["neighbour_id"])]
        for name, chunk_id in (("document", pair["chunk_id"]), ("neighbour_document", pair["neighbour_id"])):
            document = documents[chunks[chunk_id]["document_id"]]
            assert pair[name] == {key: document[key] for key in ("key", "title", "source")}
        assert pair["split"] == "train"
        own = documents[chunks[pair["chunk_id"]]["document_id"]]["text"].encode()
        start, end = (chunks[pair["chunk_id"]][name] for name in ("start", "end"))
        assert pair["text"] == own[start:end].decode(errors="replace")
        assert pair["shared_text"] in pair["text"]
        assert pair["shared_text"] in pair["neighbour_text"] + (pair["continuation_text"] or "")


@pytest.mark.slow
def test_info_tells_it_to_people_and_to_programs(whole):
    train = report_of(whole)["splits"]["train"]
    line = f"r > 0.5 for {train['share_above']['0.5']:.1%} of training chunks, mean {train['mean']:.2f}"
    assert line in " ".join(retrodb("info", whole).out.split())
    found = retrodb("info", whole, "--json").json["leakage"]
    del train["histogram"]
    assert found == {"neighbours": 10, "splits": {"train": train}, "report": REPORT}


@pytest.mark.slow
def test_one_worker_or_two_give_the_same_table_and_report(source, whole, tiny_encoder, tmp_path, monkeypatch):
    build(source, tmp_path / "db", tiny_encoder, until="training")
    always_use_workers(monkeypatch)
    assert build(source, tmp_path / "db", tiny_encoder, workers=2) == ("report",)
    assert digests(tmp_path / "db", ["leakage", "reports"]) == digests(whole, ["leakage", "reports"])
    assert manifest_of(tmp_path / "db")["stages"] == manifest_of(whole)["stages"]


@pytest.mark.slow
@pytest.mark.parametrize("looked_up", [True, False])
def test_neither_a_shuffle_nor_the_size_of_answers_and_blocks_changes_a_byte(
    source, whole, tiny_encoder, tmp_path, monkeypatch, looked_up
):
    """As on a cluster, or as on one machine: there chunk shards come and go."""
    from retrodb.pipelines import join
    from retrodb.pipelines.runners import LocalRunner

    monkeypatch.setattr(LocalRunner, "is_local", looked_up)
    monkeypatch.setattr(join, "ANSWER_ROWS", 5)
    monkeypatch.setattr(join, "NEIGHBOUR_CACHE_BYTES", 1)
    read: Counter[int] = Counter()
    original = join.NeighbourSource.read

    def counted(self, storage, shard):
        assert isinstance(self.chunks[shard], Shard), "with the checksum that is recorded of it"
        read[shard] += 1
        return original(self, storage, shard)

    monkeypatch.setattr(join.NeighbourSource, "read", counted)
    monkeypatch.setattr(leakage, "_GATHERED_PAIRS", 7)
    monkeypatch.setattr(leakage, "_BLOCK_CELLS", 64 * 5)
    build(source, tmp_path / "db", tiny_encoder)
    assert digests(tmp_path / "db", ["training", "leakage", "reports"]) == digests(
        whole, ["training", "leakage", "reports"]
    )
    shards = len(shards_of(whole, "chunks"))
    assert len(read) == shards > 1
    if not looked_up:
        assert set(read.values()) == {2}, "each stage reads a shard once"


@pytest.mark.slow
def test_the_text_is_decoded_so_that_the_report_does_not_depend_on_whether_it_is_kept(
    source, whole, tiny_encoder, tmp_path
):
    build(source, tmp_path / "db", tiny_encoder, text=False)
    assert report_of(tmp_path / "db") == report_of(whole)


@pytest.mark.slow
def test_it_looks_at_ten_neighbours_or_as_many_as_are_kept(source, tiny_encoder, database):
    assert build(source, database, tiny_encoder, neighbours=12) == ("neighbours", "training", "report")
    assert report_of(database)["neighbours"] == 10
    build(source, database, tiny_encoder, neighbours=3)
    assert report_of(database)["neighbours"] == 3
    assert "one of its 3 nearest" in report_of(database)["definition"]
    assert verify(database).ok


@pytest.mark.slow
def test_what_only_the_training_shards_depend_on_leaves_the_report_alone(source, tiny_encoder, database):
    before = {**digests(database, ["leakage"]), "report": sha256(database / REPORT)}
    assert build(source, database, tiny_encoder, training_neighbours=1) == ("training",)
    assert {**digests(database, ["leakage"]), "report": sha256(database / REPORT)} == before


@pytest.mark.slow
def test_a_document_without_neighbours_leaks_nothing(tiny_encoder, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "A single short document."}])
    build(source, tmp_path / "db", tiny_encoder)
    (row,) = rows_of(tmp_path / "db", "leakage")
    assert (row["overlap"], row["leakage"], row["neighbour_id"]) == (0, 0.0, None)
    assert report_of(tmp_path / "db")["worst"] == []
    assert verify(tmp_path / "db", sample=1.0).ok


@pytest.mark.slow
def test_validation_chunks_are_reported_apart_from_training_chunks(source, tiny_encoder, tmp_path):
    database = tmp_path / "db"
    build(source, database, tiny_encoder, validation_fraction=0.4, decontaminate=False)
    held = {row["document_id"] for row in rows_of(database, "documents") if row["split"] == "validation"}
    own = {row["chunk_id"] for row in rows_of(database, "chunks") if row["document_id"] in held}
    overlap = {row["chunk_id"]: row["overlap"] for row in rows_of(database, "leakage")}
    split_of = {chunk_id: "validation" if chunk_id in own else "train" for chunk_id in overlap}
    splits = report_of(database)["splits"]
    for split, wanted in (("validation", own), ("train", set(overlap) - own)):
        counted = np.bincount([overlap[chunk_id] for chunk_id in wanted], minlength=65).tolist()
        assert splits[split]["histogram"] == counted
    assert splits["validation"]["chunks"] == len(own) > 0
    assert all(pair["split"] == split_of[pair["chunk_id"]] for pair in report_of(database)["worst"])
    assert "of validation chunks" in retrodb("info", database).out
    assert verify(database, sample=1.0).ok


# -- damage ------------------------------------------------------------------------------------------------------------


def verify(database: Path, sample: float = 0.0) -> Any:
    return verify_database(retrodb_package.open(str(database)), sample=sample)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_report_that_is_missing_or_changed_is_named_and_written_anew_alone(source, tiny_encoder, database, damage):
    before = stamps(database)
    file = database / REPORT
    if damage == "missing":
        file.unlink()
    else:
        file.write_text(file.read_text(encoding="utf-8").replace("1.0", "0.9", 1), encoding="utf-8")
    assert verify(database).paths == [REPORT]
    assert build(source, database, tiny_encoder) == ("report",)
    after = stamps(database)
    assert {name: digest for name, (_, digest) in after.items()} == {name: d for name, (_, d) in before.items()}
    assert {name for name in after if after[name][0] != before[name][0]} == {REPORT}
    assert verify(database).ok
    assert build(source, database, tiny_encoder) == ()


@pytest.mark.slow
def test_a_damaged_shard_is_made_again_alone(source, tiny_encoder, database):
    before = stamps(database)
    (database / "leakage" / "00001.parquet").unlink()
    assert verify(database).paths == ["leakage/00001.parquet"]
    assert build(source, database, tiny_encoder) == ("report",)
    after = stamps(database)
    assert {name: digest for name, (_, digest) in after.items()} == {name: d for name, (_, d) in before.items()}
    assert {name for name in after if after[name][0] != before[name][0]} == {"leakage/00001.parquet"}
    assert strays(database) == []


@pytest.mark.slow
def test_a_database_from_before_there_was_a_report_gets_one_and_nothing_else(source, whole, tiny_encoder, database):
    manifest = manifest_of(database)
    del manifest["stages"]["report"], manifest["tables"]["leakage"], manifest["fingerprints"]["stages"]["report"]
    (database / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    shutil.rmtree(database / "leakage")
    (database / REPORT).unlink()
    assert build(source, database, tiny_encoder) == ("report",)
    assert manifest_of(database) == manifest_of(whole)
    assert digests(database, ["leakage", "reports"]) == digests(whole, ["leakage", "reports"])
