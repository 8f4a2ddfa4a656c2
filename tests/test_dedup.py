"""Near-duplicate clusters, validation documents and decontamination, as they stand in a finished database.

Read with pyarrow and numpy alone; which documents are near-duplicates is known from how they were made.
"""

import hashlib
import json
import random
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from near_duplicates import assert_conserved, counts_of, half_new, varied, verified, words_of
from support import (
    Running,
    always_use_workers,
    build_here,
    digests,
    manifest_of,
    retrodb,
    rows_of,
    stamps,
    strays,
    vectors_of,
    write_jsonl,
)

from retrodb.errors import InputError, UsageError

pytestmark = pytest.mark.slow

TABLES = ("documents", "duplicates", "chunks", "embeddings", "index", "neighbours", "training")
FAMILIES = {"a": 3, "b": 2, "c": 5}
"""Near-duplicate documents made of one original each."""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Families of near-duplicates, strewn over several shards among documents that have none."""
    records = [{"id": f"alone-{n}", "text": " ".join(words_of(n))} for n in range(20)]
    for place, (family, members) in enumerate(FAMILIES.items()):
        words = words_of(100 + place)
        records += [{"id": f"{family}-{copy}", "text": varied(words, copy)} for copy in range(members)]
        records.append({"id": f"half-{family}", "text": half_new(words, place)})
    random.Random(5).shuffle(records)
    records.insert(7, {"id": "blank", "text": "  "})
    return write_jsonl(tmp_path_factory.mktemp("dedup") / "in.jsonl", records)


def made(source: Path, out: Path, encoder: Path, **settings: Any) -> Any:
    given = {"encoder": str(encoder), "shard_bytes": "12KiB", "precision": "fp32", "chunk_tokens": 32, **settings}
    return build_here([source], out, sequence_tokens=128, **given)


def family_of(key: str) -> str | None:
    family = key.split("-", maxsplit=1)[0]
    return family if family in FAMILIES else None


@pytest.fixture(scope="module")
def kept(source, tiny_encoder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("kept") / "db"
    made(source, out, tiny_encoder)
    assert len(manifest_of(out)["tables"]["documents"]["shards"]) >= 4
    return out


# -- clusters --------------------------------------------------------------------------------------------------------


def test_by_default_near_duplicates_are_kept_and_told_by_cluster_id(kept):
    clusters = defaultdict(set)
    for row in rows_of(kept, "documents"):
        if family_of(row["key"]) is None:
            assert row["cluster_id"] is None, row["key"]
        else:
            clusters[row["cluster_id"]].add(row["key"])
            assert row["cluster_id"] is not None
    assert sorted(len(members) for members in clusters.values()) == sorted(FAMILIES.values())
    assert all(len({family_of(key) for key in members}) == 1 for members in clusters.values())
    first = {row["cluster_id"]: row["document_id"] for row in reversed(rows_of(kept, "documents")) if row["cluster_id"]}
    assert all(name == document for name, document in first.items()), "a cluster has the id of its first document"
    assert_conserved(kept)
    verified(kept)


def test_drop_keeps_the_first_of_each_cluster_and_says_what_is_gone(source, kept, tiny_encoder, tmp_path):
    made(source, tmp_path / "db", tiny_encoder, dedup="drop")
    before, after = rows_of(kept, "documents"), rows_of(tmp_path / "db", "documents")
    first = {row["cluster_id"]: row["key"] for row in reversed(before) if row["cluster_id"] is not None}
    expected = [row["key"] for row in before if row["cluster_id"] is None or first[row["cluster_id"]] == row["key"]]
    assert [row["key"] for row in after] == expected
    assert all(row["cluster_id"] is None for row in after)
    by_shard = Counter(row["document_id"] >> 32 for row in after)
    assert [row["document_id"] & 0xFFFFFFFF for row in after] == [
        at for _, number in sorted(by_shard.items()) for at in range(number)
    ]
    assert counts_of(tmp_path / "db")["dropped"]["near_duplicate"] == sum(FAMILIES.values()) - len(FAMILIES)
    assert_conserved(tmp_path / "db")

    gone = [row for row in rows_of(tmp_path / "db", "duplicates") if row["removed"]]
    assert {row["key"] for row in gone} == {row["key"] for row in before} - set(expected)
    texts = {row["key"]: row["text"] for row in before}
    assert all(row["content_hash"] == hashlib.sha256(texts[row["key"]].encode()).digest() for row in gone)
    keys = {row["document_id"]: row["key"] for row in after}
    assert all(family_of(keys[row["cluster_id"]]) == family_of(row["key"]) for row in gone)
    report = json.loads((tmp_path / "db" / "reports" / "dedup.json").read_text())
    assert report["removed"]["near_duplicate"] == len(gone)
    assert report["largest"][0]["documents"] == max(FAMILIES.values())
    verified(tmp_path / "db")


def test_off_looks_for_none(source, tiny_encoder, tmp_path):
    made(source, tmp_path / "db", tiny_encoder, dedup="off", until="chunk")
    assert all(row["cluster_id"] is None for row in rows_of(tmp_path / "db", "documents"))
    assert counts_of(tmp_path / "db")["near_duplicates"] is None
    assert not (tmp_path / "db" / "reports" / "dedup.json").exists()
    verified(tmp_path / "db")


def test_worker_processes_and_small_shuffles_find_the_same(source, kept, tiny_encoder, tmp_path, monkeypatch):
    from retrodb.pipelines import dedup, dedup_stage

    always_use_workers(monkeypatch)
    for name in [name for name in vars(dedup_stage) if name.startswith("_SMALL_")]:
        monkeypatch.setattr(dedup_stage, name, 0)
    monkeypatch.setattr(dedup, "WAVE_BYTES", 24 * 40 * 9)
    monkeypatch.setattr(dedup_stage.dedup, "parts_for", lambda documents: 3)
    made(source, tmp_path / "db", tiny_encoder, workers=2)
    assert digests(tmp_path / "db", TABLES) == digests(kept, TABLES)
    assert strays(tmp_path / "db") == []


def test_hundreds_of_equal_documents_are_one_cluster(tiny_encoder, tmp_path):
    records = [{"id": f"same-{n}", "text": " ".join(words_of(1, 60))} for n in range(300)]
    source = write_jsonl(tmp_path / "in.jsonl", [*records, {"id": "other", "text": " ".join(words_of(2, 60))}])
    made(source, tmp_path / "db", tiny_encoder, until="chunk")
    clusters = Counter(row["cluster_id"] for row in rows_of(tmp_path / "db", "documents"))
    assert clusters == {0: 300, None: 1}
    made(source, tmp_path / "dropped", tiny_encoder, dedup="drop")
    assert [row["key"] for row in rows_of(tmp_path / "dropped", "documents")] == ["same-0", "other"]
    verified(tmp_path / "dropped")


# -- exclusion -------------------------------------------------------------------------------------------------------


def nearest(database: Path, allowed: Any) -> list[list[float]]:
    """By brute force: the squared distances of the 20 nearest allowed chunks, ascending."""
    vectors = vectors_of(database).astype(np.float64)
    documents = {row["document_id"]: row for row in rows_of(database, "documents")}
    owners = [documents[row["document_id"]] for row in rows_of(database, "chunks")]
    distances = ((vectors[:, None, :] - vectors[None, :, :]) ** 2).sum(axis=2)
    return [
        sorted(distances[i, j] for j in range(len(owners)) if allowed(owners[i], owners[j]))[:20]
        for i in range(len(owners))
    ]


def assert_neighbours(database: Path, allowed: Any) -> None:
    for row, expected in zip(rows_of(database, "neighbours"), nearest(database, allowed), strict=True):
        assert row["n_valid"] == len(expected)
        assert np.allclose(row["distances"][: row["n_valid"]], expected, atol=1e-5)


def other_cluster(query: dict[str, Any], candidate: dict[str, Any]) -> bool:
    if query["document_id"] == candidate["document_id"] or candidate["split"] == "validation":
        return False
    return query["cluster_id"] is None or query["cluster_id"] != candidate["cluster_id"]


def test_exclude_cluster_finds_the_nearest_of_all_other_clusters(source, kept, tiny_encoder, tmp_path):
    shutil.copytree(kept, tmp_path / "db")
    outcome = made(source, tmp_path / "db", tiny_encoder, exclude="cluster")
    assert outcome.done[0] == "neighbours", "nothing before the neighbours is made again"
    assert_neighbours(tmp_path / "db", other_cluster)
    verified(tmp_path / "db")
    made(source, tmp_path / "db", tiny_encoder)
    assert digests(tmp_path / "db", TABLES) == digests(kept, TABLES)


def test_exclude_cluster_with_an_approximate_index_and_inner_product(source, tiny_encoder, tmp_path):
    made(source, tmp_path / "db", tiny_encoder, exclude="cluster", metric="ip", index_key="IVF4,Flat")
    documents = {row["document_id"]: row for row in rows_of(tmp_path / "db", "documents")}
    owners = {row["chunk_id"]: documents[row["document_id"]] for row in rows_of(tmp_path / "db", "chunks")}
    for row in rows_of(tmp_path / "db", "neighbours"):
        for neighbour in row["neighbour_ids"][: row["n_valid"]]:
            assert other_cluster(owners[row["chunk_id"]], owners[neighbour])
    verified(tmp_path / "db")


def test_when_the_only_other_documents_are_near_duplicates_there_is_no_neighbour_and_that_is_said(
    tiny_encoder, tmp_path
):
    words = words_of(1)
    source = write_jsonl(tmp_path / "in.jsonl", [{"id": str(n), "text": varied(words, n)} for n in range(3)])
    made(source, tmp_path / "db", tiny_encoder, exclude="cluster")
    assert all(row["n_valid"] == 0 for row in rows_of(tmp_path / "db", "neighbours"))
    verified(tmp_path / "db")


# -- validation ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    """Validation documents: a near-duplicate of family a, one of no one, an equal of alone-3, and two of each other."""
    words, own = words_of(100), words_of(500)
    records = [
        {"id": "v-a", "text": varied(words, 7)},
        {"id": "v-new", "text": " ".join(words_of(600))},
        {"id": "v-equal", "text": " ".join(words_of(3))},
        {"id": "v-twin-0", "text": varied(own, 0)},
        {"id": "v-twin-1", "text": varied(own, 1)},
    ]
    return write_jsonl(tmp_path_factory.mktemp("held-out") / "valid.jsonl", records)


@pytest.mark.parametrize("dedup", ["keep", "drop"])
def test_validation_documents_are_queries_and_what_repeats_them_is_removed(
    source, held_out, tiny_encoder, tmp_path, dedup
):
    out = tmp_path / "db"
    made(source, out, tiny_encoder, validation=[str(held_out)], dedup=dedup)
    splits = {row["key"]: row["split"] for row in rows_of(out, "documents")}
    assert {key for key, split in splits.items() if split == "validation"} == {
        "v-a", "v-new", "v-equal", "v-twin-0", "v-twin-1"
    }, "none of them is ever removed"  # fmt: skip
    gone = {row["key"]: row["removed"] for row in rows_of(out, "duplicates") if row["removed"]}
    contaminated = {key for key, rule in gone.items() if rule == "validation_duplicate"}
    assert contaminated == {"a-0", "a-1", "a-2", "alone-3"}
    assert not contaminated & set(splits)
    assert counts_of(out)["dropped"]["validation_duplicate"] == 4
    assert counts_of(out)["validation"] == 5
    assert_conserved(out)
    verified(out)

    documents = {row["document_id"]: row for row in rows_of(out, "documents")}
    owners = {row["chunk_id"]: documents[row["document_id"]] for row in rows_of(out, "chunks")}
    rows = rows_of(out, "neighbours")
    assert {row["chunk_id"] for row in rows} == set(owners), "every chunk is a query"
    for row in rows:
        assert all(owners[n]["split"] == "train" for n in row["neighbour_ids"] if n is not None)
    for row in rows_of(out, "training"):
        assert {documents[d]["split"] for d in row["document_ids"] if d is not None} == {row["split"]}
    assert any(row["split"] == "validation" for row in rows_of(out, "training"))


def test_without_decontamination_they_stay_and_exclude_cluster_keeps_them_apart(
    source, held_out, tiny_encoder, tmp_path
):
    out = tmp_path / "db"
    made(source, out, tiny_encoder, validation=[str(held_out)], decontaminate=False, exclude="cluster")
    assert {"a-0", "alone-3", "v-equal"} <= {row["key"] for row in rows_of(out, "documents")}
    assert_neighbours(out, other_cluster)
    verified(out)


def test_a_file_that_is_input_and_validation_is_validation(source, held_out, tiny_encoder, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for path in (source, held_out):
        shutil.copy(path, folder / path.name)
    made(folder, tmp_path / "db", tiny_encoder, validation=[str(folder / held_out.name)], until="corpus")
    splits = Counter((row["key"].startswith("v-"), row["split"]) for row in rows_of(tmp_path / "db", "documents"))
    assert set(splits) == {(True, "validation"), (False, "train")}


def test_validation_beside_a_corpus_moves_none_of_its_shards(source, held_out, kept, tiny_encoder, tmp_path):
    made(source, tmp_path / "db", tiny_encoder, validation=[str(held_out)], decontaminate=False, until="chunk")
    with_validation = {s["path"]: s["rows"] for s in manifest_of(tmp_path / "db")["tables"]["documents"]["shards"]}
    for shard in manifest_of(kept)["tables"]["documents"]["shards"]:
        assert with_validation[shard["path"]] == shard["rows"]


def test_a_fraction_is_drawn_by_content_and_seed_and_equal_texts_fall_together(tiny_encoder, tmp_path):
    records = [{"id": f"{n}-{copy}", "text": " ".join(words_of(n, 20))} for n in range(150) for copy in range(2)]
    source = write_jsonl(tmp_path / "in.jsonl", records)

    def splits(out: str, records: Path = source, **settings: Any) -> dict[str, str]:
        made(records, tmp_path / out, tiny_encoder, validation_fraction=0.2, until="corpus", **settings)
        return {row["key"]: row["split"] for row in rows_of(tmp_path / out, "documents")}

    first = splits("first")
    assert all(first[f"{n}-0"] == first[f"{n}-1"] for n in range(150))
    assert 0.1 < sum(split == "validation" for split in first.values()) / 300 < 0.3
    assert splits("other-seed", seed=1) != first
    assert splits("reversed", write_jsonl(tmp_path / "reversed.jsonl", records[::-1])) == first


def test_how_many_chunks_are_held_out_of_the_index_is_recorded_and_not_counted_again(tiny_encoder, tmp_path):
    """Counted by the workers, shard by shard: the driver reads no table for it."""
    records = [{"id": str(n), "text": " ".join(words_of(n, 40 + n))} for n in range(60)]
    source = write_jsonl(tmp_path / "in.jsonl", records)
    settings = {"validation_fraction": 0.3, "shard_bytes": "4KiB", "index_key": "IVF4,SQ8", "min_recall": 0.0}
    made(source, tmp_path / "db", tiny_encoder, until="index", **settings)
    manifest = manifest_of(tmp_path / "db")
    held_out: Counter[str] = Counter()
    for row in rows_of(tmp_path / "db", "documents"):
        if row["split"] == "validation":
            held_out[str(row["document_id"] >> 32)] += row["n_chunks"]
    assert manifest["stages"]["chunk"]["details"] == {"validation_chunks": dict(held_out)}
    indexed = sum(shard["rows"] for shard in manifest["tables"]["index"]["shards"])
    assert indexed == len(rows_of(tmp_path / "db", "chunks")) - held_out.total()
    assert held_out.total() > 0


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"validation": ["x.jsonl"], "validation_fraction": 0.1}, UsageError, "not both"),
        ({"dedup": "off", "exclude": "cluster"}, UsageError, "exclude cluster"),
        ({"dedup": "off", "validation_fraction": 0.1}, UsageError, "no-decontaminate"),
        ({"validation_fraction": 1.0}, UsageError, "validation-fraction 1.0"),
        ({"dedup": "sometimes"}, UsageError, "sometimes"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_before_anything_is_written(
    source, tiny_encoder, tmp_path, settings, error, says
):
    with pytest.raises(error, match=says):
        made(source, tmp_path / "db", tiny_encoder, **settings)
    assert not (tmp_path / "db").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"validation": ["copy.jsonl"]}, r"every training document is a validation document.*no-decontaminate"),
        ({"validation_fraction": 0.9999999}, "fell to --validation-fraction"),
        ({"validation": ["blank.jsonl"]}, "no record of --validation can be kept"),
        ({"validation": ["missing.jsonl"]}, "--validation: .*missing"),
    ],
    ids=str,
)
def test_a_useless_validation_is_refused_and_costs_no_database(
    source, kept, tiny_encoder, tmp_path, monkeypatch, settings, says
):
    monkeypatch.chdir(tmp_path)
    shutil.copy(source, "copy.jsonl")
    write_jsonl(tmp_path / "blank.jsonl", [{"id": "x", "text": " "}, {"id": "y"}])
    shutil.copytree(kept, "db")
    before = stamps(tmp_path / "db")
    for out in ("db", "new"):
        with pytest.raises(InputError, match=says):
            made(source, tmp_path / out, tiny_encoder, **settings)
    assert stamps(tmp_path / "db") == before
    assert not (tmp_path / "new").exists()


def test_decontaminating_a_database_of_nothing_but_copies_is_refused_and_costs_nothing(source, tiny_encoder, tmp_path):
    shutil.copy(source, tmp_path / "copy.jsonl")
    settings = {"validation": [str(tmp_path / "copy.jsonl")], "until": "chunk"}
    made(source, tmp_path / "db", tiny_encoder, decontaminate=False, **settings)
    before = stamps(tmp_path / "db")
    with pytest.raises(InputError, match="every training document is a validation document"):
        made(source, tmp_path / "db", tiny_encoder, **settings)
    assert stamps(tmp_path / "db") == before


def test_when_every_training_document_is_a_near_duplicate_of_a_validation_one_nothing_is_left_behind(
    tiny_encoder, tmp_path
):
    words = words_of(1)
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": varied(words, 0)}, {"text": varied(words, 1)}])
    held_out = write_jsonl(tmp_path / "valid.jsonl", [{"text": varied(words, 2)}])
    with pytest.raises(InputError, match=r"near-duplicate of a validation document.*no-decontaminate"):
        made(source, tmp_path / "db", tiny_encoder, validation=[str(held_out)])
    assert not (tmp_path / "db").exists()


def test_a_fraction_that_takes_no_document_says_so(tiny_encoder, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "one"}, {"text": "two"}])
    ran = retrodb("build", source, "--out", tmp_path / "db", "--until", "corpus", "--validation-fraction", "0.0000001")
    assert (ran.code, "none of 2 documents" in ran.err) == (0, True)


def test_by_the_command_line_and_a_file_of_settings(source, held_out, tiny_encoder, tmp_path):
    config = tmp_path / "retrodb.toml"
    config.write_text(f'validation = ["{held_out}"]\ndecontaminate = false\ndedup = "drop"\n')
    common = ["--encoder", tiny_encoder, "--shard-bytes", "12KiB", "--until", "chunk", "--json"]
    ran = retrodb("build", source, "--out", tmp_path / "db", "--config", config, *common)
    assert ran.code == 0, ran.err
    assert ran.json["documents"]["dropped"].get("validation_duplicate", 0) == 0
    assert ran.json["documents"]["dropped"]["near_duplicate"] > 0
    ran = retrodb("build", source, "--out", tmp_path / "db", "--config", config, "--decontaminate", *common)
    assert ran.code == 0, ran.err
    assert ran.json["documents"]["dropped"]["validation_duplicate"] == 4
    assert "decontaminate: False -> True" in ran.err


# -- killed, changed, damaged ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dropped(source, held_out, tiny_encoder, tmp_path_factory) -> Path:
    """Everything at once: documents removed by both rules, and clusters left. Never to be changed."""
    out = tmp_path_factory.mktemp("dropped") / "db"
    made(source, out, tiny_encoder, validation=[str(held_out)], dedup="drop")
    return out


def assert_same(found: Path, expected: Path) -> None:
    assert digests(found, TABLES) == digests(expected, TABLES)
    assert manifest_of(found)["stages"] == manifest_of(expected)["stages"]
    assert strays(found) == []


def arguments(source: Path, held_out: Path, out: Path, encoder: Path) -> list[object]:
    settings = ["--shard-bytes", "12KiB", "--precision", "fp32", "--chunk-tokens", 32, "--sequence-tokens", 128]
    return ["build", source, "--out", out, "--encoder", encoder, "--validation", held_out, "--dedup", "drop", *settings]


def test_killed_in_every_step_it_ends_as_an_undisturbed_build(source, held_out, dropped, tiny_encoder, tmp_path):
    out = tmp_path / "db"
    made(source, out, tiny_encoder, validation=[str(held_out)], dedup="drop", until="corpus")

    def there(pattern: str) -> bool:
        return any((out / ".build").glob(pattern))

    for step in ("dedup-*/sketch-*/*", "dedup-*/pair/*", "dedup-*/compare/*", "dedup-*/[0-9]*", "chunk-*/[0-9]*"):
        running = Running.start(*arguments(source, held_out, out, tiny_encoder), "--workers", 1)
        running.wait_for(lambda step=step: there(step))  # type: ignore[misc]
        running.kill()
    made(source, out, tiny_encoder, validation=[str(held_out)], dedup="drop")
    assert_same(out, dropped)


@pytest.mark.parametrize("report", ["dedup", "recall", "leakage"])
@pytest.mark.parametrize("how", ["deleted", "garbled"])
def test_a_lost_or_changed_report_is_found_and_written_again(source, kept, tiny_encoder, tmp_path, report, how):
    shutil.copytree(kept, tmp_path / "db")
    path = tmp_path / "db" / "reports" / f"{report}.json"
    path.unlink() if how == "deleted" else path.write_text("{}")
    ran = retrodb("verify", tmp_path / "db")
    assert (ran.code, f"reports/{report}.json" in ran.err) == (4, True)
    assert len(made(source, tmp_path / "db", tiny_encoder).done) == 1
    assert {n: d for n, (_, d) in stamps(tmp_path / "db").items()} == {n: d for n, (_, d) in stamps(kept).items()}


def test_a_dry_run_tells_that_damaged_duplicates_take_the_source_and_the_chunk_stage_too(
    source, kept, tiny_encoder, tmp_path
):
    shutil.copytree(kept, tmp_path / "db")
    damage(next((tmp_path / "db" / "duplicates").iterdir()))
    settings = ["--encoder", tiny_encoder, "--shard-bytes", "12KiB", "--precision", "fp32", "--chunk-tokens", 32]
    ran = retrodb("build", source, "--out", tmp_path / "db", *settings, "--sequence-tokens", 128, "--dry-run", "--json")
    told = [stage["stage"] for stage in ran.json["stages"] if stage["action"] == "repair"]
    assert told == ["corpus", "dedup", "chunk"]
    assert set(made(source, tmp_path / "db", tiny_encoder).done) == set(told)


def test_a_dry_run_tells_that_the_source_is_read_again(source, dropped, tiny_encoder):
    before = stamps(dropped)
    settings = ["--encoder", tiny_encoder, "--shard-bytes", "12KiB", "--precision", "fp32", "--chunk-tokens", 32]
    ran = retrodb("build", source, "--out", dropped, *settings, "--sequence-tokens", 128, "--dry-run", "--json")
    assert {stage["action"] for stage in ran.json["stages"]} == {"make again"}
    assert stamps(dropped) == before


@pytest.mark.parametrize("before", ["dedup", "report"])
def test_readers_see_the_recorded_documents_while_they_are_finished_anew(source, tiny_encoder, tmp_path, before):
    """Killed in the chunk stage, the first time or once more: what the manifest names is there, to the byte."""
    out = tmp_path / "db"
    made(source, out, tiny_encoder, dedup="drop", until=before, no_text=True)
    settings = ["--shard-bytes", "12KiB", "--precision", "fp32", "--chunk-tokens", 16, "--sequence-tokens", 128]
    given = ["build", source, "--out", out, "--encoder", tiny_encoder, "--dedup", "drop", "--no-text", *settings]
    running = Running.start(*given, "--workers", 1)
    assert running.wait_for(lambda: any((out / ".build").glob("chunk-*/0000[1-9].json")))
    running.kill()
    assert "chunk" not in manifest_of(out)["stages"]
    for shard in manifest_of(out)["tables"]["documents"]["shards"]:
        assert hashlib.sha256((out / shard["path"]).read_bytes()).hexdigest() == shard["sha256"], shard["path"]
    assert retrodb("verify", out).code == 0


def test_a_shard_that_was_damaged_before_its_stage_was_recorded_is_made_again(source, kept, tiny_encoder, tmp_path):
    out = tmp_path / "db"
    made(source, out, tiny_encoder, until="chunk")
    running = Running.start(
        *("build", source, "--out", out, "--encoder", tiny_encoder, "--shard-bytes", "12KiB", "--precision", "fp32"),
        *("--chunk-tokens", 32, "--sequence-tokens", 128, "--workers", 1),
    )
    assert running.wait_for(lambda: any((out / ".build").glob("embed-*/0000[1-9].json")))
    running.kill()
    receipt = next((out / ".build").glob("embed-*/0000[0-9].json"))
    damage(out / json.loads(receipt.read_text())["shards"]["embeddings"]["path"])
    made(source, out, tiny_encoder)
    assert digests(out, TABLES) == digests(kept, TABLES)


def test_other_duplicates_are_found_in_the_documents_as_they_were_read(
    source, held_out, kept, dropped, tiny_encoder, tmp_path
):
    """Removed documents are not in the database any more: the source is read again."""
    shutil.copytree(dropped, tmp_path / "db")
    made(source, tmp_path / "db", tiny_encoder)
    assert_same(tmp_path / "db", kept)
    made(source, tmp_path / "db", tiny_encoder, dedup="drop")
    made(source, tmp_path / "db", tiny_encoder, dedup="off")
    made(source, tmp_path / "db", tiny_encoder, validation=[str(held_out)], dedup="drop")
    assert_same(tmp_path / "db", dropped)


def test_other_chunks_of_the_same_documents_remove_nothing_twice(source, held_out, dropped, tiny_encoder, tmp_path):
    settings = {"validation": [str(held_out)], "dedup": "drop"}
    shutil.copytree(dropped, tmp_path / "db")
    outcome = made(source, tmp_path / "db", tiny_encoder, **settings, chunk_tokens=16)
    assert outcome.done[0] == "chunk"
    made(source, tmp_path / "alone", tiny_encoder, **settings, chunk_tokens=16)
    assert_same(tmp_path / "db", tmp_path / "alone")
    made(source, tmp_path / "db", tiny_encoder, **settings)
    assert_same(tmp_path / "db", dropped)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize(
    "tables", [("documents",), ("duplicates",), ("chunks",), ("documents", "duplicates", "chunks")]
)
def test_damage_is_repaired_to_the_same_bytes_though_documents_were_removed(
    source, held_out, tiny_encoder, tmp_path, tables, text
):
    settings = {"validation": [str(held_out)], "dedup": "drop", "no_text": None if text else True}
    settings = {name: value for name, value in settings.items() if value is not None}
    out = tmp_path / "db"
    made(source, out, tiny_encoder, **settings)
    before = {name: digest for name, (_, digest) in stamps(out).items()}
    for table in tables:
        shards = manifest_of(out)["tables"][table]["shards"]
        damage(out / shards[len(shards) // 2]["path"])
    assert retrodb("verify", out).code == 4
    made(source, out, tiny_encoder, **settings)
    assert {name: digest for name, (_, digest) in stamps(out).items()} == before


def test_a_tokenizer_learnt_again_is_the_same_though_documents_were_removed(source, held_out, tiny_encoder, tmp_path):
    settings = {"validation": [str(held_out)], "dedup": "drop", "tokenizer": "train:300", "until": "chunk"}
    made(source, tmp_path / "db", tiny_encoder, **settings)
    before = {name: digest for name, (_, digest) in stamps(tmp_path / "db").items()}
    (tmp_path / "db" / "tokenizer.json").unlink()
    made(source, tmp_path / "db", tiny_encoder, **settings)
    assert {name: digest for name, (_, digest) in stamps(tmp_path / "db").items()} == before
