"""Defects of earlier tools that no room's own tests guard against, and the table that names the guard of each."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import pytest
from retrodb.pipelines.plan import dry_run
from support import build_here, digests, manifest_of, stamps

import retrodb
from retrodb.config import make_config
from retrodb.corpus import expand_inputs
from retrodb.errors import InputError
from retrodb.index import merge, search_group
from retrodb.manifest import STAGES
from retrodb.neighbours import Exclusion, find_neighbours
from retrodb.quality.verify import verify_database
from retrodb.storage import Storage

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "defects.md"


# -- the table --------------------------------------------------------------------------------------------------------


def named_tests() -> list[tuple[str, str]]:
    return re.findall(r"`(tests/\w+\.py)::(\w+)`", TABLE.read_text(encoding="utf-8"))


def test_every_test_that_the_table_of_defects_names_exists():
    assert len(named_tests()) >= 40
    for file, name in named_tests():
        found = re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert found, f"{file}::{name}"


def test_every_row_of_the_table_of_defects_names_a_test_or_says_that_there_is_none():
    rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("|")][2:]
    assert len(rows) == 25
    for row in rows:
        assert re.search(r"`tests/\w+\.py::\w+`|not yet \(", row), row


# -- a constant for "none" --------------------------------------------------------------------------------------------


@dataclass
class Far:
    """Single-chunk documents of one shard, far apart: a source of candidates, documents and vectors."""

    vectors: np.ndarray
    metric: str
    raw_is_exact: bool = True
    nprobe: int = 1
    n_lists: int = 1
    largest_norm: float | None = None

    def __post_init__(self) -> None:
        kind = faiss.METRIC_L2 if self.metric == "l2" else faiss.METRIC_INNER_PRODUCT
        self.index = faiss.IndexIDMap(faiss.IndexFlat(self.vectors.shape[1], kind))
        self.index.add_with_ids(self.vectors.astype(np.float32), np.arange(len(self.vectors)))

    @property
    def ntotal(self) -> int:
        return self.index.ntotal

    def search(self, queries: np.ndarray, candidates: int, nprobe: int) -> tuple[np.ndarray, np.ndarray]:
        return search_group(self.index, queries, candidates, nprobe)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        return self.vectors[ids]

    def document_ids(self, ids: np.ndarray) -> np.ndarray:
        return ids


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_a_real_neighbour_however_far_comes_before_a_missing_one(metric):
    ladder = np.array([[1.0], [100.0], [-250.0], [600.0]])
    base = Far((ladder * np.ones((1, 8))).astype(np.float16), metric)
    ids = np.arange(4)
    found = find_neighbours(ids, base.vectors, Exclusion.of_chunks(ids, ids, "document"), base, base, base, 6, metric)
    exact = base.vectors.astype(np.float64)
    for query in range(4):
        scores = ((exact - exact[query]) ** 2).sum(axis=1) if metric == "l2" else -(exact @ exact[query])
        expected = [int(row) for row in np.argsort(scores) if row != query]
        assert scores[expected].max() > 1_000
        assert found.neighbour_ids[query].tolist() == [*expected, -1, -1, -1]
        assert found.n_valid[query] == 3


@pytest.mark.parametrize(("metric", "sign"), [("l2", 1), ("ip", -1)])
def test_merging_puts_what_is_missing_behind_the_farthest(metric, sign):
    nearer = (np.array([[sign * 9e4, sign * np.inf]], np.float32), np.array([[7, -1]]))
    farther = (np.array([[sign * 8e8]], np.float32), np.array([[3]]))
    assert merge([nearer, farther], 3, metric)[1].tolist() == [[7, 3, -1]]


# -- two featurisers, and embedding more than once --------------------------------------------------------------------


@pytest.mark.slow
def test_a_query_with_the_text_of_a_chunk_is_featurised_as_the_chunk_was(built):
    """Another special token, length or casing would put the query elsewhere."""
    db = retrodb.open(str(built))
    chosen = [(shard.number << 32) + row for shard in db.manifest.shards("chunks")[:4] for row in (0, shard.rows // 2)]
    for chunk_id in chosen:
        (hit, *_) = db.search(db.chunk(chunk_id).text, k=1)
        assert hit.distance < 1e-3  # batches differ in the last bits
        assert db.chunk(hit.chunk_id).text == db.chunk(chunk_id).text


@pytest.mark.slow
def test_a_build_embeds_each_chunk_once_and_nothing_else(quickstart_corpus, tiny_encoder, tmp_path, monkeypatch):
    """The training sample of the index, what is added to it and the queries are all read from the stored vectors."""
    from retrodb.encoding.encoder import Encoder

    embedded = []
    original = Encoder.vectors
    monkeypatch.setattr(Encoder, "vectors", lambda self, rows: embedded.append(rows.count) or original(self, rows))
    settings = {"shard_bytes": "64KiB", "index_key": "IVF4,SQ8", "min_recall": 0.0}
    build_here([quickstart_corpus], tmp_path / "db", encoder=str(tiny_encoder), **settings)
    assert list(manifest_of(tmp_path / "db")["stages"]) == list(STAGES)
    assert sum(embedded) == retrodb.open(str(tmp_path / "db")).manifest.rows("chunks")


# -- a stage that needs what it does not use --------------------------------------------------------------------------


@pytest.fixture
def no_encoder(monkeypatch):
    """The package of the embedded encoder is not installed, and there is no network."""
    monkeypatch.setattr("retrodb.encoding.source.find_spec", lambda name: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def planned(inputs, out, **settings):
    """The stages of a dry run, and what it says of the index."""
    config, run = make_config({}, {"workers": 1, **settings})
    plan = dry_run(expand_inputs([str(path) for path in inputs]).files, Storage(str(out)), config, run)
    return [stage["stage"] for stage in plan["stages"]], plan["index"]


@pytest.mark.parametrize("given", [{}, {"encoder": "nowhere/at/all"}, {"device": "cuda"}], ids=str)
def test_chunking_needs_no_encoder_and_no_gpu_and_a_later_build_goes_on(
    quickstart_corpus, tiny_encoder, tmp_path, no_encoder, given
):
    out = tmp_path / "db"
    assert planned([quickstart_corpus], out, until="chunk", **given) == (["corpus", "dedup", "chunk"], None)
    assert build_here([quickstart_corpus], out, until="corpus", **given).done == ("corpus",)
    assert build_here([quickstart_corpus], out, until="chunk", **given).done == ("dedup", "chunk")
    assert build_here([quickstart_corpus], out, until="chunk", **given).done == ()
    assert verify_database(retrodb.open(str(out)), sample=1.0).ok
    before = stamps(out)
    with pytest.raises(InputError, match="encoder"):
        build_here([quickstart_corpus], out, until="embed", encoder="nowhere/at/all")
    with pytest.raises(InputError, match="encoder"):
        planned([quickstart_corpus], out, encoder="nowhere/at/all")
    assert stamps(out) == before
    done = build_here([quickstart_corpus], out, encoder=str(tiny_encoder)).done
    assert done == STAGES[3:]
    build_here([quickstart_corpus], tmp_path / "at-once", encoder=str(tiny_encoder))
    assert digests(out) == digests(tmp_path / "at-once")


def test_chunking_with_the_encoders_own_tokenizer_needs_that_and_no_weights(quickstart_corpus, tiny_encoder, tmp_path):
    settings = {"tokenizer": "encoder", "until": "chunk"}
    with pytest.raises(InputError, match="nowhere"):
        build_here([quickstart_corpus], tmp_path / "db", encoder="nowhere/at/all", **settings)
    assert not (tmp_path / "db").exists()
    weightless = shutil.copytree(tiny_encoder, tmp_path / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    assert build_here([quickstart_corpus], tmp_path / "db", encoder=str(weightless), **settings).done[-1] == "chunk"
