"""Relations to join: who is whose kin, and who came before whom.

The history-like domain of the Nemotron-CrossThink miniature (arXiv 2504.13941).
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from random import Random

from bloomery.config import Config, Field
from bloomery.data.procedural.facts import NAMES
from bloomery.data.procedural.forms import FORM_FIELD, Form, distractors, in_form
from bloomery.data.procedural.problem import Draft

_WORDS: Mapping[str, tuple[str, str]] = {
    "parent": ("mother", "father"), "child": ("daughter", "son"), "sibling": ("sister", "brother"),
    "grandparent": ("grandmother", "grandfather"), "grandchild": ("granddaughter", "grandson"),
    "pibling": ("aunt", "uncle"), "nibling": ("niece", "nephew"),
}  # fmt: skip
_JOINED: Mapping[tuple[str, str], str] = {
    ("parent", "parent"): "grandparent", ("child", "child"): "grandchild", ("sibling", "sibling"): "sibling",
    ("sibling", "parent"): "pibling", ("child", "sibling"): "nibling", ("parent", "sibling"): "parent",
    ("sibling", "child"): "child",
}  # fmt: skip
"""What the first is to the third: of the first to the second and of the second to the third."""
KIN = tuple(itertools.chain.from_iterable(_WORDS.values()))


class FamilyOptions(Config):
    """Settings of `family`: two relations to join, among others that do not matter."""

    form: Form = Field(default="open", description=FORM_FIELD)
    others: int = Field(default=1, ge=0, le=4, description="further facts, about other people")


def families(options: FamilyOptions, random: Random) -> Iterator[Draft]:
    """Endless families: `Ann mother of Bob. Bob father of Cy.` asks what Ann is to Cy. Siblings share both parents."""
    while True:
        names = random.sample(NAMES, 3 + 2 * options.others)
        kinds = random.choice(list(_JOINED))
        female = random.random() < 0.5
        answer = _word(_JOINED[kinds], female)
        path = [
            f"{names[0]} {_word(kinds[0], female)} of {names[1]}",
            f"{names[1]} {_word(kinds[1], random.random() < 0.5)} of {names[2]}",
        ]
        unrelated = [
            f"{one} {_word(random.choice(('parent', 'child', 'sibling')), random.random() < 0.5)} of {other}"
            for one, other in zip(names[3::2], names[4::2], strict=True)
        ]
        facts = random.sample([*path, *unrelated], len(path) + len(unrelated))
        asked = f"{names[0]} of {names[2]}?"
        canonical = f"family {asked} {sorted(facts)}"
        yield in_form(
            options.form, canonical, ". ".join(facts) + f".\n{asked}", answer, distractors(canonical, answer, KIN),
            (*path, answer), "exact",
        )  # fmt: skip


def _word(kind: str, female: bool) -> str:
    return _WORDS[kind][0 if female else 1]


class OrderOptions(Config):
    """Settings of `order`: people in a row, told by neighbours."""

    form: Form = Field(default="open", description=FORM_FIELD)
    people: int = Field(default=4, ge=3, le=8, description="people in the row")


def orders(options: OrderOptions, random: Random) -> Iterator[Draft]:
    """Endless rows: who came first, last, or right after somebody."""
    while True:
        row = random.sample(NAMES, options.people)
        facts = [
            f"{one} before {other}" if random.random() < 0.5 else f"{other} after {one}"
            for one, other in itertools.pairwise(row)
        ]
        asked, answer = _asked(row, random)
        canonical = f"order {asked} {row}"
        yield in_form(
            options.form, canonical, ". ".join(random.sample(facts, len(facts))) + f".\n{asked}", answer,
            distractors(canonical, answer, row), (" ".join(row), answer), "exact",
        )  # fmt: skip


def _asked(row: Sequence[str], random: Random) -> tuple[str, str]:
    kind = random.choice(("first", "last", "next"))
    if kind == "next":
        place = random.randrange(1, len(row))
        return f"next after {row[place - 1]}?", row[place]
    return f"{kind}?", row[0] if kind == "first" else row[-1]
