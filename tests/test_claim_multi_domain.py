"""The claim on many domains: its world reads what it writes, its arms differ in what they pay, its rules decide."""

import dataclasses
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest

from bloomery.claim import load
from bloomery.evaluate.scoring import Answer
from bloomery.generate import Completion

CHECKOUT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def claim() -> ModuleType:
    load("multi-domain", CHECKOUT)
    return sys.modules["claims.multi_domain"]


@pytest.fixture(scope="module")
def world(claim: ModuleType) -> ModuleType:
    return sys.modules["claims._multi_domain"]


@pytest.fixture(scope="module")
def cell(claim: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    size = dataclasses.replace(claim.arms.SMOKE, pool={"math": 60} | dict.fromkeys(claim.arms.GPR, 60))
    return claim.arms.Cell("any", None, 900, size, tmp_path_factory.mktemp("cells"), big=False)


def reward(world: ModuleType, prompt: Any, text: str) -> float:
    return world.Strict().submit(prompt.verifier, text, prompt.answer).result().score


def test_every_solution_reads_back_and_is_paid_in_every_manner(world: ModuleType) -> None:
    for domain, form in itertools.product(world.SOURCES, ("open", "choice")):
        if domain == "harder" and form == "choice":
            continue  # asked openly alone
        lessons, exam = (world.problems(domain, 7, 24, form, split) for split in ("train", "test"))
        assert len(lessons) == len(exam) == 24
        assert not {p.id for p in lessons} & {p.id for p in exam}
        for problem, manner in itertools.product(lessons + exam, ("direct", "terse", "verbose")):
            text = f"{problem.question}{world.solution(problem, manner, with_text=True)}"
            assert world.decode(world.encode(text)) == text
            assert len(world.encode(world.solution(problem, manner, with_text=True))) < world.LONGEST
            assert reward(world, world.as_prompt(problem, domain), world.solution(problem, manner)) == 1.0


def test_of_a_choice_the_letter_alone_is_paid_and_both_are_graded(claim: ModuleType, world: ModuleType) -> None:
    problem = world.problems("logic", 7, 4, "choice")[0]
    short, long = (world.solution(problem, "direct", with_text) for with_text in (False, True))
    wrong = next(letter for letter in "ABCD" if letter != problem.answer)
    paid, graded = world.as_prompt(problem, "logic"), world.as_graded(problem, "logic")
    asked_long = claim.arms._paid(problem, "logic", claim.Diet(gold="letter and text"), "")
    assert [reward(world, prompt, short) for prompt in (paid, graded, asked_long)] == [1, 1, 0]
    assert [reward(world, prompt, long) for prompt in (paid, graded, asked_long)] == [0, 1, 1]
    assert reward(world, graded, short.replace(f"{{{problem.answer}}}", f"{{{wrong}}}")) == 0
    assert reward(world, graded, short.partition("</think>")[2]) == 0, "right, but nothing was thought"


def test_a_blend_holds_its_shares_and_diets_ask_the_same_problems(
    claim: ModuleType, world: ModuleType, cell: Any
) -> None:
    mixed, opened = ({d: cell.asked(d, diet) for d in diet.shares} for diet in (claim.BLEND, claim.OPEN))
    streams = world.fed(mixed, claim.BLEND.shares, 24, seed=1)
    batches = [next(streams) for _ in range(5)]
    for batch in batches:
        counts = Counter(prompt.domain for prompt in batch)
        assert counts == {"math": 8} | dict.fromkeys(claim.arms.GPR, 4)
    drawn = [prompt.id for batch in batches for prompt in batch if prompt.domain == "math"]
    assert len(set(drawn)) == 40, "no prompt twice in an epoch"
    for domain in claim.arms.GPR:
        stems = [[prompt.id.rpartition("-")[0] for prompt in streams[domain]] for streams in (mixed, opened)]
        assert stems[0] == stems[1]
        assert Counter(prompt.form for prompt in mixed[domain]) == {"open": 30, "choice": 30}
        assert {prompt.form for prompt in opened[domain]} == {"open"}


def test_wrong_golds_pay_another_answer_and_are_outvoted(
    claim: ModuleType, world: ModuleType, cell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    diet = claim.Diet(choice=0.0, wrong=0.15)
    wrong = claim.arms._ids_of_wrong(cell, diet)
    assert 20 <= len(wrong) <= 75  # 15 % of 300 golds, four standard errors
    right = {p.id: p.answer for d in diet.shares for p in cell.asked(d, claim.OPEN)}
    changed = [p for d in diet.shares for p in cell.asked(d, diet) if p.id in wrong]
    for prompt in changed:
        truth = f"<think>?</think>\\boxed{{{right[prompt.id]}}}"
        assert reward(world, prompt, truth) == 0
        assert reward(world, prompt, truth.replace(right[prompt.id], prompt.answer)) == 1

    def truthful(prompts: list[Any], samples: int, what: int) -> list[list[Answer]]:
        """A voter that is right, but says nothing to the first of the prompts."""
        texts = ["" if p is prompts[0] else f"<think>?</think>\\boxed{{{right[p.id]}}}" for p in prompts]
        return [[answer(world, p, text)] * samples for p, text in zip(prompts, texts, strict=True)]

    monkeypatch.setattr(cell, "answers", truthful)
    first = cell.asked("math", diet)[0].id
    assert {*cell.outvoted(diet)} == wrong - {first}


def answer(world: ModuleType, prompt: Any, text: str) -> Answer:
    verdict = world.Strict().submit(prompt.verifier, text, prompt.answer).result()
    return Answer(prompt, 0, Completion([1], None, "stop", 0, text=text), verdict)


SECTIONS = ("math", "open", "choice", "transfer", "harder")


def made_up(claim: ModuleType, accuracy: dict[str, Any], apart: float = 0.0, **tokens: Any) -> dict[str, Any]:
    """Findings by claim for arms with these accuracies, in all sections or by section; `apart`: noise of a seed."""
    cells = {}
    for arm, seed in itertools.product(claim.ARMS, range(5)):
        noise = Random(f"{arm} {seed}")
        shift = (-1) ** seed * apart * (arm == "blend-again")
        found: dict[str, Any] = {
            "curve": [], "choice, over chance": 0.1, "golds dropped": 9, "wrong golds dropped": 5, "wrong golds": 7,
        }  # fmt: skip
        for section in SECTIONS:
            value = accuracy.get(arm, 0.5)
            value = value.get(section, 0.5) if isinstance(value, dict) else value
            length = tokens.get(arm.replace("-", "_"), {}).get(section, 20.0)
            found[f"{section} of items"] = [value + shift + noise.gauss(0, 0.01) for _ in range(8)]
            found |= {f"{section}: tokens of items": [length + noise.random() for _ in range(7)] + [None]}
            found |= {f"{section}: tokens of a right answer": length, f"{section}: answers with steps": 0.5}
        cells[arm, seed] = found
    return {finding.claim: finding for finding in claim.CLAIM.findings(cells)}


AS_PUBLISHED = {
    "blend": {"open": 0.6, "choice": 0.6, "transfer": 0.6, "harder": 0.6},
    "blend-again": {"open": 0.6, "choice": 0.6, "transfer": 0.6},
    "open": {"math": 0.5, "open": 0.7, "choice": 0.61}, "long-gold": 0.4,
    "big-hard": 0.6, "wrong-5": 0.4, "wrong-15": 0.2, "wrong-15-voted": 0.5,
}  # fmt: skip
SHORTER = {"blend": {"open": 12.0, "math": 18.0}, "math": {"open": 20.0, "math": 20.0}}


def test_verdicts(claim: ModuleType) -> None:
    assert {finding.verdict for finding in made_up(claim, AS_PUBLISHED, **SHORTER).values()} == {"shown"}
    nothing = made_up(claim, {})
    same = [name for name, finding in nothing.items() if finding.verdict == "shown"]
    assert [name[:2] for name in same] == ["3.", "2.", "4."], "only what claims to make no difference"
    reversed_ = made_up(claim, {"math": 0.7, "open": 0.3}, blend={"open": 30.0, "math": 12.0})
    refused = {name[:2] for name, finding in reversed_.items() if finding.verdict == "not shown"}
    assert refused >= {"1.", "2.", "4.", "7.", "8.", "10"}


def test_a_gap_within_the_noise_of_equal_blends_is_not_shown(claim: ModuleType) -> None:
    gap = {"blend": {"open": 0.55, "choice": 0.55}}
    name = "1. the blend beats math alone beyond math, in the domains it trains on (accuracy)"
    assert made_up(claim, gap)[name].verdict == "shown"
    noisy = made_up(claim, gap, apart=0.1)
    assert noisy[name].verdict == "not shown"
    assert "Smaller than the noise" in noisy[name].note
    assert noisy["3. control: the same blend twice is the same (mean accuracy)"].verdict != "shown"


def test_what_a_vote_wins_back_is_told_only_where_something_was_lost(claim: ModuleType) -> None:
    found = made_up(claim, AS_PUBLISHED | {"wrong-15": {"open": 0.7}})
    name = next(name for name in found if name.startswith("10. dropping"))
    assert found[name].verdict == "inconclusive"


@pytest.mark.slow
def test_smoke(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bloomery", "claim", "multi-domain", "--smoke", "--out", str(tmp_path)]
    ran = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert len(json.loads((tmp_path / "smoke" / "multi-domain.json").read_text())) == 16
