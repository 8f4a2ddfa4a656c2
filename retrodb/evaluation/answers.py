"""Whether an answer stands in a text: words are compared, not characters (Chen et al. 2017; Karpukhin et al. 2020).

Text and answer are brought to Unicode NFD and lower case and cut into words of letters, digits and their marks;
punctuation and the articles a, an, the are left out, as SQuAD's evaluation does (Rajpurkar et al. 2016). An answer
stands in a text where its words follow each other in it. In scripts that put no spaces between words each character is
a word.
"""

import string
import unicodedata
from collections.abc import Iterable
from typing import Final

import regex

_WORD: Final = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}&&[\p{L}\p{N}]]\p{M}*|"
    r"[[\p{L}\p{N}\p{M}]--[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]+",
    regex.VERSION1,
)
_SQUAD_ARTICLES: Final = regex.compile(r"\b(a|an|the)\b")
_PUNCTUATION: Final = frozenset(string.punctuation)
_ARTICLES: Final = frozenset(("a", "an", "the"))


def words(text: str) -> list[str]:
    """The words of a text in order, lower case, NFD, without articles."""
    found = _WORD.findall(unicodedata.normalize("NFD", text).lower())
    return [word for word in found if word not in _ARTICLES]


def normalised(text: str) -> str:
    """The `words` of a text with a space before and after each: one text of whole words holds another as a string."""
    found = words(text)
    return f" {' '.join(found)} " if found else ""


def normalised_answers(answers: Iterable[str]) -> tuple[str, ...]:
    """The different `normalised` answers, in order; without those that are but articles and punctuation."""
    return tuple(dict.fromkeys(form for answer in answers if (form := normalised(answer))))


def stands_in(answers: Iterable[str], body: str) -> bool:
    """Whether one of ``answers`` stands in ``body``; all of them `normalised`."""
    return any(answer in body for answer in answers)


def squad_form(text: str) -> str:
    """A text as SQuAD's evaluation compares answers (Rajpurkar et al. 2016): lower case, without ASCII punctuation, the
    articles a, an and the, and superfluous blanks."""
    plain = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_SQUAD_ARTICLES.sub(" ", plain).split())


def exact_match(prediction: str, answers: Iterable[str]) -> bool:
    """Whether a prediction is one of the answers, compared by `squad_form`."""
    return squad_form(prediction) in {squad_form(answer) for answer in answers}
