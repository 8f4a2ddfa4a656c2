"""Blocks: whole sentences with their title, within the budget without exception; nothing lost, nothing across."""

import functools
import gzip
import itertools
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    Running,
    always_use_workers,
    build_here,
    corpus,
    digests,
    manifest_of,
    retrodb,
    rows_of,
    vectors_of,
    write_jsonl,
)
from tokenizers import Tokenizer, models, processors

from retrodb import schemas
from retrodb.chunking import load_tokenizer
from retrodb.chunking.blocks import Room, block_documents, uid_of
from retrodb.chunking.pairs import PairTemplate
from retrodb.chunking.sentences import sentences, splitter_identity
from retrodb.corpus.quickstart import quickstart_lines
from retrodb.encoding import DEFAULT_ENCODER, resolve_encoder
from retrodb.errors import InputError

SPECIAL = 3
WORDS = st.sampled_from(
    ["one", "two. ", "Three? ", " ", "\n", "\n\n", "é", "日本。", "antidisestablishment", "\x00", "𝒳! ", "."]
)
TEXT = st.lists(WORDS, max_size=60).map("".join) | st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
TITLE = st.none() | st.lists(WORDS, max_size=12).map("".join)


@pytest.fixture(scope="module")
def transformer():
    return resolve_encoder(DEFAULT_ENCODER).transformer


@pytest.fixture(scope="module")
def wordpiece(transformer):
    return load_tokenizer(str(transformer / "tokenizer.json"))


def tokens_of(tokenizer, text):
    return next(iter(tokenizer.tokenize([text])))


def check(titles, texts, tokenizer, budget):
    table, counts = block_documents(np.arange(len(texts)) + 5, titles, texts, tokenizer, Room(budget, SPECIAL), shard=7)
    assert table.schema.equals(schemas.blocks(budget, "uint16"))
    rows = table.to_pylist()
    assert [row["chunk_id"] for row in rows] == [(7 << 32) + at for at in range(len(rows))]
    assert len(rows) == counts.sum()
    for document, (title, text) in enumerate(zip(titles, texts, strict=True)):
        own = [row for row in rows if row["document_id"] == document + 5]
        assert len(own) == counts[document]
        check_document(title or "", text, own, tokenizer, budget)
    return rows


def check_document(title, text, rows, tokenizer, budget):
    tokens, data = tokens_of(tokenizer, text), text.encode()
    title_ids = tokens_of(tokenizer, title).ids.tolist()
    assert [row["position"] for row in rows] == list(range(len(rows)))
    bodies = [row["tokens"][: row["n_tokens"]] for row in rows]
    assert list(itertools.chain(*bodies)) == tokens.ids.tolist(), "no token is lost or doubled"
    end = 0
    for row, body in zip(rows, bodies, strict=True):
        assert body
        assert not any(row["tokens"][row["n_tokens"] :])
        assert SPECIAL + len(row["title_tokens"]) + len(body) <= budget, "within the budget without exception"
        assert row["title_tokens"] == title_ids[: len(row["title_tokens"])]
        assert row["truncated_title"] == (len(row["title_tokens"]) < len(title_ids))
        assert len(row["title_tokens"]) == min(len(title_ids), (budget - SPECIAL) // 2)
        assert end <= row["start"] < row["end"] <= len(data)
        end = row["end"]
        assert row["uid"] == uid_of(title, data[row["start"] : row["end"]])
    covered = b"".join(data[row["start"] : row["end"]] for row in rows)
    if rows:
        spans = sentences(text)
        edges = {int(edge) for edge in spans.reshape(-1)}
        for before, row in zip([None, *rows[:-1]], rows, strict=True):
            if not row["split_sentence"]:
                assert row["start"] in edges, "whole sentences"
                assert row["end"] in edges
            room = budget - SPECIAL - len(row["title_tokens"])
            if before is not None and not row["split_sentence"]:
                first = next(s for s in spans if s[0] == row["start"])
                n_first = len([e for e in tokens.ends if first[0] < e <= first[1]])
                assert before["n_tokens"] + n_first > room, "packed greedily"
        if not any(row["split_sentence"] for row in rows):
            assert "".join(text.split()) == "".join(covered.decode().split()), "all of the text is in some block"


@given(documents=st.lists(st.tuples(TITLE, TEXT), max_size=4), budget=st.sampled_from([16, 24, 288]))
@settings(max_examples=200, deadline=None)
def test_blocks_B1_within_the_budget_and_no_token_lost_or_doubled(wordpiece, documents, budget):
    check([title for title, _ in documents], [text for _, text in documents], wordpiece, budget)


def test_blocks_B1_a_longer_sentence_is_split_at_token_boundaries_and_flagged(wordpiece):
    long = "word " * 40 + "end."
    rows = check(["A title"], [f"Short one. {long} After it. " + "More words follow here. " * 4], wordpiece, 24)
    assert [row["n_tokens"] for row in rows] == [3, 19, 19, 17, 10]
    assert [row["split_sentence"] for row in rows] == [False, True, True, True, False]


def test_blocks_B1_a_longer_title_is_truncated_to_half_of_the_budget_and_flagged(wordpiece):
    rows = check(["title " * 100, "title " * 10, None], ["A body."] * 3, wordpiece, 23)
    assert [len(row["title_tokens"]) for row in rows] == [10, 10, 0]
    assert [row["truncated_title"] for row in rows] == [True, False, False]


def test_blocks_B1_real_texts_within_288(wordpiece):
    for name in ("multilingual", "wiki_featured"):
        with gzip.open(corpus(name), "rt", encoding="utf-8") as lines:
            records = [json.loads(line) for _, line in zip(range(20), lines, strict=False)]
        check([r.get("title") for r in records], [r["text"][:20_000] for r in records], wordpiece, 288)


def test_blocks_B2_the_uid_tells_title_from_body(wordpiece):
    assert uid_of("ab", b"c") != uid_of("a", b"bc")
    rows = check(["T", "T", "U"], ["The same body.", "The same body.", "The same body."], wordpiece, 32)
    assert rows[0]["uid"] == rows[1]["uid"] != rows[2]["uid"]
    assert rows[0]["uid"].hex() == "5662472cf4d9ef3203be48c2e13cb123", "the same in every run, and every version"


def test_blocks_B1_the_template_is_the_encoders_own(transformer):
    pairs = PairTemplate.load(transformer)
    assert (pairs.special_tokens, pairs.typed) == (3, True)
    assert pairs.wrap([], []) == [101, 102, 102]
    assert pairs.wrap([7], [8, 9]) == [101, 7, 102, 8, 9, 102]
    assert pairs.second([7]) == 3


@given(text=TEXT, budget=st.sampled_from([16, 40]))
@settings(max_examples=100, deadline=None)
def test_blocks_B1_of_a_byte_level_tokenizer_whose_tokens_hold_the_blanks(text, budget):
    gpt2 = load_gpt2_once()
    table, _ = block_documents(np.arange(1), ["A title"], [text], gpt2, Room(budget, 4), shard=0)
    rows = table.to_pylist()
    bodies = [row["tokens"][: row["n_tokens"]] for row in rows]
    assert gpt2.decode(list(itertools.chain(*bodies))) == text.encode(), "no token is lost or doubled"
    assert all(4 + len(row["title_tokens"]) + row["n_tokens"] <= budget for row in rows)
    assert all(a["end"] <= b["start"] for a, b in itertools.pairwise(rows))


@functools.cache
def load_gpt2_once():
    return load_tokenizer("gpt2")


def test_blocks_B1_a_roberta_has_four_special_tokens_and_no_token_types(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "[UNK]": 3}, unk_token="[UNK]"))
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    pairs = PairTemplate.load(tmp_path)
    assert (pairs.special_tokens, pairs.typed) == (4, False)
    assert pairs.wrap([2], [2, 2]) == [0, 2, 1, 1, 2, 2, 1]
    tokenizer.post_processor = None
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert PairTemplate.load(tmp_path).special_tokens == 0
    with pytest.raises(InputError, match="no tokenizer.json"):
        PairTemplate.load(tmp_path / "nowhere")


# -- in a build --------------------------------------------------------------------------------------------------------

TABLES = ("documents", "chunks", "block_duplicates", "embeddings", "null", "index", "neighbours")


@pytest.fixture(scope="module")
def topics(tmp_path_factory):
    """Real text; the first record stands there twice, once with another id."""
    lines = [line for line in quickstart_lines() if 1_000 < len(line) < 4_000][:10]
    return write_jsonl(
        tmp_path_factory.mktemp("topics") / "topics.jsonl", [*lines, {**json.loads(lines[0]), "id": "again"}]
    )


@pytest.fixture(scope="module")
def blocks(topics, tiny_encoder):
    out = topics.parent / "db"
    build_here([topics], out, unit="block", encoder=str(tiny_encoder), shard_bytes="8KiB", chunk_tokens=48)
    return out


@pytest.mark.slow
def test_blocks_B2_one_or_two_workers_with_the_default_encoder_give_the_same_bytes(topics, tmp_path, monkeypatch):
    topics = write_jsonl(tmp_path / "few.jsonl", topics.read_text(encoding="utf-8").splitlines()[:4])
    outcome = build_here([topics], tmp_path / "one", unit="block", shard_bytes="4KiB")
    assert list(outcome.done) == ["corpus", "dedup", "chunk", "embed", "index", "neighbours"]
    assert manifest_of(tmp_path / "one")["config"]["chunk_tokens"] == 256, "what all-MiniLM-L6-v2 reads"
    always_use_workers(monkeypatch)
    build_here([topics], tmp_path / "two", unit="block", shard_bytes="4KiB", workers=2)
    assert digests(tmp_path / "one", TABLES) == digests(tmp_path / "two", TABLES)
    ran = retrodb("verify", tmp_path / "two", "--sample", "1", "--json")
    assert (ran.code, ran.json["problems"], ran.json["complete"]) == (0, [], True)
    assert ran.json["checked"]["null documents"] == 1
    assert build_here([topics], tmp_path / "one", unit="block", shard_bytes="4KiB").done == ()


def test_blocks_B2_uids_and_duplicates_are_the_same_for_any_number_of_shards(blocks, topics, tiny_encoder, tmp_path):
    given = {"unit": "block", "encoder": str(tiny_encoder), "chunk_tokens": 48, "until": "chunk"}
    build_here([topics], tmp_path / "few", shard_bytes="10MB", **given)
    shards = [len(manifest_of(db)["tables"]["chunks"]["shards"]) for db in (blocks, tmp_path / "few")]
    assert shards[0] > shards[1] == 1

    def counted(db):
        rows = rows_of(db, "chunks")
        keys = {row["document_id"]: row["key"] for row in rows_of(db, "documents")}
        return sorted((keys[row["document_id"]], row["position"], row["uid"]) for row in rows)

    assert counted(blocks) == counted(tmp_path / "few")
    for db in (blocks, tmp_path / "few"):
        of_uid = {}
        for row in rows_of(db, "chunks"):
            of_uid.setdefault(row["uid"], []).append(row["chunk_id"])
        repeated = {uid: ids for uid, ids in of_uid.items() if len(ids) > 1}
        assert repeated, "a document stands there twice"
        assert {row["uid"]: row["chunk_ids"] for row in rows_of(db, "block_duplicates")} == repeated, "each uid once"
        counts = manifest_of(db)["stages"]["chunk"]["counts"]
        assert counts["repeated_uids"] == len(repeated)
        assert counts["duplicate_blocks"] == sum(len(ids) - 1 for ids in repeated.values())


def test_blocks_B3_never_across_documents_and_offsets_round_trip(blocks):
    documents = {row["document_id"]: row for row in rows_of(blocks, "documents")}
    rows = rows_of(blocks, "chunks")
    by_document = {}
    for row in rows:
        by_document.setdefault(row["document_id"], []).append(row)
        document = documents[row["document_id"]]
        body = document["text"].encode()[row["start"] : row["end"]]
        assert body.decode() == body.decode().strip()
        assert row["uid"] == uid_of(document["title"] or "", body)
    for identifier, own in by_document.items():
        assert [row["position"] for row in own] == list(range(documents[identifier]["n_chunks"]))
        text = documents[identifier]["text"]
        assert "".join(text.split()) == "".join(
            text.encode()[row["start"] : row["end"]].decode() for row in own
        ).replace(" ", "").replace("\n", "")


def test_blocks_B1_what_is_stored_is_within_the_budget_and_described(blocks):
    stored = manifest_of(blocks)["tables"]["chunks"]["shards"][0]["path"]
    schema = pq.read_schema(blocks / stored)
    assert all(field.metadata[b"description"] for field in schema)
    for row in rows_of(blocks, "chunks"):
        assert SPECIAL + len(row["title_tokens"]) + row["n_tokens"] <= 48
    assert manifest_of(blocks)["stages"]["chunk"]["made_from"]["splitter"] == splitter_identity()


def test_blocks_are_read_by_the_encoder_with_their_title(blocks, tiny_encoder):
    import torch
    from transformers import AutoModel

    rows, stored = rows_of(blocks, "chunks"), vectors_of(blocks)
    model = AutoModel.from_pretrained(tiny_encoder).eval()
    titled = [at for at, row in enumerate(rows) if row["title_tokens"]][:3]
    assert titled
    for at in titled:
        row = rows[at]
        body = row["tokens"][: row["n_tokens"]]
        ids = [101, *row["title_tokens"], 102, *body, 102]
        types = [0] * (2 + len(row["title_tokens"])) + [1] * (1 + len(body))
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types])).last_hidden_state
        assert np.allclose(hidden[0].mean(0).numpy(), stored[at].astype(np.float32), atol=2e-2)


@pytest.mark.slow
def test_blocks_B2_a_killed_build_ends_as_an_undisturbed_one(blocks, topics, tiny_encoder, tmp_path):
    flags = [
        "--unit",
        "block",
        "--encoder",
        tiny_encoder,
        "--shard-bytes",
        "8KiB",
        "--chunk-tokens",
        48,
        "--workers",
        1,
    ]
    for table in ("chunks", "embeddings"):
        running = Running.start("build", topics, "--out", tmp_path / "db", *flags)
        running.wait_for(lambda table=table: any((tmp_path / "db" / table).glob("*")))
        running.kill()
    assert retrodb("build", topics, "--out", tmp_path / "db", *flags).code == 0
    assert digests(tmp_path / "db", TABLES) == digests(blocks, TABLES)
    assert not (tmp_path / "db" / ".build").exists()


@pytest.mark.parametrize("table", ["chunks", "block_duplicates", "null"])
def test_a_damaged_shard_is_found_and_made_again(blocks, topics, tiny_encoder, tmp_path, table):
    import shutil

    shutil.copytree(blocks, tmp_path / "db")
    path = next(iter(sorted((tmp_path / "db" / table).glob("*"))))
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    from retrodb import open as open_database
    from retrodb.quality.verify import verify_database

    assert verify_database(open_database(str(tmp_path / "db"))).paths == [str(path.relative_to(tmp_path / "db"))]
    build_here([topics], tmp_path / "db", unit="block", encoder=str(tiny_encoder), shard_bytes="8KiB", chunk_tokens=48)
    assert digests(tmp_path / "db", TABLES) == digests(blocks, TABLES)


def test_what_does_not_fit_blocks_is_refused_before_any_work(topics, tiny_encoder, blocks, tmp_path):
    out = tmp_path / "db"
    for flags, code, says in [
        (["--tokenizer", "gpt2"], 2, "the encoder's own tokens"),
        (["--chunk-tokens", 300], 3, "reads 256 tokens at once"),
        (["--chunk-tokens", 4], 2, "leaves a block no room"),
        (["--until", "training"], 2, "has no such stage"),
    ]:
        ran = retrodb("build", topics, "--out", out, "--unit", "block", *flags)
        assert (ran.code, says in ran.err, out.exists()) == (code, True, False), ran.err
    ran = retrodb("train", blocks, "--out", tmp_path / "ckpt")
    assert (ran.code, "database of blocks" in ran.err) == (3, True)


def test_info_and_a_dry_run_say_what_belongs_to_chunks(blocks, topics, tiny_encoder):
    info = retrodb("info", blocks, "--json").json
    assert (info["unit"], info["complete"], info["blocks"]["budget"]) == ("block", True, 48)
    assert info["blocks"]["duplicates"] > 0
    assert info["training"] is info["leakage"] is None
    flags = ["--unit", "block", "--encoder", tiny_encoder, "--shard-bytes", "8KiB", "--chunk-tokens", 48]
    ran = retrodb("build", topics, "--out", blocks, *flags, "--dry-run")
    assert ran.code == 0
    assert "training and report belong to chunks" in ran.out
    assert ran.out.count("up to date") == 6
