"""The claim on RL: its world encodes what it draws, its controls change what they say, its verdicts follow."""

import json
import subprocess
import sys
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest

from bloomery.claim import load
from bloomery.verify import Pool

CHECKOUT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def claim() -> ModuleType:
    load("math-then-code", CHECKOUT)
    return sys.modules["claims.math_then_code"]


@pytest.fixture(scope="module")
def world(claim: ModuleType) -> ModuleType:
    return sys.modules["claims._math_code"]


def test_every_problem_has_its_tokens_and_no_exam_item_is_a_lesson(world: ModuleType) -> None:
    for domain in world.SOURCES:
        lessons, exam = (world.problems(domain, 7, 60, split=split) for split in ("train", "test"))
        assert len(lessons) == len(exam) == 60
        for problem in lessons + exam:
            text = f"{problem.question}{problem.solution}"
            assert world.decode(world.encode(text)) == text
        assert not {p.id for p in lessons} & {p.id for p in exam}


def test_answers_are_sorted_by_what_is_wrong_with_them(world: ModuleType) -> None:
    def kind(text: str, status: str) -> str:
        verdict = world.Verdict.of(status)
        completion = type("C", (), {"text": text})()
        return world._kind(type("A", (), {"completion": completion, "verdict": verdict})())

    assert kind("12-5=7;7*3=21\n\\boxed{21}", "correct") == "right"
    assert kind("12-5=8;8*3=21\n\\boxed{21}", "correct") == "right by wrong steps"
    assert kind("9/3=3;3+1=5\n\\boxed{5}", "wrong") == "wrong with steps"
    assert kind("\\boxed{5}", "wrong") == "wrong without steps"
    assert kind("9/3=3;", "no_answer") == "no answer"


def test_weak_tests_pay_wrong_programs_and_bad_golds_refuse_right_ones(claim: ModuleType, world: ModuleType) -> None:
    problems = [p for p in world.problems("code", 3, 60) if p.metadata["kind"] == "linear"]
    first = problems[0]
    x, y = first.question.partition("f(")[2].partition(",")[0].split(")=")
    constant = f"```python\ndef f(x):\n    return {y}\n```"
    [weak] = claim.arms.weakened([first])
    bad = claim.arms.corrupted(problems)
    changed = [(new, old) for new, old in zip(bad, problems, strict=True) if new.answer != old.answer]
    assert 1 <= len(changed) <= 15
    with Pool(1) as pool:
        judged = pool.judge_all(
            [("program", constant, p.answer) for p in (first, weak)]
            + [("program", changed[0][1].solution, p.answer) for p in changed[0]]
        )
    assert [verdict.status for verdict in judged] == ["wrong", "correct", "wrong", "correct"]
    assert json.loads(weak.answer)["cases"] == [{"args": [int(x)], "ret": int(y)}]


def made_up(claim: ModuleType, accuracy: dict[str, tuple[float, float]], **changes: Any) -> dict[str, str]:
    """Verdicts by claim for arms with these accuracies in math and code."""
    cells = {}
    for arm in claim.ARMS:
        for seed in range(5):
            noise = Random(f"{arm} {seed}")
            found: dict[str, Any] = {"curve": [
                {"accuracy": 0.5, "entropy": 0.4 * (0.2 if "8" in arm else 0.9) ** (n > 2) + noise.uniform(0, 0.02),
                 "truncated": 0.1} for n in range(6)
            ]}  # fmt: skip
            for domain, value in zip(("math", "code"), accuracy.get(arm, (0.6, 0.6)), strict=True):
                found[f"{domain} of items"] = [value + noise.gauss(0, 0.01) for _ in range(24)]
                found |= {domain: value, f"{domain} by kind": {"right": value}}
            cells[arm, seed] = found | {
                "unsolved": [0, 1, 2], "puzzles right again": [0, 0, 1], "puzzles right": changes.get("rl", [3, 1, 2]),
                "tries again": 8, "hard items": [1, 3, 5],
            }  # fmt: skip
    return {finding.claim: finding.verdict for finding in claim.CLAIM.findings(cells)}


AS_PUBLISHED = {
    "sft": (0.3, 0.3), "more-sft": (0.3, 0.3), "coin": (0.2, 0.2), "words": (0.4, 0.4), "math": (0.7, 0.6),
    "math-code": (0.7, 0.7), "math-sft": (0.7, 0.2), "updates-8": (0.4, 0.4), "one-length": (0.5, 0.5),
    "hard": (0.8, 0.6), "weak-tests": (0.5, 0.4), "bad-golds": (0.5, 0.4),
}  # fmt: skip


def test_verdicts(claim: ModuleType) -> None:
    assert set(made_up(claim, AS_PUBLISHED).values()) == {"shown"}
    nothing = dict.fromkeys(claim.ARMS, (0.6, 0.6))
    found = made_up(claim, nothing | {"updates-8": (0.7, 0.6), "coin": (0.9, 0.6)}, rl=[0, 0, 0])
    assert found.pop("3. code RL after it keeps math (accuracy, margin 2 points)") == "shown"
    assert found.pop("5. eight updates on a batch: the entropy falls further (least over first, against one update)")
    refused = [name for name, verdict in found.items() if verdict == "not shown"]
    assert {name[:2] for name in refused} >= {"1.", "5.", "9."}
    assert "shown" not in found.values()


def test_solutions_and_rewards_are_compared_at_equal_math_only(claim: ModuleType) -> None:
    found = made_up(claim, AS_PUBLISHED | {"math-sft": (0.5, 0.2)})
    assert [verdict for name, verdict in found.items() if name.startswith("4.")] == ["inconclusive"]


@pytest.mark.slow
def test_smoke(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bloomery", "claim", "math-then-code", "--smoke", "--out", str(tmp_path)]
    ran = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert len(json.loads((tmp_path / "smoke" / "math-then-code.json").read_text())) == 15
