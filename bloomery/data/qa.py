"""A question with an answer that a rule can check, whatever corpus it comes from, and the prompt that it becomes.

The items and templates of Nemotron-CrossThink (arXiv 2504.13941, sections 2.1 and 2.2): multiple choice with the
options listed, or open-ended without them. An item that was written with options keeps them when it is asked openly,
so that it can be asked either way under one id, and nothing is lost on the way there and back.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from bloomery.data.document import Document, content_hash

Form = Literal["choice", "open"]
AnswerForm = Literal["label", "short", "math"]

LABELS = "ABCDEFGHIJ"
VERIFIERS: dict[AnswerForm, str] = {"label": "label", "short": "short", "math": "answer"}
"""Answer form → the verifier that judges it."""

INSTRUCTIONS: dict[Form, str] = {
    "choice": r"Think between <think> and </think>, then give the letter of the right option in \boxed{}.",
    "open": r"Think between <think> and </think>, then give your answer, and nothing else, in \boxed{}.",
}


@dataclass(frozen=True)
class Item:
    """One question. `gold_label` is the letter of the right option; `gold_text` is its text, or the open answer.

    form: how it is asked; options: also kept where it is asked openly; alt_golds: other texts that are right;
    difficulty: 1 − pass rate of `judge_model`, of which `n_pass` of `n_try` samples were right; parent_id: the item it
    was converted from, which has the same id; decontam: what the contamination check found; transforms: what was done
    to it, in order.
    """

    id: str
    question: str
    gold_text: str
    source: str = ""
    domain: str = ""
    subject: str = ""
    form: Form = "open"
    options: tuple[str, ...] | None = None
    gold_label: str | None = None
    answer_form: AnswerForm = "short"
    alt_golds: tuple[str, ...] = ()
    difficulty: float | None = None
    n_pass: int | None = None
    n_try: int | None = None
    judge_model: str | None = None
    parent_id: str | None = None
    license: str = ""
    decontam: Mapping[str, Any] | None = None
    transforms: tuple[Mapping[str, Any], ...] = ()

    @property
    def gold_index(self) -> int | None:
        """Place of the right option; `None` where no option has the gold's label."""
        place = LABELS.find(self.gold_label) if self.gold_label else -1
        return place if 0 <= place < len(self.options or ()) else None

    @property
    def answer(self) -> str:
        """What the verifier compares with: for a label with the number of options, for words with what is as good."""
        if self.answer_form == "label":
            return f'{{"label": "{self.gold_label}", "options": {len(self.options or ())}}}'
        if self.answer_form == "short" and self.alt_golds:
            return json.dumps({"gold": self.gold_text, "alt_golds": self.alt_golds}, ensure_ascii=False)
        return self.gold_text

    @property
    def text(self) -> str:
        """Question and options, without any template: what is compared with evaluation sets."""
        return "\n".join((self.question, *(self.options or ())))

    @property
    def row_id(self) -> str:
        """The id of its row; twins, which have one id, are told apart by their form."""
        return f"{self.id}:{self.form}" if self.parent_id else self.id

    def metadata(self) -> dict[str, Any]:
        """All but what is empty or has a column of its own, as JSON values; `from_row` reads it back."""
        found: dict[str, Any] = {"item": self.id}
        for name, value in vars(self).items():
            if (value or value == 0) and name not in _COLUMNS:
                found[name] = list(value) if isinstance(value, tuple) else value
        return found

    def changed(self, **values: Any) -> "Item":
        """The item with other values in these fields."""
        other = object.__new__(Item)  # as dataclasses.replace, at a tenth of its time
        vars(other).update(vars(self))
        vars(other).update(values)
        return other

    @classmethod
    def from_row(cls, row: Mapping[str, Any], metadata: Mapping[str, Any]) -> "Item":
        """The item of a row of kind prompts with its metadata read."""
        found: dict[str, Any] = {name: metadata[name] for name in _KEPT if name in metadata}
        for name in ("options", "alt_golds", "transforms"):
            if name in found:
                found[name] = tuple(found[name])
        return cls(metadata["item"], source=row["source"], **found)


_COLUMNS = frozenset({"id", "source"})
_KEPT = tuple(field.name for field in fields(Item) if field.name not in _COLUMNS)


def new_id(question: str, options: tuple[str, ...] | None, gold: str) -> str:
    """The id of an item that brings none: by its content, whatever the order of the options."""
    return content_hash("\0".join((question, *sorted(options or ()), gold)))


def render(item: Item, instructions: Mapping[Form, str] = INSTRUCTIONS) -> str:
    """The user's message: an instruction, the question, and for a choice the options with their labels, one a line."""
    lines = [item.question]
    if item.form == "choice":
        lines.append("\n".join(map("{}. {}".format, LABELS, item.options or ())))
    return "\n\n".join([instructions[item.form], *lines] if instructions.get(item.form) else lines)


def to_prompt(item: Item, instructions: Mapping[Form, str] = INSTRUCTIONS) -> Document:
    """The item as a row of kind prompts."""
    asked = render(item, instructions)
    columns = {
        "prompt": [{"role": "user", "content": asked}], "answer": item.answer, "verifier": VERIFIERS[item.answer_form],
    }  # fmt: skip
    return Document(f"{asked}\n{item.answer}", item.row_id, item.source, item.metadata(), columns)


def to_benchmark(item: Item) -> Document:
    """The item of an evaluation set, for the contamination check."""
    return Document(item.text, item.row_id, item.source, {"question": item.question, "options": item.options or ()})


def shuffled(item: Item, seed: int, epoch: int = 0) -> Item:
    """The options in an order that (seed, id, epoch) decide, so that no label is likelier than another; recorded."""
    assert item.options is not None, f"{item.id}: nothing to shuffle"
    assert item.gold_index is not None, f"{item.id}: its gold is none of the options"
    order = _permutation(len(item.options), f"{seed}\0{item.id}\0{epoch}")
    options = tuple(item.options[place] for place in order)
    label = LABELS[order.index(item.gold_index)]
    done = (*item.transforms, {"shuffled": order})
    return item.changed(options=options, gold_label=label, transforms=done)


def _permutation(size: int, name: str) -> list[int]:
    """A random order of [0, size) that the name decides (Fisher and Yates)."""
    order = list(range(size))
    number = int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest(), "little")
    for place in range(size - 1, 0, -1):
        number, other = divmod(number, place + 1)
        order[place], order[other] = order[other], order[place]
    return order
