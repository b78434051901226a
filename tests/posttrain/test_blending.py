"""Prompts drawn by shares: each source an epoch stream of its own, resumed from what the progress holds."""

import json
from collections import Counter
from typing import Any

import pytest

from bloomery import config as configs
from bloomery.data.prompt_blend import PromptBlend, Systematic
from bloomery.data.prompts import Prompt
from bloomery.errors import ConfigError
from bloomery.posttrain.blending import BlendedCurriculum
from bloomery.posttrain.curate import PassRate
from bloomery.posttrain.curriculum import AllSolved
from bloomery.posttrain.rl_config import RLConfig, Sampling

SIZES = {"numbers": ("math", 6), "laws": ("law", 20), "kin": ("law", 10)}
PROMPTS = [
    Prompt(f"{source}{i}", source, [], "1", "answer", (place, i), domain)
    for place, (source, (domain, size)) in enumerate(SIZES.items())
    for i in range(size)
]
ANY = Sampling(0, 8, 2, 1.0)


def blended(
    drop_solved: float | None = None, rates: dict[str, PassRate] | None = None, **settings
) -> BlendedCurriculum:
    return BlendedCurriculum(PROMPTS, configs.build(PromptBlend, settings), 0, drop_solved, rates)


def sources(positions: list[int]) -> Counter[str]:
    return Counter(PROMPTS[position].source for position in positions)


def test_counts_are_exact_and_each_source_goes_round_by_itself():
    curriculum, progress = blended(shares={"math": 2, "law": 1}), dict[str, Any]()
    steps = [curriculum.take(9, ANY, progress) for _ in range(6)]
    assert all(sources(step) == {"numbers": 6, "laws": 2, "kin": 1} for step in steps)
    assert all(len(set(step)) == 9 for step in steps)  # numbers: a whole epoch each step
    laws = [position for step in steps for position in step if PROMPTS[position].source == "laws"]
    assert len(set(laws)) == len(laws) == 12  # none twice before all were drawn
    found = curriculum.metrics(progress)
    assert found["epoch/math.numbers"] == 6
    assert found["epoch/law.laws"] == pytest.approx(12 / 20)
    assert found["blend/math.numbers"] == pytest.approx(2 / 3)


def test_a_resumed_run_draws_the_same_and_one_number_gives_the_counts():
    whole, progress = blended(shares={"math": 1, "law": 2}), dict[str, Any]()
    steps = [whole.take(7, ANY, progress) for _ in range(8)]
    cut: dict[str, Any] = {}
    first = [blended(shares={"math": 1, "law": 2}).take(7, ANY, cut) for _ in range(3)]
    cut = json.loads(json.dumps(cut))
    again = blended(shares={"math": 1, "law": 2})
    assert first + [again.take(7, ANY, cut) for _ in range(5)] == steps
    assert cut == progress
    before = Systematic(whole.weights, 7, seed=0).before(progress["draws"])
    assert before.tolist() == [progress["cells"][name]["prompts_drawn"] for name in whole.cells]


def test_a_part_of_a_step_has_its_shares():
    step = blended(shares={"math": 1, "law": 1}).take(12, ANY, {})
    for part in (step[:6], step[6:]):
        assert sources(part)["numbers"] == 3


def test_an_exhausted_source_repeats_or_leaves_its_share_to_the_others():
    progress: dict[str, Any] = {}
    curriculum = blended(shares={"math": 1, "law": 1}, exhausted="renormalise")
    steps = [curriculum.take(4, ANY, progress) for _ in range(9)]
    assert [sources(step)["numbers"] for step in steps] == [2, 2, 2, 0, 0, 0, 0, 0, 0]
    assert sorted(position for step in steps for position in step) == list(range(36))  # every prompt once
    assert sources(curriculum.take(4, ANY, progress))["numbers"] == 2  # then all begin again


def test_a_step_larger_than_everything_goes_round_more_than_once():
    progress: dict[str, Any] = {}
    assert sources(blended(exhausted="renormalise").take(72, ANY, progress)) == {"numbers": 12, "laws": 40, "kin": 20}


def test_what_is_solved_leaves_its_share_to_the_others_and_at_last_the_stage_is_done():
    progress: dict[str, Any] = {}
    curriculum = blended(shares={"math": 1, "law": 1}, drop_solved=1.0)
    drawn = curriculum.take(12, ANY, progress)
    for position in drawn:
        curriculum.record(position, int(PROMPTS[position].source == "numbers"), 1, progress)
    assert sources(curriculum.take(6, ANY, progress))["numbers"] == 0
    for position in range(len(PROMPTS)):
        curriculum.record(position, 1, 1, progress)
    with pytest.raises(AllSolved):  # the epochs that have begun end first
        curriculum.take(60, ANY, progress)


def test_a_phase_of_hard_prompts_takes_off_what_guessing_gives():
    choices = [Prompt(f"c{i}", "quiz", [], "A", "choice", (i,), "law", "choice", 4) for i in range(3)]
    rates = {"c0": PassRate(4, 8), "c1": PassRate(5, 8), "c2": PassRate(8, 8)}  # P(X ≥ 4) = 0.11, P(X ≥ 5) = 0.027
    curriculum = BlendedCurriculum(choices, PromptBlend(), 0, None, rates)
    assert set(curriculum.take(3, Sampling(0, 8, 2, 1.0, None, 0.375), {})) == {0}


def test_difficulty_needs_rates_of_these_prompts():
    with pytest.raises(ConfigError, match="no prompt has a pass rate"):
        blended(difficulty=True)
    rates = {f"numbers{i}": PassRate(0, 4) for i in range(6)} | {f"laws{i}": PassRate(3, 4) for i in range(20)}
    rates |= {f"kin{i}": PassRate(4, 4) for i in range(10)}
    curriculum = blended(difficulty=True, rates=rates)
    assert list(curriculum.cells) == ["math.numbers", "law.laws"]  # nothing is hard in kin
    assert curriculum.weights == pytest.approx([6 / 11, 5 / 11])
    settings = {"model": "m", "prompts": "p", "num_prompts": 2, "max_new_tokens": 4, "blend": {"difficulty": True}}
    with pytest.raises(ConfigError, match="blend.difficulty: weights by pass rates; give rollouts"):
        configs.build(RLConfig, settings | {"loop": {"max_steps": 1, "learning_rate": 1e-4}})
