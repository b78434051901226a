"""Which questions can be asked where the reward is one checkable answer, and why the others cannot.

The rules of Nemotron-CrossThink (arXiv 2504.13941, section 2.3: the gold is one of the options, an open answer has at
most ten words, math has an answer), and what published corpora bring beside: damaged rows, several right answers,
letters that only look like others, questions that make no sense without their options. Patterns are ours, and would
rather drop a good question than keep one whose reward is noise.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from bloomery.config import Config, Field
from bloomery.data.qa import LABELS, Item

DAMAGED = frozenset({
    "empty question", "invalid characters", "no gold answer", "fewer than two options", "too many options",
    "an empty option", "duplicate options", "gold is not among the options",
})  # fmt: skip
"""Reasons that speak of a damaged row, not of a question that cannot be used."""

# Control characters but tab, newline and return; half surrogate pairs; what a bad decoder leaves behind.
_INVALID = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffd\ufffe\uffff]")
_PLAIN = bytes(range(32, 127)) + b"\t\n\r"
_REORDERING = re.compile("[\u202a-\u202e\u2066-\u2069]")
_WORD = re.compile(r"[^\W\d_]+")
_TEX_GROUP = re.compile(r"\$[^$]*\$|\\[a-zA-Z]+(?:\s*\{(?:[^{}]|\{[^{}]*\})*\})*")
_ALIKE = frozenset({"LATIN", "CYRILLIC", "GREEK", "ARMENIAN", "CHEROKEE"})
_GREEK_LIKE_LATIN = frozenset("ΑΒΕΖΗΙΚΜΝΟΡΤΥΧο")  # others, as in Δx and μm, are science

_SEVERAL_LABELS = re.compile(r"[A-J](?:\s*(?:,|;|/|&|and|or)?\s*[A-J])+")


class Phrases:
    """A pattern, whatever the case, with hints of which one stands in every text that it finds, in lower case: where
    none does, which is soon seen, there is nothing to search."""

    def __init__(self, pattern: str, hints: Sequence[str]):
        self._pattern, self._hints = re.compile(pattern, re.IGNORECASE | re.MULTILINE), hints

    def found_in(self, text: str) -> bool:
        """Whether the pattern is somewhere in the text."""
        lower = text.lower()
        for hint in self._hints:
            if hint in lower:
                return self._pattern.search(text) is not None
        return False


_SEVERAL = Phrases(
    r"\b(?:select|choose|mark|check|pick) (?:all|two|three|any|one or more|every)\b|\ball that apply\b",
    ("select ", "choose ", "mark ", "check ", "pick ", "apply"),
)
_EACH_OTHER = Phrases(
    r"\b(?:all|none|both|neither|either|any|two) of (?:the )?"
    r"(?:above|these|them|those|following|other|options|choices)\b"
    r"|\b(?:both|neither|either|only|all but) \(?[A-J]\)?(?:\W|$)"
    r"|\b(?:options?|choices?|answers?) \(?[A-J]\)?(?:\W|$)|\b(?:the )?above\b",
    (" of the", "above", "both ", "neither ", "either ", "only ", "all but ", "option", "choice", "answer"),
)
_TWO_LABELS = re.compile(r"\(?[A-J]\)?,? (?:and|or|&) \(?[A-J]\)?\W*$", re.IGNORECASE)


class QAFilterConfig(Config):
    """Which questions are left out."""

    max_answer_words: int = Field(default=10, description="longest gold of an open question, in words", gt=0)
    max_question_characters: int = Field(default=20_000, description="longest question, in characters", gt=0)
    max_options: int = Field(default=len(LABELS), description="most options of a question", ge=2, le=len(LABELS))
    min_options: int = Field(default=2, description="fewest options of a question", ge=2, le=len(LABELS))


def drop_reason(item: Item, config: QAFilterConfig) -> str | None:
    """Why a question is left out, in the form it is in; `None` when it is kept."""
    if not item.question:
        return "empty question"
    if len(item.question) > config.max_question_characters:
        return f"question longer than {config.max_question_characters} characters"
    if not item.gold_text:
        return "no gold answer"
    texts = item.text if item.options else f"{item.question}\n{item.gold_text}"
    return (
        _characters_reason(texts)
        or (None if item.options is None else _options_reason(item, item.options, config))
        or (None if item.form == "choice" else open_reason(item, config))
    )


def _characters_reason(text: str) -> str | None:
    if text.isascii():
        return "invalid characters" if text.encode().translate(None, _PLAIN) else None
    if _INVALID.search(text):
        return "invalid characters"
    if _REORDERING.search(text):
        return "characters that reorder what is shown"
    return None if mixed_scripts(text) is None else "a word of mixed scripts"


def mixed_scripts(text: str) -> str | None:
    """The first word with letters of several scripts of which some look alike, as a Cyrillic а in a Latin word.

    Text from right to left, and words of several languages side by side, are whole and stay.
    """
    for word in _WORD.findall(text):
        if not word.isascii() and len(_scripts(word)) > 1:
            return word
    return None


def _scripts(word: str) -> set[str]:
    found = {_script(letter) for letter in word}
    if "GREEK" in found and not _GREEK_LIKE_LATIN.intersection(word):
        found.discard("GREEK")
    return found & _ALIKE


@lru_cache(maxsize=1 << 14)
def _script(letter: str) -> str:
    """`LATIN`, `CYRILLIC`, …: the first word of the character's name."""
    return unicodedata.name(letter, "").partition(" ")[0]


def _options_reason(item: Item, options: tuple[str, ...], config: QAFilterConfig) -> str | None:
    if len(options) < config.min_options:
        return "fewer than two options" if config.min_options == 2 else f"fewer than {config.min_options} options"
    if len(options) > config.max_options:
        return "too many options"
    if not all(options):
        return "an empty option"
    if len({" ".join(option.split()) for option in options}) < len(options):
        return "duplicate options"
    if item.gold_index is None:
        several = _SEVERAL_LABELS.fullmatch(item.gold_text) or _SEVERAL.found_in(item.question)
        return "several right answers" if several else "gold is not among the options"
    if options[item.gold_index] != item.gold_text:
        return "gold is not among the options"
    return "several right answers" if _SEVERAL.found_in(item.question) else None


def open_reason(item: Item, config: QAFilterConfig) -> str | None:
    """Why a gold cannot be judged where the question is asked openly."""
    if num_words(item.gold_text) > config.max_answer_words:
        return f"open answer of more than {config.max_answer_words} words"
    return "true or false" if item.gold_text.strip(" .").lower() in _TRUE_FALSE else None


_TRUE_FALSE = frozenset({"true", "false", "yes", "no"})


def num_words(text: str) -> int:
    """Words between white space after NFKC; a TeX group is one."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    if "\\" not in text and "$" not in text:
        return len(text.split())
    return len(_TEX_GROUP.sub("x", text).split())


def refer_to_each_other(options: Sequence[str]) -> bool:
    """Whether an option speaks of others, as `all of the above` and `A and C` do: then their order must stay."""
    return _EACH_OTHER.found_in("\n".join(options)) or any(map(_TWO_LABELS.match, options))
