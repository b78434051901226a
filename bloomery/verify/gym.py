"""reasoning-gym's own scorers, made binary: right is a score of exactly 1.0."""

import json
from functools import lru_cache
from typing import Any

from bloomery.errors import ArtifactError
from bloomery.verify.deferred import Deferred
from bloomery.verify.extract import boxed_answer
from bloomery.verify.verdict import Verdict

RUNS_ANSWERS = frozenset({
    "binary_matrix", "composite", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication",
    "puzzle24", "simple_integration", "spiral_matrix", "string_insertion",
})  # fmt: skip
"""Generators of reasoning-gym 0.1.25 whose scorer passes the answer to `eval` or to sympy's `parse_expr`, or to any
scorer at all (`composite`): a model's completion would run as Python code here, so they are refused."""

MAX_CHARS = 10_000


def gym(completion: str, gold: str, require_think: bool = False) -> Verdict | Deferred:
    """The work for a worker. `gold` is JSON: `{"dataset": name, "config": {...}, "entry": {...}}`."""
    name = _record(gold)["dataset"]
    if name in RUNS_ANSWERS:
        raise ArtifactError(f"the scorer of reasoning-gym's {name} executes answers as Python code; drop its prompts")
    found = boxed_answer(completion, require_think)
    if isinstance(found, Verdict):
        return found
    if len(found) > MAX_CHARS:
        return Verdict.of("parse_fail", f"{len(found)} characters, at most {MAX_CHARS}")
    return Deferred("gym", {"gold": gold, "found": found})


def score(gold: str, found: str) -> Verdict:
    """The worker's half. A scorer that raises on an odd answer has judged it wrong."""
    record = _record(gold)
    dataset = _dataset(record["dataset"], json.dumps(record["config"], sort_keys=True))
    try:
        value = dataset.score_answer(found, record["entry"])
    except Exception as error:  # noqa: BLE001 - scorers of many authors raise anything on an odd answer
        return Verdict.of("wrong", f"the scorer raised {type(error).__name__}: {error}"[:200])
    return Verdict.of("correct") if value == 1.0 else Verdict.of("wrong", f"score {value}")


def _record(gold: str) -> dict[str, Any]:
    try:
        record = json.loads(gold)
    except json.JSONDecodeError:
        record = None
    if not isinstance(record, dict) or not {"dataset", "config", "entry"} <= record.keys():
        raise ArtifactError("a prompt with verifier 'gym' needs an answer of JSON with dataset, config and entry")
    return record


@lru_cache(maxsize=64)
def _dataset(name: str, config: str) -> Any:
    import reasoning_gym  # takes a second, so only where it is used

    return reasoning_gym.create_dataset(name, seed=0, size=1, **json.loads(config))
