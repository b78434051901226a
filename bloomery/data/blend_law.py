"""Laws that predict what a blend gives: fitted to a table of runs, and believed as far as held-out runs bear them out.

Three of them, all over weights by phase, shares of the phases and ln epochs (`blend_table.features`): a ridge
regression on logarithms, boosted trees as RegMix has them (arXiv 2407.01492), and the exponential mixing law
(arXiv 2403.16952) with a power of the epochs beside it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bloomery.data.blend_table import LOSS, Table, features
from bloomery.errors import ConfigError
from bloomery.progress import say

Predict = Callable[[np.ndarray], np.ndarray]
"""(n, features) → (n, targets)."""
FOLDS, _DRAWS = 5, 500
_LEAST_ROWS, _ROWS_AN_UNKNOWN = 16, 2
_HUBER = 1.35


@dataclass(frozen=True)
class Bounded:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Validation:
    """How a law does on blends that it has not seen.

    rank: Spearman's correlation; error: root mean square, in the unit of the objective; skill: the part of the variance
    that it explains beyond the mean of the other runs, at most 1. predicted: (n,) what each run was predicted to give.
    """

    rank: Bounded
    error: Bounded
    skill: Bounded
    predicted: np.ndarray


def fit_linear(x: np.ndarray, y: np.ndarray, weights: np.ndarray, logs: np.ndarray) -> Predict:
    """Ridge regression, its strength by leave-one-out. logs: (targets,) bool, those fitted as logarithms."""
    from sklearn.linear_model import RidgeCV

    center, scale = x.mean(0), np.maximum(x.std(0), 1e-9)
    level = np.where(logs, np.log(np.where(logs, y, 1.0)), y)
    spread = np.maximum(level.std(0), 1e-12)
    ridge = RidgeCV(np.logspace(-4, 3, 15)).fit((x - center) / scale, level / spread, sample_weight=weights)

    def predict(new: np.ndarray) -> np.ndarray:
        values = ridge.predict((new - center) / scale).reshape(len(new), -1) * spread
        return np.where(logs, np.exp(np.where(logs, values, 0.0)), values)

    return predict


def fit_trees(x: np.ndarray, y: np.ndarray, weights: np.ndarray, logs: np.ndarray) -> Predict:
    """Gradient-boosted trees of depth 4, each on a random 70 % of the rows."""
    from sklearn.ensemble import GradientBoostingRegressor

    models = [
        GradientBoostingRegressor(
            n_estimators=150, learning_rate=0.1, max_depth=4, subsample=0.7, max_features=0.5, random_state=0
        ).fit(x, column, sample_weight=weights)
        for column in y.T
    ]
    return lambda new: np.stack([model.predict(new) for model in models], 1)


def fit_exponential(x: np.ndarray, y: np.ndarray, weights: np.ndarray, logs: np.ndarray) -> Predict:
    """c + k · exp(t · features) for every target, by Huber loss and L-BFGS; a loss starts as falling."""
    center, scale = x.mean(0), np.maximum(x.std(0), 1e-9)
    standard, share = (x - center) / scale, weights / weights.sum()
    laws = [
        _exponential(standard, column, share, 1.0 if falls else -1.0) for column, falls in zip(y.T, logs, strict=True)
    ]

    def predict(new: np.ndarray) -> np.ndarray:
        inputs = (new - center) / scale
        return np.stack([c + k * np.exp(np.clip(inputs @ t, -30, 30)) for c, k, t in laws], 1)

    return predict


def _exponential(
    x: np.ndarray, y: np.ndarray, share: np.ndarray, sign: float
) -> tuple[float, float, np.ndarray]:  # fmt: skip
    from scipy.optimize import minimize

    middle, spread = float(np.average(y, weights=share)), max(float(y.std()), 1e-12)
    level = (y - middle) / spread

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        power = np.clip(x @ theta[2:], -30, 30)
        rise = np.exp(power)
        gap = theta[0] + theta[1] * rise - level
        small = np.abs(gap) <= _HUBER
        value = share @ np.where(small, gap**2 / 2, _HUBER * (np.abs(gap) - _HUBER / 2))
        slope = share * np.where(small, gap, _HUBER * np.sign(gap))
        inner = slope * theta[1] * rise
        gradient = np.concatenate([[slope.sum(), slope @ rise], x.T @ inner + 2e-4 * theta[2:]])
        return float(value + 1e-4 * theta[2:] @ theta[2:]), gradient

    start = np.concatenate([[-sign], [sign], np.zeros(x.shape[1])])
    best = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 300})
    return middle + spread * best.x[0], spread * best.x[1], best.x[2:]


LAWS: Mapping[str, Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], Predict]] = {
    "linear": fit_linear, "trees": fit_trees, "exponential": fit_exponential,
}  # fmt: skip


@dataclass(frozen=True)
class Objective:
    """A weighted sum of targets that is to be small: scores count against it. signs: (targets,)."""

    targets: tuple[str, ...]
    signs: np.ndarray

    @classmethod
    def of(cls, table: Table, wanted: Mapping[str, float]) -> "Objective":
        """The mean of the targets named in `wanted` with their weights; of all where none is. Raises `ConfigError`."""
        for name, weight in wanted.items():
            if name not in table.targets:
                raise ConfigError(f"target {name}: no such column; the table has {', '.join(table.targets)}")
            if not weight > 0:
                raise ConfigError(f"target {name}: weight {weight:g}; expected a number above 0")
        kinds = {name.partition("/")[0] for name in table.targets}
        if not wanted and len(kinds) > 1:
            raise ConfigError("the table holds losses and scores; name the targets to optimize with --target")
        given = wanted or dict.fromkeys(table.targets, 1.0)
        signs = [given.get(name, 0.0) * (1 if name.startswith(LOSS) else -1) for name in table.targets]
        return cls(table.targets, np.array(signs) / sum(given.values()))

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """(n,) from (n, targets)."""
        return values @ self.signs


def fit(law: str, table: Table, weights: np.ndarray | None = None, rows: np.ndarray | None = None) -> Predict:
    """Fit a law to some rows of a table, all of them unless `rows` says which."""
    rows = np.arange(len(table)) if rows is None else rows
    weights = np.ones(len(table)) if weights is None else weights
    found = table.found[rows]
    logs = np.array([name.startswith(LOSS) for name in table.targets]) & (table.found > 0).all(0)
    return LAWS[law](features(table.parts, table.epochs)[rows], found, weights[rows], logs)


def for_law(law: str, table: Table, objective: Objective) -> tuple[Table, Objective]:
    """What a law is fitted to: each target that counts; trees, which take long, to the objective alone."""
    if law != "trees":
        counts = np.flatnonzero(objective.signs)
        names = tuple(table.targets[place] for place in counts)
        return replace(table, targets=names, found=table.found[:, counts]), Objective(names, objective.signs[counts])
    alone = replace(table, targets=("objective",), found=objective(table.found)[:, None])
    return alone, Objective(alone.targets, np.ones(1))


def validate(law: str, table: Table, objective: Objective, seed: int = 0) -> Validation:
    """Five-fold cross-validation; runs of one blend are held out together."""
    table, objective = for_law(law, table, objective)
    groups, x = table.groups, features(table.parts, table.epochs)
    fold = np.random.default_rng(seed).permutation(groups.max() + 1)[groups] % FOLDS
    predicted, plain, truth = np.empty(len(table)), np.empty(len(table)), objective(table.found)
    for number in range(FOLDS):
        held_out, rest = fold == number, np.flatnonzero(fold != number)
        predicted[held_out] = objective(fit(law, table, rows=rest)(x[held_out]))
        plain[held_out] = truth[rest].mean()
    return _measured(predicted, plain, truth, groups, seed)


def _measured(predicted: np.ndarray, plain: np.ndarray, truth: np.ndarray, groups: np.ndarray, seed: int) -> Validation:
    """Rank correlation, error and skill with percentile intervals over blends drawn anew."""
    random, members = np.random.default_rng(seed), [np.flatnonzero(groups == g) for g in range(groups.max() + 1)]

    def measure(rows: np.ndarray) -> tuple[float, float, float]:
        wrong, missed = (predicted[rows] - truth[rows]) ** 2, (plain[rows] - truth[rows]) ** 2
        return rank_correlation(predicted[rows], truth[rows]), wrong.mean() ** 0.5, 1 - wrong.sum() / missed.sum()

    draws = [
        measure(np.concatenate([members[g] for g in random.integers(len(members), size=len(members))]))
        for _ in range(_DRAWS)
    ]
    whole, (low, high) = measure(np.arange(len(truth))), np.quantile(draws, [0.025, 0.975], axis=0)
    rank, error, skill = (Bounded(float(w), float(a), float(b)) for w, a, b in zip(whole, low, high, strict=True))
    return Validation(rank, error, skill, predicted)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: the correlation of ranks, ties sharing theirs; 0 where one side is constant."""
    left, right = _ranks(a), _ranks(b)
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return 0.0
    return float(np.corrcoef(left, right)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def refuse_small(table: Table) -> None:
    """Raises `ConfigError` where a table holds too few blends to tell a law from chance."""
    blends, wanted = int(table.groups.max()) + 1, max(_LEAST_ROWS, _ROWS_AN_UNKNOWN * table.unknowns)
    if blends < wanted:
        raise ConfigError(
            f"the table holds {blends} different blends that vary {table.unknowns} numbers; expected at least "
            f"{wanted}: run more blends, or fix some weights"
        )


def best_law(
    table: Table, objective: Objective, laws: Sequence[str] = tuple(LAWS), seed: int = 0
) -> tuple[str, dict[str, Validation]]:
    """The law with the least held-out error, and how each did.

    Raises `ConfigError` where the table is too small, or no law is surely better than a constant.
    """
    refuse_small(table)
    found = {law: validate(law, table, objective, seed) for law in laws}
    best = min(found, key=lambda law: found[law].error.value)
    skill = found[best].skill
    for law, held_out in found.items():
        say(f"blend search  {law}: rank correlation {_shown(held_out.rank)}, skill {_shown(held_out.skill)} held out")
    if skill.low <= 0:
        raise ConfigError(
            f"no law predicts held-out runs better than their mean does: the best, {best}, explains {_shown(skill)} of "
            "the variance (95 % interval), so it can propose nothing; run more blends that differ more, or more seeds"
        )
    return best, found


def _shown(number: Bounded) -> str:
    return f"{number.value:.3f} ({number.low:.3f} to {number.high:.3f})"
