"""Re-ranking by surface overlap: the scores against their formulas, the rows of a build against search-then-rerank."""

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build_topics, topics
from support import (
    Progress,
    build_here,
    digests,
    manifest_of,
    retrodb,
    rows_of,
    save_manifest,
    sha256,
    vectors_of,
    write_jsonl,
)

import retrodb as library
from retrodb.errors import InputError, RetrodbError, UsageError
from retrodb.neighbours import Neighbours, Reranking, Tokens, rerank, surface_scores
from retrodb.quality.findings import VerifyReport
from retrodb.quality.verify import verify_database
from retrodb.storage import Storage

M = 6

# -- the rule, written out ---------------------------------------------------------------------------------------------


def overlap(query: list[int], document: list[int], _: list[list[int]]) -> float:
    return float((Counter(query) & Counter(document)).total())


def bm25(query: list[int], document: list[int], candidates: list[list[int]], k1: float = 1.5, b: float = 0.75) -> float:
    """Robertson's formula with Lucene's idf; collection: the candidates; a term to the nearest 2^-20."""
    n, mean = len(candidates), sum(map(len, candidates)) / len(candidates)
    score = 0.0
    for token, often in Counter(query).items():
        df = sum(token in candidate for candidate in candidates)
        idf = math.log(1 + (n - df + 0.5) / (df + 0.5))
        tf = document.count(token)
        term = often * idf * (tf * (k1 + 1)) / (tf + k1 * (1 - b + b * len(document) / max(mean, 1)))
        score += round(term * 2**20)
    return score / 2**20


RULES: dict[str, Callable[[list[int], list[int], list[list[int]]], float]] = {"overlap": overlap, "bm25": bm25}


def best_of(
    method: str, query: list[int], candidates: list[tuple[float, int]], tokens: Callable[[int], list[int]], k: int
) -> tuple[list[int], list[int]]:
    """Ids by distance, and their ranks, of the k best of candidates (distance, id), which are in order."""
    texts = [tokens(chunk) for _, chunk in candidates]
    scores = [RULES[method](query, text, texts) for text in texts]
    order = sorted(range(len(candidates)), key=lambda at: (-scores[at], at))[:k]
    return [candidates[at][1] for at in sorted(order)], [order.index(at) for at in sorted(order)]


def padded(texts: list[list[int]], dtype: str = "uint16") -> Tokens:
    tokens = np.zeros((len(texts), M), dtype=dtype)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    return Tokens(tokens, np.array([len(text) for text in texts], dtype=np.int16))


# Few tokens, 0 among them (which padding holds as well), so that they repeat.
texts = st.lists(st.integers(0, 5), min_size=1, max_size=M)


@dataclass
class Stored:
    texts: list[list[int]]
    chunk_tokens: int = M

    def take(self, ids: np.ndarray) -> Tokens:
        assert (ids >= 0).all(), "a missing neighbour was looked up"
        return padded([self.texts[i] for i in ids])


@settings(max_examples=150, deadline=None)
@given(data=st.data(), method=st.sampled_from(["overlap", "bm25"]), dtype=st.sampled_from(["uint16", "uint32"]))
def test_scores_are_those_of_the_formula(data: st.DataObject, method: str, dtype: str) -> None:
    documents = data.draw(st.lists(texts, min_size=1, max_size=7))
    queries = data.draw(st.lists(texts, min_size=1, max_size=5))
    k = data.draw(st.integers(1, 8))
    places = np.array(
        data.draw(
            st.lists(
                st.lists(st.integers(-1, len(documents) - 1), min_size=k, max_size=k),
                min_size=len(queries),
                max_size=len(queries),
            )
        )
    )
    found = surface_scores(padded(queries, dtype), padded(documents, dtype), places, method)
    for row, query in enumerate(queries):
        candidates = [documents[at] for at in places[row] if at >= 0]
        expected = [RULES[method](query, documents[at], candidates) if at >= 0 else -math.inf for at in places[row]]
        assert found[row].tolist() == expected


@settings(max_examples=150, deadline=None)
@given(data=st.data(), method=st.sampled_from(["overlap", "bm25"]), budget=st.sampled_from([1, 1 << 20]))
def test_the_best_are_kept_in_the_order_of_their_distances_with_their_ranks(
    data: st.DataObject, method: str, budget: int
) -> None:
    stored = data.draw(st.lists(texts, min_size=2, max_size=9))
    k = data.draw(st.integers(1, 4))
    width = data.draw(st.integers(k, 6))
    rows = data.draw(
        st.lists(st.lists(st.integers(0, len(stored) - 1), max_size=width, unique=True), min_size=0, max_size=4)
    )
    queries = np.array([data.draw(st.integers(0, len(stored) - 1)) for _ in rows], dtype=np.int64)
    found = Neighbours.none(queries, width)
    for row, ids in enumerate(rows):
        found.neighbour_ids[row, : len(ids)] = ids
        found.neighbour_document_ids[row, : len(ids)] = np.array(ids, np.int64) + 100
        found.distances[row, : len(ids)] = np.arange(len(ids)) / 2
        found.n_valid[row] = len(ids)
    kept = rerank(found, Reranking(method, k), Stored(stored), budget_bytes=budget)
    assert kept.k == k
    assert kept.ranks is not None
    assert kept.ranks.shape == kept.distances.shape == (len(rows), k)
    for row, ids in enumerate(rows):
        candidates = [(at / 2, chunk) for at, chunk in enumerate(ids)]
        expected, ranks = best_of(method, stored[queries[row]], candidates, stored.__getitem__, k) if ids else ([], [])
        n = len(expected)
        assert kept.n_valid[row] == n
        assert kept.neighbour_ids[row].tolist() == expected + [-1] * (k - n)
        assert kept.ranks[row].tolist() == ranks + [-1] * (k - n)
        assert kept.neighbour_document_ids[row, :n].tolist() == [chunk + 100 for chunk in expected]
        assert kept.distances[row, :n].tolist() == [ids.index(chunk) / 2 for chunk in expected]
        assert np.isnan(kept.distances[row, n:]).all()


# -- a build -----------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {"neighbours": 4, "rerank": "bm25", "rerank_candidates": 12, "training_neighbours": 2}


@pytest.fixture(scope="module")
def reranked(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With validation documents, and more than one shard. Do not change it."""
    return build_topics(tmp_path_factory.mktemp("reranked"), tiny_encoder, shard_bytes="4KB", **SETTINGS)


def verify(db: Path, sample: float = 1.0) -> VerifyReport:
    return verify_database(library.open(str(db)), sample=sample)


@pytest.fixture
def copy(reranked: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reranked, tmp_path / "copy"))


def brute_force(db: Path, method: str, k: int, candidates: int) -> Iterator[tuple[list[int], list[float], list[int]]]:
    """Of each chunk: ids, distances and ranks, by comparing it with every training chunk of another document."""
    chunks, vectors = rows_of(db, "chunks"), vectors_of(db).astype(np.float32)
    tokens = {row["chunk_id"]: row["tokens"][: row["n_tokens"]] for row in chunks}
    held_out = {row["document_id"] for row in rows_of(db, "documents") if row["split"] == "validation"}
    for query, own in zip(chunks, vectors, strict=True):
        distances = np.add.reduce(np.square(vectors - own), axis=1, dtype=np.float32)
        allowed = sorted(
            (float(distance), row["chunk_id"])
            for distance, row in zip(distances, chunks, strict=True)
            if row["document_id"] not in {*held_out, query["document_id"]}
        )[:candidates]
        ids, ranks = best_of(method, tokens[query["chunk_id"]], allowed, tokens.__getitem__, k)
        of = {chunk: distance for distance, chunk in allowed}
        yield ids, [of[chunk] for chunk in ids], ranks


@pytest.mark.parametrize("method", ["overlap", "bm25"])
def test_rows_are_the_best_of_the_nearest(method: str, reranked: Path, tmp_path: Path, tiny_encoder: Path) -> None:
    db = reranked
    if method != "bm25":
        db = build_topics(tmp_path, tiny_encoder, **{**SETTINGS, "rerank": method, "until": "neighbours"})
    assert_best_of_nearest(db, method)


def assert_best_of_nearest(db: Path, method: str) -> None:
    rows = rows_of(db, "neighbours")
    assert len(rows) > 40
    for row, (ids, distances, ranks) in zip(rows, brute_force(db, method, 4, 12), strict=True):
        assert row["neighbour_ids"] == ids
        assert row["distances"] == distances
        assert row["neighbour_ranks"] == ranks
    assert any(row["neighbour_ranks"] != [0, 1, 2, 3] for row in rows), "nothing was re-ranked here"


def test_a_model_takes_the_best_by_rank_first(reranked: Path) -> None:
    """In training rows, in the memory-mapped join of any k, and in r(C)."""
    best = {
        row["chunk_id"]: [i for _, i in sorted(zip(row["neighbour_ranks"], row["neighbour_ids"], strict=True))]
        for row in rows_of(reranked, "neighbours")
    }
    seen = 0
    for row in rows_of(reranked, "training"):
        joined = np.array(row["neighbour_ids"]).reshape(-1, 2)
        for chunk, ids in zip(row["chunk_ids"], joined.tolist(), strict=True):
            assert chunk is None or ids == best[chunk][:2]
            seen += chunk is not None
    assert seen == len(best)
    db = library.open(str(reranked))
    from retrodb.training import TrainingTable

    table = TrainingTable(db.storage, db.manifest, str(reranked.parent / "cache"), 3, None)
    sample = table[0]
    for chunk, ids in zip(sample["chunk_ids"].tolist(), sample["neighbour_ids"].tolist(), strict=True):
        assert chunk < 0 or ids == best[chunk][:3]
    for row in rows_of(reranked, "leakage"):
        assert row["neighbour_id"] in (None, *best[row["chunk_id"]])


def test_a_build_without_it_has_no_trace_of_it(topics_db: Path) -> None:
    made_from = manifest_of(topics_db)["stages"]["neighbours"]["made_from"]
    assert set(made_from) == {"code", "index", "neighbours", "exclude"}
    assert "neighbour_ranks" not in rows_of(topics_db, "neighbours")[0]


def test_changing_it_makes_neighbours_again_and_what_follows_and_nothing_before(copy: Path, reranked: Path) -> None:
    source, held_out = reranked.parent / "topics.jsonl", reranked.parent / "held-out.jsonl"
    recorded = manifest_of(reranked)["config"]
    given = {name: recorded[name] for name in (*SETTINGS, "tokenizer", "chunk_tokens", "sequence_tokens", "encoder")}
    given |= {"dedup": "off", "decontaminate": False, "validation": [str(held_out)], "shard_bytes": 4000}

    def build(**changes: Any) -> tuple[str, ...]:
        return build_here([source], copy, **{**given, **changes}).done

    assert build() == ()
    assert build(rerank="overlap") == ("neighbours", "training", "report")
    assert build(rerank="overlap", rerank_candidates=13) == ("neighbours", "training", "report")
    plain = {"rerank": "none", "rerank_candidates": None}
    given = {name: value for name, value in given.items() if name not in plain}
    assert build() == ("neighbours", "training", "report")
    assert "neighbour_ranks" not in rows_of(copy, "neighbours")[0]
    assert build(rerank="bm25", rerank_candidates=12) == ("neighbours", "training", "report")
    assert digests(copy) == digests(reranked)


def test_other_shards_and_a_shuffle_give_the_same_rows(tmp_path: Path, tiny_encoder: Path, monkeypatch) -> None:
    """By texts: ids say which shard a chunk is in."""
    from retrodb.pipelines import retrieval_stages

    def rows(db: Path) -> list[tuple]:
        tokens = {row["chunk_id"]: tuple(row["tokens"]) for row in rows_of(db, "chunks")}
        return [
            (
                tokens[row["chunk_id"]],
                *((tokens[i], rank) for i, rank in zip(row["neighbour_ids"], row["neighbour_ranks"], strict=True)),
            )
            for row in rows_of(db, "neighbours")
        ]

    until = {"until": "neighbours", **SETTINGS}
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    one = build_topics(tmp_path / "one", tiny_encoder, **until)
    monkeypatch.setattr(retrieval_stages, "TOGETHER_BELOW", 0)
    many = build_topics(tmp_path / "many", tiny_encoder, shard_bytes="2KB", **until)
    assert len(manifest_of(many)["tables"]["chunks"]["shards"]) > 2
    assert sorted(rows(one)) == sorted(rows(many))


def test_an_approximate_index_is_gated_by_the_recall_of_its_candidates(tmp_path: Path, tiny_encoder: Path) -> None:
    db = build_topics(tmp_path, tiny_encoder, index_key="IVF4,Flat", until="neighbours", **SETTINGS)
    details = manifest_of(db)["stages"]["neighbours"]["details"]
    assert details["recall_at_10"] >= 0.95
    assert details["recall_at"] == 10
    assert verify(db).ok


def test_few_kept_neighbours_do_not_fail_the_gate_of_an_approximate_index(tmp_path: Path, tiny_encoder: Path) -> None:
    """Of two neighbours, recall@2 is measured, where nprobe is tuned as well."""
    db = build_topics(tmp_path, tiny_encoder, index_key="IVF4,Flat", until="neighbours", neighbours=2)
    assert manifest_of(db)["stages"]["neighbours"]["details"]["recall_at_10"] >= 0.95


# -- verification ------------------------------------------------------------------------------------------------------


def changed(db: Path, change: Callable[[list[dict[str, Any]]], None]) -> str:
    """Rewrite a shard of neighbours, and record it; its path."""
    manifest = manifest_of(db)
    entry = manifest["tables"]["neighbours"]["shards"][0]
    path = db / entry["path"]
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    entry |= {"bytes": path.stat().st_size, "sha256": sha256(path)}
    save_manifest(db, manifest)
    return str(entry["path"])


def swapped(rows: list[dict[str, Any]]) -> None:
    """A neighbour gives way to a near one that was not chosen: its true distance, in its place."""
    row = rows[3]
    row["neighbour_ranks"][0], row["neighbour_ranks"][1] = row["neighbour_ranks"][1], row["neighbour_ranks"][0]


def twice(rows: list[dict[str, Any]]) -> None:
    rows[2]["neighbour_ranks"][0] = rows[2]["neighbour_ranks"][1]


def missing(rows: list[dict[str, Any]]) -> None:
    rows[2]["neighbour_ranks"][0] = None


@pytest.mark.parametrize(
    ("change", "words", "sample"),
    [(swapped, "best by bm25", 1.0), (twice, "once each", 0.0), (missing, "once each", 0.0)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_verify_finds_wrong_ranks(change: Callable[[list], None], words: str, sample: float, copy: Path) -> None:
    path = changed(copy, change)
    report = verify(copy, sample)
    assert [words in problem.what for problem in report.problems if problem.path == path].count(True) == 1


def test_verify_finds_a_neighbour_that_was_not_the_best(copy: Path) -> None:
    """With the true distance of a chunk that is near but was not chosen, so that the row is right in itself."""
    chunks, vectors = rows_of(copy, "chunks"), vectors_of(copy).astype(np.float32)
    of = {row["chunk_id"]: at for at, row in enumerate(chunks)}
    held_out = {row["document_id"] for row in rows_of(copy, "documents") if row["split"] == "validation"}

    def other_neighbour(rows: list[dict[str, Any]]) -> None:
        row = rows[5]
        own = chunks[of[row["chunk_id"]]]
        distances = np.add.reduce(np.square(vectors - vectors[of[row["chunk_id"]]]), axis=1, dtype=np.float32)
        last = row["neighbour_ids"][-1]
        further = sorted(
            (float(distances[at]), chunk["chunk_id"], chunk["document_id"])
            for at, chunk in enumerate(chunks)
            if chunk["document_id"] not in {*held_out, own["document_id"]}
            and (float(distances[at]), chunk["chunk_id"]) > (row["distances"][-1], last)
        )[0]
        row["distances"][-1], row["neighbour_ids"][-1], row["neighbour_document_ids"][-1] = further

    path = changed(copy, other_neighbour)
    report = verify(copy)
    assert any("best by bm25 of the 12 nearest" in problem.what for problem in report.problems if problem.path == path)


def test_a_whole_database_is_verified(reranked: Path) -> None:
    report = verify(reranked)
    assert report.ok, report.problems
    assert report.checked["neighbours recomputed"] > 100


# -- what goes with it, and what does not ------------------------------------------------------------------------------


def test_a_refresh_keeps_it_and_additions_and_compactions_search_everything_anew(
    copy: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    from retrodb.pipelines.add import add
    from retrodb.pipelines.compact import compact
    from retrodb.pipelines.living import delete
    from retrodb.pipelines.progress import Silent
    from retrodb.pipelines.refresh import refresh
    from support import make_tiny_encoder

    from retrodb.config import RunSettings
    from retrodb.corpus import expand_inputs
    from retrodb.corpus.selection import Selection

    more = write_jsonl(tmp_path / "more.jsonl", topics(4, first=200))
    add(Storage(str(copy)), expand_inputs([str(more)]).files, RunSettings(workers=1), Silent())
    assert_best_of_nearest(copy, "bm25")
    delete(Storage(str(copy)), Selection(ids=(0,)), Silent())
    done = compact(Storage(str(copy)), RunSettings(workers=1), Silent())
    assert done.searched == len(rows_of(copy, "chunks"))
    assert_best_of_nearest(copy, "bm25")
    assert verify(copy).ok
    refresh(Storage(str(copy)), str(make_tiny_encoder(tmp_path / "other", seed=5)), RunSettings(workers=1), Silent())
    db = library.open(str(copy))
    assert db.manifest.stages["neighbours"].made_from["rerank"] == "bm25"
    assert verify(copy).ok


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"rerank": "tfidf"}, "rerank tfidf"),
        ({"rerank_candidates": 50}, "give rerank overlap or bm25"),
        (
            {"rerank": "bm25", "rerank_candidates": 5, "neighbours": 6, "training_neighbours": 1},
            "less than neighbours 6",
        ),
        ({"rerank": "bm25", "rerank_candidates": 0}, "rerank-candidates 0"),
    ],
    ids=str,
)
def test_settings_that_say_nothing_are_refused(flags: dict[str, Any], words: str) -> None:
    from retrodb.config import make_config

    with pytest.raises(UsageError, match=words):
        make_config({}, flags)


def test_the_command_line_plans_and_tells_it(reranked: Path) -> None:
    given = ["build", reranked.parent / "topics.jsonl", "--validation", reranked.parent / "held-out.jsonl", "--out"]
    given += [reranked, "--dry-run", "--rerank", "overlap", "--neighbours", 4, "--dedup", "off", "--no-decontaminate"]
    recorded = manifest_of(reranked)["config"]
    for name in ("encoder", "tokenizer", "chunk_tokens", "sequence_tokens"):
        given += [f"--{name.replace('_', '-')}", recorded[name]]
    planned = retrodb(*given, "--shard-bytes", "4KB", "--json").json
    why = {stage["stage"]: stage for stage in planned["stages"]}
    assert why["index"]["action"] == "up to date"
    assert why["neighbours"]["why"] == "rerank: bm25 -> overlap; rerank-candidates: 12 -> 40"
    assert why["training"]["action"] == "make again"
    told = retrodb("info", reranked)
    assert "4 a chunk, by bm25 of 12" in told.out


def test_a_build_that_ends_while_it_re_ranks_goes_on_and_a_lost_shard_is_made_again(
    reranked: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retrodb.pipelines import searching

    calls = []

    def cut_short(*given: Any) -> Neighbours:
        calls.append(given)
        if len(calls) == 2:
            raise MemoryError("here it ends")
        return rerank(*given)

    monkeypatch.setattr(searching, "rerank", cut_short)
    with pytest.raises(RetrodbError, match="here it ends"):
        build_topics(tmp_path, tiny_encoder, shard_bytes="4KB", **SETTINGS)
    db = build_topics(tmp_path, tiny_encoder, shard_bytes="4KB", **SETTINGS)
    shards = manifest_of(reranked)["tables"]["neighbours"]["shards"]
    assert len(calls) == len(shards) + 1, "what was done is not done again"
    tables = ("neighbours", "training", "leakage")
    assert digests(db, tables) == digests(reranked, tables)
    (db / shards[1]["path"]).unlink()
    build_topics(tmp_path, tiny_encoder, shard_bytes="4KB", **SETTINGS)
    assert digests(db, tables) == digests(reranked, tables)


def test_models_are_measured_with_it_and_exports_put_the_best_first(reranked: Path, tmp_path: Path) -> None:
    from retrodb.evaluation import EvaluationSettings
    from retrodb.evaluation.run import evaluate
    from retrodb.export.huggingface import export_huggingface
    from retrodb.export.rows import neighbour_rows
    from retrodb.learning import make_settings
    from retrodb.learning.run import train

    db = library.open(str(reranked))
    sizes = {"preset": "tiny", "width": 16, "layers": 2, "heads": 2, "steps": 2, "warmup": 1, "precision": "fp32"}
    train(db, str(tmp_path / "ckpt"), make_settings({}, sizes), Progress(), "cpu")
    found = evaluate(
        db, [str(tmp_path / "ckpt")], EvaluationSettings(neighbours=(0, 1, 4), draws=20), Progress(), device="cpu"
    )
    assert [one.name for one in found.conditions][:4] == ["off", "k=1", "k=4", "k=2"]
    settings = EvaluationSettings(neighbours=(5,))
    with pytest.raises(InputError, match="keeps 4 neighbours"):
        evaluate(db, [str(tmp_path / "ckpt")], settings, Progress(), device="cpu")
    stored = rows_of(reranked, "neighbours")
    best = {row["chunk_id"]: row["neighbour_ids"][row["neighbour_ranks"].index(0)] for row in stored}
    for shard in db.manifest.shards("chunks"):
        chunk_ids = db.storage.read_table(shard, ["chunk_id"])["chunk_id"].to_numpy()
        assert neighbour_rows(db, shard, chunk_ids).ids[:, 0].tolist() == [best[one] for one in chunk_ids]
    export_huggingface(db, str(tmp_path / "set"))
    exported = pq.ParquetDataset(tmp_path / "set" / "neighbours").read(["chunk_id", "neighbour_ranks"]).to_pylist()
    assert {row["chunk_id"]: row["neighbour_ranks"] for row in exported} == {
        row["chunk_id"]: row["neighbour_ranks"] for row in stored
    }
