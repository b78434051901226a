"""The score against closed forms and brute force, and its state that adds, merges and takes away."""

import math

import numpy as np
import pytest

from bloomery.synthesize import vendi
from bloomery.synthesize.vendi import Influence, Moments


def rows(count=60, dim=16, seed=0):
    draw = np.random.default_rng(seed)
    return draw.normal(size=(count, dim)) + 0.5


def test_the_score_counts_orthogonal_directions_whatever_their_length():
    three = np.repeat(np.eye(8)[:3], 5, axis=0) * np.arange(1, 16)[:, None]
    values = vendi.spectrum(Moments.of(three).density)
    assert vendi.score(values) == pytest.approx(3)
    assert vendi.order_two(values) == pytest.approx(3)
    uneven = vendi.spectrum(Moments.of(np.eye(4)[[0, 0, 0, 1]]).density)
    assert vendi.score(uneven) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert vendi.order_two(uneven) == pytest.approx(1 / (0.75**2 + 0.25**2))
    assert vendi.score(vendi.spectrum(Moments.of(np.ones((9, 4))).density)) == pytest.approx(1)


def test_the_two_matrices_have_one_spectrum():
    for count in (10, 60):  # fewer rows than dimensions, and more
        u = vendi.unit(rows(count))
        kernel = vendi.spectrum(u @ u.T / count)
        assert vendi.spectrum_of(rows(count)) == pytest.approx(kernel, abs=1e-9)
        assert vendi.score(vendi.spectrum(Moments.of(rows(count)).density)) == pytest.approx(vendi.score(kernel))


def test_moments_add_merge_and_take_away_in_any_order():
    data, weights = rows(50), np.linspace(0.1, 2, 50)
    whole = Moments.of(data, weights)
    u = vendi.unit(data)
    assert whole.density == pytest.approx((u.T * weights) @ u / weights.sum())
    assert whole.density == pytest.approx(whole.density.T)
    parts = Moments.of(data[30:], weights[30:]).merge(Moments.of(data[:30], weights[:30]))
    assert (parts.count, parts.weight) == (50, pytest.approx(weights.sum()))
    assert parts.second == pytest.approx(whole.second)
    left = parts.remove(data[:20], weights[:20])
    assert left.count == 30
    assert left.density == pytest.approx(Moments.of(data[20:], weights[20:]).density)
    assert left.centred == pytest.approx(Moments.of(data[20:], weights[20:]).centred)


def test_the_centred_score_forgets_what_all_share():
    shared = np.eye(8)[[1, 2, 3, 4]] + 20 * np.eye(8)[0]
    moments = Moments.of(shared)
    assert vendi.score(vendi.spectrum(moments.density)) < 1.1
    assert vendi.score(vendi.spectrum(moments.centred)) == pytest.approx(3)  # four corners of a tetrahedron
    assert not Moments.of(np.ones((3, 4))).centred.any()


def test_a_row_without_direction_is_named():
    data = rows(4)
    data[2] = 0
    with pytest.raises(ValueError, match="row 2 has length 0.0: it has no direction"):
        Moments.of(data)
    data[2] = np.nan
    with pytest.raises(ValueError, match="row 2 has length nan"):
        vendi.spectrum_of(data)


def test_half_precision_rows_give_the_score_of_exact_ones():
    exact, half = (vendi.score(vendi.spectrum(Moments.of(rows(500).astype(t)).density)) for t in (float, np.float16))
    assert half == pytest.approx(exact, rel=1e-3)


def test_the_ceiling_is_that_of_random_rows():
    data = np.random.default_rng(1).normal(size=(1000, 256))
    found = vendi.score(vendi.spectrum(Moments.of(data).density))
    assert found == pytest.approx(vendi.ceiling(1000, 256), rel=5e-3)
    assert vendi.ceiling(1000, 256) == pytest.approx(225.2, abs=0.1)


def test_scores_of_different_sizes_are_not_compared_raw():
    """The same distribution twice: the raw scores differ by size, rarefied ones do not."""
    small, large = np.split(np.random.default_rng(2).normal(size=(2400, 64)) * np.linspace(1, 3, 64), [400])
    raw = [vendi.score(vendi.spectrum_of(data)) for data in (small[:200], large)]
    assert raw[1] / raw[0] > 1.1
    mean, spread = vendi.rarefied(large, 200)
    assert mean == pytest.approx(raw[0], rel=0.02)
    assert 0 < spread < 0.02 * mean
    assert vendi.rarefied(small, 400) == (vendi.score(vendi.spectrum_of(small)), 0)
    with pytest.raises(ValueError, match="subsets of 401 of 400 rows"):
        vendi.rarefied(small, 401)


def test_extrapolation_removes_a_term_in_one_over_n():
    at = {n: math.exp(4 - 50 / n) for n in (500, 1000)}
    assert vendi.extrapolated(at[500], at[1000]) == pytest.approx(math.exp(4))


def test_gains_are_the_derivative_of_the_entropy():
    data, extra = rows(80), rows(3, seed=5)
    influence = Influence.of(Moments.of(data).density)
    density = (1 - 1e-3) * Moments.of(data).density + 1e-3 / 16 * np.eye(16)
    for row, gain in zip(vendi.unit(extra), influence.gains(extra), strict=True):
        step = 1e-6
        moved = vendi.entropy(vendi.spectrum((1 - step) * density + step * np.outer(row, row)))
        assert (moved - influence.entropy) / step == pytest.approx(gain - influence.entropy, abs=1e-3)
    assert influence.gains(data).mean() == pytest.approx(influence.entropy, rel=2e-3)


def test_the_interval_covers_and_the_bootstrap_would_not():
    """Monte Carlo over fresh data against one dataset's interval; duplicates of a bootstrap lie below it."""
    draw = np.random.default_rng(3)
    fresh = [draw.normal(size=(400, 32)) * np.linspace(1, 4, 32) for _ in range(40)]
    entropies = [vendi.entropy(vendi.spectrum(Moments.of(data).density)) for data in fresh]
    density = Moments.of(fresh[0]).density
    low, high = vendi.interval(density, [fresh[0][:150], fresh[0][150:]])
    error = (math.log(high) - math.log(low)) / (2 * 1.959964)
    assert error == pytest.approx(np.std(entropies), rel=0.35)
    again = [draw.integers(0, 400, 400) for _ in range(10)]
    bootstrap = np.mean([vendi.entropy(vendi.spectrum(Moments.of(fresh[0][at]).density)) for at in again])
    assert bootstrap < entropies[0] - 3 * error


def test_sources_add_up_to_the_whole():
    data = np.concatenate([np.eye(6)[[0, 1, 0, 1]], np.eye(6)[[2, 3]], np.eye(6)[[2, 3]]])
    whole, own, added = vendi.decomposition(data, ["a"] * 4 + ["b"] * 4)
    assert (whole, own["a"], own["b"]) == pytest.approx((math.log(4), math.log(2), math.log(2)))
    assert added == pytest.approx(math.log(2))  # nothing in common: all of the tags' entropy
