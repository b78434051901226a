"""reasoning-gym's generators as a source of problems.

The scorers of reasoning-gym give partial credit, so an answer is right only at a score of exactly 1.0. A generator is
refused when its own answer does not reach that after the way through a Parquet row, or when its scorer runs the answer
as Python code.
"""

import dataclasses
import difflib
import json
from collections.abc import Iterator
from random import Random
from typing import Any

from bloomery.config import Config, Field
from bloomery.data.procedural.problem import Draft
from bloomery.errors import ConfigError

RUNS_ANSWERS = frozenset({
    "binary_matrix", "composite", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication",
    "puzzle24", "simple_integration", "spiral_matrix", "string_insertion",
})  # fmt: skip
"""Generators of reasoning-gym 0.1.25 whose scorer passes the answer to `eval` or to sympy's `parse_expr`, or to any
scorer at all (`composite`)."""

_BATCH = 1000


class GymOptions(Config):
    """Settings of `gym`."""

    name: str = Field(description="generator of reasoning-gym, for example chain_sum or spell_backward")
    config: dict[str, Any] = Field(default={}, description="the generator's own settings, for example {min_terms: 2}")


def gym(options: GymOptions, random: Random) -> Iterator[Draft]:
    """Problems of one generator. Raises `ConfigError` for one that cannot be judged, with the reason."""
    for dataset, entry in _entries(options, random):
        entry, reason = _portable(entry)
        if reason is None and dataset.score_answer(entry["answer"], entry) != 1.0:
            reason = "its own answer does not score 1"
        if reason is not None:
            raise ConfigError(f"gym.name: {options.name} cannot be used: {reason}; choose another generator")
        record = {"dataset": options.name, "config": options.config, "entry": entry}
        yield Draft(
            canonical=f"gym {options.name} {entry['question']}", question=entry["question"], answer=json.dumps(record),
            verifier="gym", final=rf"\boxed{{{entry['answer']}}}", metadata={"generator": options.name},
        )  # fmt: skip


def _entries(options: GymOptions, random: Random) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Some generators prepare all their entries at once, so that one huge data set will not do."""
    while True:
        dataset = _dataset(options, seed=random.getrandbits(31))
        yield from ((dataset, dataset[index]) for index in range(_BATCH))


def _dataset(options: GymOptions, seed: int) -> Any:
    if options.name in RUNS_ANSWERS:
        raise ConfigError(f"gym.name: the scorer of {options.name} executes answers as code; choose another generator")
    import reasoning_gym.factory  # takes a second, so only where it is used

    known = reasoning_gym.factory.DATASETS
    if options.name not in known:
        raise ConfigError(f"gym.name: no generator {options.name!r}; {_nearest(options.name, known)}")
    fields = {field.name for field in dataclasses.fields(known[options.name][1])} - {"seed", "size"}
    for key in options.config:
        if key not in fields:
            raise ConfigError(f"gym.config.{key}: {options.name} has no such setting; {_nearest(key, fields)}")
    try:
        return reasoning_gym.factory.create_dataset(options.name, seed=seed, size=_BATCH, **options.config)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"gym.config: {options.name} refuses its settings: {error}") from None


def _nearest(name: str, known: Any) -> str:
    found = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {', '.join(found)}?" if found else f"known: {', '.join(sorted(known))}"


def _portable(entry: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The entry as it comes back from JSON, and why it cannot be a problem, if it cannot."""
    answer = entry["answer"]
    if not isinstance(answer, str) or not answer.strip():
        return entry, "it gives no answer text"
    if answer != answer.strip() or answer.count("{") != answer.count("}"):
        return entry, "its answers do not fit into a box"
    try:
        return json.loads(json.dumps(entry)), None
    except TypeError as error:
        return entry, f"its entries are not JSON ({error})"
