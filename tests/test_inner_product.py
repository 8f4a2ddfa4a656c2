"""Inner product, end to end: the order of argsort, one metric an index, and nothing normalised on the way."""

from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import build_here, manifest_of, retrodb, save_manifest, vectors_of, write_jsonl

import retrodb as library
from retrodb.corpus.quickstart import quickstart_lines
from retrodb.errors import DamagedError, EncoderError, InputError, MismatchError
from retrodb.index import build_index_shard, choose_key, load_template, search_group, train_template
from retrodb.index.merged import merge_index
from retrodb.neighbours import Exclusion, find_neighbours


@dataclass
class Vectors:
    """Vectors in memory as every source that a search needs."""

    stored: np.ndarray
    nprobe: int = 1
    n_lists: int = 1
    raw_is_exact: bool = True

    def __post_init__(self) -> None:
        self.index = faiss.IndexIDMap(faiss.IndexFlat(self.stored.shape[1], faiss.METRIC_INNER_PRODUCT))
        self.index.add_with_ids(self.stored[::-1].astype(np.float32), np.arange(len(self.stored))[::-1].copy())
        self.largest_norm = float(np.linalg.norm(self.stored.astype(np.float64), axis=1).max())

    @property
    def ntotal(self) -> int:
        return int(self.index.ntotal)

    def search(self, queries: np.ndarray, candidates: int, nprobe: int) -> tuple[np.ndarray, np.ndarray]:
        return search_group(self.index, queries, candidates, nprobe)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        return self.stored[ids]

    def document_ids(self, ids: np.ndarray) -> np.ndarray:
        return ids

    def best(self, queries: np.ndarray, k: int) -> np.ndarray:
        nothing = Exclusion.of_nothing(len(queries))
        return find_neighbours(np.arange(len(queries)), queries, nothing, self, self, self, k, "ip", 1).neighbour_ids


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_metric_M1_exact_search_is_argsort_with_ties_by_ascending_id(data):
    seed = data.draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    n, d, k = (
        data.draw(st.integers(1, 200)),
        data.draw(st.sampled_from([2, 8, 33])),
        data.draw(st.sampled_from([1, 5, 60])),
    )
    whole = rng.integers(-3, 4, size=(n, d))  # small whole numbers: many ties, and products without rounding
    scale = 2.0 ** rng.integers(0, 12, size=(n, 1))  # norms that differ by a factor of thousands
    base = Vectors((whole * scale).astype(np.float16))
    queries = rng.integers(-3, 4, size=(4, d)).astype(np.float32)
    products = queries.astype(np.float64) @ base.stored.astype(np.float64).T
    expected = np.argsort(-products, axis=1, kind="stable")[:, :k]
    found = base.best(queries, k)
    assert np.array_equal(found[:, : expected.shape[1]], expected)
    assert (found[:, expected.shape[1] :] == -1).all()


def test_metric_M1_negative_scores_alone():
    base = Vectors(-np.arange(1, 50, dtype=np.float16)[:, None] * np.ones((1, 4), np.float16))
    assert base.best(np.ones((1, 4), np.float32), 10).tolist() == [list(range(10))]


def test_metric_M1_real_numbers_of_very_different_norm():
    rng = np.random.default_rng(5)
    stored = (rng.standard_normal((3_000, 64)) * 10.0 ** rng.uniform(-2, 3, size=(3_000, 1))).astype(np.float16)
    queries = rng.standard_normal((50, 64)).astype(np.float16).astype(np.float32)
    products = queries.astype(np.float64) @ stored.astype(np.float64).T
    expected = np.argsort(-products, axis=1, kind="stable")[:, :20]
    assert np.array_equal(Vectors(stored).best(queries, 20), expected)


# -- in a build --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def topics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [line for line in quickstart_lines() if len(line) < 6_000][:20]
    return write_jsonl(tmp_path_factory.mktemp("ip") / "topics.jsonl", lines)


@pytest.fixture(scope="module")
def ip_db(topics: Path, tiny_encoder: Path) -> Path:
    out = topics.parent / "db"
    build_here(
        [topics], out, metric="ip", unit="block", chunk_tokens=64, encoder=str(tiny_encoder), shard_bytes="16KiB"
    )
    return out


def test_metric_M1_a_built_database_answers_as_argsort(ip_db):
    db = library.open(str(ip_db))
    stored = vectors_of(ip_db).astype(np.float64)
    ids = np.concatenate([table["chunk_id"].to_numpy() for table in db.chunks()])
    rng = np.random.default_rng(1)
    for query in rng.integers(-4, 5, size=(20, 32)).astype(np.float32):
        scores = stored @ query
        hits = db.search(query, k=15)
        assert [hit.chunk_id for hit in hits] == ids[np.argsort(-scores, kind="stable")[:15]].tolist()
        assert np.allclose([hit.distance for hit in hits], np.sort(scores)[::-1][:15], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_metric_M1_an_approximate_index_is_trained_for_it_and_passes_the_gate(topics, tiny_encoder, tmp_path):
    for key in ("IVF8,Flat", "OPQ8_32,IVF8,PQ8x8"):
        out = tmp_path / key.replace(",", "-")
        given = {"metric": "ip", "unit": "block", "chunk_tokens": 32, "encoder": str(tiny_encoder), "index_key": key}
        build_here([topics], out, min_recall=0.95, **given)
        manifest = manifest_of(out)
        assert manifest["stages"]["neighbours"]["details"]["recall_at_10"] >= 0.95
        template = load_template((out / "index" / "quantiser.faiss").read_bytes(), 32, "ip")
        assert template.metric_type == faiss.METRIC_INNER_PRODUCT


def test_metric_M2_an_index_of_one_metric_refuses_queries_of_another(ip_db, tmp_path):
    db = library.open(str(ip_db))
    assert db.metric == "ip"
    with pytest.raises(MismatchError, match="built with metric 'ip'"):
        db.search(np.ones(32), metric="l2")
    ran = retrodb("query", ip_db, "generators", "--metric", "l2")
    assert (ran.code, "'ip'" in ran.err) == (3, True)


def test_metric_M2_a_manifest_that_says_another_metric_is_not_believed(ip_db, tmp_path):
    import shutil

    lying = tmp_path / "db"
    shutil.copytree(ip_db, lying)
    manifest = manifest_of(lying)
    manifest["stages"]["index"]["details"]["metric"] = "l2"
    save_manifest(lying, manifest)
    with pytest.raises(DamagedError, match="not the index that was recorded"):
        library.open(str(lying)).search(np.ones(32))
    ran = retrodb("query", lying, "generators")
    assert ran.code == 4
    assert "Traceback" not in ran.err


def test_metric_M2_shards_of_another_metric_are_not_merged(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((400, 8)).astype(np.float32)
    template = train_template(vectors, "IVF8,Flat", "ip", 0)
    with pytest.raises(DamagedError, match="metric"):
        merge_index(None, template, [], 8, "l2", tmp_path / "merged")  # type: ignore[arg-type]
    with pytest.raises(DamagedError, match="metric"):
        build_index_shard(template, [], 8, "l2")


def test_metric_M3_nothing_is_normalised(ip_db):
    db = library.open(str(ip_db))
    stored = vectors_of(ip_db).astype(np.float32)
    norms = np.linalg.norm(stored, axis=1)
    assert norms.std() > 1e-3, "this encoder has no Normalize module, and nothing else normalises"
    assert not db.encoder_identity.normalise
    query = np.full(32, 3.0, dtype=np.float32)
    assert db.search(2 * query, k=1)[0].distance == pytest.approx(2 * db.search(query, k=1)[0].distance, rel=1e-6)
    assert manifest_of(ip_db)["stages"]["index"]["details"]["largest_norm"] == pytest.approx(norms.max(), rel=1e-6)


@pytest.mark.slow
def test_metric_M3_the_exact_rescore_is_on_for_codes_too(topics, tiny_encoder, tmp_path):
    given = {"metric": "ip", "unit": "block", "chunk_tokens": 32, "encoder": str(tiny_encoder), "index_key": "IVF8,SQ4"}
    build_here([topics], tmp_path / "db", min_recall=0.5, **given)
    db = library.open(str(tmp_path / "db"))
    stored = vectors_of(tmp_path / "db").astype(np.float32)
    ids = np.concatenate([table["chunk_id"].to_numpy() for table in db.chunks()])
    query = np.random.default_rng(2).standard_normal(32).astype(np.float16).astype(np.float32)
    for hit in db.search(query, k=5):
        exact = float(stored[np.flatnonzero(ids == hit.chunk_id)[0]] @ query)
        assert hit.distance == pytest.approx(exact, rel=1e-5), "scores are those of the stored vectors, not of codes"


def test_metric_M3_numbers_beyond_float16_are_an_error_never_infinity(ip_db, tiny_encoder):
    db = library.open(str(ip_db))
    for bad in (70_000.0, np.nan, np.inf):
        with pytest.raises(InputError, match="65,504"):
            db.search(np.full(32, bad), k=1)
        with pytest.raises(InputError, match="65,504"):
            db.candidates(np.full((1, 32), bad))
    encoder = db.encoder()
    from dataclasses import replace

    loud = replace(encoder, network=lambda batch: encoder.network(batch) * 1e6)
    with pytest.raises(EncoderError, match="beyond 65,504, which float16 cannot hold"):
        loud.embed(["a text"])


def test_metric_M1_the_key_is_chosen_for_it():
    assert choose_key(5_000_000, 128, 16 * 10**9, "ip", None).key.count("IVF") == 1
