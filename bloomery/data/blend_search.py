"""Proposing a blend from a table of runs: the best one that a validated law knows of, within the caps of a plan.

In each phase a proposal lies between blends that were tried (in the convex hull of their shares of all tokens), where a
law has been checked. Caps on epochs and floors are linear in these shares, so between blends that keep them lie only
such that do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bloomery.data.blend_law import Bounded, Objective, Predict, Validation, best_law, fit, for_law, refuse_small
from bloomery.data.blend_table import Budget, Table, features
from bloomery.errors import ConfigError

_VERTICES, _ROUNDS, _CHILDREN, _ELITE = 48, 20, 384, 24
_MARGIN = 0.999
"""Of a cap: what counts of whole sequences may add to a share by rounding must still fit."""


@dataclass(frozen=True)
class Proposal:
    """A blend with what it is predicted to give.

    weights: (phases, sources), which sum to 1 in each phase; shares: of the phases; epochs: (sources,).
    objective: with the interval that a run of it should fall in; tried: the best mean of runs of a feasible blend;
    gain: what the law says it saves against the best feasible blend that was tried, the selection being pessimistic.
    """

    law: str
    validation: Mapping[str, Validation]
    weights: np.ndarray
    shares: np.ndarray
    epochs: np.ndarray
    objective: Bounded
    targets: Mapping[str, float]
    tried: Bounded | None
    gain: Bounded | None


def search(
    table: Table, budget: Budget, wanted: Mapping[str, float] | None = None, draws: int = 48, seed: int = 0,
    laws: Sequence[str] = ("linear", "trees", "exponential"),
) -> Proposal:  # fmt: skip
    """The blend of the least predicted objective, counted pessimistically: the mean of refits plus their deviation.

    wanted: target → weight, all targets equally where empty; draws: refits on reweighted runs (the Bayesian bootstrap,
    Rubin 1981), from which the intervals come. Raises `ConfigError` as `best_law` does, and where no blend between
    those tried keeps the caps.
    """
    random, objective = np.random.default_rng(seed), Objective.of(table, wanted or {})
    refuse_small(table)
    pool = _feasible(table, budget, random)
    law, validation = best_law(table, objective, laws, seed)
    fitted, aim = for_law(law, table, objective)
    refits = _refits(law, fitted, draws, random)

    def predicted(parts: np.ndarray) -> np.ndarray:
        """(draws, n) objectives."""
        inputs = features(parts, budget.epochs(parts))
        return np.stack([aim(refit(inputs)) for refit in refits])

    best = _descend(pool, lambda parts: _pessimistic(predicted(parts)), random)
    tried = _tried(table, objective, budget)
    return _proposal(best, tried, law, validation, table, budget, objective, predicted)


def _refits(law: str, table: Table, draws: int, random: np.random.Generator) -> list[Predict]:
    """Each on its own weights of the blends; runs of one blend share theirs."""
    groups = table.groups
    return [fit(law, table, random.dirichlet(np.ones(groups.max() + 1))[groups] * len(table)) for _ in range(draws)]


def _pessimistic(values: np.ndarray) -> np.ndarray:
    return values.mean(0) + values.std(0)


def _feasible(table: Table, budget: Budget, random: np.random.Generator) -> np.ndarray:
    """(n, phases, sources): blends that were tried and keep caps and floors, and corners of what lies between them."""
    from scipy.linalg import block_diag
    from scipy.optimize import linprog

    phases, (matrix, limits) = len(budget.shares), _limits(budget)
    flat = table.parts.reshape(len(table), -1)
    between = block_diag(*table.parts.transpose(1, 2, 0))  # how much of each run's phase → shares of all tokens
    whole = np.vstack([np.repeat(np.eye(phases), len(table), axis=1), between.sum(0)])
    corners = []
    for _ in range(_VERTICES):
        aim = random.normal(size=flat.shape[1]) @ between
        found = linprog(aim, matrix @ between, limits, whole, np.ones(phases + 1), bounds=(0, None), method="highs")
        if found.x is None:
            raise ConfigError(_why_not(table, budget))
        corners.append(between @ found.x)
    tried = flat[(flat @ matrix.T <= limits + 1e-12).all(1)]
    return np.concatenate([tried, np.stack(corners)]).reshape(-1, *table.parts.shape[1:])


def _limits(budget: Budget) -> tuple[np.ndarray, np.ndarray]:
    """Rows a and numbers b such that a · (shares of all tokens, flat) ≤ b holds for each cap and floor."""
    phases, sources = len(budget.shares), len(budget.sources)
    capped = np.flatnonzero(np.isfinite(budget.largest))
    caps = np.tile(np.eye(sources), phases)[capped]
    of_phase = np.repeat(np.eye(phases), sources, axis=0)  # (phases · sources, phases)
    floors = budget.floors.reshape(-1, 1) * of_phase @ np.repeat(np.eye(phases), sources, axis=1)
    floored = np.flatnonzero(budget.floors.reshape(-1) > 0)
    rows = np.concatenate([caps, (floors - np.eye(phases * sources))[floored]])
    return rows, np.concatenate([budget.largest[capped] * _MARGIN, np.zeros(len(floored))])


def _why_not(table: Table, budget: Budget) -> str:
    """Names the cap that the blends of the table miss by the most."""
    least = budget.epochs(table.parts.min(0)[None])[0]
    over = np.flatnonzero(least > budget.max_epochs)
    if not len(over):
        return (
            "no blend between those of the table keeps all caps and floors at once; run blends that do, raise a cap or "
            "lower a floor"
        )
    worst = over[np.argmax(least[over] / budget.max_epochs[over])]
    return (
        f"sources.{budget.sources[worst]}: the least of it that the table's blends hold is {least[worst]:.3g} epochs, "
        f"max_epochs is {budget.max_epochs[worst]:g}; run blends with less of it, raise the cap or add data"
    )


def _descend(pool: np.ndarray, cost: Any, random: np.random.Generator) -> np.ndarray:
    """Points between the best found so far and others of the pool, again and again; the mean of the best ones."""
    best, value = pool, cost(pool)
    for _ in range(_ROUNDS):
        parents = best[np.argsort(value)[:_ELITE]]
        mates = np.concatenate([parents, pool])
        one, other = random.integers(len(parents), size=_CHILDREN), random.integers(len(mates), size=_CHILDREN)
        step = (random.random(_CHILDREN) ** 2)[:, None, None]
        children = (1 - step) * parents[one] + step * mates[other]
        best, value = np.concatenate([best, children]), np.concatenate([value, cost(children)])
        keep = np.argsort(value)[:_ELITE]
        best, value = best[keep], value[keep]
    return best.mean(0)


def _tried(table: Table, objective: Objective, budget: Budget) -> tuple[np.ndarray, Bounded] | None:
    """The feasible blend whose runs did best, with their mean and range; None where no run was feasible."""
    matrix, limits = _limits(budget)
    keeps = (table.parts.reshape(len(table), -1) @ matrix.T <= limits + 1e-12).all(1)
    values, groups = objective(table.found), table.groups
    means = {g: values[groups == g].mean() for g in np.unique(groups[keeps])}
    if not means:
        return None
    runs = np.flatnonzero(groups == min(means, key=means.__getitem__))
    told = Bounded(float(values[runs].mean()), float(values[runs].min()), float(values[runs].max()))
    return table.parts[runs[0]], told


def _proposal(
    best: np.ndarray, tried: tuple[np.ndarray, Bounded] | None, law: str, validation: Mapping[str, Validation],
    table: Table, budget: Budget, objective: Objective, predicted: Any,
) -> Proposal:  # fmt: skip
    shares = best.sum(1)
    epochs = budget.epochs(best[None])[0]
    assert (epochs <= budget.max_epochs).all(), "points between feasible blends are feasible"
    at_best = predicted(best[None])[:, 0]
    misses = objective(table.found) - validation[law].predicted
    gain = None if tried is None else _interval(predicted(tried[0][None])[:, 0] - at_best)
    values = fit(law, table)(features(best[None], epochs[None]))[0]
    return Proposal(
        law, validation, best / shares[:, None], shares, epochs, _interval(at_best[:, None] + misses),
        dict(zip(table.targets, values.tolist(), strict=True)), None if tried is None else tried[1], gain,
    )  # fmt: skip


def _interval(values: np.ndarray) -> Bounded:
    low, high = np.quantile(values, [0.025, 0.975])
    return Bounded(float(values.mean()), float(low), float(high))
