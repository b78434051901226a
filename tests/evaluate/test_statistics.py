"""Estimators against brute force and numbers worked out by hand."""

import itertools
import math

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
