"""Tokens and right answers: what each model needs for one, and how two models compare on what both solve."""

from collections.abc import Sequence
from dataclasses import dataclass

from bloomery.evaluate import efficiency
from bloomery.evaluate.efficiency import Answered, Problem
from bloomery.evaluate.statistics import Difference, Estimate, ratio
from bloomery.report import quantities
from bloomery.report.curves import Picture
from bloomery.report.facts import Grid
from bloomery.report.results import Evaluation

_DRAWS = 2_000
_POINTS = 60
_COLUMNS = ("tokens of a right answer", "for each right answer", "wrong over right", "right within ¼", "within ½",
            "at full length", "matched, against the model above")  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """One task: a picture of accuracy at every budget, and the numbers, a row a model."""

    task: str
    picture: Picture
    table: Grid


@dataclass(frozen=True)
class _Side:
    """One model's judged answers to one task; `longest` is the most tokens that an answer could have."""

    model: str
    problems: dict[str, list[Answered]]
    longest: int

    @property
    def listed(self) -> list[list[Answered]]:
        return list(self.problems.values())


def comparisons(found: Sequence[Evaluation]) -> list[Comparison]:
    """One per task that any model has samples of, in order of appearance."""
    tasks = dict.fromkeys(task for each in found for task in each.problems)
    ordered = sorted(tasks, key=lambda task: task != "all")
    sides = {task: [side for each in found if (side := _side(each, task))] for task in ordered}
    return [_comparison(task, own) for task, own in sides.items() if own]


def _side(each: Evaluation, task: str) -> _Side | None:
    """None where nothing was judged."""
    problems = {
        name: judged
        for name, samples in each.problems.get(task, {}).items()
        if (judged := [Answered(score >= 1, tokens) for score, tokens in samples if score is not None])
    }
    if not problems:
        return None
    written = max(answer.tokens for problem in problems.values() for answer in problem)
    longest = each.stage.config.get("max_new_tokens", written)
    return _Side(each.model, problems, longest if isinstance(longest, int) else written)


def _comparison(task: str, sides: Sequence[_Side]) -> Comparison:
    rows = [_row(side, before) for side, before in zip(sides, [None, *sides[:-1]], strict=True)]
    return Comparison(task, _picture(task, sides), Grid(_COLUMNS, tuple(rows)))


def _row(side: _Side, before: _Side | None) -> tuple[str, ...]:
    problems = side.listed
    lengths, right = [[sum(a.tokens for a in p) for p in problems], [sum(a.right for a in p) for p in problems]]
    within = [efficiency.accuracy_within(problems, part * side.longest) for part in (*efficiency.BUDGETS.values(), 1)]
    matched = None if before is None else efficiency.matched_ratio(before.problems, side.problems, draws=_DRAWS)
    return (
        side.model, _number(efficiency.tokens_when(problems, True)), _number(ratio(lengths, right)),
        _number(efficiency.wrong_over_right(problems)), *(quantities.percent(each.value) for each in within),
        _ratio(matched),
    )  # fmt: skip


def _number(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    low_high = estimate.interval
    ends = "" if low_high is None else f" ({' – '.join(quantities.number(max(0.0, end)) for end in low_high)})"
    return quantities.number(estimate.value) + ends


def _ratio(found: Difference | None) -> str:
    if found is None:
        return "–"
    if found.n == 1:  # no interval over one item
        return f"× {found.effect:.2f}, 1 item"
    return f"× {found.effect:.2f} ({found.low:.2f} – {found.high:.2f}), {quantities.grouped(found.n)} items"


def _picture(task: str, sides: Sequence[_Side]) -> Picture:
    """Share of answers that are right within so many tokens, a line a model."""
    longest = max(side.longest for side in sides)
    budgets = sorted({max(1, round(longest * step / _POINTS)) for step in range(1, _POINTS + 1)})
    traces = tuple(
        {"x": budgets, "y": [_within(side.listed, budget) for budget in budgets], "name": side.model, "color": color,
         "role": "line"}
        for color, side in enumerate(sides)
    )  # fmt: skip
    ends = [f"{side.model} {quantities.percent(trace['y'][-1])}" for side, trace in zip(sides, traces, strict=True)]
    caption = f"right within {quantities.grouped(longest)} tokens: {'; '.join(ends)}"
    identity = f"efficiency-{task}".lower().replace(" ", "-").replace("/", "-")
    return Picture(identity, "Accuracy at a budget", "share of answers, by tokens", traces, caption, True)


def _within(problems: Sequence[Problem], budget: int) -> float:
    return float(f"{efficiency.accuracy_within(problems, budget).value:.4g}")
