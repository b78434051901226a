"""A few answers per evaluation, grouped by problem so that the same question can be read across models."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bloomery.report.results import Evaluation

Outcome = Literal["right", "wrong", "unjudged"]
PER_OUTCOME = 3
MAX_PROBLEMS = 12


@dataclass(frozen=True)
class Answer:
    """One completion and what the verifier said."""

    model: str
    completion: str
    outcome: Outcome
    reason: str
    tokens: int | None
    truncated: bool


@dataclass(frozen=True)
class Problem:
    """One prompt, its expected answer and what each model wrote."""

    task: str
    id: str
    source: str
    prompt: str
    expected: str
    answers: tuple[Answer, ...]


def outcome(score: float | None) -> Outcome:
    """No score is never a zero: it could not be judged."""
    return "unjudged" if score is None else "right" if score >= 1 else "wrong"


def problems(found: Sequence[Evaluation]) -> list[Problem]:
    """Up to `MAX_PROBLEMS` per task, with `PER_OUTCOME` of each outcome of each evaluation where there are so many."""
    firsts = [(each.model, _first_samples(each)) for each in found if each.samples is not None]
    chosen: dict[tuple[str, str], None] = {}
    for _, rows in reversed(firsts):
        chosen |= dict.fromkeys(_choice(rows))
    tasks: dict[str, list[Problem]] = {}
    for task, name in chosen:
        answered = [(model, rows[task, name]) for model, rows in firsts if (task, name) in rows]
        tasks.setdefault(task, []).append(_problem(task, name, answered))
    return [problem for task in tasks.values() for problem in task[:MAX_PROBLEMS]]


def _first_samples(each: Evaluation) -> dict[tuple[str, str], dict[str, Any]]:
    """The first sample of every problem."""
    assert each.samples is not None
    rows = each.samples.to_pylist()
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        first.setdefault((row["task"], str(row["id"])), row)
    return first


def _choice(rows: dict[tuple[str, str], dict[str, Any]]) -> list[tuple[str, str]]:
    """Outcomes in turn, so that a cut list still shows each of them."""
    taken: dict[tuple[str, Outcome], int] = {}
    ranked = []
    for (task, name), row in rows.items():
        kind = outcome(row["score"])
        rank = taken[task, kind] = taken.get((task, kind), 0) + 1
        if rank <= PER_OUTCOME:
            ranked.append((rank, task, name))
    return [(task, name) for _, task, name in sorted(ranked, key=lambda item: item[0])]


def _problem(task: str, name: str, answered: list[tuple[str, dict[str, Any]]]) -> Problem:
    first = answered[0][1]
    answers = tuple(_answer(model, row) for model, row in answered)
    source, expected = (str(first.get(column) or "") for column in ("source", "answer"))
    return Problem(task, name, source, _prompt(first.get("prompt")), expected, answers)


def _prompt(value: Any) -> str:
    """A chat as its turns, the role named where there is more than one."""
    if not isinstance(value, list):
        return str(value or "")
    turns = [(str(turn.get("role", "")), str(turn.get("content", ""))) for turn in value if isinstance(turn, dict)]
    return turns[0][1] if len(turns) == 1 else "\n".join(f"{role}: {content}" for role, content in turns)


def _answer(model: str, row: dict[str, Any]) -> Answer:
    reason = row.get("reason") or row.get("status") or ""
    return Answer(
        model=model,
        completion=str(row.get("completion") or ""),
        outcome=outcome(row["score"]),
        reason="" if reason == "correct" else str(reason).replace("_", " "),
        tokens=row.get("tokens"),
        truncated=row.get("finish_reason") == "length",
    )
