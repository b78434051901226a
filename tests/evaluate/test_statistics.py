"""Estimators against brute force and numbers worked out by hand."""

import itertools
import math
import re

import numpy as np
import pytest

from bloomery.evaluate import statistics
from bloomery.evaluate.statistics import majority_at_k, pass_at_k


def test_average_clusters_by_problem() -> None:
    estimate = statistics.average_at_k([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]])
    assert estimate.value == pytest.approx(0.5)
    assert estimate.stderr == pytest.approx(0.5 / math.sqrt(3))  # 12 independent samples would give 0.15
    low, high = estimate.interval or (0, 0)
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.288675, 0.5 + 1.96 * 0.288675), abs=1e-4)


def test_one_problem_has_no_standard_error() -> None:
    assert statistics.average_at_k([[1, 0]]) == statistics.Estimate(0.5, None, 1)
    assert statistics.average_at_k([[1, 0]]).interval is None


@pytest.mark.parametrize(("correct", "total", "k"), [(0, 5, 2), (1, 5, 2), (3, 5, 2), (4, 5, 2), (2, 6, 6), (1, 1, 1)])
def test_pass_at_k_is_the_mean_over_all_subsets(correct: int, total: int, k: int) -> None:
    flags = [True] * correct + [False] * (total - correct)
    brute = np.mean([any(subset) for subset in itertools.combinations(flags, k)])
    assert pass_at_k(correct, total, k) == pytest.approx(brute)


def test_pass_at_k_of_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="pass@3 needs 1 ≤ k ≤ 2"):
        pass_at_k(1, 2, 3)


def test_majority_by_hand() -> None:
    votes, correct = ["7", "7", "5", None], [True, True, False, False]
    assert majority_at_k(votes, correct, 1) == pytest.approx(0.5)
    # {7,7} {7,5}×2 tie → ½ each, {7,-}×2 → 1 each, {5,-} → 0: (1 + 2·½ + 2 + 0) / 6
    assert majority_at_k(votes, correct, 2) == pytest.approx(4 / 6)
    assert majority_at_k(votes, correct, 4) == 1.0
    assert majority_at_k([None, None], [False, False], 2) == 0.0


def test_a_popular_wrong_answer_beats_a_right_one() -> None:
    assert majority_at_k(["1", "1", "2"], [False, False, True], 3) == 0.0


def test_sampled_subsets_agree_with_exact_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    votes, correct = ["a"] * 5 + ["b"] * 4 + [None], [True] * 5 + [False] * 5
    exact = majority_at_k(votes, correct, 5)
    monkeypatch.setattr(statistics, "_EXACT_SUBSETS", 1)
    assert majority_at_k(votes, correct, 5) == pytest.approx(exact, abs=0.05)
    assert majority_at_k(votes, correct, 5, seed=3) == majority_at_k(votes, correct, 5, seed=3)


def test_tokens_per_correct_answer() -> None:
    estimate = statistics.ratio([100, 300], [1, 1])
    assert estimate is not None
    assert estimate.value == 200
    assert estimate.stderr == pytest.approx(100)  # equal denominators: the plain standard error of the mean
    assert statistics.ratio([100, 300], [0, 0]) is None


def test_paired_difference_is_tighter_than_the_items_spread() -> None:
    before = {str(i): float(i % 2) for i in range(100)}
    after = {item: score * 0.8 + 0.2 for item, score in before.items()}
    difference = statistics.paired_difference(before, {**after, "new": 1.0}, draws=500)
    assert difference.effect == pytest.approx(0.1)
    assert difference.n == 100
    assert 0 < difference.low < 0.1 < difference.high < 0.15


def test_paired_difference_without_shared_items() -> None:
    with pytest.raises(ValueError, match="share no item"):
        statistics.paired_difference({"a": 1.0}, {"b": 1.0})


def test_one_number_a_seed_gives_the_t_interval_nearly() -> None:
    values = [0.9, 1.3, 0.7, 1.6, 1.0, 1.2, 0.4, 1.5, 1.1, 0.8]
    found = statistics.two_level_bootstrap([[value] for value in values])
    half = 2.262 * np.std(values, ddof=1) / math.sqrt(10)  # Student's t with 9 degrees of freedom
    assert found.effect == pytest.approx(1.05)
    assert found.n == 10
    assert found.low == pytest.approx(1.05 - half, abs=0.25 * half)
    assert found.high == pytest.approx(1.05 + half, abs=0.25 * half)


def test_the_interval_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        seeds = 0.3 + generator.normal(size=5)
        found = statistics.two_level_bootstrap(
            [seed + generator.normal(size=8) for seed in seeds], draws=500, seed=trial
        )
        covered += found.low <= 0.3 <= found.high
    assert 0.92 <= covered / 200 <= 0.99  # without the expansion, 0.88


def test_items_alone_decide_where_seeds_agree() -> None:
    items = [0.0, 1.0] * 50
    wide = statistics.two_level_bootstrap([items[:10]] * 4, draws=4000)
    narrow = statistics.two_level_bootstrap([items] * 4, draws=4000)
    assert wide.effect == narrow.effect == 0.5
    # 0.5 / √(4·100) = 0.025 is the standard error of the mean of all items; the tail for four seeds is 3.67 of them
    assert narrow.high - 0.5 == pytest.approx(3.67 * 0.025, rel=0.2)
    assert wide.high - 0.5 == pytest.approx(math.sqrt(10) * (narrow.high - 0.5), rel=0.2)


def test_every_seed_counts_the_same_whatever_its_items() -> None:
    assert statistics.two_level_bootstrap([[1.0] * 99, [0.0]]).effect == 0.5


def test_a_single_seed_varies_by_items_only() -> None:
    assert statistics.two_level_bootstrap([[2.0]]) == statistics.Difference(2.0, 2.0, 2.0, 1)
    found = statistics.two_level_bootstrap([[0.0, 1.0] * 50])
    assert found.low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02)


def test_a_seed_without_items_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("at least one difference; found [1, 0]")):
        statistics.two_level_bootstrap([[1.0], []])


@pytest.mark.parametrize(
    ("interval", "direction", "threshold", "said"),
    [
        ((3.1, 4.0), "above", 3.0, "shown"),
        ((2.9, 4.0), "above", 3.0, "inconclusive"),
        ((1.0, 2.9), "above", 3.0, "not shown"),
        ((-2.0, -0.1), "below", 0.0, "shown"),
        ((-2.0, 0.1), "below", 0.0, "inconclusive"),
        ((0.1, 2.0), "below", 0.0, "not shown"),
        ((0.0, 0.0), "below", 0.0, "not shown"),
        ((0.0, 0.0), "above", 0.0, "not shown"),
        ((-0.01, 0.009), "within", 0.01, "shown"),
        ((-0.02, 0.0), "within", 0.01, "inconclusive"),
        ((-0.02, 0.02), "within", 0.01, "inconclusive"),
        ((0.011, 0.02), "within", 0.01, "not shown"),
        ((-0.03, -0.02), "within", 0.01, "not shown"),
    ],
)
def test_verdicts(interval: tuple[float, float], direction: str, threshold: float, said: str) -> None:
    assert statistics.verdict(interval, direction, threshold) == said


def test_an_interval_that_is_none_has_no_verdict() -> None:
    for interval in ((1.0, 0.0), (math.nan, math.nan)):
        with pytest.raises(ValueError, match="expected low ≤ high"):
            statistics.verdict(interval, "above", 0.0)
