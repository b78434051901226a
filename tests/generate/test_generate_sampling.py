"""Draws against hand-computed distributions, and randomness that depends on nothing but (seed, position)."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from bloomery.generate.sampling import RowSettings, SamplingParams, derive_seed, sample, uniforms

CPU = torch.device("cpu")


def draw(logits, params, uniform):
    tokens, logprobs = sample(
        logits.clone(), RowSettings.of(params, CPU), torch.tensor(uniform, dtype=torch.float64)[:, None]
    )
    return tokens[:, 0].tolist(), logprobs[:, 0].tolist()


def kept(probabilities, draws=400, **settings):
    """The tokens that a sweep of uniforms over (0, 1) can reach."""
    logits = torch.tensor(probabilities).log().expand(draws, -1)
    tokens, _ = draw(logits, [SamplingParams(**settings)] * draws, [(i + 0.5) / draws for i in range(draws)])
    return sorted(set(tokens))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1}, "greater than or equal to 0"),
        ({"temperature": 1e-5}, "neither 0 .greedy. nor at least"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "greater than 0"),
        ({"top_p": 1.5}, "less than or equal to 1"),
        ({"top_k": -1}, "greater than or equal to 0"),
        ({"min_p": 1}, "less than 1"),
        ({"max_new_tokens": 0}, "leaves nothing to do; give at least 1, or ask for prompt_logprobs"),
        ({"stop": ("",)}, "empty stop string"),
        ({"stop_token_ids": (-2,)}, "found -2"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"temperature": 0, "top_p": 0.9}, "top_k, top_p and min_p must stay off"),
        ({"topk": 3}, "topk"),
    ],
)
def test_nonsense_settings_are_refused(setting, message):
    with pytest.raises(ValidationError, match=message):
        SamplingParams(**setting)


def test_uniforms_are_a_function_of_seed_and_position():
    together = uniforms([7, 8, 2**63 - 1], 5)
    assert np.array_equal(uniforms([8], 9)[0, :5], together[1])
    assert np.array_equal(uniforms([8, 7], 5)[1], together[0])


def test_uniforms_match_splitmix64():
    """The first words from state 0 are published with the generator (Vigna's C code): the stream itself is right."""
    from bloomery.generate.sampling import _GOLDEN, _mix

    words = _mix(np.arange(1, 4, dtype=np.uint64) * _GOLDEN)
    assert [hex(word) for word in words] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


def test_uniforms_are_uniform_and_independent_across_seeds():
    u = uniforms(range(1000), 100)
    assert u.min() > 0
    assert u.max() < 1
    cells, _ = np.histogram(u, bins=100, range=(0, 1))
    chi_square = ((cells - 1000) ** 2 / 1000).sum()
    assert 60 < chi_square < 150  # 99 degrees of freedom
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 0.02


def test_inversion_takes_the_token_whose_interval_holds_the_uniform():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(6, -1)
    tokens, logprobs = draw(logits, [SamplingParams()] * 6, [0.01, 0.49, 0.51, 0.76, 0.874, 0.99])
    assert tokens == [0, 0, 1, 2, 2, 3]
    assert logprobs == pytest.approx([math.log(p) for p in (0.5, 0.5, 0.25, 0.125, 0.125, 0.125)], abs=1e-6)


def test_frequencies_follow_the_softmax_at_temperature():
    count, temperature = 50_000, 0.7
    logits = torch.tensor([1.0, 0.3, -0.5, 2.0, 0.0])
    u = uniforms(range(count), 1)[:, 0].tolist()
    tokens, logprobs = draw(logits.expand(count, -1), [SamplingParams(temperature=temperature)] * count, u)
    expected = torch.softmax(logits / temperature, 0)
    frequencies = torch.tensor(tokens).bincount(minlength=5) / count
    assert torch.allclose(frequencies, expected, atol=0.007)  # 3 standard errors
    assert logprobs[:20] == pytest.approx([expected[t].log().item() for t in tokens[:20]], abs=1e-6)


def test_top_k_keeps_the_k_likeliest():
    assert kept([0.1, 0.4, 0.2, 0.3], top_k=2) == [1, 3]
    assert kept([0.1, 0.4, 0.2, 0.3], top_k=9) == [0, 1, 2, 3]


def test_top_p_keeps_the_fewest_tokens_that_hold_the_mass():
    assert kept([0.1, 0.4, 0.2, 0.3], top_p=0.65) == [1, 3]
    assert kept([0.1, 0.4, 0.2, 0.3], top_p=0.75) == [1, 2, 3]
    assert kept([0.1, 0.4, 0.2, 0.3], top_p=1e-9) == [1]


def test_top_p_counts_the_mass_left_by_top_k():
    """Of {0.4, 0.3} the first holds 57 %: enough for top_p 0.5 after top_k, not before."""
    assert kept([0.1, 0.4, 0.2, 0.3], top_k=2, top_p=0.5) == [1]
    assert kept([0.1, 0.4, 0.2, 0.3], top_p=0.5) == [1, 3]


def test_min_p_is_relative_to_the_likeliest():
    assert kept([0.1, 0.4, 0.2, 0.3], min_p=0.3) == [1, 2, 3]
    assert kept([0.1, 0.4, 0.2, 0.3], min_p=0.3, top_k=2) == [1, 3]


def test_logprobs_are_of_the_filtered_distribution():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    _, logprobs = draw(logits, [SamplingParams(top_k=2)], [0.99])
    assert logprobs == pytest.approx([math.log(0.3 / 0.7)], abs=1e-6)


def test_greedy_takes_the_likeliest_and_reports_it_at_temperature_one():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    assert draw(logits, [SamplingParams(temperature=0)], [0.01]) == ([1], pytest.approx([math.log(0.4)], abs=1e-6))
    assert draw(logits, [SamplingParams(temperature=0, logprobs=False)], [0.01])[0] == [1]


def test_rows_with_different_settings_do_not_touch_each_other():
    """Each row of a mixed batch equals the row drawn alone, bit for bit."""
    settings = [
        {}, {"temperature": 0.5}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2},
        {"temperature": 2.0, "top_k": 7, "top_p": 0.9, "min_p": 0.05}, {"temperature": 0, "logprobs": False},
    ]  # fmt: skip
    params = [SamplingParams(**each) for each in settings]
    logits = torch.randn(len(params), 50, generator=torch.Generator().manual_seed(0)) * 2
    uniform = uniforms(range(len(params)), 1)[:, 0].tolist()
    tokens, logprobs = draw(logits, params, uniform)
    for row, each in enumerate(params):
        alone = draw(logits[row : row + 1], [each], uniform[row : row + 1])
        assert alone[0] == [tokens[row]]
        if each.logprobs:
            assert alone[1] == pytest.approx([logprobs[row]], abs=1e-6)


def test_the_last_uniform_never_reaches_a_token_without_probability():
    logits = torch.full((2, 300), -math.inf)
    logits[:, 10:20] = torch.randn(10)
    tokens, _ = draw(logits, [SamplingParams()] * 2, [0.5 * 2**-32, (2**32 - 0.5) * 2**-32])
    assert tokens == [10, 19]


@pytest.mark.parametrize("params", [{}, {"temperature": 0}, {"temperature": 0, "logprobs": False}, {"top_p": 0.9}])
def test_logits_that_are_not_numbers_stay_visible(params):
    logits = torch.zeros(1, 8)
    logits[0, 3] = math.nan
    tokens, logprobs = draw(logits, [SamplingParams(**params)], [0.999])
    assert math.isnan(logprobs[0])
    assert 0 <= tokens[0] < 8


def test_derived_seeds_are_stable_and_distinct():
    assert derive_seed(1, 2, "a") == 5586689458854358813
    seeds = {derive_seed(run, step, sample) for run in range(3) for step in range(30) for sample in range(16)}
    assert len(seeds) == 3 * 30 * 16
    assert derive_seed(1, 23) != derive_seed(12, 3)
