"""One item in both forms: asked openly without its options, or as a choice among them.

The rules of opening (Nemotron-CrossThink, arXiv 2504.13941, section 2.2, discards questions that make no sense without
their options and gives no patterns; these are ours).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from bloomery.data.qa import LABELS, AnswerForm, Form, Item, shuffled
from bloomery.data.qa_filters import Phrases, QAFilterConfig, open_reason, refer_to_each_other
from bloomery.data.qa_read import is_math

Ambiguous = Literal["drop", "mark"]

AMBIGUOUS = "ambiguous"
"""Marks, among its transforms, an open question whose answer could be worded otherwise, until a model was asked."""

_DEPENDENT = Phrases(
    r"\b(?:which|what)(?: (?:one|ones|two))? of (?:the )?(?:following|these|those|above|below|options|choices)\b"
    r"|\b(?:all|none|both|each|any|one) of the (?:following|above|options|choices|statements|answers)\b"
    r"|\bthe following (?:is|are|was|were|would|can|could|best|statements?|options?|pairs?|except)\b|\bexcept\b"
    r"|\bnot (?:true|correct|false|necessarily)\b|\bleast likely\b|\b(?:choose|select|match)\b"
    r"|\b(?:options?|choices?|statements?) (?:[A-J]|[IV]+|\d)\b|\b(?:i|ii|iii|iv) (?:only|and)\b"
    r"|\bwhich (?:option|choice|answer|statement|pair|combination)\b|\bbest (?:describes|explains|answers|completes)\b",
    (
        " of ", "the following", "except", "not ", "least likely", "choose", "select", "match", "option", "choice",
        "statement", "i only", "i and", "v only", "v and", "which ", "best ",
    ),
)  # fmt: skip
_BLANK = re.compile(r"_{2,}|\.{4,}|…\s*$")
_ASKS = re.compile(r"[?？؟⁇]\W*$")
_IMPERATIVE = re.compile(
    r"(?:^|[.:;,!?]\s+|\bthen )(?:please )?(?:find|compute|calculate|determine|evaluate|solve|simplify|name|give|state|"
    r"identify|write|express|estimate|factor|expand|differentiate|integrate|convert|round|list|translate|spell|count|"
    r"add|subtract|multiply|divide|tell|say|explain|what|who|when|where|how|why|which)\b[^?]*$",
    re.IGNORECASE,
)
_LABEL_ONLY = re.compile(r"\(?[A-J]\)?\.?|\(?(?:i|ii|iii|iv|v)\)?(?:,? (?:and|or|only).*)?", re.IGNORECASE)
_SMALL = frozenset({"of", "the", "de", "la", "von", "van", "and", "in", "on", "du", "al", "el"})


def to_open(item: Item, config: QAFilterConfig, ambiguous: Ambiguous = "drop") -> Item | str:
    """The item without its options shown, or the reason why it cannot be asked so. An open one comes back as it is.

    It keeps id, options and label, so that `to_choice` has the way back. ambiguous: a question whose answer is no
    number and no name is dropped, or marked as one that `curate` must try (`probe`).
    """
    if item.form == "open":
        return item
    if (before := _before(item, "choice")) is not None:
        return before.changed(options=None, gold_label=None)
    reason = _dependence(item) or open_reason(item, config) or _collision(item)
    if reason is not None:
        return reason
    doubtful = not one_wording(item)
    if doubtful and ambiguous == "drop":
        return "the answer could be worded otherwise"
    done = {"form": "open", "from": "label"} | ({AMBIGUOUS: True} if doubtful else {})
    return _converted(item, "open", "math" if is_math(item.gold_text) else "short", done)


def to_choice(item: Item, distractors: Sequence[str] = (), seed: int = 0) -> Item:
    """The item with its options shown: those that it was opened from, or else its gold among `distractors`.

    Raises `ValueError` for an open item that has neither, or whose gold is one of the distractors.
    """
    if item.form == "choice":
        return item
    if (before := _before(item, "open")) is not None:
        return before
    options = (item.gold_text, *distractors)
    if len(options) < 2 or len(set(options)) < len(options) or len(options) > len(LABELS):
        raise ValueError(f"{item.id}: {len(distractors)} distractors; expected 1 to 9, all different from the gold")
    listed = item.changed(options=options, gold_label=LABELS[0])
    return shuffled(_converted(listed, "choice", "label", {"form": "choice", "from": item.answer_form}), seed)


def _converted(item: Item, form: Form, answer_form: AnswerForm, done: Mapping[str, Any]) -> Item:
    transforms = (*item.transforms, done)
    return item.changed(form=form, answer_form=answer_form, parent_id=item.id, transforms=transforms)


def _before(item: Item, form: Form) -> Item | None:
    """The item as it was before it was converted to this form; `None` where it never was."""
    made = next((place for place, done in enumerate(item.transforms) if done.get("form") == form), None)
    if made is None:
        return None
    return item.changed(
        form="choice" if form == "open" else "open", answer_form=item.transforms[made]["from"], parent_id=None,
        transforms=item.transforms[:made],
    )  # fmt: skip


def _dependence(item: Item) -> str | None:
    """What the question loses with its options."""
    asked = item.question.rpartition("\n\n")[2]
    if _DEPENDENT.found_in(asked):
        return "needs its options"
    if refer_to_each_other((item.gold_text,)) or _LABEL_ONLY.fullmatch(item.gold_text):
        return "gold names options"
    if _BLANK.search(asked) and not is_math(item.gold_text):
        return "a blank that several answers could fill"
    return None if _ASKS.search(asked) or _IMPERATIVE.search(asked) else "no question without its options"


def _collision(item: Item) -> str | None:
    """Where verdicts on short answers do not see case and end punctuation, another option must not count as right."""
    assert item.options is not None
    gold = _loose(item.gold_text)
    same = sum(_loose(option) == gold for option in item.options)
    return "another option reads like the gold" if same > 1 else None


def _loose(text: str) -> str:
    return " ".join(text.casefold().strip(" .,;:!?\"'()[]$").split())


def one_wording(item: Item) -> bool:
    """Whether the gold can hardly be worded otherwise: a number or formula, or a name as all options are names."""
    return is_math(item.gold_text) or all(map(_is_name, item.options or (item.gold_text,)))


def _is_name(text: str) -> bool:
    """Capitalised throughout, as Marie Curie and Treaty of Rome; at most four words."""
    words = text.strip(" .").split()
    return 0 < len(words) <= 4 and all(word[0].isupper() or word in _SMALL for word in words) and words[0][0].isupper()
