"""Multiple choice: exact labels only. `A`, `(A)` and `A.` say A; "A or B", "AB" and a stray letter say nothing."""

import json
import re
from dataclasses import dataclass
from functools import lru_cache

from bloomery.errors import ArtifactError
from bloomery.verify.extract import after_thinking, boxed_answer
from bloomery.verify.normalize import normalize, plain
from bloomery.verify.verdict import Verdict

_LABEL = re.compile(r"[(\[]?([A-Za-z])(?:[)\].:]+|$)\s*(.*)", re.DOTALL)
_ANOTHER = re.compile(r"(?<![A-Za-z'])(?:[A-Z](?![A-Za-z'])|[a-z][).])")
_DRESS = " \t\n()[].:*$"
MAX_CHARS = 1000


@dataclass(frozen=True, slots=True)
class Gold:
    """The right label; the text behind it, "" where only the label is asked; and the last label of the item."""

    label: str
    text: str = ""
    last: str = "Z"


def label(completion: str, gold: str, require_think: bool = False) -> Verdict:
    r"""The single letter in the last box against the gold's label (Nemotron-CrossThink, arXiv 2504.13941, section 2.4).

    gold: `B`; `B) text` where label and text are asked for: then text may stand behind the label, which alone is
    graded; or JSON with the number of options, `{"label": "B", "options": 4}`, whose labels are A to D.
    """
    right = read_gold(gold)
    found = boxed_answer(completion, require_think)
    if isinstance(found, Verdict):
        return found
    said = _said(found, right) if len(found) <= MAX_CHARS else None
    if said is None:
        return Verdict.of("wrong", "no single label")
    if said > right.last:
        return Verdict.of("wrong", f"{said} is no option: the labels are A to {right.last}")
    return Verdict.of("correct") if said == right.label else Verdict.of("wrong", f"{said} is not {right.label}")


def _said(found: str, right: Gold) -> str | None:
    """The label in a box. Text behind it counts for nothing, unless it names another label."""
    bare = plain(found).strip(_DRESS)
    if re.fullmatch("[A-Za-z]", bare):
        return bare.upper()
    match = read_label(found) if right.text else None
    if match is None:
        return None
    said, words = match
    own = said == right.label and normalize(words) == normalize(right.text)
    return said if own or not _ANOTHER.search(words) else None


@lru_cache(maxsize=4096)
def read_gold(gold: str) -> Gold:
    """What a prompt's answer says. Raises `ArtifactError` where it is no label of the item."""
    found = _from_json(gold) if gold.lstrip().startswith("{") else read_label(gold)
    if found is None:
        raise ArtifactError(
            f"a prompt with verifier 'label' has the answer {gold[:200]!r}; expected a label such as B, 'B) text' or "
            '{"label": "B", "options": 4}'
        )
    right = found if isinstance(found, Gold) else Gold(*found)
    if right.label > right.last:
        raise ArtifactError(
            f"a prompt with verifier 'label' has the answer {right.label}, and its labels are A to {right.last}; "
            "drop such rows when preparing the data"
        )
    return right


def _from_json(gold: str) -> Gold | None:
    try:
        record = json.loads(gold)
        (name, text), count = read_label(str(record["label"])) or ("", ""), int(record["options"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        return None
    return Gold(name, text, chr(ord("A") + count - 1)) if name and 2 <= count <= 26 else None


def chosen(completion: str, require_think: bool = False) -> str | None:
    """The label that a completion has chosen, right or wrong; `None` where its last box holds no single label."""
    found = boxed_answer(completion, require_think)
    match = None if isinstance(found, Verdict) or len(found) > MAX_CHARS else read_label(found)
    return None if match is None or _ANOTHER.search(match[1]) else match[0]


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
