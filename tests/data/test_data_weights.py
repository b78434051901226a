"""Rules for weights against hand-computed numbers, and what they refuse."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bloomery.data.weights import effective_tokens, natural, temperature, unimax, water_filling
from bloomery.errors import ConfigError

TOKENS = {"web": 800.0, "code": 150.0, "wiki": 50.0}


def test_natural_and_temperature():
    assert natural(TOKENS) == pytest.approx({"web": 0.8, "code": 0.15, "wiki": 0.05})
    assert temperature({"a": 16, "b": 1}, 0.5) == pytest.approx({"a": 0.8, "b": 0.2})
    assert temperature({"a": 16, "b": 1, "none": 0}, 0) == pytest.approx({"a": 0.5, "b": 0.5, "none": 0})


def test_unimax_shares_what_capped_sources_cannot_give():
    """300 tokens: wiki gives at most 1 × 50, so the other two share 250."""
    found = unimax(TOKENS, 300, {"wiki": 1.0, "web": 4.0, "code": 4.0})
    assert {name: 300 * share for name, share in found.items()} == pytest.approx({"web": 125, "code": 125, "wiki": 50})


def test_water_filling_follows_size_and_quality_between_floors_and_caps():
    quality = {"web": 0.0, "code": math.log(2), "wiki": math.log(4)}
    plain = water_filling(TOKENS, 100, quality, {}, alpha=1.0, beta=1.0)
    assert plain == pytest.approx({"web": 800 / 1300, "code": 300 / 1300, "wiki": 200 / 1300})
    capped = water_filling(TOKENS, 700, quality, {"wiki": 2.0}, alpha=1.0, beta=1.0)
    assert capped == pytest.approx({"web": 600 * 8 / 11 / 700, "code": 600 * 3 / 11 / 700, "wiki": 1 / 7})
    floored = water_filling(TOKENS, 100, {}, {}, alpha=1.0, beta=0.0, floors={"wiki": 0.24})
    assert floored == pytest.approx({"web": 0.76 * 800 / 950, "code": 0.76 * 150 / 950, "wiki": 0.24})


SIZES = st.lists(st.floats(1, 1e12), min_size=1, max_size=12)


@given(SIZES, st.floats(0, 1.5), st.floats(0.01, 0.99))
@settings(max_examples=60, deadline=None)
def test_no_source_passes_its_cap_and_shares_sum_to_one(sizes, alpha, filled):
    tokens, caps = {str(i): size for i, size in enumerate(sizes)}, {str(i): 2.0 for i in range(len(sizes))}
    budget = filled * 2 * sum(sizes)
    found = water_filling(tokens, budget, {}, caps, alpha, 0.0)
    assert sum(found.values()) == pytest.approx(1)
    assert all(share * budget <= 2 * tokens[name] * (1 + 1e-9) for name, share in found.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1001, {}, {"web": 1.0, "code": 1.0, "wiki": 1.0}), r"asks for 1,001 tokens, all sources under .* hold 1,000"),
        ((1000, {"wiki": 0.2}, {"wiki": 1.0}), r"source wiki: its floor asks for 200 tokens, its epochs allow 50"),
        ((100, {"wiki": 0.7, "web": 0.7}, {}), r"floors: they add up to 1\.4 of the phase"),
    ],
)
def test_what_cannot_be_filled_is_refused(arguments, message):
    budget, floors, caps = arguments
    with pytest.raises(ConfigError, match=message):
        water_filling(TOKENS, budget, {}, caps, floors=floors)


def test_a_rule_without_any_token_is_refused():
    with pytest.raises(ConfigError, match="no source has a token"):
        natural({"a": 0})


def test_repeated_tokens_are_worth_less_and_less():
    assert effective_tokens(100, 0.5) == 50
    assert effective_tokens(100, 1) == 100
    assert effective_tokens(100, 4) == pytest.approx(100 * (1 + 15 * (1 - math.exp(-3 / 15))))
    assert effective_tokens(100, 1e6) == pytest.approx(1600)
