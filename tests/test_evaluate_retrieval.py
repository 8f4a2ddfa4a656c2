"""Zero-shot retrieval on question sets: every figure against an oracle of numpy, and every kind of file."""

import gzip
import hashlib
import itertools
import json
import re
import shutil
import unicodedata

import fsspec
import numpy as np
import pytest
from scipy.stats import binomtest
from support import (
    Progress,
    build_here,
    corpus,
    retrodb,
    rows_of,
    stamps,
    vectors_of,
    write_jsonl,
)

from retrodb import open as open_database
from retrodb.corpus.selection import Selection
from retrodb.encoding import resolve_encoder
from retrodb.encoding.encoder import Encoder
from retrodb.errors import InputError
from retrodb.evaluation.answers import normalised as normal_form
from retrodb.evaluation.answers import normalised_answers, stands_in, words
from retrodb.evaluation.intervals import wilson
from retrodb.evaluation.questions import QuestionSet, parse_question
from retrodb.evaluation.retrieval import evaluate_retrieval
from retrodb.quality.verify import verify_database
from retrodb.storage import Storage

KS = (1, 3, 20)
PLACES = ("Ankara", "Bogotá", "Cairo", "Dakar", "Évora", "Fez", "Gdańsk", "Hanoi")
THINGS = ("glass bridge", "old mill", "harbour wall", "clock tower", "salt mine")


class Quiet:
    """Progress that nobody looks at."""

    def begin(self, stage, total, done, unit): ...
    def advance(self, done): ...
    def end(self, summary): ...


def documents():
    """Forty documents of several chunks: each says in which year one thing was built in one place."""
    for number, (place, thing) in enumerate(itertools.product(PLACES, THINGS)):
        filler = " ".join(f"Visitors of {place} like the {other}." for other in THINGS for _ in range(6))
        text = f"{filler} The {thing} of {place} was built in {1700 + number}. {filler}"
        yield {"id": f"doc-{number}", "title": place, "text": text}


def questions():
    for number, (place, thing) in enumerate(itertools.product(PLACES, THINGS)):
        yield {
            "question": f"When was the {thing} of {place} built?",
            "answers": [f"in the {1700 + number}.", "never said so"],
            "gold_ids": [f"doc-{number}", f"doc-{(number + 1) % 40}"],
        }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrieval")
    return write_jsonl(folder / "docs.jsonl", documents()), write_jsonl(folder / "questions.jsonl.gz", questions())


@pytest.fixture(scope="module", params=["l2", "ip"])
def database(request, inputs, tiny_encoder, tmp_path_factory):
    """Approximate on purpose: one list of eight is read."""
    out = tmp_path_factory.mktemp(request.param) / "db"
    settings = {"metric": request.param, "index_key": "IVF8,Flat", "min_recall": 0.0, "shard_bytes": "16KiB"}
    build_here(inputs[:1], out, encoder=str(tiny_encoder), dedup="off", until="neighbours", **settings)
    return out


def plain_words(text):
    """Another way to the same words, for text in Latin letters."""
    text = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if not unicodedata.combining(c))
    return [word for word in re.sub(r"[^a-z0-9]+", " ", text).split() if word not in ("a", "an", "the")]


def holds(body, answer):
    body, answer = plain_words(body), plain_words(answer)
    return any(body[at : at + len(answer)] == answer for at in range(len(body) - len(answer) + 1))


def brute_force(path, vectors, metric):
    """Chunk rows by distance from each query vector, ties by ascending id."""
    stored = vectors_of(path).astype(np.float64)
    if metric == "ip":
        keys = -(vectors.astype(np.float64) @ stored.T)
    else:
        keys = ((vectors[:, None].astype(np.float64) - stored[None]) ** 2).sum(-1)
    return np.argsort(np.float32(keys), axis=1, kind="stable")


def bodies_of(path):
    texts = {row["document_id"]: (row["key"], row["text"].encode()) for row in rows_of(path, "documents")}
    chunks = rows_of(path, "chunks")
    return [(texts[r["document_id"]][0], texts[r["document_id"]][1][r["start"] : r["end"]].decode()) for r in chunks]


def figures(result, criterion, side="exact"):
    found = next(one for one in result.as_json()["criteria"] if one["criterion"] == criterion)
    return {int(k): one["value"] for k, one in found["recall"][side].items()}


@pytest.mark.slow
def test_evaluation_V1_equals_brute_force_with_either_metric(database, inputs):
    db = open_database(str(database))
    result = evaluate_retrieval(db, QuestionSet(str(inputs[1])), KS, progress=Quiet())
    asked = list(questions())
    order = brute_force(database, db.embed([one["question"] for one in asked]), db.metric)
    bodies = bodies_of(database)
    for k in KS:
        answered = documents = shares = 0
        for question, rows in zip(asked, order[:, :k], strict=True):
            answered += any(holds(bodies[row][1], answer) for row in rows for answer in question["answers"])
            relevant = {bodies[row][0] for row in rows} & set(question["gold_ids"])
            documents += bool(relevant)
            shares += len(relevant) / 2
        assert figures(result, "answers")[k] == answered / 40
        assert figures(result, "documents")[k] == documents / 40
        found = next(one for one in result.as_json()["criteria"] if one["criterion"] == "documents")
        assert found["documents_found"]["exact"][str(k)]["value"] == pytest.approx(shares / 40)
    assert 0 < figures(result, "answers")[20] < 1, "the oracle has to tell hits from misses"


@pytest.mark.slow
def test_evaluation_V1_shows_the_index_beside_exact_search(database, inputs):
    db = open_database(str(database))
    result = evaluate_retrieval(db, QuestionSet(str(inputs[1])), KS, progress=Quiet())
    bodies = dict(zip((row["chunk_id"] for row in rows_of(database, "chunks")), bodies_of(database), strict=True))
    exact = brute_force(database, db.embed([one["question"] for one in questions()]), db.metric)
    ids = np.array(list(bodies))
    for k in KS:
        found = [[hit.chunk_id for hit in db.search(one["question"], k)] for one in questions()]
        hits = sum(
            any(holds(bodies[chunk][1], answer) for chunk in chunks for answer in one["answers"])
            for one, chunks in zip(questions(), found, strict=True)
        )
        # The index may be asked for more at once when the largest k is larger: never for less.
        assert figures(result, "answers", "index")[k] >= hits / 40
        agreed = np.mean([len(set(ids[e[:k]]) & set(f)) / k for e, f in zip(exact, found, strict=True)])
        assert result.agreement[k] >= agreed - 1e-9
    assert result.about["index"]["key"] == "IVF8,Flat"
    assert figures(result, "answers").keys() == figures(result, "answers", "index").keys()


@pytest.mark.slow
def test_evaluation_V1_command_keeps_a_report_that_no_build_and_no_verification_minds(database, inputs, tiny_encoder):
    ran = retrodb("evaluate-retrieval", database, inputs[1], "--k", "3,1", "--json")
    assert ran.code == 0, ran.err
    content = gzip.decompress(inputs[1].read_bytes())
    name = f"reports/retrieval-{hashlib.sha256(content).hexdigest()[:16]}.json"
    assert ran.json["report"] == name
    kept = json.loads((database / name).read_text(encoding="utf-8"))
    assert kept == {key: value for key, value in ran.json.items() if key != "report"}
    assert kept["questions"]["asked"] == 40
    assert kept["k"] == [1, 3]
    assert kept["version"] == 1, "R7: answers carry the version id"
    before = stamps(database)
    assert retrodb("evaluate-retrieval", database, inputs[1], "--k", "1,3").out.count("recall@3") == 2
    assert verify_database(open_database(str(database))).paths == []
    settings = {"index_key": "IVF8,Flat", "min_recall": 0.0, "shard_bytes": "16KiB", "until": "neighbours"}
    metric = open_database(str(database)).metric
    build_here(inputs[:1], database, encoder=str(tiny_encoder), dedup="off", metric=metric, **settings)
    assert {path: seen[1] for path, seen in stamps(database).items()} == {p: seen[1] for p, seen in before.items()}


@pytest.mark.slow
def test_evaluation_V1_of_validation_documents_and_of_tokens_without_text(inputs, tiny_encoder, tmp_path):
    """Validation documents are never retrieved; without their text, documents are judged by what their tokens say."""
    records = list(documents())
    held_out = write_jsonl(tmp_path / "held.jsonl", records[:5])
    rest = write_jsonl(tmp_path / "rest.jsonl", records[5:])
    settings = {"validation": [str(held_out)], "decontaminate": False, "dedup": "off", "until": "index"}
    build_here([rest], tmp_path / "db", encoder=str(tiny_encoder), no_text=True, **settings)
    db = open_database(str(tmp_path / "db"))
    result = evaluate_retrieval(db, QuestionSet(str(inputs[1])), (100_000,), progress=Quiet())
    assert figures(result, "answers")[100_000] == 35 / 40
    assert figures(result, "documents")[100_000] == 36 / 40  # doc-4 of question 4 is held out, doc-5 is not
    assert result.about["questions"]["with_a_document_here"] == 36


@pytest.mark.slow
def test_evaluation_V1_a_deleted_document_is_not_here(inputs, tiny_encoder, tmp_path):
    from retrodb.pipelines.living import delete

    build_here(inputs[:1], tmp_path / "db", encoder=str(tiny_encoder), dedup="off")
    delete(Storage(str(tmp_path / "db")), Selection(keys=("doc-0", "doc-1", "doc-2")), Progress())
    here = [
        evaluate_retrieval(one, QuestionSet(str(inputs[1])), (5,), progress=Quiet()).about
        for one in (open_database(str(tmp_path / "db"), version=1), open_database(str(tmp_path / "db")))
    ]
    assert [one["questions"]["with_a_document_here"] for one in here] == [40, 38], "question 2 names doc-3 as well"
    db = open_database(str(tmp_path / "db"))
    assert [one["chunks"] for one in here] == [db.manifest.rows("chunks"), sum(map(len, db.chunks()))]
    assert here[0]["chunks"] > here[1]["chunks"]
    delete(Storage(str(tmp_path / "db")), Selection(sources=("*",)), Progress())
    with pytest.raises(InputError, match="has no chunk that could be retrieved"):
        evaluate_retrieval(open_database(str(tmp_path / "db")), QuestionSet(str(inputs[1])), (5,), progress=Quiet())


def test_evaluation_V1_intervals_are_wilsons():
    for hits, total in ((0, 7), (7, 7), (3, 10), (812, 1000)):
        reference = binomtest(hits, total).proportion_ci(0.95, method="wilson")
        assert wilson(hits, total).interval == pytest.approx((reference.low, reference.high), abs=1e-6)


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "body", "stands"),
    [
        ("The Walt Disney Company", "owned by Walt Disney's company", False),
        ("The Walt Disney Company", "a subsidiary of (the) Walt-Disney COMPANY.", True),
        ("Bogotá", "in bogotá, in June", True),
        ("Bogotá", "in Bogota", False),
        ("1957", "in 19570", False),
        ("42,972,878", "a population of 42,972,878 (2020)", True),
        ("St. Lawrence River", "the Saint Lawrence River", False),
        ("上野", "東京都の上野駅", True),
        ("الحديقة الساكسونية", "في (الحديقة الساكسونية)، كان", True),
        ("the", "the and the", False),
    ],
)
def test_evaluation_V1_compares_words_not_characters(answer, body, stands):
    assert stands_in(normalised_answers([answer]), normal_form(body)) is stands


def test_evaluation_V1_composed_and_decomposed_letters_are_the_same():
    assert words(unicodedata.normalize("NFC", "Évora")) == words(unicodedata.normalize("NFD", "évora"))
    assert words("है") == ["है"], "a vowel sign belongs to its letter"


# -- question sets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "criteria", "named"),
    [
        ("squad_questions_v1.1", 3_918, {"answers"}, 3_918),
        ("squad_questions_v2.0", 5_864, {"answers"}, 5_864),
        ("nq_open", 8_757, {"answers"}, 0),
        ("scifact_queries", 809, set(), 809),
        ("xquad_questions", 5_652, {"answers"}, 5_652),
    ],
)
def test_evaluation_V1_reads_the_published_sets_without_flags(name, count, criteria, named):
    found = list(QuestionSet(str(corpus(name))).read())
    assert len(found) == count
    assert set().union(*(one.answers for one in found)) == criteria
    assert sum(bool(one.documents) for one in found) == named


def test_evaluation_V1_reads_answers_of_several_versions():
    found = list(QuestionSet(str(corpus("factbook_swap_questions"))).read())
    assert len(found) == 683
    assert found[0].answers["answers 2016"] == ("President Abdelaziz BOUTEFLIKA",)
    assert {"answers 2016", "answers 2020"} <= set(found[0].answers)


@pytest.mark.parametrize(
    ("record", "answers", "keys"),
    [
        ({"query": "who?", "answer": "me"}, {"answers": ("me",)}, ()),
        ({"question": "who?", "answers": {"text": ["me"], "answer_start": [3]}}, {"answers": ("me",)}, ()),
        ({"question": "who?", "answers": [{"text": "me"}]}, {"answers": ("me",)}, ()),
        ({"claim": "so it is", "cited_doc_ids": [7, 7, 8]}, {}, ("7", "8")),
        ({"question": "who?", "answers": [], "gold_id": None}, {"answers": ()}, ()),
    ],
)
def test_evaluation_V1_takes_the_fields_by_their_usual_names(record, answers, keys):
    found = parse_question(json.dumps(record).encode(), "here")
    assert (dict(found.answers), found.documents) == (answers, keys)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"question": "who?", "reply": "me"}', "line 2 says neither answers .* The fields are 'question', 'reply'"),
        ('{"prompt": "who?", "answers": ["me"]}', "line 2 has no question: .* The fields are 'prompt', 'answers'"),
        ('{"question": " ", "answers": ["me"]}', "line 2 has no question"),
        ('{"question": "who?", "answers": [3]}', "line 2: answers holds something else than text"),
        ('{"question": "who?", "gold_ids": [{}]}', "line 2: gold_ids holds something else than keys"),
        ('{"question": "who?", "answers_by_version": ["x"]}', "line 2: answers_by_version is no object"),
        ('["who?"]', "line 2 is not a JSON object"),
        ('{"question": "who?"', "line 2 is not JSON"),
        ('{"question": "who \\ud800?", "answers": ["me"]}', "line 2 holds half a surrogate pair"),
    ],
)
def test_evaluation_V1_names_the_line_that_is_no_question(line, said, tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl.zst", [{"question": "who?", "answers": ["me"]}, line])
    with pytest.raises(InputError, match=said):
        list(QuestionSet(str(path)).read())


def test_evaluation_V1_refuses_a_torn_file_and_reads_any_url(tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl.gz", [{"question": f"who is {n}?", "answers": ["me"]} for n in range(900)])
    with fsspec.open("memory://sets/q.jsonl.gz", "wb") as file:
        file.write(path.read_bytes())
    assert len(list(QuestionSet("memory://sets/q.jsonl.gz").read())) == 900
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match="q.jsonl.gz.*truncated"):
        list(QuestionSet(str(path)).read())


@pytest.mark.slow
def test_evaluation_V1_says_what_is_wrong(database, tmp_path):
    cases = {
        "none of the documents that .* names": [{"question": "who?", "gold_id": "nobody"}],
        "none with a gold answer": [{"question": "who?", "answers": []}],
        "has 0 questions": [],
    }
    db = open_database(str(database))
    for said, records in cases.items():
        path = write_jsonl(tmp_path / "questions.jsonl", records)
        with pytest.raises(InputError, match=said):
            evaluate_retrieval(db, QuestionSet(str(path)), progress=Quiet())
    with pytest.raises(InputError, match="cannot read .*missing.jsonl"):
        evaluate_retrieval(db, QuestionSet(str(tmp_path / "missing.jsonl")), progress=Quiet())
    ran = retrodb("evaluate-retrieval", database, path, "--k", "5,0")
    assert (ran.code, "--k 5,0" in ran.err) == (2, True)


def test_evaluation_V1_questions_have_the_prompt_that_the_encoder_has_for_them(tiny_encoder, tmp_path):
    folder = tmp_path / "prompted"
    shutil.copytree(tiny_encoder, folder)
    prompts = {"prompts": {"query": "query: ", "passage": "passage: "}, "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts), encoding="utf-8")
    encoder, plain = (Encoder.load(resolve_encoder(str(one))) for one in (folder, tiny_encoder))
    assert np.array_equal(encoder.embed_queries(["who built it?"]), plain.embed(["query: who built it?"]))
    assert np.array_equal(encoder.embed(["who built it?"]), plain.embed_queries(["who built it?"]))
