"""The adapter to reasoning-gym: what passes, what is refused and why, and that no answer is ever executed."""

import inspect
import json
import re

import pytest

from bloomery import verify
from bloomery.data.procedural import generate
from bloomery.data.procedural.gym import RUNS_ANSWERS
from bloomery.errors import ConfigError
from bloomery.verify import gym as judge

reasoning_gym = pytest.importorskip("reasoning_gym")


def draw(name: str, count: int = 20, seed: int = 0, split: str = "train", config: dict | None = None):
    config = config or {}
    return list(generate("gym", seed=seed, count=count, split=split, name=name, config=config))


@pytest.mark.parametrize(
    "name", ["chain_sum", "gcd", "spell_backward", "syllogism", "letter_counting", "tower_of_hanoi"]
)
def test_its_own_answers_score_one(name: str):
    for problem in draw(name):
        assert (problem.verifier, problem.domain) == ("gym", "gym")
        assert problem.solution == verify.echo("gym", problem.answer)
        answer = json.loads(problem.answer)["entry"]["answer"]
        assert judge.score(problem.answer, answer).score == 1.0
        assert judge.score(problem.answer, f"{answer} or so").score == 0.0, "partial credit counts as wrong"


def test_seeds_repeat_and_splits_are_disjoint():
    assert draw("gcd", seed=5) == draw("gcd", seed=5)
    test = {p.question for p in draw("gcd", 50, split="test")}
    assert not test & {p.question for seed in range(3) for p in draw("gcd", 200, seed=seed)}


def test_settings_reach_the_generator():
    assert all(
        p.question.count("+") + p.question.count("-") == 1
        for p in draw("chain_sum", config={"min_terms": 2, "max_terms": 2})
    )


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("chain_sums", {}, "no generator 'chain_sums'; did you mean chain_sum"),
        ("gcd", {"min_number": 1}, "gym.config.min_number: gcd has no such setting; did you mean min_numbers"),
        ("gcd", {"seed": 1}, "gym.config.seed: gcd has no such setting"),
        ("gcd", {"min_numbers": -1}, "gym.config: gcd refuses its settings"),
        ("propositional_logic", {}, "propositional_logic cannot be used: it gives no answer text"),
        ("rearc", {}, "rearc cannot be used: its own answer does not score 1"),
        ("gsm_symbolic", {}, "gsm_symbolic cannot be used: its entries are not JSON"),
        ("countdown", {}, "the scorer of countdown executes answers as code"),
    ],
)
def test_what_cannot_be_judged_is_refused(name: str, config: dict, message: str):
    with pytest.raises(ConfigError) as raised:
        draw(name, 100, config=config)
    assert message in str(raised.value)


def test_every_scorer_that_runs_an_answer_is_refused_on_both_sides():
    """A new version of the library with another such scorer must fail here."""
    assert RUNS_ANSWERS == judge.RUNS_ANSWERS
    runs = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\(.*\banswer\b(?!\")")
    found = {
        name
        for name, (dataset, _) in reasoning_gym.factory.DATASETS.items()
        if any(runs.search(line) for line in inspect.getsource(dataset).splitlines())
    }
    assert found == RUNS_ANSWERS - {"composite"}


def test_a_hostile_answer_is_text():
    problem = draw("gcd", 1)[0]
    for text in ("__import__('os')._exit(1)", "9**9**9**9", "\0", "[]" * 4000):
        assert judge.score(problem.answer, text).score == 0.0
