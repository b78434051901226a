"""What k samples per problem say about a model, with standard errors clustered by problem. NumPy and SciPy only.

Samples of one problem are not independent, so every standard error is taken over problems (Miller, arXiv 2411.00640).
"""

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Z95 = 1.959964
_EXACT_SUBSETS = 5_000
_DRAWS = 1_000


@dataclass(frozen=True)
class Estimate:
    """A mean over problems. `stderr` is None where fewer than two problems leave it unknown."""

    value: float
    stderr: float | None
    n: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % normal interval."""
        return None if self.stderr is None else (self.value - Z95 * self.stderr, self.value + Z95 * self.stderr)


@dataclass(frozen=True)
class Difference:
    """Mean change between two sides on the same `n` items (or seeds), with its 95 % bootstrap interval."""

    effect: float
    low: float
    high: float
    n: int


def mean(values: Sequence[float]) -> Estimate:
    """Mean of one number per problem; the standard error is over problems."""
    data = np.asarray(values, dtype=np.float64)
    stderr = float(data.std(ddof=1) / math.sqrt(len(data))) if len(data) > 1 else None
    return Estimate(float(data.mean()), stderr, len(data))


def average_at_k(scores: Sequence[Sequence[float]]) -> Estimate:
    """avg@k: the mean score of a single sample, estimated from all k samples of each problem."""
    return mean([float(np.mean(problem)) for problem in scores])


def pass_at_k(correct: int, total: int, k: int) -> float:
    """Chance that at least one of k samples drawn from `total`, of which `correct` are right, is right.

    Unbiased: 1 − C(total − correct, k) / C(total, k) (Chen et al., arXiv 2107.03374, eq. 1).
    """
    if not 1 <= k <= total or not 0 <= correct <= total:
        raise ValueError(f"pass@{k} needs 1 ≤ k ≤ {total} samples and 0 ≤ {correct} correct ≤ {total}")
    return 1.0 - math.comb(total - correct, k) / math.comb(total, k)


def majority_at_k(votes: Sequence[Hashable | None], correct: Sequence[bool], k: int, seed: int = 0) -> float:
    """maj@k: chance that the most frequent answer among k of the samples is right.

    `votes` names each sample's answer; None (no readable answer) never votes, and a subset without a vote is wrong.
    Ties share. Over all subsets where they are few, else over seeded draws.
    """
    if not 1 <= k <= len(votes):
        raise ValueError(f"maj@{k} needs 1 ≤ k ≤ {len(votes)} samples")
    subsets = _subsets(len(votes), k, seed)
    return float(np.mean([_majority(subset, votes, correct) for subset in subsets]))


def _subsets(total: int, k: int, seed: int) -> list[Sequence[int]]:
    if math.comb(total, k) <= _EXACT_SUBSETS:
        return list(itertools.combinations(range(total), k))
    generator = np.random.default_rng(seed)
    return [generator.choice(total, k, replace=False).tolist() for _ in range(_DRAWS)]


def _majority(subset: Sequence[int], votes: Sequence[Hashable | None], correct: Sequence[bool]) -> float:
    counts = Counter(votes[i] for i in subset if votes[i] is not None)
    most = max(counts.values(), default=0)
    winners = {answer for answer, count in counts.items() if count == most}
    right = {votes[i] for i in subset if votes[i] is not None and correct[i]}
    return len(winners & right) / len(winners) if winners else 0.0


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate | None:
    """Σ numerators / Σ denominators over problems, as for tokens per correct answer; None where nothing is counted.

    The standard error is the linearised (delta method) one for a ratio of clustered sums.
    """
    top, bottom = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if bottom.sum() == 0:
        return None
    value = float(top.sum() / bottom.sum())
    residuals = (top - value * bottom) / bottom.mean()
    stderr = float(residuals.std(ddof=1) / math.sqrt(len(top))) if len(top) > 1 else None
    return Estimate(value, stderr, len(top))


def paired_difference(
    before: Mapping[str, float], after: Mapping[str, float], draws: int = 10_000, seed: int = 0
) -> Difference:
    """Mean of after − before over the items both hold, with a 95 % percentile bootstrap over items."""
    shared = sorted(before.keys() & after.keys())
    if not shared:
        raise ValueError("the two evaluations share no item, so no paired difference exists")
    differences = np.array([after[item] - before[item] for item in shared])
    generator = np.random.default_rng(seed)
    means = [generator.choice(differences, len(differences)).mean() for _ in range(draws)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(differences.mean()), float(low), float(high), len(shared))


def two_level_bootstrap(differences: Sequence[Sequence[float]], draws: int = 10_000, seed: int = 0) -> Difference:
    """Mean paired difference with a 95 % interval that holds for new seeds and new items.

    differences: for each seed, one number per item (side A − side B at that seed and item); a seed with one number has
    no item level. Every seed counts the same. Each draw takes seeds with replacement, then items within each.
    Few seeds make a percentile interval too narrow, so its quantiles are moved outwards to Φ(−√(n/(n−1))·t(n−1)), the
    expanded percentile interval (Hesterberg 2015, arXiv 1411.5279, section 5.2). With a single seed only the items
    vary, and the interval says nothing of other seeds.
    """
    groups = [np.asarray(group, dtype=np.float64) for group in differences]
    if not groups or not all(len(group) for group in groups):
        raise ValueError(f"every seed needs at least one difference; found {[len(group) for group in groups]}")
    generator = np.random.default_rng(seed)
    chosen = generator.integers(len(groups), size=(draws, len(groups)))
    resampled = np.empty(chosen.shape)
    for number, group in enumerate(groups):
        places = chosen == number
        resampled[places] = _item_means(group, int(places.sum()), generator)
    means = resampled.mean(axis=1)
    tail = _tail(len(groups))
    low, high = np.quantile(means, [tail, 1 - tail])
    return Difference(float(np.mean([group.mean() for group in groups])), float(low), float(high), len(groups))


def _item_means(group: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """`count` means of as many items as there are, drawn with replacement."""
    picked = generator.integers(len(group), size=(count, len(group)), dtype=np.int32)
    return group[picked].mean(axis=1)


def _tail(n: int) -> float:
    """The share to cut off at each end of a bootstrap over n units for a 95 % interval."""
    from scipy.special import ndtr, stdtrit  # a third of a second, which only claims need

    return 0.025 if n < 2 else float(ndtr(math.sqrt(n / (n - 1)) * stdtrit(n - 1, 0.025)))


def verdict(
    interval: tuple[float, float], direction: Literal["above", "below", "within"], threshold: float
) -> Literal["shown", "not shown", "inconclusive"]:
    """What a 95 % interval says of an effect that is expected above or below a threshold, or within ± threshold.

    shown: the whole interval lies on the expected side (for `within` that is the two one-sided tests of equivalence,
    Schuirmann 1987, at 2.5 %). not shown: none of it does. inconclusive: some does. No effect at all is neither above
    nor below 0.
    """
    low, high = interval
    if not low <= high:
        raise ValueError(f"interval {interval}: expected low ≤ high")
    if direction == "within":
        return _three_way(-threshold <= low and high <= threshold, high < -threshold or low > threshold)
    if direction == "below":
        low, high, threshold = -high, -low, -threshold
    return _three_way(low > threshold, high <= threshold)


def _three_way(all_inside: bool, all_outside: bool) -> Literal["shown", "not shown", "inconclusive"]:
    return "shown" if all_inside else "not shown" if all_outside else "inconclusive"
