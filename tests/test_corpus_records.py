"""Records: each is kept, dropped by a rule, or quarantined with a reason, by itself."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrodb.corpus.records import (
    MAX_DEPTH,
    RECORD_BYTES,
    Document,
    Dropped,
    FieldNames,
    Outcome,
    Quarantined,
    parse_line,
    parse_row,
    parse_text,
)
from retrodb.errors import InputError


def parse(record: Any, **fields: str) -> Outcome | None:
    line = record if isinstance(record, bytes) else json.dumps(record).encode()
    return parse_line(line, 7, "src", FieldNames(**fields))


def kept(record: Any, **fields: str) -> Document:
    outcome = parse(record, **fields)
    assert isinstance(outcome, Document), outcome
    return outcome


def reason(record: Any, **fields: str) -> str:
    outcome = parse(record, **fields)
    assert isinstance(outcome, Quarantined), outcome
    assert outcome.position == 7
    outcome.reason.encode()
    return outcome.reason


def metadata(document: Document) -> Any:
    return None if document.metadata is None else json.loads(document.metadata)


# -- fields --------------------------------------------------------------------------------------------------------


def test_text_id_title_and_the_rest_are_told_apart() -> None:
    got = kept({"url": "u", "id": "k", "title": "T", "text": "té xt", "n": [1, {"a": "é"}]})
    assert got == Document("k", b"T", "té xt".encode(), '{"url":"u","n":[1,{"a":"é"}]}'.encode())


def test_nothing_else_gives_no_metadata_and_no_id_gives_the_place() -> None:
    assert kept({"text": "x"}) == Document("src#7", None, b"x", None)


@pytest.mark.parametrize("name", ["text", "content", "body", "raw_content", "document", "article", "passage"])
def test_usual_names_of_text_are_guessed(name: str) -> None:
    assert kept({name: "x"}).text == b"x"


def test_guesses_go_in_order_and_leave_the_others_in_the_metadata() -> None:
    got = kept({"passage": "p", "content": "c", "_id": 1, "uuid": "u", "name": "n"})
    assert (got.text, got.key, got.title, metadata(got)) == (b"c", "1", b"n", {"passage": "p", "uuid": "u"})


@pytest.mark.parametrize(("value", "key"), [("a", "a"), (0, "0"), (-5, "-5"), (2**70, str(2**70))])
def test_an_id_is_a_string_or_an_integer(value: Any, key: str) -> None:
    assert kept({"text": "x", "id": value}) == Document(key, None, b"x", None)


@pytest.mark.parametrize("value", [None, True, 1.5, [1], {"a": 1}, ""])
def test_any_other_id_is_the_place_and_stays_in_the_metadata(value: Any) -> None:
    got = kept({"text": "x", "id": value})
    assert got.key == "src#7"
    assert metadata(got) == {"id": value}


def test_a_title_that_is_no_string_is_metadata() -> None:
    got = kept({"text": "x", "title": ["t"]})
    assert got.title is None
    assert metadata(got) == {"title": ["t"]}


def test_given_names_are_the_only_ones() -> None:
    got = kept(
        {"text": "no", "t": "yes", "id": "no", "k": "yes", "title": "no", "h": "yes"}, text="t", id="k", title="h"
    )
    assert (got.text, got.key, got.title) == (b"yes", "yes", b"yes")
    assert "'t'" in reason({"text": "x", "id": 1}, text="t")
    assert kept({"text": "x", "id": 1}, id="k").key == "src#7"
    assert kept({"title": "all there is"}, text="title").title is None


def test_a_name_with_dots_reaches_inside_unless_a_field_has_that_name() -> None:
    nested = {"data": {"text": "x", "meta": {"id": 3}, "n": 1}}
    got = kept(nested, text="data.text", id="data.meta.id")
    assert (got.text, got.key, metadata(got)) == (b"x", "3", {"data": {"n": 1}})
    got = kept({"data": {"text": "no"}, "data.text": "yes"}, text="data.text")
    assert (got.text, metadata(got)) == (b"yes", {"data": {"text": "no"}})
    assert kept({"data": {"text": "x"}}, text="data.text").metadata is None
    assert "no text field 'data.text'" in reason({"data": "x"}, text="data.text")


def test_an_empty_field_name_is_refused() -> None:
    with pytest.raises(InputError, match="--title-field"):
        FieldNames(title="")


# -- rules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", " ", "\n\t\r ", "\u3000\u2003\xa0"])
def test_blank_text_is_dropped_by_the_rule_empty(text: str) -> None:
    assert parse({"text": text}) == Dropped("empty")
    assert parse_text(text.encode(), "src") == Dropped("empty")


@pytest.mark.parametrize("line", [b"", b" \t", b"\r", b"\xef\xbb\xbf", b"\xef\xbb\xbf \r"])
def test_a_blank_line_is_no_record(line: bytes) -> None:
    assert parse(line) is None


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"id": 1, "url": "u"}, "the record has 'id', 'url'"),
        ({}, "the record has no fields"),
        ({"text": None}, "'text' is null"),
        (b'{"text": NaN}', "'text' is null"),
        ({"text": 5}, "'text' is a number"),
        ({"text": ["a"]}, "'text' is a list"),
        ({"text": {"a": 1}}, "'text' is an object"),
        ({"text": False}, "'text' is a boolean"),
        ({f"f{n}": 1 for n in range(1000)}, "and 980 more"),
        ({"\ud800" * 9999: 1}, "no text field"),
        (["text"], "not a JSON object but a list"),
        ("text", "not a JSON object but a string"),
        (b"null", "not a JSON object but null"),
        (b'{"text": "x"', "not JSON"),
        (b'{"text": "x"} {"text": "y"}', "Extra data"),
        (b"\0", "not JSON"),
        (b"{'text': 'x'}", "not JSON"),
        (b'{"text": "a\xffb"}', "invalid UTF-8 at byte 11"),
        (b'{"text": "x", "other": "\xc3"}', "invalid UTF-8"),
        (b'{"text": "\xed\xa0\x80"}', "invalid UTF-8"),  # a surrogate as bytes
        ('{"text": "x"}'.encode("utf-16"), "UTF-16"),
        (b'{"text": "a\\ud800b"}', "lone surrogate in the text field 'text' at character 1"),
        (b'{"text": "x", "id": "\\udfff"}', "lone surrogate in the id field"),
        (b'{"text": "x", "title": "\\udfff"}', "lone surrogate in the title field"),
        (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"text": "x", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested more than"),
        (b'{"text": "x", "n": ' + b'{"n":' * 100_000, "nested more than"),
    ],
)
def test_what_cannot_be_read_is_quarantined_with_its_reason(record: Any, says: str) -> None:
    assert says in reason(record)


def test_the_deepest_nesting_allowed_does_not_depend_on_the_stack() -> None:
    def nested(levels: int) -> bytes:
        return b'{"text": "x", "n": ' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"

    def deep(frames: int, line: bytes) -> Outcome | None:
        return deep(frames - 1, line) if frames else parse(line)

    for frames in (0, 300):
        assert isinstance(deep(frames, nested(MAX_DEPTH)), Document)
        assert isinstance(deep(frames, nested(MAX_DEPTH + 1)), Quarantined)
        assert deep(frames, nested(900)) == Quarantined(7, "nested more than 256 levels deep", nested(900))


def test_a_quarantined_record_keeps_its_first_64_kib() -> None:
    line = b"{" + b"x" * 100_000
    outcome = parse(line)
    assert isinstance(outcome, Quarantined)
    assert outcome.record == line[:RECORD_BYTES]


def test_odd_but_valid_text_is_kept_verbatim() -> None:
    for text in ("a\0b", "\ufeffx", "\r\n x \u2028", "😀", "\u200b"):
        assert kept({"text": text}).text == text.encode()
    assert kept(b'{"text": "\\ud83d\\ude00"}').text == "😀".encode()
    assert kept(b'\xef\xbb\xbf{"text": "x"}\r').text == b"x"


def test_metadata_is_made_representable() -> None:
    got = kept(b'{"text": "x", "a": NaN, "b": [-Infinity, 1e999, 1.5], "c": "\\ud800!", "\\udc00": 1}')
    assert metadata(got) == {"a": None, "b": [None, None, 1.5], "c": "\ufffd!", "\ufffd": 1}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(record=st.dictionaries(st.sampled_from(["text", "id", "title", "a", "b.c", ""]) | st.text(), JSON))
@settings(deadline=None)
def test_every_json_object_has_one_outcome_and_keeps_what_it_held(record: dict[str, Any]) -> None:
    outcome = parse(record)
    if isinstance(outcome, Document):
        back = metadata(outcome) or {}
        back["text"] = outcome.text.decode()
        if outcome.title is not None:
            back["title"] = outcome.title.decode()
        ids = {name: value for name, value in record.items() if name not in back}
        assert {**back, **ids} == record
        assert all(str(value) == outcome.key for value in ids.values())
    else:
        text = record.get("text")
        assert isinstance(outcome, Dropped | Quarantined)
        assert isinstance(outcome, Dropped) == (isinstance(text, str) and not text.strip())


@given(line=st.binary() | st.text().map(str.encode))
@settings(deadline=None)
def test_no_line_of_bytes_can_make_the_parser_fail(line: bytes) -> None:
    outcome = parse(line)
    assert outcome is None or isinstance(outcome, Quarantined)


# -- rows and files ------------------------------------------------------------------------------------------------


def test_values_that_json_lacks_become_metadata_text() -> None:
    got = parse_row({"text": b"bytes are text where they are UTF-8", "b": b"\xff\0", "s": {1}}, 3, "src", FieldNames())
    assert isinstance(got, Document)
    assert metadata(got) == {"b": "/wA=", "s": "{1}"}


def test_a_quarantined_row_is_kept_as_json() -> None:
    got = parse_row({"body": None, "n": 1}, 3, "src", FieldNames())
    assert got == Quarantined(3, "the text field 'body' is null, not a string", b'{"body":null,"n":1}')


def test_a_text_file_is_one_document_verbatim() -> None:
    assert parse_text(b"\xef\xbb\xbfa\r\n\0b", "src") == Document("src#0", None, b"a\r\n\0b", None)


@pytest.mark.parametrize(("data", "says"), [(b"ok \xff", "byte 3"), ("hi".encode("utf-16"), "UTF-16")])
def test_a_text_file_that_is_not_utf8_is_quarantined(data: bytes, says: str) -> None:
    got = parse_text(data, "src")
    assert isinstance(got, Quarantined)
    assert says in got.reason
    assert (got.position, got.record) == (0, data)
