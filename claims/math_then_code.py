"""Reinforcement learning on math, then on code, raises both, as learning from the solutions of one does not.

AceReason-Nemotron (arXiv 2505.16400) trains 7B and 14B models that reason already, on math alone and then on code
alone. Here a model of a third of a million parameters has learnt from solutions of both, most of them bare answers and
some with steps. Each arm goes on from there in its own way; nine sentences of the paper are judged.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from bloomery.claim import Cells, Claim, Expectation, Finding, picture
from bloomery.evaluate.statistics import Difference, pass_at_k, two_level_bootstrap
from bloomery.posttrain.rl_config import Clip
from claims import _math_code_arms as arms

Teach = Callable[[arms.Cell], dict[str, Any]]
PPO, CLIP_HIGHER = Clip(low=0.2, high=0.2), Clip(low=0.2, high=0.28)
FORK = "math-fork"
ARMS: Mapping[str, tuple[str | None, Teach]] = {
    "sft": (None, arms.warm_start),
    "math": ("sft", arms.math_first),
    "more-sft": ("sft", lambda cell: cell.study(("math",), stepwise=arms.MIXTURE)),
    "coin": ("sft", lambda cell: cell.practise("math", judge=cell.coin)),
    "words": ("sft", lambda cell: cell.practise("words")),
    "math-code": ("math", lambda cell: cell.practise("code")),
    "code": ("sft", lambda cell: cell.practise("code")),
    "math-sft": ("math", arms.study_until_equal),
    "updates-1": ("math", lambda cell: cell.practise("math", start=FORK, late=True)),
    "updates-4": ("math", lambda cell: cell.practise("math", start=FORK, late=True, updates=4, clip=PPO)),
    "updates-8": ("math", lambda cell: cell.practise("math", start=FORK, late=True, updates=8, clip=PPO)),
    "updates-8-higher": (
        "math", lambda cell: cell.practise("math", start=FORK, late=True, updates=8, clip=CLIP_HIGHER)
    ),
    "updates-8-slower": (
        "math",
        lambda cell: cell.practise("math", start=FORK, late=True, updates=8, clip=PPO, rate=arms.RATE / 8**0.5),
    ),
    "verbose-sft": ("sft", arms.study_verbose),
    "lengths": ("verbose-sft", lambda cell: cell.practise("math", lengths=arms.LENGTHS)),
    "lengths-filtered": (
        "verbose-sft", lambda cell: cell.practise("math", lengths=arms.LENGTHS, skip_truncated=True)
    ),
    "one-length": ("verbose-sft", lambda cell: cell.practise("math", lengths=arms.LENGTHS[-1:])),
    "all": ("math", lambda cell: cell.practise("math", late=True)),
    "hard": ("math", lambda cell: cell.practise("math", late=True, hard=True)),
    "weak-tests": ("sft", lambda cell: cell.practise("code", change=arms.weakened)),
    "bad-golds": ("sft", lambda cell: cell.practise("code", change=arms.corrupted)),
}  # fmt: skip
AFTER = {arm: after for arm, (after, _) in ARMS.items() if after is not None}


def measure(arm: str, seed: int, smoke: bool, folder: Path) -> dict[str, Any]:
    """Teach one model in the way of `arm`; its accuracies item by item, and what the arm itself has found."""
    with arms.Cell(arm, AFTER.get(arm), seed, arms.SMOKE if smoke else arms.FULL, folder) as cell:
        found = ARMS[arm][1](cell)
        cell.save(arm)
        return cell.examined() | found


KEPT, MATCHED = 0.02, 0.03
EXPECTED = (
    Expectation("1. math RL lifts math (accuracy)", "above", 0.0, "7B on AIME24: 55.5 to 69.0"),
    Expectation("1. more than the solutions of the same problems do (accuracy)", "above", 0.0, "not compared"),
    Expectation("1. control: a reward by chance does not lift math (accuracy)", "below", KEPT, "not measured"),
    Expectation("2. math RL lifts code (accuracy)", "above", 0.0, "7B on LiveCodeBench v5: 37.6 to 44.4"),
    Expectation(
        "2. by arithmetic, not by style alone: more than RL on reversing words does (accuracy)", "above", 0.0,
        "not compared",
    ),
    Expectation("3. code RL after it keeps math (accuracy, margin 2 points)", "above", -KEPT, "AIME24: 65.9 to 66.9"),
    Expectation("3. code RL after it lifts code (accuracy)", "above", 0.0, "LiveCodeBench v5: 44.4 to 51.8"),
    Expectation(
        "4. solutions of math alone leave code lower than math RL at equal math (accuracy)", "below", 0.0,
        "14B: LiveCodeBench v5 19.3 after SFT, 58.9 after RL",
        f"Inconclusive unless the two are within {MATCHED:g} of each other in math.",
    ),
    Expectation(
        "5. eight updates on a batch: the entropy falls further (least over first, against one update)", "below", 0.0,
        "2 or 4 updates: collapse near step 100",
    ),
    Expectation("5. and math ends lower at equal rollouts (accuracy)", "below", 0.0, "worse"),
    Expectation(
        "6. growing lengths beat the full length at equal generated tokens (math accuracy)", "above", 0.0,
        "24K from the start: hardly any gain",
    ),
    Expectation("7. late training on hard prompts lifts hard problems more than on all (accuracy)", "above", 0.0,
                "AIME24 65.9 against 63.3"),
    Expectation("8. tests that wrong programs pass lower code (accuracy)", "below", 0.0, "a sudden drop"),
    Expectation("8. wrong golds of one problem in ten lower code (accuracy)", "below", 0.0, "an early plateau"),
    Expectation(
        "9. math RL solves problems that were never solved in 128 tries (share solved in 256, against 256 new tries)",
        "above", 0.0, "7B on LiveCodeBench v5: 30 problems more",
    ),
)  # fmt: skip
LIMITS = """
A model of a third of a million parameters, arithmetic of two digits and functions of one line. At the start most of
its answers come without steps, and what RL changes first is how often it writes them: a choice between two styles that
it has, not new ability. Read 1 and 2 with the shares by kind of answer above and with the control on words. The two
domains share their arithmetic steps by construction. The paper's models start from long chains of thought, and its
lengths, hard prompts and entropies are of another order. Five seeds, one learning rate for all arms but one.
"""


def judge(cells: Cells) -> list[Finding]:
    """Paired by seed and held-out item."""
    seeds = sorted({seed for _, seed in cells})

    def gap(arm: str, other: str, name: str) -> Difference:
        return two_level_bootstrap([_difference(cells, arm, other, name, seed) for seed in seeds])

    matched = abs(gap("math-sft", "math", "math").effect) <= MATCHED
    found = [
        (gap("math", "sft", "math"), _kinds(cells, "math", ("sft", "math"))),
        (gap("math", "more-sft", "math"), ""),
        (gap("coin", "sft", "math"), ""),
        (gap("math", "sft", "code"), _kinds(cells, "code", ("sft", "math", "words"))),
        (gap("math", "words", "code"), ""),
        (gap("math-code", "math", "math"), ""),
        (gap("math-code", "math", "code"), _said("code RL from the start instead, code after math RL minus code "
                                                 "without it", gap("math-code", "code", "code"))),
        (gap("math-sft", "math", "code"), _said("difference in math", gap("math-sft", "math", "math"))),
        (_entropy_gap(cells, "updates-8", "updates-1", seeds), _collapse(cells, seeds)),
        (gap("updates-8", "updates-1", "math"), ""),
        (gap("lengths", "one-length", "math"), _lengths(cells, seeds)),
        (two_level_bootstrap(_hard(cells, seeds)), ""),
        (gap("weak-tests", "code", "code"), _said("its own tests against all", _overpaid(cells, seeds))),
        (gap("bad-golds", "code", "code"), ""),
        (two_level_bootstrap(_solved(cells, seeds)), _pass_at(cells, seeds)),
    ]  # fmt: skip
    return [
        expected.judged(effect, note, telling=matched or not expected.claim.startswith("4."))
        for expected, (effect, note) in zip(EXPECTED, found, strict=True)
    ]


def _difference(cells: Cells, arm: str, other: str, name: str, seed: int) -> list[float]:
    pair = (cells[arm, seed][f"{name} of items"], cells[other, seed][f"{name} of items"])
    return np.subtract(*pair).tolist()


def _said(what: str, effect: Difference) -> str:
    return f"{what[0].upper()}{what[1:]}: {effect.effect:+.3f} ({effect.low:+.3f} to {effect.high:+.3f})."


def _kinds(cells: Cells, domain: str, wanted: Sequence[str]) -> str:
    """What the answers of some arms are, in a sentence."""
    parts = []
    for arm in wanted:
        tables = [cell[f"{domain} by kind"] for (of, _), cell in cells.items() if of == arm]
        parts.append(f"{arm} " + ", ".join(f"{kind} {mean(table[kind] for table in tables):.3f}" for kind in tables[0]))
    return f"Answers in {domain}: {'; '.join(parts)}."


def _lowest_entropy(cells: Cells, arm: str, seed: int) -> float:
    """Least entropy of a run over that of its first batch."""
    curve = [row["entropy"] for row in cells[arm, seed]["curve"]]
    return min(curve) / curve[0]


def _entropy_gap(cells: Cells, arm: str, other: str, seeds: Sequence[int]) -> Difference:
    return two_level_bootstrap(
        [[_lowest_entropy(cells, arm, seed) - _lowest_entropy(cells, other, seed)] for seed in seeds]
    )


def _collapse(cells: Cells, seeds: Sequence[int]) -> str:
    """Entropy left and seeds whose accuracy fell by more than 5 points from its best, for every number of updates."""
    parts = []
    for arm in (arm for arm in ARMS if arm.startswith("updates")):
        left = mean(_lowest_entropy(cells, arm, seed) for seed in seeds)
        falls = [_fall([row["accuracy"] for row in cells[arm, seed]["curve"]]) for seed in seeds]
        steps = len(cells[arm, seeds[0]]["curve"]) * int(arm.split("-")[1])
        parts.append(
            f"{arm} ({steps} steps) entropy {left:.2f}, fell in {sum(fall > 0.05 for fall in falls)} of {len(falls)} "
            f"seeds, math {mean(cells[arm, seed]['math'] for seed in seeds):.3f}"
        )
    return f"Share of the entropy left, and seeds that fell 5 points from their best: {'; '.join(parts)}."


def _fall(accuracy: Sequence[float], window: int = 5) -> float:
    """How far the last batches lie below the best ones, of means over a few batches."""
    means = [mean(accuracy[max(0, end - window) : end]) for end in range(min(window, len(accuracy)), len(accuracy) + 1)]
    return max(means) - means[-1]


def _lengths(cells: Cells, seeds: Sequence[int]) -> str:
    parts = []
    for arm in ("lengths", "lengths-filtered", "one-length"):
        cut = [row["truncated"] for seed in seeds for row in cells[arm, seed]["curve"]]
        accuracy = mean(cells[arm, seed]["math"] for seed in seeds)
        first = mean(cells[arm, seed]["curve"][0]["truncated"] for seed in seeds)
        parts.append(f"{arm} math {accuracy:.3f}, cut off {first:.2f} at first and {mean(cut):.2f} on average")
    return f"{'; '.join(parts)}; before, math {mean(cells['verbose-sft', seed]['math'] for seed in seeds):.3f}."


def _hard(cells: Cells, seeds: Sequence[int]) -> list[list[float]]:
    """Differences on the items that math RL left hard, by samples that no arm is judged by."""
    found = []
    for seed in seeds:
        items = cells["math", seed]["hard items"]
        differences = _difference(cells, "hard", "all", "math", seed)
        found += [[differences[item] for item in items]] if items else []
    return found or [[0.0]]


def _overpaid(cells: Cells, seeds: Sequence[int]) -> Difference:
    """What the arm's own tests pay in its last batches, minus its accuracy under all tests."""
    last = {seed: mean(row["accuracy"] for row in cells["weak-tests", seed]["curve"][-5:]) for seed in seeds}
    return two_level_bootstrap([[last[seed] - cells["weak-tests", seed]["code"]] for seed in seeds])


def _solved(cells: Cells, seeds: Sequence[int]) -> list[list[float]]:
    """By item that SFT never solved: solved after RL, minus solved by SFT in new tries."""
    pairs = [(cells["math", seed]["puzzles right"], cells["sft", seed]["puzzles right again"]) for seed in seeds]
    found = [[float(new > 0) - float(old > 0) for new, old in zip(*pair, strict=True)] for pair in pairs]
    return [items for items in found if items] or [[0.0]]


def _pass_at(cells: Cells, seeds: Sequence[int]) -> str:
    parts = []
    for arm, name in (("sft", "puzzles right again"), ("math", "puzzles right")):
        tries = cells["sft", seeds[0]]["tries again"]
        rights = [right for seed in seeds for right in cells[arm, seed][name]] or [0]
        at = {k: mean(pass_at_k(right, tries, k) for right in rights) for k in (1, tries // 8 or 1, tries)}
        parts.append(f"{arm} " + ", ".join(f"pass@{k} {value:.3f}" for k, value in at.items()))
    count = sum(len(cells["sft", seed]["puzzles right again"]) for seed in seeds)
    return f"{count} problems unsolved over all seeds: {'; '.join(parts)}."


PANELS = {
    "math accuracy of batches": ("accuracy", ("math", "coin")),
    "code accuracy of batches": ("accuracy", ("code", "math-code", "weak-tests", "bad-golds")),
    "entropy, nats a token": ("entropy", ("updates-1", "updates-4", "updates-8", "updates-8-slower")),
}


def figure(cells: Cells, file: Path) -> None:
    """Accuracy and entropy while learning."""
    panels = {
        title: {
            arm: [
                np.array([[number, row[name]] for number, row in enumerate(cell["curve"], 1)])
                for (of, _), cell in cells.items()
                if of == arm
            ]
            for arm in wanted
        }
        for title, (name, wanted) in PANELS.items()
    }
    picture.curves(file, panels, "batches of rollouts")


CLAIM = Claim(
    name="math-then-code",
    paper="arXiv 2505.16400",
    title="RL on math, then on code",
    arms=tuple(ARMS),
    seeds=(0, 1, 2, 3, 4),
    smoke_seeds=(900,),
    measure=measure,
    expected=EXPECTED,
    judge=judge,
    limits=LIMITS,
    figure=figure,
    after=AFTER,
)
