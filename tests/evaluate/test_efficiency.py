"""Tokens per right answer, against numbers worked out by hand."""

import math

import pytest

from bloomery.evaluate import efficiency
from bloomery.evaluate.efficiency import Answered

SHORT = {
    "a": [Answered(True, 10), Answered(False, 40)],
    "b": [Answered(True, 20), Answered(True, 30)],
    "c": [Answered(False, 60), Answered(False, 60)],
}
LONG = {"a": [Answered(True, 20)], "b": [Answered(True, 50)], "c": [Answered(True, 500)]}


def test_one_model() -> None:
    found = efficiency.metrics(list(SHORT.values()), 80)
    assert found["tokens_when_right"].value == 20  # (10 + 20 + 30) / 3
    assert found["tokens_when_wrong"].value == pytest.approx(160 / 3)
    assert found["tokens_wrong_over_right"].value == pytest.approx(160 / 60)
    assert found["avg_within_quarter"].value == pytest.approx(1 / 3)  # within 20: half of a, half of b
    assert found["avg_within_half"].value == pytest.approx(0.5)
    assert found["avg_within_half"].stderr == pytest.approx(0.5 / math.sqrt(3))
    nothing = efficiency.metrics([[Answered(False, 5)]])
    assert set(nothing) == {"tokens_when_wrong"}


def test_a_model_that_solves_harder_items_looks_longer_and_is_matched() -> None:
    """By the mean 20 against 190 tokens; on the items both solve 20/10 and 50/25."""
    matched = efficiency.matched_ratio(SHORT, LONG, draws=200)
    assert matched is not None
    assert matched.effect == pytest.approx(2.0)
    assert (matched.low, matched.high, matched.n) == (pytest.approx(2.0), pytest.approx(2.0), 2)
    wide = efficiency.matched_ratio(SHORT, {"a": [Answered(True, 5)], "b": [Answered(True, 100)]}, draws=500)
    assert wide is not None
    assert wide.effect == pytest.approx(math.sqrt(0.5 * 4))
    assert (wide.low, wide.high) == (pytest.approx(0.5), pytest.approx(4.0))
    assert efficiency.matched_ratio(SHORT, {"c": LONG["c"]}) is None, "c is solved by one of them alone"


def test_adaptivity_is_mathematics_over_the_rest() -> None:
    found = efficiency.adaptivity({"math": [SHORT["b"], SHORT["b"]], "law": [SHORT["a"]], "text": [LONG["a"]]})
    assert found is not None
    assert found.value == pytest.approx(25 / 15)
    assert efficiency.adaptivity({"math": [SHORT["a"]]}) is None
    assert efficiency.adaptivity({"math": [SHORT["a"]], "law": [SHORT["c"]]}) is None
