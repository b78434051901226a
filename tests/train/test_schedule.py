"""Schedules at hand-computed steps."""

import math

import pytest

from bloomery.train.schedule import learning_rate


def rates(schedule, steps, **settings):
    return [learning_rate(step, 100, 2.0, schedule, **settings) for step in steps]


def test_warm_up_rises_linearly_and_reaches_the_peak():
    for schedule in ("wsd", "cosine", "constant"):
        assert rates(schedule, [1, 5, 9, 10], warmup_steps=10) == pytest.approx([0.2, 1.0, 1.8, 2.0])


def test_wsd_is_flat_then_falls_by_the_square_root():
    found = rates("wsd", [1, 80, 85, 95, 100], warmup_steps=0, decay_fraction=0.2, min_ratio=0.1)
    assert found == pytest.approx([2.0, 2.0, 0.2 + 1.8 * 0.5, 0.2 + 1.8 * (1 - math.sqrt(0.75)), 0.2])


def test_cosine_is_half_way_in_the_middle():
    assert rates("cosine", [20, 60, 100], warmup_steps=20, min_ratio=0.5) == pytest.approx([2.0, 1.5, 1.0])


def test_constant_stays():
    assert rates("constant", [1, 50, 100], min_ratio=0.1) == [2.0, 2.0, 2.0]
