"""How many tokens a right answer takes, of one model and of two compared on the items that both solve.

Tokens per correct answer (Nemotron-CrossThink, arXiv 2504.13941) is a choice of answers: a model that solves harder
items looks longer. So two models are also compared item by item, the cost of failures is counted, and accuracy is given
at smaller budgets. All with the same tokenizer and the same longest answer; lengths count the token that ends an answer
and not the prompt.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bloomery.evaluate import statistics
from bloomery.evaluate.statistics import Difference, Estimate

BUDGETS = {"quarter": 1 / 4, "half": 1 / 2}
"""Parts of the longest answer at which accuracy is given, beside the whole."""
MATHS = ("math", "arithmetic")
"""Domains that adaptivity compares with all others."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One judged answer."""

    right: bool
    tokens: int


Problem = Sequence[Answered]


def tokens_when(problems: Sequence[Problem], right: bool) -> Estimate | None:
    """Mean length of the right (or of the wrong) answers, every answer the same weight; None where there is none."""
    chosen = [[a.tokens for a in problem if a.right == right] for problem in problems]
    return statistics.ratio([sum(lengths) for lengths in chosen], [len(lengths) for lengths in chosen])


def wrong_over_right(problems: Sequence[Problem]) -> Estimate | None:
    """How much longer wrong answers are; None where all are right, or none is."""
    return _quotient(tokens_when(problems, False), tokens_when(problems, True))


def adaptivity(problems: Mapping[str, Sequence[Problem]]) -> Estimate | None:
    """Tokens of a right answer in mathematics over those elsewhere: above 1, thinking is spent where it is needed.

    problems: by domain. None where one side has no right answer.
    """
    sides = [[p for name, own in problems.items() if (name in MATHS) == is_math for p in own] for is_math in (1, 0)]
    if not all(sides):
        return None
    return _quotient(*(tokens_when(side, True) for side in sides))


def _quotient(top: Estimate | None, bottom: Estimate | None) -> Estimate | None:
    """Of two independent means, its standard error to first order."""
    if top is None or bottom is None:
        return None
    value, stderr = top.value / bottom.value, None
    if top.stderr is not None and bottom.stderr is not None:
        stderr = value * math.hypot(top.stderr / top.value, bottom.stderr / bottom.value)
    return Estimate(value, stderr, top.n)


def accuracy_within(problems: Sequence[Problem], budget: float) -> Estimate:
    """Share of answers that are right and done within `budget` tokens."""
    return statistics.mean([sum(a.right and a.tokens <= budget for a in p) / len(p) for p in problems])


def matched_ratio(
    before: Mapping[str, Problem], after: Mapping[str, Problem], draws: int = 10_000, seed: int = 0
) -> Difference | None:
    """Tokens of a right answer after over before, on the items that both solve: exp of the mean log-ratio of each
    item's mean lengths, with a 95 % bootstrap interval over those items; None where they share none."""
    logs = [
        {name: math.log(lengths.value) for name, problem in side.items() if (lengths := tokens_when([problem], True))}
        for side in (before, after)
    ]
    if not logs[0].keys() & logs[1].keys():
        return None
    found = statistics.paired_difference(*logs, draws=draws, seed=seed)
    return Difference(math.exp(found.effect), math.exp(found.low), math.exp(found.high), found.n)


def metrics(problems: Sequence[Problem], longest: int | None = None) -> dict[str, Estimate]:
    """Of one model on one task: metric → estimate; what nothing can be said of is left out. longest: most new tokens
    that an answer could have, for the accuracy at parts of it."""
    found = {
        "tokens_when_right": tokens_when(problems, True),
        "tokens_when_wrong": tokens_when(problems, False),
        "tokens_wrong_over_right": wrong_over_right(problems),
    }
    if longest is not None and problems:
        found |= {f"avg_within_{name}": accuracy_within(problems, part * longest) for name, part in BUDGETS.items()}
    return {name: estimate for name, estimate in found.items() if estimate is not None}
