"""Multiple choice: exact labels only. `A`, `(A)`, `A.` and `A) text` say A; "A or B" and a stray letter say nothing."""

import re

from bloomery.errors import ArtifactError
from bloomery.verify.exact import normalize, plain
from bloomery.verify.extract import after_thinking, boxed_answer
from bloomery.verify.verdict import Verdict

_LABEL = re.compile(r"[(\[]?([A-Za-z])(?:[)\].:]+|$)\s*(.*)", re.DOTALL)
_ANOTHER = re.compile(r"(?<![A-Za-z'])(?:[A-Z](?![A-Za-z'])|[a-z][).])")
MAX_CHARS = 1000


def choice(completion: str, gold: str, require_think: bool = False) -> Verdict:
    """The label in the last box, or else the whole text after the thinking, against a gold such as `B` or `B) text`.

    Text behind the label must be the gold's text where the gold has one; otherwise it must not name another label.
    """
    expected = read_label(gold)
    if expected is None:
        raise ArtifactError(
            f"a prompt with verifier 'choice' has the answer {gold!r}; expected a label such as B or 'B) text'"
        )
    text = after_thinking(completion, require_think)
    boxed = not isinstance(text, Verdict) and r"\boxed" in text
    text = boxed_answer(completion, require_think) if boxed else text
    if isinstance(text, Verdict):
        return text
    found = read_label(text) if len(text) <= MAX_CHARS else None
    if found is None:
        return Verdict.of("wrong" if boxed else "no_answer", "no single label")
    (label, words), (gold_label, gold_words) = found, expected
    if label != gold_label:
        return Verdict.of("wrong", f"{label} is not {gold_label}")
    if words and normalize(words) != normalize(gold_words or words):
        return Verdict.of("wrong", f"label {label} with the text of another option")
    if words and not gold_words and _ANOTHER.search(words):
        return Verdict.of("wrong", "more than one label")
    return Verdict.of("correct")


def read_label(text: str) -> tuple[str, str] | None:
    """(label in upper case, text behind it) when `text` is one label, alone or in front of its option."""
    match = _LABEL.fullmatch(plain(text).strip().strip("$*").strip())
    return (match.group(1).upper(), match.group(2).strip()) if match else None
