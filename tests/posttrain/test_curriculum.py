"""Which prompts come next: once an epoch, by difficulty, without the solved, and the same again after a resume."""

import json
from typing import Any

import pytest

from bloomery.data.prompts import Prompt
from bloomery.errors import ConfigError
from bloomery.posttrain.curate import PassRate
from bloomery.posttrain.curriculum import AllSolved, Curriculum
from bloomery.posttrain.rl_config import Sampling

PROMPTS = [Prompt(f"p{i}", "s", [], "1", "answer", (i,)) for i in range(10)]
ANY = Sampling(0, 8, 2, 1.0)


def hard(number: int = 1, at_most: float = 0.5, above: float | None = None) -> Sampling:
    return Sampling(number, 8, 2, 1.0, above, at_most)


def test_every_prompt_once_an_epoch_in_orders_of_their_own() -> None:
    progress: dict[str, Any] = {}
    curriculum = Curriculum(PROMPTS, seed=0)
    first, second = (curriculum.take(10, ANY, progress) for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert progress["prompts_drawn"] == 20
    again: dict[str, Any] = {}
    assert [*curriculum.take(7, ANY, again), *curriculum.take(7, ANY, again)] == [*first, *second[:4]]
    assert Curriculum(PROMPTS, seed=1).take(10, ANY, {}) != first


def test_solved_prompts_stay_out_of_later_epochs() -> None:
    progress: dict[str, Any] = {}
    curriculum = Curriculum(PROMPTS, seed=0, drop_solved=0.75)
    for position in curriculum.take(10, ANY, progress):
        curriculum.record(position, {0: 4, 1: 3, 2: 2}.get(position, 0), 4, progress)
    curriculum.record(5, 0, 0, progress)  # not judged: nothing is known
    assert sorted(curriculum.take(8, ANY, progress)) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert curriculum.size(progress) == 8


def test_when_all_are_solved_the_stage_is_done() -> None:
    progress: dict[str, Any] = {}
    curriculum = Curriculum(PROMPTS, seed=0, drop_solved=1.0)
    for position in curriculum.take(10, ANY, progress):
        curriculum.record(position, 2, 2, progress)
    with pytest.raises(AllSolved):
        curriculum.take(1, ANY, progress)


def test_a_phase_begins_an_epoch_of_its_own_difficulty() -> None:
    progress: dict[str, Any] = {}
    curriculum = Curriculum(PROMPTS, seed=0)
    drawn = curriculum.take(6, ANY, progress)
    for position in drawn:
        curriculum.record(position, position % 3, 2, progress)
    too_easy = {position for position in drawn if position % 3 == 2}
    epoch = curriculum.take(10 - len(too_easy), hard(), progress)
    assert sorted(epoch) == sorted(set(range(10)) - too_easy)  # those never drawn are of unknown difficulty
    assert too_easy
    assert progress["epoch"] == 1
    assert progress["prompts_drawn"] == 6 + len(epoch)


def test_pass_rates_from_before_the_run_and_its_own_which_replace_them() -> None:
    before = {f"p{i}": PassRate(i, 10) for i in range(10)}
    curriculum = Curriculum(PROMPTS, seed=0, rates=before)
    assert sorted(curriculum.take(4, hard(0, at_most=0.4, above=0.0), {})) == [1, 2, 3, 4]
    progress: dict[str, Any] = {}
    curriculum.record(4, 9, 10, progress)
    assert sorted(curriculum.take(3, hard(0, at_most=0.4, above=0.0), progress)) == [1, 2, 3]
    with pytest.raises(ConfigError, match=r"phases.2: none of 10 prompts has a pass rate above 0.95 and at most 1"):
        curriculum.take(1, hard(2, at_most=1.0, above=0.95), progress)


def test_a_resumed_run_draws_the_same() -> None:
    """Everything that changes goes through JSON, as a checkpoint's does."""
    whole, cut = Curriculum(PROMPTS, 3, drop_solved=1.0), Curriculum(PROMPTS, 3, drop_solved=1.0)
    calm: dict[str, Any] = {}
    broken: dict[str, Any] = {}
    phases = [ANY] * 5 + [hard()] * 5
    for phase in phases:
        for curriculum, progress in ((whole, calm), (cut, broken)):
            for position in curriculum.take(4, phase, progress):
                curriculum.record(position, position % 2, 2, progress)
        broken = json.loads(json.dumps(broken))
        cut = Curriculum(PROMPTS, 3, drop_solved=1.0)
        assert broken == json.loads(json.dumps(calm))
