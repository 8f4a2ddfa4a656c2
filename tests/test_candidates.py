"""Candidates of a database of blocks: the null document in slot 0, exclusion, duplicates merged, every query kept."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import build_here, rows_of, vectors_of, write_jsonl

import retrodb
from retrodb.candidates import NULL_ID
from retrodb.corpus.quickstart import quickstart_lines
from retrodb.database import Database
from retrodb.errors import InputError, MismatchError

EXCLUDES = ("self", "document", "neardup")


def records() -> list[dict[str, str]]:
    """Real texts; one twice as it is, one nearly twice, and a key that two different documents have."""
    real = [json.loads(line) for line in quickstart_lines() if 2_000 < len(line) < 8_000][:8]
    texts = [{"id": r["id"], "title": r.get("title") or r["id"], "text": r["text"]} for r in real]
    equal = {**texts[0], "id": "equal"}
    near = {**texts[1], "id": "near", "text": texts[1]["text"] + " again"}
    texts[3]["id"] = texts[2]["id"]
    return [*texts, equal, near]


@pytest.fixture(scope="module")
def blocks_db(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blocks")
    source = write_jsonl(folder / "topics.jsonl", records())
    given = {"unit": "block", "metric": "ip", "encoder": str(tiny_encoder), "chunk_tokens": 64, "shard_bytes": "8KiB"}
    build_here([source], folder / "db", neighbours=5, **given)
    return folder / "db"


class Brute:
    """The same by hand, from the files alone."""

    def __init__(self, database: Path) -> None:
        self.blocks = rows_of(database, "chunks")
        self.documents = {row["document_id"]: row for row in rows_of(database, "documents")}
        self.vectors = vectors_of(database).astype(np.float32)

    def best(self, query: np.ndarray, own: int | None, documents: set[int], exclude: str, count: int) -> list[int]:
        """Chunk ids of the best allowed blocks: by inner product, ties by id, one of each uid."""
        scores = np.add.reduce(np.multiply(self.vectors, query), axis=1, dtype=np.float32)
        order = sorted(range(len(scores)), key=lambda row: (-scores[row], self.blocks[row]["chunk_id"]))
        uid = None if own is None else next(b["uid"] for b in self.blocks if b["chunk_id"] == own)
        clusters = {self.documents[d]["cluster_id"] for d in documents} - {None}
        found: list[int] = []
        seen = {uid}
        for row in order:
            block = self.blocks[row]
            document = self.documents[block["document_id"]]
            if block["uid"] in seen or (exclude != "self" and document["document_id"] in documents):
                continue
            if exclude == "neardup" and document["cluster_id"] in clusters:
                continue
            seen.add(block["uid"])
            found.append(block["chunk_id"])
        return found[:count]


@pytest.fixture(scope="module")
def brute(blocks_db: Path) -> Brute:
    return Brute(blocks_db)


@pytest.fixture(scope="module")
def db(blocks_db: Path) -> Database:
    return retrodb.open(str(blocks_db))


QUERY = st.lists(st.integers(-8, 8), min_size=32, max_size=32).map(lambda v: np.array(v, dtype=np.float32) / 4)


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_exclusion_E1_E2_candidates_are_those_of_brute_force(db, brute, data):
    rows = data.draw(st.lists(st.integers(0, len(brute.blocks) - 1), min_size=1, max_size=6))
    exclude = data.draw(st.sampled_from(EXCLUDES))
    k = data.draw(st.sampled_from([1, 2, 8, len(brute.blocks) + 3]))
    own_vectors = data.draw(st.booleans())
    queries = brute.vectors[rows] if own_vectors else np.stack([data.draw(QUERY) for _ in rows])
    own = [brute.blocks[row]["chunk_id"] for row in rows]
    found = db.candidates(queries, k, own_chunks=own, exclude=exclude)
    assert found.ids.shape == found.document_ids.shape == found.scores.shape == (len(rows), k)
    for at, row in enumerate(rows):
        expected = brute.best(queries[at], own[at], {brute.blocks[row]["document_id"]}, exclude, k - 1)
        assert found.n_valid[at] == len(expected), "k valid, or the database is exhausted"
        assert found.ids[at].tolist() == [NULL_ID, *expected, *[-1] * (k - 1 - len(expected))]
        assert np.isnan(found.scores[at, 1 + len(expected) :]).all()


@pytest.mark.parametrize("exclude", EXCLUDES)
def test_exclusion_E1_never_the_own_block_nor_what_is_excluded_with_it(db, brute, exclude):
    own = np.array([block["chunk_id"] for block in brute.blocks])
    found = db.candidates(brute.vectors, len(own) + 1, own_chunks=own, exclude=exclude)
    by_id = {block["chunk_id"]: block for block in brute.blocks}
    for block, ids in zip(brute.blocks, found.ids, strict=True):
        others = [by_id[i] for i in ids[1:].tolist() if i != -1]
        assert block["uid"] not in {other["uid"] for other in others}, "nor an equal of the own block"
        document = brute.documents[block["document_id"]]
        for other in others:
            theirs = brute.documents[other["document_id"]]
            assert exclude == "self" or theirs["document_id"] != document["document_id"]
            assert exclude != "neardup" or None in (a := (theirs["cluster_id"], document["cluster_id"])) or a[0] != a[1]


def test_exclusion_E2_duplicates_are_merged_and_every_query_is_kept(db, brute):
    uids = [block["uid"] for block in brute.blocks]
    twice = [row for row, uid in enumerate(uids) if uids.count(uid) > 1]
    assert twice, "the corpus holds a document twice"
    found = db.candidates(brute.vectors, len(uids) + 1, exclude="self")
    assert (found.n_valid == len(set(uids))).all()
    by_id = {block["chunk_id"]: block["uid"] for block in brute.blocks}
    for ids in found.ids:
        kept = [by_id[i] for i in ids[1:].tolist() if i != -1]
        assert len(kept) == len(set(kept))


def test_exclusion_E3_by_the_document_where_the_query_was_cut_otherwise(db, brute):
    row = len(brute.blocks) // 2
    document = brute.blocks[row]["document_id"]
    key = brute.documents[document]["key"]
    query = brute.vectors[[row]]
    same_key = {d for d, r in brute.documents.items() if r["key"] == key}
    for exclude in ("document", "neardup"):
        by_id = db.candidates(query, 9, own_documents=[document], exclude=exclude)
        assert by_id.ids[0, 1:].tolist() == brute.best(query[0], None, {document}, exclude, 8)
        by_key = db.candidates(query, 9, own_keys=[key], exclude=exclude)
        assert by_key.ids[0, 1:].tolist() == brute.best(query[0], None, same_key, exclude, 8)
    with pytest.raises(InputError, match="own_chunks"):
        db.candidates(query, own_documents=[document], exclude="self")


def test_exclusion_E3_a_key_that_repeats_stands_for_all_its_documents(db, brute):
    keys = [row["key"] for row in brute.documents.values()]
    key = next(key for key in keys if keys.count(key) > 1)
    own = {d for d, row in brute.documents.items() if row["key"] == key}
    query = brute.vectors[[0, 1, 2]]
    found = db.candidates(query, len(brute.blocks), own_keys=[key, None, "no such key"])
    assert not own & set(found.document_ids[0].tolist())
    for at in (1, 2):
        assert own & set(found.document_ids[at].tolist()), "nothing is said of these"


def test_null_N1_a_reserved_id_in_slot_0_counted_in_k_and_never_found(db, brute):
    assert np.iinfo(np.int64).max == NULL_ID
    assert NULL_ID not in {block["chunk_id"] for block in brute.blocks}
    found = db.candidates(brute.vectors, 8)
    assert found.ids.shape == (len(brute.vectors), 8)
    assert (found.ids[:, 0] == NULL_ID).all()
    assert not (found.ids[:, 1:] == NULL_ID).any()
    assert (found.document_ids[:, 0] == -1).all()
    assert (found.n_valid == 7).all(), "the null document is counted in k, not among the blocks"
    null = np.load(db.storage.path("null/00000.npy"))
    assert all(hit.chunk_id != NULL_ID for hit in db.search(null[0].astype(np.float32), k=10_000))
    only = db.candidates(brute.vectors[:2], k=1)
    assert only.ids.tolist() == [[NULL_ID], [NULL_ID]]
    with pytest.raises(InputError, match="k is 0"):
        db.candidates(brute.vectors[:1], k=0)


def test_null_N2_its_vector_is_stored_and_is_that_of_cls_sep_sep(db, blocks_db):
    shards = json.loads((blocks_db / "manifest.json").read_text())["tables"]["null"]["shards"]
    assert [shard["path"] for shard in shards] == ["null/00000.npy"]
    null = np.load(blocks_db / "null" / "00000.npy")
    assert (null.dtype, null.shape) == (np.float16, (1, 32))
    encoder = db.encoder()
    assert encoder.pairs.wrap([], []) == [101, 102, 102]
    assert np.array_equal(encoder.embed_null(), null)
    query = np.arange(32, dtype=np.float32)[None, :]
    found = db.candidates(query, 2, vectors=True)
    assert np.array_equal(found.vectors[0, 0], null[0])
    assert found.scores[0, 0] == pytest.approx(float(query[0] @ null[0].astype(np.float32)), rel=1e-5)


def test_null_N2_with_an_empty_index_slot_0_still_works(db):
    from dataclasses import replace

    from retrodb.candidates import Candidates
    from retrodb.neighbours.searcher import Searcher

    template = tuple(shard for shard in db.manifest.shards("index") if shard.number < 0)
    empty = replace(db.manifest, tables={**db.manifest.tables, "index": template})
    candidates = Candidates(db.storage, empty, Searcher(db.storage, empty))
    found = candidates.of(np.ones((3, 32)), 8, tokens=True, vectors=True)
    assert (found.ids[:, 0] == NULL_ID).all()
    assert (found.ids[:, 1:] == -1).all()
    assert found.n_valid.tolist() == [0, 0, 0]
    assert np.isfinite(found.scores[:, 0]).all()
    assert not found.n_tokens.any()


def test_what_a_reader_reads_comes_with_the_candidates(db, brute):
    by_id = {block["chunk_id"]: block for block in brute.blocks}
    found = db.candidates(["how do generators work", "a for loop"], 6, tokens=True, vectors=True)
    rows = {block["chunk_id"]: row for row, block in enumerate(brute.blocks)}
    assert found.tokens.shape == (2, 6, 64)
    for q in range(2):
        assert found.n_tokens[q, 0] == found.n_title_tokens[q, 0] == 0, "the null document is empty"
        for slot in range(1, 6):
            block = by_id[int(found.ids[q, slot])]
            assert found.tokens[q, slot].tolist() == block["tokens"]
            assert found.n_tokens[q, slot] == block["n_tokens"]
            assert found.title_tokens[q, slot, : found.n_title_tokens[q, slot]].tolist() == block["title_tokens"]
            assert np.array_equal(found.vectors[q, slot].astype(np.float32), brute.vectors[rows[block["chunk_id"]]])


@pytest.mark.parametrize("exclude", ["self", "document", "neardup"])
def test_exclusion_E2_what_an_earlier_version_had_stands_for_nothing(db, brute, exclude):
    """A trainer follows a database through a swap or a compaction with the ids that it has."""
    queries = brute.vectors[:3]
    gone = {"own_chunks": [2**40, 2**31, -1], "own_documents": [2**40, 2**31, -1]}
    found = db.candidates(queries, 4, **gone, exclude=exclude)
    assert np.array_equal(found.ids, db.candidates(queries, 4).ids), "any block may be had"


def test_what_does_not_fit_is_refused(db, built):
    query = np.ones((2, 32), dtype=np.float32)
    for options, message in [
        ({"own_chunks": [0]}, "own_chunks has shape"),
        ({"own_chunks": [0, -2]}, "own_chunks holds -2, which is no id"),
        ({"own_documents": [1.5, 0]}, "own_documents holds .*1.5.*give whole numbers"),
        ({"own_keys": ["a"]}, "1 key for 2 queries"),
        ({"exclude": "cluster"}, "give one of self, document, neardup"),
    ]:
        with pytest.raises(InputError, match=message):
            db.candidates(query, **options)
    with pytest.raises(InputError, match="shape"):
        db.candidates(query[0])
    with pytest.raises(InputError, match=r"give \['hello'\]"):
        db.candidates("hello")
    with pytest.raises(MismatchError, match="width 32"):
        db.candidates(query[:, :5])
    with pytest.raises(MismatchError, match="'ip'"):
        db.candidates(query, metric="l2")
    with pytest.raises(InputError, match="database of chunks"):
        retrodb.open(str(built)).candidates(["a"])


def test_exclusion_E1_E2_the_neighbours_table_of_blocks_follows_the_same_rules(blocks_db, brute):
    rows = {block["chunk_id"]: row for row, block in enumerate(brute.blocks)}
    for row in rows_of(blocks_db, "neighbours"):
        at = rows[row["chunk_id"]]
        expected = brute.best(brute.vectors[at], row["chunk_id"], {brute.blocks[at]["document_id"]}, "document", 5)
        assert [i for i in row["neighbour_ids"] if i is not None] == expected
