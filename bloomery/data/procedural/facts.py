"""Reasoning over facts that stand in the prompt: small tables and chains of relations.

Every problem exists in an open form and in a multiple-choice form with the same id stem: the same seed and settings
with another `form` give the same problems, so that what is asked and how it is asked can be told apart
(Nemotron-CrossThink, arXiv 2504.13941, sections on templates).
"""

from collections.abc import Iterator, Sequence
from random import Random
from typing import Literal

from bloomery.config import Config, Field
from bloomery.data.procedural.problem import Draft

Form = Literal["choice", "open"]

_NAMES = ("Ann", "Bob", "Cy", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Jo", "Kim", "Lee")
_GOODS = ("figs", "nuts", "eggs", "keys", "pens", "cups", "hats", "toys")
_PETS = ("cat", "dog", "fox", "hen", "owl", "pig", "bee", "ant", "cow", "bat")
_COLORS = ("red", "blue", "green", "black", "white", "pink", "gray", "brown")
_CHOICES = 4
_NEAR = (-10, -2, -1, 1, 2, 10)


class TableOptions(Config):
    """Settings of `table`: who has how many of what."""

    form: Form = Field(default="open", description="choice: the answer is an option's letter; open: it is a word")
    questions: tuple[Literal["most", "least", "total"], ...] = Field(
        default=("most", "least", "total"), min_length=1, description="what is asked about a column"
    )
    rows: int = Field(default=3, ge=2, le=8, description="people in the table")
    columns: int = Field(default=2, ge=1, le=4, description="kinds of goods in the table")
    max_value: int = Field(default=20, ge=10, description="largest number in a cell; the smallest is 1")


def tables(options: TableOptions, random: Random) -> Iterator[Draft]:
    """Endless table problems; the numbers of a column differ, so that `most` and `least` have one answer."""
    while True:
        names = random.sample(_NAMES, options.rows)
        goods = random.sample(_GOODS, options.columns)
        columns = {good: random.sample(range(1, options.max_value + 1), options.rows) for good in goods}
        kind, good = random.choice(options.questions), random.choice(goods)
        cells = columns[good]
        if kind == "total":
            answer, steps = str(sum(cells)), _running_sum(cells)
            others = [str(sum(cells) + shift) for shift in random.sample(_NEAR, _CHOICES - 1)]
        else:
            answer = names[cells.index(max(cells) if kind == "most" else min(cells))]
            steps = (" ".join(f"{name} {cell}" for name, cell in zip(names, cells, strict=True)), answer)
            others = [name for name in names if name != answer]
        lines = [" ".join((name, *(str(columns[g][row]) for g in goods))) for row, name in enumerate(names)]
        question = "\n".join((" ".join(goods), *lines, f"{kind} {good}?"))
        by_row = sorted((name, sorted((g, columns[g][row]) for g in goods)) for row, name in enumerate(names))
        verifier = "answer" if kind == "total" else "exact"
        yield _in_form(options.form, f"table {kind} {good} {by_row}", question, answer, others, steps, verifier)


def _running_sum(cells: Sequence[int]) -> tuple[str, ...]:
    total, steps = cells[0], []
    for cell in cells[1:]:
        steps.append(f"{total}+{cell}={total + cell}")
        total += cell
    return tuple(steps)


class RelationOptions(Config):
    """Settings of `relation`: who has which pet of which colour."""

    form: Form = Field(default="open", description="choice: the answer is an option's letter; open: it is a word")
    people: int = Field(default=3, ge=2, le=8, description="people that the facts speak of")
    hops: int = Field(default=2, ge=1, le=2, description="facts to join: 1 person and pet, 2 also the pet's colour")


def relations(options: RelationOptions, random: Random) -> Iterator[Draft]:
    """Endless relation problems; facts come in random order and the question runs along or against them."""
    while True:
        names, pets, colors = (random.sample(pool, options.people) for pool in (_NAMES, _PETS, _COLORS))
        owns = [f"{name} has {pet}" for name, pet in zip(names, pets, strict=True)]
        looks = [f"{pet} is {color}" for pet, color in zip(pets, colors, strict=True)] if options.hops == 2 else []
        facts = random.sample(owns + looks, len(owns + looks))
        target, forward = random.randrange(options.people), random.random() < 0.5
        ends = colors if options.hops == 2 else pets
        answers = ends if forward else names
        asked = _question(options.hops, forward, names[target], ends[target])
        path = [line[target] for line in (owns, looks) if line]
        draft = _in_form(
            options.form, f"relation {asked} {sorted(facts)}", ". ".join(facts) + f".\n{asked}", answers[target],
            [a for place, a in enumerate(answers) if place != target], tuple(path if forward else path[::-1]), "exact",
        )  # fmt: skip
        yield draft


def _question(hops: int, forward: bool, name: str, end: str) -> str:
    if hops == 1:
        return f"{name} has?" if forward else f"who has {end}?"
    return f"{name}'s pet is?" if forward else f"whose pet is {end}?"


def _in_form(
    form: Form, canonical: str, question: str, answer: str, others: Sequence[str], steps: tuple[str, ...], verifier: str
) -> Draft:
    """The open draft, or its multiple-choice twin with the options in an order that only the problem decides."""
    if form == "open":
        return Draft(canonical, question, answer, verifier, steps, variant="open", metadata={"form": form})
    options = [answer, *others]
    Random(canonical).shuffle(options)
    label = chr(ord("A") + options.index(answer))
    lettered = "\n".join(f"{chr(ord('A') + place)}) {option}" for place, option in enumerate(options))
    return Draft(
        canonical, f"{question}\n{lettered}", label, "choice", (*steps, f"{label}) {answer}"), variant="choice",
        metadata={"form": form, "options": options, "answer_text": answer},
    )  # fmt: skip
