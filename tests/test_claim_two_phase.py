"""The claim on two phases: its world is what it says, its arms differ in order or blend alone, its verdicts follow."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from bloomery.claim import load

CHECKOUT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def claim() -> ModuleType:
    load("two-phase", CHECKOUT)
    return sys.modules["claims.two_phase"]


@pytest.fixture(scope="module")
def world(claim: ModuleType) -> ModuleType:
    return sys.modules["claims._two_phase"]


@pytest.fixture(scope="module")
def corpus(claim: ModuleType, world: ModuleType) -> Any:
    sizes = replace(claim.FULL.world, rows={"web-low": 8000, "web-high": 3000, "math": 80, "code": 80, "wiki": 400})
    return world.Corpus(sizes, 900)


def answered_wrong(world: ModuleType, rows: np.ndarray) -> np.ndarray:
    """Of math items: whether the answer is wrong, by plain arithmetic."""
    wrong = []
    for operation, *digits, _, said in (rows[:, 1:8] - [world.OPERATION, *[world.DIGIT] * 4, 0, world.DIGIT]).tolist():
        right = [max(digits), min(digits), max(digits) - min(digits), (digits[0] + digits[1]) % 10][operation]
        wrong.append(said != right)
        assert (said - right) % 10 in (0, 1)
    return np.array(wrong)


def test_the_web_is_wrong_as_often_as_it_should_be_and_the_rest_never(world: ModuleType, corpus: Any) -> None:
    def math_in(name: str) -> np.ndarray:
        return corpus.pools[name][corpus.pools[name][:, 0] == world.MARK]

    shares = {name: answered_wrong(world, math_in(name)).mean() for name in ("web-low", "web-high", "math")}
    assert shares == {"web-low": pytest.approx(0.5, abs=0.05), "web-high": pytest.approx(0.1, abs=0.05), "math": 0}
    assert not answered_wrong(world, corpus.exam(100)[:20]).any()


def test_code_answers_are_the_letters_moved(world: ModuleType, corpus: Any) -> None:
    row = next(row for row in corpus.pools["code"].tolist() if row[1] == world.OPERATION + 4)
    assert row[6:9] == row[2:5][::-1]


def test_no_question_of_the_exam_on_math_and_code_is_ever_read(world: ModuleType, corpus: Any) -> None:
    def questions(rows: np.ndarray) -> set[bytes]:
        return {row.tobytes() for row in rows[:, :6][rows[:, 0] < world.MARK + 2]}

    exam = corpus.exam(1000)
    assert len(questions(exam)) > 300
    assert not questions(exam) & set.union(*(questions(pool) for pool in corpus.pools.values()))


def test_breadth_is_in_the_web_alone_and_its_high_tier_knows_a_part(world: ModuleType, corpus: Any) -> None:
    asked = {
        name: {(row[1], row[2]) for row in pool.tolist() if row[0] == world.MARK + 3}
        for name, pool in corpus.pools.items()
    }
    assert not asked["math"] | asked["code"] | asked["wiki"]
    assert 0.5 < len(asked["web-high"]) / len(asked["web-low"]) < 0.8
    assert (world.domains(1000) == 3).sum() == 400


def test_arms_read_the_same_items_in_another_order(claim: ModuleType, world: ModuleType, corpus: Any) -> None:
    course = replace(claim.FULL.course, steps=40, batch=25)
    plans = {
        arm: order(world.plan_of(corpus.pools, phases(corpus), course, 900))
        for arm, (phases, order) in claim.ORDERS.items()
    }
    drawn = {arm: plan.drawn.tolist() for arm, plan in plans.items()}
    assert drawn["two-phase"] == drawn["random"] == drawn["reversed"]
    assert len({sum(counts) for counts in drawn.values()}) == 1
    late = {arm: np.bincount(plan.order(750, 1000)[0], minlength=5) / 250 for arm, plan in plans.items()}
    assert late["two-phase"] == pytest.approx(list(claim.SECOND.values()), abs=0.005)
    assert late["reversed"] == pytest.approx(list(claim.FIRST.values()), abs=0.005)
    assert late["random"] == pytest.approx(np.array(drawn["random"]) / 1000, abs=0.01)


def test_a_branch_leaves_its_trunk_alone_and_both_end_as_one_run_would(
    claim: ModuleType, world: ModuleType, corpus: Any
) -> None:
    course = replace(claim.SMOKE.course, steps=8)
    plan = world.plan_of(corpus.pools, [(0.75, claim.FIRST), (0.25, claim.SECOND)], course, 900)
    whole, trunk = world.begin(course, 900), world.begin(course, 900)
    assert list(world.teach(whole, plan, corpus.pools, course)) == [*range(1, 9)]
    assert list(world.teach(trunk, plan, corpus.pools, course, until=6)) == [*range(1, 7)]
    before = {name: value.clone() for name, value in trunk.model.state_dict().items()}
    branch = world.branch(trunk)
    list(world.teach(branch, plan, corpus.pools, course))
    for name, value in whole.model.state_dict().items():
        assert value.equal(branch.model.state_dict()[name])
        assert before[name].equal(trunk.model.state_dict()[name])
        assert not value.equal(before[name])


def test_a_cell_says_what_the_judge_asks_for(claim: ModuleType) -> None:
    cells = {(arm, 900): claim.measure(arm, 900, True) for arm in ("two-phase", "proxy", "larger")}
    others = {(arm, 900): cells["two-phase", 900] for arm in claim.ORDERS} | {("proxy-whole", 900): cells["proxy", 900]}
    assert len(claim.CLAIM.findings(others | cells)) == len(claim.EXPECTED)
    assert len(set(cells["larger", 900]["loss of blends"])) == len(claim.BLENDS)


def made_up(claim: ModuleType, accuracy: dict[str, float], ranked: dict[str, list[float]]) -> list[str]:
    cells: dict[tuple[str, int], Any] = {}
    for seed in claim.CLAIM.seeds:
        for arm in claim.ORDERS:
            noise, value = Random(f"{arm} {seed}"), accuracy.get(arm, 0.7)
            right = [value + noise.gauss(0, 0.01) for _ in range(40)]
            cells[arm, seed] = {
                "accuracy": value, "accuracy of items": right, "loss": 1 - value,
                "loss of items": [1 - each for each in right], "loss: code": 0.2, "loss on code that was read": 0.1,
                "epochs: code": 9.0,
            }  # fmt: skip
        for arm, losses in ranked.items():
            noise = Random(f"{arm} {seed}")
            cells[arm, seed] = {"loss of blends": [loss + noise.gauss(0, 0.01) for loss in losses]}
    return [finding.verdict for finding in claim.CLAIM.findings(cells)]


RISING = [0.1 * number for number in range(8)]


def test_verdicts(claim: ModuleType) -> None:
    published = {"natural": 0.5, "random": 0.7, "two-phase": 0.75, "reversed": 0.6, "quality-only": 0.6}
    ranked = {"proxy": RISING, "larger": RISING, "proxy-whole": RISING[::-1]}
    assert made_up(claim, published | {"diverse-only": 0.6}, ranked) == ["shown"] * 10
    worse = dict.fromkeys(claim.ORDERS, 0.8) | {"two-phase": 0.7, "random": 0.75}
    found = made_up(claim, worse, {"proxy": RISING[::-1], "larger": RISING, "proxy-whole": RISING})
    assert found == ["not shown"] * 10


@pytest.mark.slow
def test_smoke(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bloomery", "claim", "two-phase", "--smoke", "--out", str(tmp_path)]
    ran = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert len(json.loads((tmp_path / "smoke" / "two-phase.json").read_text())) == 10
