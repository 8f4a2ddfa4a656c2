"""Every character that is not blank lies in exactly one sentence; paragraphs and abbreviations are respected."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import corpus

from retrodb.chunking.sentences import _MOST_CHARACTERS, sentences, splitter_identity

MARKS = [
    "a",
    "B",
    ".",
    "!",
    "? ",
    " ",
    "\n",
    "\n\n",
    "\r\n",
    "\x85",
    "\u2028",
    "“",
    '"',
    "(",
    ")",
    "Dr. ",
    "J. ",
    "U.S. ",
]
OTHERS = ["1.5 ", "é", "日本。", "𝒳", "\u200b", "\ufeff", "\u0301", "\x00", "...", "e.g. ", "।", "؟ ", "word " * 15]
PARTS = st.sampled_from([*MARKS, *OTHERS])
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300) | st.lists(PARTS, max_size=60).map("".join)


def split(text: str) -> list[str]:
    data = text.encode()
    return [data[start:end].decode() for start, end in sentences(text)]


def check(text: str) -> None:
    spans, data = sentences(text), text.encode()
    assert spans.dtype == np.int64
    assert spans.shape == (len(spans), 2)
    edges = spans.reshape(-1)
    assert (np.diff(edges) >= 0).all(), "they ascend and do not overlap"
    assert (spans[:, 0] < spans[:, 1]).all(), "none is empty"
    at = 0
    for start, end in spans:
        assert not data[at:start].decode().strip(), "what lies between two is blank"
        sentence = data[start:end].decode()
        assert sentence == sentence.strip()
        at = end
    assert not data[at:].decode().strip()


@given(TEXT)
@settings(max_examples=400, deadline=None)
def test_every_character_lies_in_exactly_one_sentence(text):
    check(text)


def test_abbreviations_initials_and_numbers_end_no_sentence():
    assert split("Dr. Smith met J. K. Rowling on Jan. 5, 2018. It grew 3.5% in the U.S. economy. “Yes!” she said.") == [
        "Dr. Smith met J. K. Rowling on Jan. 5, 2018.",
        "It grew 3.5% in the U.S. economy.",
        "“Yes!” she said.",
    ]


def test_other_scripts_have_their_own_full_stops():
    assert split("これはテストです。二つ目。यह एक वाक्य है। दूसरा वाक्य।") == [
        "これはテストです。",
        "二つ目。",
        "यह एक वाक्य है।",
        "दूसरा वाक्य।",
    ]


def test_blank_lines_and_headings_end_a_paragraph_and_wrapped_lines_do_not():
    wrapped = "It was a bright cold day in April, and the clocks were striking thirteen as Winston\nSmith slipped in."
    assert split(f"Chapter One\n{wrapped}\n\nno full stop\n \nThe end") == [
        "Chapter One",
        wrapped,
        "no full stop",
        "The end",
    ]
    assert split("A short line that goes\non in lower case.") == ["A short line that goes\non in lower case."]


@pytest.mark.parametrize(
    "text",
    [
        "word " * 60_000,
        "a" * 200_000,
        "“a b. " * 30_000,
        "中文" * 60_000,
        '"' * 100_000,
        "\n" * 200_000,
        "A. B. " * 30_000,
    ],
    ids=["no-full-stop", "one-word", "unpaired-quotes", "no-spaces", "quotes", "newlines", "initials"],
)
def test_very_long_paragraphs_are_split_in_bounded_pieces(text):
    check(text)
    spans = sentences(text)
    assert len(spans) == 0 or int((spans[:, 1] - spans[:, 0]).max()) <= 4 * _MOST_CHARACTERS


def test_a_sentence_at_the_bound_is_not_cut():
    sentence = "This is one sentence of some length."
    text = " ".join([sentence] * 1000)
    assert set(split(text)) == {sentence}


@pytest.mark.parametrize("name", ["multilingual", "gutenberg", "wiki_featured"])
def test_real_texts(name):
    with gzip.open(corpus(name), "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"][:20_000] for _, line in zip(range(40), lines, strict=False)]
    for text in texts:
        check(text)


def test_the_splitter_is_told_with_its_version():
    assert splitter_identity().startswith("sentencex 1.")
