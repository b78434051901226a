"""Reasoning over facts that stand in the prompt: small tables and chains of relations."""

from collections.abc import Iterator, Sequence
from random import Random
from typing import Literal

from bloomery.config import Config, Field
from bloomery.data.procedural.forms import CHOICES, FORM_FIELD, Form, in_form
from bloomery.data.procedural.problem import Draft

NAMES = ("Ann", "Bob", "Cy", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Jo", "Kim", "Lee")
GOODS = ("figs", "nuts", "eggs", "keys", "pens", "cups", "hats", "toys")
_PETS = ("cat", "dog", "fox", "hen", "owl", "pig", "bee", "ant", "cow", "bat")
_COLORS = ("red", "blue", "green", "black", "white", "pink", "gray", "brown")
_NEAR = (-10, -2, -1, 1, 2, 10)
Question = Literal["most", "least", "total", "after"]


class TableOptions(Config):
    """Settings of `table`: who has how many of what."""

    form: Form = Field(default="open", description=FORM_FIELD)
    questions: tuple[Question, ...] = Field(
        default=("most", "least", "total"), min_length=1,
        description="what is asked about a column; after: who has most of it once somebody has got more",
    )  # fmt: skip
    rows: int = Field(default=3, ge=2, le=8, description="people in the table")
    columns: int = Field(default=2, ge=1, le=4, description="kinds of goods in the table")
    max_value: int = Field(default=20, ge=10, description="largest number in a cell; the smallest is 1")


def tables(options: TableOptions, random: Random) -> Iterator[Draft]:
    """Endless table problems; the numbers of a column differ, so that `most` and `least` have one answer."""
    while True:
        names = random.sample(NAMES, options.rows)
        goods = random.sample(GOODS, options.columns)
        columns = {good: random.sample(range(1, options.max_value + 1), options.rows) for good in goods}
        kind, good = random.choice(options.questions), random.choice(goods)
        asked, answer, others, steps = _asked(kind, good, names, columns[good], options, random)
        lines = [" ".join((name, *(str(columns[g][row]) for g in goods))) for row, name in enumerate(names)]
        question = "\n".join((" ".join(goods), *lines, asked))
        by_row = sorted((name, sorted((g, columns[g][row]) for g in goods)) for row, name in enumerate(names))
        verifier = "answer" if kind == "total" else "exact"
        subject = asked if kind == "after" else f"{kind} {good}"
        yield in_form(options.form, f"table {subject} {by_row}", question, answer, others, steps, verifier)


def _asked(
    kind: Question, good: str, names: Sequence[str], cells: Sequence[int], options: TableOptions, random: Random
) -> tuple[str, str, list[str], tuple[str, ...]]:
    """The question on one column, its answer, the wrong options, and the steps."""
    if kind == "total":
        total = sum(cells)
        others = [str(total + shift) for shift in random.sample(_NEAR, CHOICES - 1)]
        return f"total {good}?", str(total), others, _running_sum(cells)
    asked = f"{kind} {good}?"
    first: tuple[str, ...] = ()
    if kind == "after":
        row = random.randrange(len(cells))
        gains = [gain for gain in range(1, options.max_value + 1) if cells[row] + gain not in cells]
        gain = random.choice(gains)
        asked = f"{names[row]} gets {gain} {good}. most {good}?"
        first = (f"{cells[row]}+{gain}={cells[row] + gain}",)
        cells = [cell + gain * (place == row) for place, cell in enumerate(cells)]
    answer = names[cells.index(min(cells) if kind == "least" else max(cells))]
    compared = " ".join(f"{name} {cell}" for name, cell in zip(names, cells, strict=True))
    return asked, answer, [name for name in names if name != answer], (*first, compared, answer)


def _running_sum(cells: Sequence[int]) -> tuple[str, ...]:
    total, steps = cells[0], []
    for cell in cells[1:]:
        steps.append(f"{total}+{cell}={total + cell}")
        total += cell
    return tuple(steps)


class RelationOptions(Config):
    """Settings of `relation`: who has which pet of which colour."""

    form: Form = Field(default="open", description=FORM_FIELD)
    people: int = Field(default=3, ge=2, le=8, description="people that the facts speak of")
    hops: int = Field(default=2, ge=1, le=2, description="facts to join: 1 person and pet, 2 also the pet's colour")


def relations(options: RelationOptions, random: Random) -> Iterator[Draft]:
    """Endless relation problems; facts come in random order and the question runs along or against them."""
    while True:
        names, pets, colors = (random.sample(pool, options.people) for pool in (NAMES, _PETS, _COLORS))
        owns = [f"{name} has {pet}" for name, pet in zip(names, pets, strict=True)]
        looks = [f"{pet} is {color}" for pet, color in zip(pets, colors, strict=True)] if options.hops == 2 else []
        facts = random.sample(owns + looks, len(owns + looks))
        target, forward = random.randrange(options.people), random.random() < 0.5
        ends = colors if options.hops == 2 else pets
        answers = ends if forward else names
        asked = _question(options.hops, forward, names[target], ends[target])
        path = [line[target] for line in (owns, looks) if line]
        draft = in_form(
            options.form, f"relation {asked} {sorted(facts)}", ". ".join(facts) + f".\n{asked}", answers[target],
            [a for place, a in enumerate(answers) if place != target], tuple(path if forward else path[::-1]), "exact",
        )  # fmt: skip
        yield draft


def _question(hops: int, forward: bool, name: str, end: str) -> str:
    if hops == 1:
        return f"{name} has?" if forward else f"who has {end}?"
    return f"{name}'s pet is?" if forward else f"whose pet is {end}?"
