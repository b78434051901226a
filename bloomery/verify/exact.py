"""Short answers in words: equal after a fixed, small normalisation (Nemotron-CrossThink's `short` form)."""

import re
import unicodedata

from bloomery.errors import ArtifactError
from bloomery.verify.extract import boxed_answer
from bloomery.verify.verdict import Verdict

_NUMERALS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
_DIGITS = {word: str(value) for value, word in enumerate(_NUMERALS)}
_SAME = str.maketrans(dict.fromkeys("‐‑‒–—−", "-") | dict.fromkeys("‘’ʼ`", "'") | dict.fromkeys("“”„", '"'))
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_ENDS = " \t\n.,;:!?\"'()[]$*"
_ARTICLES = ("the", "a", "an")
MAX_CHARS = 1000


def exact(completion: str, gold: str, require_think: bool = False) -> Verdict:
    """Is the boxed answer the gold text? Case, end punctuation, a leading article and spacing do not count."""
    expected = normalize(gold)
    if not expected:
        raise ArtifactError(
            f"a prompt with verifier 'exact' has the answer {gold!r}; expected a word or a short phrase"
        )
    found = boxed_answer(completion, require_think)
    if isinstance(found, Verdict):
        return found
    if len(found) > max(MAX_CHARS, 2 * len(gold)):
        return Verdict.of("parse_fail", f"{len(found)} characters, at most {MAX_CHARS}")
    return (
        Verdict.of("correct")
        if normalize(found) == expected
        else Verdict.of("wrong", f"{found[:80]} is not {gold[:80]}")
    )


def plain(text: str) -> str:
    r"""NFKC, and the content of `\text{…}` in its place."""
    return _TEXT.sub(r"\1", unicodedata.normalize("NFKC", text))


def normalize(text: str) -> str:
    """The form in which two short answers are compared."""
    text = plain(text).translate(_SAME).casefold().strip(_ENDS)
    words = [_DIGITS.get(word, word) for word in text.split()]
    if len(words) > 1 and words[0] in _ARTICLES:
        words = words[1:]
    return " ".join(words)
