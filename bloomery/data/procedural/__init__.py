"""Generated problems with verifiable answers and worked solutions.

`generate("chain", seed=0, count=1000, split="train", min_ops=2)` draws from one task; the same arguments give the same
problems. A problem belongs to the train or the test split by its canonical form alone, so no seed and no setting can
bring a test problem into training.
"""

import difflib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from bloomery import config as configs
from bloomery.config import Config
from bloomery.data.procedural.arithmetic import ChainOptions, EquationOptions, chains, equations
from bloomery.data.procedural.dates import CalendarOptions, calendars
from bloomery.data.procedural.facts import RelationOptions, TableOptions, relations, tables
from bloomery.data.procedural.gym import GymOptions, gym
from bloomery.data.procedural.logic import KnightsOptions, VerdictOptions, knights, verdicts
from bloomery.data.procedural.problem import Draft, Problem, Split, Style
from bloomery.data.procedural.programs import ProgramOptions, programs
from bloomery.data.procedural.relational import FamilyOptions, OrderOptions, families, orders
from bloomery.data.procedural.schedule import ScheduleOptions, schedules
from bloomery.data.procedural.strings import StringOptions, strings
from bloomery.errors import ConfigError


@dataclass(frozen=True)
class Task:
    """One kind of problem: its domain, its settings, an endless source of drafts, and how solutions are written."""

    domain: str
    options: type[Config]
    drafts: Callable[[Any, Random], Iterator[Draft]]
    style: Mapping[str, float]


_MIXED: Mapping[str, float] = {"direct": 0.6, "stepwise": 0.4}
_DIRECT: Mapping[str, float] = {"direct": 1.0}

TASKS: dict[str, Task] = {
    "chain": Task("arithmetic", ChainOptions, chains, _MIXED),
    "equation": Task("arithmetic", EquationOptions, equations, _MIXED),
    "program": Task("programs", ProgramOptions, programs, _MIXED),
    "table": Task("facts", TableOptions, tables, _MIXED),
    "relation": Task("facts", RelationOptions, relations, _MIXED),
    "verdict": Task("logic", VerdictOptions, verdicts, _MIXED),
    "knights": Task("logic", KnightsOptions, knights, _MIXED),
    "family": Task("relational", FamilyOptions, families, _MIXED),
    "order": Task("relational", OrderOptions, orders, _MIXED),
    "calendar": Task("dates", CalendarOptions, calendars, _MIXED),
    "schedule": Task("schedule", ScheduleOptions, schedules, _MIXED),
    "strings": Task("strings", StringOptions, strings, _MIXED),
    "gym": Task("gym", GymOptions, gym, _DIRECT),
}

_MISSES, _MISSES_PER_FOUND = 2000, 20


def generate(
    task: str,
    *,
    seed: int,
    count: int,
    split: Split = "train",
    style: Mapping[str, float] | None = None,
    **options: Any,
) -> Iterator[Problem]:
    """`count` distinct problems of one task.

    `style` gives the shares of the solution styles, `{"direct": 0.6, "stepwise": 0.4}` unless the task has no steps;
    it does not change which problems are drawn. `options` are the fields of `TASKS[task].options`.
    Raises `ConfigError` for anything unknown or unusable, and when fewer than `count` distinct problems exist.
    """
    if task not in TASKS:
        nearest = difflib.get_close_matches(task, TASKS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(TASKS)}"
        raise ConfigError(f"{task}: no such task; {hint}")
    if split not in ("train", "test"):
        raise ConfigError(f"{task}: split is {split!r}; choose train or test")
    settings = configs.build(TASKS[task].options, options, where=task)
    weights = _weights(task, TASKS[task].style if style is None else style)
    return _problems(task, settings, seed, count, split, weights)


def _weights(task: str, style: Mapping[str, float]) -> Mapping[str, float]:
    for name, weight in style.items():
        if name not in _MIXED:
            raise ConfigError(f"{task}.style: no style {name!r}; choose from {', '.join(_MIXED)}")
        if name == "stepwise" and weight > 0 and name not in TASKS[task].style:
            raise ConfigError(f"{task}.style: this task has no worked steps; use direct only")
    if not all(0 <= weight < float("inf") for weight in style.values()) or sum(style.values()) <= 0:
        raise ConfigError(f"{task}.style: found {dict(style)}, expected weights of at least 0 with a positive sum")
    return style


def _problems(
    task: str, settings: Config, seed: int, count: int, split: Split, weights: Mapping[str, float]
) -> Iterator[Problem]:
    styles: Random = Random(f"style {task} {seed}")
    drafts = _distinct(task, settings, seed, count, split)
    for draft in itertools.islice(drafts, count):
        style: Any = styles.choices(list(weights), list(weights.values()))[0] if draft.steps else "direct"
        yield Problem(
            id="-".join(filter(None, (task, draft.digest, draft.variant))), domain=TASKS[task].domain,
            question=draft.question, answer=draft.answer, verifier=draft.verifier, solution=draft.solution(style),
            metadata={**draft.metadata, "task": task, "split": split, "style": style},
        )  # fmt: skip


def _distinct(task: str, settings: Config, seed: int, count: int, split: Split) -> Iterator[Draft]:
    """Drafts of one split, each canonical form once. A long row of misses means that all have been seen."""
    seen: set[str] = set()
    misses = 0
    for draft in TASKS[task].drafts(settings, Random(f"{task} {seed}")):
        if draft.split == split and draft.digest not in seen:
            seen.add(draft.digest)
            misses = 0
            yield draft
        elif (misses := misses + 1) > _MISSES + _MISSES_PER_FOUND * len(seen):
            break
    raise ConfigError(
        f"{task}: asked for {count} {split} problems, found {len(seen)}: these settings allow no more; "
        "ask for fewer or widen the settings"
    )


__all__ = ["TASKS", "Problem", "Split", "Style", "Task", "generate"]
