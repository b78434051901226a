"""Question-answer corpora in the layouts that they are published in, as items."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bloomery.data.dataset import Row
from bloomery.data.qa import LABELS, AnswerForm, Item, new_id
from bloomery.data.read import Invalid, Located
from bloomery.errors import ArtifactError

Layout = Literal["columns", "mmlu", "agieval", "arc", "gsm8k"]

_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200e\u200f\u061c\u2060\ufeff"))  # they say nothing, and hide differences
_LABEL = re.compile(r"\s*[(\[]?([A-J])\s*[)\].:]+\s*")
_OWN_LABEL = re.compile(r"[(\[]?([A-Ja-j])\s*(?:[)\].:]+\s*(.*)|$)", re.DOTALL)
_NUMBER = re.compile(r"(?=.*\d)[-+−]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:\s?/\s?\d+)?\s?\\?%?")
_FORMULA = re.compile(r"\\[a-zA-Z]|\$.*\$|[\^_=]")


class Unusable(Exception):
    """A row in which nothing can be read as question, options or answer; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Raw:
    """What a layout finds in a row, as it stands there. labels: those of the options, where the row has its own."""

    question: Any
    options: Any
    gold: Any
    labels: Sequence[str] | None = None
    passage: Any = None
    alt_golds: Any = None


def items(
    rows: Iterable[Located], layout: Layout, columns: Mapping[str, str], tags: "Tags", invalid: Invalid
) -> Iterator[tuple[str, Item]]:
    """(place, item) of each row; one in which nothing can be read is counted in `invalid`.

    columns: our name → theirs, where the layout's differ. Raises `ArtifactError` naming a missing column.
    """
    read = LAYOUTS[layout]
    for where, row in rows:
        try:
            yield where, to_item(read(_Columns(row, columns, where)), tags, row, columns)
        except Unusable as error:
            invalid(where, str(error), str(error))


class _Columns:
    """A row by our names."""

    def __init__(self, row: Row, columns: Mapping[str, str], where: str):
        self.row, self.columns, self.where = row, columns, where

    def get(self, *names: str) -> Any:
        """The first of these columns that is there. Raises `ArtifactError` when none is."""
        for name in names:
            theirs = self.columns.get(name, name)
            if theirs in self.row:
                return self.row[theirs]
        raise ArtifactError(
            f"{self.where}: no column {names[0]!r}; found {', '.join(self.row)}; name it with "
            f"columns: {{{names[0]}: …}}, or choose another layout"
        )

    def maybe(self, *names: str) -> Any:
        """The first of these columns that is there, or `None`."""
        for name in names:
            theirs = self.columns.get(name, name)
            if theirs in self.row:
                return self.row[theirs]
        return None

    def options(self, *names: str) -> Any:
        """The options: one column, or one of each label (A, B, …)."""
        if (together := self.maybe(*names)) is not None:
            return together
        lettered = [self.maybe(label) for label in LABELS]
        given = [option for option in lettered if option is not None]
        return given or None


def _columns(row: _Columns) -> Raw:
    return Raw(
        row.get("question"), row.options("options"), row.get("answer"),
        passage=row.maybe("passage"), alt_golds=row.maybe("alt_golds"),
    )  # fmt: skip


def _mmlu(row: _Columns) -> Raw:
    return Raw(row.get("question"), row.options("choices", "options"), row.get("answer"))


def _agieval(row: _Columns) -> Raw:
    """Open tasks of it have an answer, the others a label."""
    options = row.get("options")
    gold = row.maybe("label") if options else row.maybe("answer")
    return Raw(row.get("question"), options, gold, passage=row.maybe("passage"))


def _arc(row: _Columns) -> Raw:
    """As the allenai files have it, the question an object, or as the hub has it, in columns; labels may be digits."""
    question: Any = row.get("question")
    choices: Any = row.maybe("choices")
    if isinstance(question, dict):
        question, choices = question.get("stem"), question.get("choices")
    if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        choices = {name: [choice.get(name) for choice in choices] for name in ("text", "label")}
    if not isinstance(choices, dict) or not isinstance(choices.get("label"), list):
        raise Unusable("options are no list of texts")
    return Raw(question, choices.get("text"), row.get("answerKey"), [str(label) for label in choices["label"]])


def _gsm8k(row: _Columns) -> Raw:
    """The answer stands behind the last ####, without the commas of thousands."""
    answer = row.get("answer")
    gold = answer.rpartition("####")[2].strip().replace(",", "") if isinstance(answer, str) else answer
    return Raw(row.get("question"), None, gold)


LAYOUTS: dict[Layout, Callable[[_Columns], Raw]] = {
    "columns": _columns, "mmlu": _mmlu, "agieval": _agieval, "arc": _arc, "gsm8k": _gsm8k,
}  # fmt: skip


@dataclass(frozen=True)
class Tags:
    """What is the same for all items of a source, or follows from their subject."""

    source: str
    domain: str = ""
    domains: Mapping[str, str] | None = None
    subject: str = ""
    license: str = ""
    answer_form: AnswerForm | None = None


def to_item(raw: Raw, tags: Tags, row: Row, columns: Mapping[str, str]) -> Item:
    """The item. A gold that is not among the options has no label; the filters see to it. Raises `Unusable`."""

    def own(name: str, otherwise: str = "") -> str:
        value = row.get(columns.get(name, name))
        return otherwise if value is None else str(value)

    question, options = _question(raw), _options(raw.options)
    label, gold = _gold(raw.gold, options, raw.labels)
    subject = own("subject", own("type", tags.subject))
    domain = (tags.domains or {}).get(subject) or own("domain", tags.domain) or tags.source
    return Item(
        own("id") or new_id(question, options, gold), question, gold, source=tags.source, domain=domain,
        subject=subject, form="open" if options is None else "choice", options=options, gold_label=label,
        answer_form="label" if options is not None else tags.answer_form or _open_form(domain, gold),
        alt_golds=_texts(raw.alt_golds), license=own("license", tags.license),
    )  # fmt: skip


def _open_form(domain: str, gold: str) -> AnswerForm:
    return "math" if "math" in domain.lower().split("_") or is_math(gold) else "short"


def is_math(gold: str) -> bool:
    """Whether an answer is a number or a formula, which its value decides and not its letters."""
    return bool(gold) and (bool(_NUMBER.fullmatch(gold)) or bool(_FORMULA.search(gold)))


def clean(text: str) -> str:
    """Composed, without surrounding space and without invisible marks of no meaning."""
    if text.isascii():
        return text.strip()
    return unicodedata.normalize("NFC", text.translate(_INVISIBLE)).strip()


def _question(raw: Raw) -> str:
    if not isinstance(raw.question, str):
        raise Unusable("no text in question")
    passage = clean(raw.passage) if isinstance(raw.passage, str) else ""
    return f"{passage}\n\n{clean(raw.question)}" if passage else clean(raw.question)


def _options(value: Any) -> tuple[str, ...] | None:
    """Their texts, without labels of their own where each stands in its order."""
    if value is None:
        return None
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list) or not all(isinstance(option, str | int | float) for option in value):
        raise Unusable("options are no list of texts")
    found = [clean(str(option)) for option in value]
    return tuple(_without_labels(found) if found and _LABEL.match(found[0]) else found)


def _without_labels(options: list[str]) -> list[str]:
    """Where each has its own label, in order."""
    labels = [match.group(1) if (match := _LABEL.match(option)) else "" for option in options]
    own = "".join(labels) == LABELS[: len(options)]
    return [_LABEL.sub("", option, count=1) for option in options] if own else options


def _gold(value: Any, options: tuple[str, ...] | None, labels: Sequence[str] | None) -> tuple[str | None, str]:
    """(label, text) of the right option, or (`None`, the answer as given) where it is none of them."""
    if value is None or isinstance(value, bool | dict):
        raise Unusable("no gold answer")
    given = clean(str(value[0] if isinstance(value, list) and len(value) == 1 else value))
    if options is None:
        return None, given
    place = _place(value, given, options, labels)
    return (LABELS[place], options[place]) if place is not None and place < len(LABELS) else (None, given)


def _place(value: Any, given: str, options: tuple[str, ...], labels: Sequence[str] | None) -> int | None:
    """A number counts from 0; a letter is a label; else it is an option's own label, its text, or label and text."""
    if isinstance(value, int):
        return value if 0 <= value < len(options) else None
    if labels is not None:
        return labels.index(given) if given in labels and labels.index(given) < len(options) else None
    if given in options:
        return options.index(given)
    if match := _OWN_LABEL.fullmatch(given):
        place = LABELS.index(match.group(1).upper())
        named = match.group(2)
        return place if place < len(options) and (not named or clean(named) == options[place]) else None
    return None


def _texts(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (clean(value),)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise Unusable("alternative answers are no list of texts")
    return tuple(map(clean, value))
