"""Which samples of a pool to keep, or how much each should count, so that the score of what is kept is high.

All work on the sketches alone. `greedy`: one after another, the sample that adds most volume (log-determinant of
C + ridge·I, kept by rank-one updates). `by_gain`: in a few rounds, those whose first-order gain in entropy
−uᵀ(ln C)u is highest. `weights`: exponentiated gradient on the entropy (as SPOKES, arXiv 2606.15216).
"""

import math

import numpy as np

from bloomery.synthesize import vendi
from bloomery.synthesize.vendi import Influence, Moments

_RIDGE = 0.05
_ROUNDS = 10


def greedy(rows: np.ndarray, count: int) -> np.ndarray:
    """Places of `count` rows, (count,), in the order they were taken; every prefix is a selection too. O(n·dim) each.

    Raises `ValueError` for more than there are.
    """
    _check(rows, count)
    unit = vendi.unit(rows)
    dim = unit.shape[1]
    inverse = np.eye(dim, dtype=unit.dtype) / _RIDGE
    left = np.einsum("nd,nd->n", unit, unit) / _RIDGE  # uᵀ(A)⁻¹u for every row
    chosen = np.empty(count, dtype=np.int64)
    for step in range(count):
        best = int(left.argmax())
        chosen[step] = best
        column = inverse @ unit[best]
        share = column / math.sqrt(1 + float(unit[best] @ column))
        inverse -= np.outer(share, share)
        left -= np.square(unit @ share)
        left[chosen[: step + 1]] = -np.inf
    return chosen


def by_gain(rows: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Places of `count` rows: a tenth at random, then tenth after tenth those with the highest gain. O(n·dim²) a round:
    for pools where `greedy` would take too long."""
    _check(rows, count)
    generator = np.random.default_rng(seed)
    first = max(1, count // _ROUNDS)
    taken = np.zeros(len(rows), dtype=bool)
    taken[generator.choice(len(rows), first, replace=False)] = True
    moments = Moments.of(rows[taken])
    while (missing := count - int(taken.sum())) > 0:
        gains = np.where(taken, -np.inf, Influence.of(moments.density).gains(rows))
        best = np.argsort(-gains, kind="stable")[: min(first, missing)]
        taken[best] = True
        moments.add(rows[best])
    return np.flatnonzero(taken)


def weights(rows: np.ndarray, steps: int = 30, rate: float = 1.0, most: float = 4.0) -> np.ndarray:
    """(n,) with mean 1 to a thousandth: each step multiplies by exp(rate·(gain − mean gain)), none exceeds `most`."""
    found = np.ones(len(rows))
    for _ in range(steps):
        gains = Influence.of(Moments.of(rows, found).density).gains(rows)
        found *= np.exp(rate * (gains - np.average(gains, weights=found)))
        found = _capped(found, most)
    return found


def _capped(found: np.ndarray, most: float) -> np.ndarray:
    """Scaled to mean 1 with no weight above `most`."""
    for _ in range(20):
        found = np.minimum(found * len(found) / found.sum(), most)
    return found


def _check(rows: np.ndarray, count: int) -> None:
    if not 1 <= count <= len(rows):
        raise ValueError(f"{count} of {len(rows)} samples: choose between 1 and all")
