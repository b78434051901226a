"""Short free-form answers: words, a number with its unit, a date, or a list of them.

Nemotron-CrossThink (arXiv 2504.13941) compares such answers as strings; here what is written differently and says the
same is the same, by a small table and never by a part of the text: who names every candidate has named none.
"""

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from bloomery.errors import ArtifactError
from bloomery.verify.dates import Date, read_date
from bloomery.verify.extract import boxed_answer
from bloomery.verify.normalize import mixed_scripts, normalize, unified
from bloomery.verify.quantities import Quantity, read_quantity
from bloomery.verify.verdict import Verdict

MAX_CHARS = 1000
NEAR_MISS = "near miss"
"""Begins the reason of an answer that is at most two letters away from the gold: never paid, but worth a look."""

_BETWEEN_ITEMS = re.compile(r"\s*(?:[;\n]|,(?!\d{3}(?!\d))|(?<=\s)(?:and|&)(?=\s))\s*")
_MISS_EDITS, _MISS_CHARS = 2, (5, 64)


@dataclass(frozen=True, slots=True)
class Reading:
    """One answer as a date, as a quantity, or as its normalised text; and its items, where it is a list."""

    value: Date | Quantity | str
    items: tuple["Reading", ...] = ()

    def same(self, other: "Reading", in_order: bool) -> bool:
        """Whether both say the same: a value of the same kind, or as many items, each the same."""
        if _equal(self.value, other.value):
            return True
        if len(self.items) != len(other.items) or not self.items:
            return False
        if in_order:
            return all(_equal(mine.value, theirs.value) for mine, theirs in zip(self.items, other.items, strict=True))
        left = list(other.items)
        return all(_take(left, mine) for mine in self.items)


def _equal(first: Date | Quantity | str, second: Date | Quantity | str) -> bool:
    if isinstance(first, Quantity) and isinstance(second, Quantity):
        return first.equals(second)
    return first == second


def _take(items: list[Reading], wanted: Reading) -> bool:
    """Remove the first item that says the same."""
    found = next((place for place, item in enumerate(items) if _equal(wanted.value, item.value)), None)
    if found is not None:
        del items[found]
    return found is not None


@dataclass(frozen=True, slots=True)
class Gold:
    """The texts that are right, read; whether the items of a list must stand in their order."""

    readings: tuple[Reading, ...]
    texts: tuple[str, ...]
    in_order: bool = True


def short(completion: str, gold: str, require_think: bool = False) -> Verdict:
    """Does the box hold the gold answer, or one of those that are as good?

    gold: the answer's text, or JSON `{"gold": "Paris", "alt_golds": ["City of Paris"], "unordered": true}`, the last
    for a list whose items may stand in any order. Raises `ArtifactError` for a gold that says nothing.
    """
    right = read_gold(gold)
    found = boxed_answer(completion, require_think)
    if isinstance(found, Verdict):
        return found
    if len(found) > max(MAX_CHARS, *(2 * len(text) for text in right.texts)):
        return Verdict.of("parse_fail", f"{len(found)} characters, at most {MAX_CHARS}")
    said = read(found)
    if any(expected.same(said, right.in_order) for expected in right.readings):
        return Verdict.of("correct")
    return Verdict.of("wrong", _why(found, right))


def _why(found: str, right: Gold) -> str:
    text = normalize(found)
    if (word := mixed_scripts(found)) is not None:
        return f"letters of several scripts in {word[:40]!r}"
    near = any(_is_near(text, normalize(gold)) for gold in right.texts)
    return f"{NEAR_MISS + ': ' if near else ''}{found[:80]} is not {right.texts[0][:80]}"


@lru_cache(maxsize=4096)
def read_gold(gold: str) -> Gold:
    """What a prompt's answer says is right. Raises `ArtifactError` where that is nothing."""
    record = _record(gold) or {}
    texts = [record.get("gold", ""), *record.get("alt_golds", [])]
    if not all(isinstance(text, str) and normalize(text) for text in texts):
        raise ArtifactError(
            f"a prompt with verifier 'short' has the answer {gold[:200]!r}; expected a short text, or JSON with gold "
            "and alt_golds, none of them empty"
        )
    return Gold(tuple(map(read, texts)), tuple(texts), not record.get("unordered", False))


def _record(gold: str) -> dict[str, Any] | None:
    if not gold.lstrip().startswith('{"'):
        return {"gold": gold}
    try:
        record = json.loads(gold)
    except json.JSONDecodeError:
        return None
    known = isinstance(record.get("alt_golds", []), list) and record.keys() <= {"gold", "alt_golds", "unordered"}
    return record if known and "gold" in record else None


def read(text: str) -> Reading:
    """An answer as what it is: a date before a quantity before words; a list where separators part it."""
    parts = [part for part in _BETWEEN_ITEMS.split(unified(text).strip(" \t\n()[]{}")) if part.strip()]
    items = tuple(Reading(_value(part)) for part in parts) if len(parts) > 1 else ()
    return Reading(_value(text), items)


def _value(text: str) -> Date | Quantity | str:
    return read_date(text) or read_quantity(text) or normalize(text)


def _is_near(found: str, gold: str) -> bool:
    """At most two letters added, left out or changed, in words long enough for that to be a slip."""
    shortest, longest = _MISS_CHARS
    if not shortest <= len(gold) <= longest or abs(len(found) - len(gold)) > _MISS_EDITS:
        return False
    row = list(range(len(gold) + 1))
    for place, letter in enumerate(found, 1):
        diagonal, row[0] = row[0], place
        for column, other in enumerate(gold, 1):
            diagonal, row[column] = row[column], min(
                row[column] + 1, row[column - 1] + 1, diagonal + (letter != other)
            )  # fmt: skip
    return row[-1] <= _MISS_EDITS
