"""Logic: which verdict rules give for facts, and who lies among two who speak of each other.

The law-like domain of the Nemotron-CrossThink miniature (arXiv 2504.13941): everything needed stands in the prompt,
except that verdicts grow harder from free over warn and fine to jail.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from random import Random

from bloomery.config import Config, Field
from bloomery.data.procedural.facts import NAMES
from bloomery.data.procedural.forms import FORM_FIELD, Form, in_form
from bloomery.data.procedural.problem import Draft

VERDICTS = ("free", "warn", "fine", "jail")
DEEDS = ("late", "loud", "rude", "idle", "rash", "sly", "mean", "vain")


class VerdictOptions(Config):
    """Settings of `verdict`: rules from deeds to verdicts, and who did what."""

    form: Form = Field(default="open", description=FORM_FIELD)
    people: int = Field(default=2, ge=1, le=6, description="people whose deeds the facts tell")
    deeds: int = Field(default=2, ge=1, le=4, description="deeds of each of them; four deeds have rules")


def verdicts(options: VerdictOptions, random: Random) -> Iterator[Draft]:
    """Endless cases; of the verdicts on a person's deeds the question takes the hardest or the mildest."""
    while True:
        deeds = random.sample(DEEDS, len(VERDICTS))
        rules = dict(zip(deeds, random.sample(VERDICTS, len(VERDICTS)), strict=True))
        did = {name: random.sample(deeds, options.deeds) for name in random.sample(NAMES, options.people)}
        name, hardest = random.choice(list(did)), random.random() < 0.5
        found = [rules[deed] for deed in did[name]]
        answer = (max if hardest else min)(found, key=VERDICTS.index)
        asked = f"{'hard' if hardest else 'mild'} {name}?"
        lines = [f"{deed} {verdict}" for deed, verdict in rules.items()]
        lines += [" ".join((who, *what)) for who, what in did.items()]
        facts = sorted([*lines[: len(rules)], *(" ".join((who, *sorted(what))) for who, what in did.items())])
        steps = (*(f"{deed} {rules[deed]}" for deed in did[name]), answer)
        yield in_form(
            options.form, f"verdict {asked} {facts}", ". ".join(lines) + f".\n{asked}", answer,
            [verdict for verdict in VERDICTS if verdict != answer], steps, "exact",
        )  # fmt: skip


Case = tuple[bool, bool]
"""Whether the first and the second of two people lie."""
_CASES: Mapping[str, Case] = {
    "none": (False, False), "first": (True, False), "second": (False, True), "both": (True, True),
}  # fmt: skip
_SAYINGS = ("{other} lies", "{other} is true", "we differ", "we agree", "both lie")


def _holds(saying: str, speaker: int, case: Case) -> bool:
    """Whether what a speaker says holds in a case."""
    other = case[1 - speaker]
    return {
        "{other} lies": other, "{other} is true": not other, "we differ": case[0] != case[1],
        "we agree": case[0] == case[1], "both lie": all(case),
    }[saying]  # fmt: skip


def _fits(sayings: Sequence[str], case: Case) -> bool:
    """Whether those who lie say what does not hold, and the others what does."""
    return all(_holds(saying, speaker, case) != case[speaker] for speaker, saying in enumerate(sayings))


_PUZZLES: Mapping[str, list[tuple[str, ...]]] = {
    name: [
        pair
        for pair in itertools.product(_SAYINGS, repeat=2)
        if [other for other, one in _CASES.items() if _fits(pair, one)] == [name]
    ]
    for name in _CASES
}
"""Case → the pairs of sayings that leave no other."""


class KnightsOptions(Config):
    """Settings of `knights`: two people, each of whom always lies or never does."""

    form: Form = Field(default="open", description=FORM_FIELD)


def knights(options: KnightsOptions, random: Random) -> Iterator[Draft]:
    """Endless puzzles with one solution, each of the four solutions equally often."""
    while True:
        names = random.sample(NAMES, 2)
        case = random.choice(list(_CASES))
        said = random.choice(_PUZZLES[case])
        called = {"none": "none", "first": names[0], "second": names[1], "both": "both"}
        lines = [f"{names[n]}: {saying.format(other=names[1 - n])}" for n, saying in enumerate(said)]
        refuted = list(_CASES)[: list(_CASES).index(case)]
        steps = (*(f"{called[name]} no" for name in refuted), f"{called[case]} yes")
        yield in_form(
            options.form, f"knights {sorted(lines)}", ". ".join(lines) + ".\nwho lies?", called[case],
            [word for name, word in called.items() if name != case], steps, "exact",
        )  # fmt: skip
