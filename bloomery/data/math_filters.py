"""Which math problems can be used where the reward is one checkable answer, and why the others cannot.

The list of AceReason-Nemotron (arXiv 2505.16400, section 3.1): several questions in one, multiple choice and
true/false, proofs, figures, other languages, very short questions, long answers. The paper gives no patterns; these are
ours, and they would rather drop a good problem than keep one whose reward is noise.
"""

import re
from collections.abc import Iterable, Iterator

from bloomery.config import Config, Field
from bloomery.data.document import Document, Drops

_FLAGS = re.IGNORECASE
_PART = re.compile(r"(?:^|[\s.;:?,])\(\s*([a-e1-5]|i{1,3}|iv|v)\s*\)(?=\s)", re.IGNORECASE)
_NUMBERED = re.compile(r"^\s*(?:part\s+)?([1-9a-e])\s*[.:)]\s+\S", re.IGNORECASE | re.MULTILINE)
_SEQUENCES = (("a", "b"), ("1", "2"), ("i", "ii"))
_OPTION = re.compile(r"(?:\\text(?:bf|rm)?\s*\{\s*)?\(?\b([A-E])\s*[).:](?:\s*\})?")
_CHOICE = re.compile(
    r"which (?:one )?of the following|(?:choose|select|pick) the (?:correct|right|best) (?:answer|option|statement)"
    r"|multiple[- ]choice|correct option|among the following (?:options|statements|propositions)",
    _FLAGS,
)
_TRUE_FALSE = re.compile(
    r"\btrue or false\b|\btrue/false\b|(?:statement|proposition|claim)s?\b[^.?!]{0,60}\b(?:is|are|be) (?:true|false)\?",
    _FLAGS,
)
_TRUE_FALSE_ANSWERS = frozenset({"true", "false", "yes", "no"})
_PROOF = re.compile(
    r"(?:^|[.?!:;,\n$]\s*|\b(?:and|then|to|please|must|can you)\s+)(?:prove|show|demonstrate|verify|justify)\b"
    r"(?! your (?:work|steps|working))|\bgive an? proof\b|\bproof of\b",
    _FLAGS,
)
_FIGURE = re.compile(
    r"\[asy\]|\\includegraphics|!\[[^\]]*\]\(|<img\b|https?://\S+\.(?:png|jpe?g|gif|svg)|\\begin\{tikzpicture\}"
    r"|\b(?:figure(?! out)|diagram|picture|image|chart|sketch)s?\b(?:\s+\S+){0,3}?\s*"
    r"\b(?:below|above|shown|given|here|right|left)\b"
    r"|\b(?:in|from|of|to|see|on) (?:the )?(?:\w+ )?(?:figure|fig\.|diagram|picture|image|illustration)\b"
    r"|\bas (?:shown|illustrated|pictured|depicted)\b"
    r"|\b(?:shown|graphed|pictured|drawn) (?:below|above|here|at right)\b"
    r"|\b(?:graph|table) (?:below|above)\b",
    _FLAGS,
)
_MATH = re.compile(r"\$\$.*?\$\$|\$[^$]*\$|\\\[.*?\\\]|\\\(.*?\\\)|\\[A-Za-z]+", re.DOTALL)
_WORD = re.compile(r"[^\W\d_]+")
_ENGLISH_WORDS = (
    "the a an of and is are in to for that what find if how with on by from be as at each it has have many "
    "this which when such all let solve evaluate given there can one two simplify compute determine calculate "
    "he she his her him they their them my your you we was were does do did or but not than more much per then up out "
    "will would its after before every other into use using where"
)
_ENGLISH = frozenset(_ENGLISH_WORDS.split())
_FEWEST_WORDS_TO_TELL = 8
_OPTIONS_TO_TELL = 3


class MathFilterConfig(Config):
    """Which math problems are left out."""

    min_words: int = Field(default=3, description="fewest words and numbers of a question", ge=0)
    max_answer_characters: int = Field(default=100, description="longest gold answer, in characters", gt=0)
    max_foreign_letters: float = Field(
        default=0.1, description="share of letters outside ASCII above which a question is not English", ge=0, le=1
    )
    min_english_words: float = Field(
        default=0.06, description="share of common English words below which longer prose is not English", ge=0, le=1
    )


def filter_math(documents: Iterable[Document], config: MathFilterConfig, drops: Drops) -> Iterator[Document]:
    """The prompts that pass; the others are counted in `drops`. Needs the columns `prompt` and `answer`."""
    for document in documents:
        question = "\n".join(message["content"] for message in document.columns["prompt"])
        reason = math_drop_reason(question, document.columns["answer"], config)
        if reason is None:
            yield document
        else:
            drops.add(reason, document.id)


def math_drop_reason(question: str, answer: str, config: MathFilterConfig) -> str | None:
    """Why a problem is left out; `None` when it is kept."""
    if not answer.strip():
        return "no answer"
    if len(answer) > config.max_answer_characters:
        return f"answer longer than {config.max_answer_characters} characters"
    if _not_english(question, config):
        return "not English"
    if len(re.findall(r"\w+", question)) < config.min_words:
        return f"question of fewer than {config.min_words} words"
    if _FIGURE.search(question):
        return "needs a figure"
    if _CHOICE.search(question) or _options(question):
        return "multiple choice"
    if _TRUE_FALSE.search(question) or answer.strip(" .$").lower() in _TRUE_FALSE_ANSWERS:
        return "true or false"
    if _PROOF.search(question):
        return "proof"
    return "several questions" if _several(question) else None


def _not_english(question: str, config: MathFilterConfig) -> bool:
    letters = [character for character in question if character.isalpha()]
    foreign = sum(not character.isascii() for character in letters)
    if foreign > config.max_foreign_letters * len(letters):
        return True
    words = [word.lower() for word in _WORD.findall(_MATH.sub(" ", question))]
    common = sum(word in _ENGLISH for word in words)
    return len(words) >= _FEWEST_WORDS_TO_TELL and common < config.min_english_words * len(words)


def _options(question: str) -> bool:
    """At least three option labels in order, A first: `(A) 3 (B) 4 (C) 5`."""
    return "".join(_OPTION.findall(question)).startswith("ABCDE"[:_OPTIONS_TO_TELL])


def _several(question: str) -> bool:
    """Two parts in order, such as (a) and (b), or lines 1. and 2.; more than two sentences that ask."""
    labels = {label.lower() for label in _PART.findall(question)}
    numbered = {label.lower() for label in _NUMBERED.findall(question)}
    if any(set(pair) <= found for pair in _SEQUENCES for found in (labels, numbered)):
        return True
    return question.count("?") > 1
