"""Group advantages, per-token objectives and aggregations against numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bloomery.posttrain import objectives
from bloomery.posttrain.objectives import advantages, aggregate, degenerate, row_weights

ALL = torch.ones(1, 8, dtype=torch.bool)


def rewards_of(correct: int, total: int) -> torch.Tensor:
    return torch.tensor([[1.0] * correct + [0.0] * (total - correct)])


def test_one_right_of_eight_has_the_published_values() -> None:
    result = advantages(rewards_of(1, 8), ALL)[0]
    assert result[0].item() == pytest.approx(2.4749, abs=1e-4)
    assert result[1:].tolist() == pytest.approx([-0.3536] * 7, abs=1e-4)


@given(st.integers(2, 16).flatmap(lambda total: st.tuples(st.integers(1, total - 1), st.just(total))))
def test_closed_form_for_binary_rewards(counts: tuple[int, int]) -> None:
    correct, total = counts
    p, c = correct / total, math.sqrt((total - 1) / total)
    result = advantages(rewards_of(correct, total), torch.ones(1, total, dtype=torch.bool), eps=0.0)[0]
    assert result[0].item() == pytest.approx(c * math.sqrt((1 - p) / p), rel=1e-5)
    assert result[-1].item() == pytest.approx(-c * math.sqrt(p / (1 - p)), rel=1e-5)


def test_ddof_scale_and_baseline() -> None:
    rewards, valid = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.ones(1, 4, dtype=torch.bool)
    assert advantages(rewards, valid, ddof=0)[0, 0].item() == pytest.approx(0.75 / math.sqrt(0.1875), rel=1e-4)
    assert advantages(rewards, valid, scale="none")[0].tolist() == pytest.approx([0.75, -0.25, -0.25, -0.25])
    alone = advantages(rewards, valid, scale="none", baseline="leave_one_out")[0]
    assert alone.tolist() == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])


def test_batch_std_uses_one_spread_for_all_groups() -> None:
    rewards, valid = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.ones(2, 2, dtype=torch.bool)
    result = advantages(rewards, valid, scale="batch_std")
    spread = torch.tensor([1.0, 0.0, 1.0, 1.0]).std().item()
    assert result[0].tolist() == pytest.approx([0.5 / spread, -0.5 / spread], rel=1e-4)
    assert result[1].tolist() == [0.0, 0.0]


def test_equal_rewards_that_floats_cannot_hold_give_exactly_zero() -> None:
    rewards = torch.tensor([[0.1 + 0.2, 0.3, 0.3]], dtype=torch.float64)
    assert rewards.std(-1).item() > 0
    assert advantages(rewards, torch.ones(1, 3, dtype=torch.bool), eps=0.0)[0].tolist() == [0.0, 0.0, 0.0]


def test_a_sample_without_verdict_leaves_its_group() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, float("nan")]])
    valid = torch.tensor([[True, True, True, False]])
    expected = advantages(torch.tensor([[1.0, 0.0, 0.0]]), torch.ones(1, 3, dtype=torch.bool))
    assert advantages(rewards, valid)[0].tolist() == pytest.approx([*expected[0].tolist(), 0.0])


def test_a_group_shrunk_to_one_or_none_is_degenerate() -> None:
    rewards = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    valid = torch.tensor([[True, False], [False, False], [True, True]])
    assert degenerate(rewards, valid).tolist() == [True, True, False]
    result = advantages(rewards, valid)
    assert result[:2].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert torch.isfinite(result).all()


def test_on_policy_gradient_is_minus_advantage() -> None:
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    objectives.on_policy(logprobs, torch.tensor([[2.5]])).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-2.5, -2.5]]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.5, 1.0, -1.28, 0.0),  # above the upper bound and gaining: held
        (1.25, 1.0, -1.25, -1.25),  # inside the widened bound
        (0.5, -1.0, 0.8, 0.0),  # below the lower bound and avoiding: held
        (1.5, -1.0, 1.5, 1.5),  # a worse move is never held
    ],
)
def test_clip_higher(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    value = objectives.clipped(logprobs, torch.zeros(1, 1, dtype=torch.float64), torch.tensor([[advantage]]))
    value.sum().backward()
    assert logprobs.grad is not None
    assert value.item() == pytest.approx(loss)
    assert logprobs.grad.item() == pytest.approx(gradient)


def test_kl_penalty() -> None:
    same, other = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -1.5]])
    assert objectives.kl_penalty(same, other)[0].tolist() == pytest.approx([0.0, math.exp(-0.5) + 0.5 - 1])
    assert torch.isfinite(objectives.kl_penalty(torch.tensor([[-900.0]]), torch.tensor([[0.0]]))).all()


LOSSES = torch.tensor([[1.0, 1.0, 1.0, 1.0], [5.0, 9.0, 9.0, 9.0], [2.0, 2.0, 9.0, 9.0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
GROUP_TOKENS = torch.tensor([5, 5, 2])  # rows 0 and 1 are one group, row 2 another


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("token_mean", 13 / 7),
        ("group_token_mean", (9 / 5 + 2) / 2),
        ("seq_mean_token_mean", (1 + 5 + 2) / 3),
        ("seq_mean_token_sum_norm", 13 / (10 * 3)),
    ],
)
def test_aggregations_by_hand_and_split_over_micro_batches(how: objectives.Aggregation, expected: float) -> None:
    weights, parts = row_weights(MASK.sum(-1), how, GROUP_TOKENS, max_tokens=10)
    assert (aggregate(LOSSES, MASK, weights) / parts.sum()).item() == pytest.approx(expected)
    sums = [aggregate(LOSSES[[i]], MASK[[i]], weights[[i]]) for i in range(3)]
    assert (torch.stack(sums).sum() / parts.sum()).item() == pytest.approx(expected)


@pytest.mark.parametrize("how", ["token_mean", "group_token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"])
def test_a_masked_row_counts_for_nothing(how: objectives.Aggregation) -> None:
    mask = torch.cat([MASK, torch.zeros(1, 4, dtype=torch.bool)])
    losses = torch.cat([LOSSES, torch.full((1, 4), float("inf"))])
    weights, parts = row_weights(mask.sum(-1), how, torch.tensor([5, 5, 2, 0]), max_tokens=10)
    expected_weights, expected_parts = row_weights(MASK.sum(-1), how, GROUP_TOKENS, max_tokens=10)
    assert aggregate(losses, mask, weights).item() == pytest.approx(aggregate(LOSSES, MASK, expected_weights).item())
    assert parts.sum().item() == pytest.approx(expected_parts.sum().item())


def test_dual_clip_bounds_what_one_unlikely_token_costs() -> None:
    """Ratio 5 with A = −1: PPO pays 5, the dual clip 3; with A = +1 the upper bound 1.28 rules either way."""
    old = torch.zeros(1, 1)
    new = torch.full((1, 1), math.log(5.0))
    down, up = torch.tensor([[-1.0]]), torch.tensor([[1.0]])
    assert objectives.clipped(new, old, down).item() == pytest.approx(5.0)
    assert objectives.clipped(new, old, down, dual=3.0).item() == pytest.approx(3.0)
    assert objectives.clipped(new, old, up, dual=3.0).item() == pytest.approx(-1.28)


def test_where_the_clip_takes_the_gradient() -> None:
    """Ratios 0.7, 1.0, 1.25 and 1.4 under bounds 0.8 and 1.28: A > 0 is held above, A < 0 below."""
    ratios = torch.tensor([[0.7, 1.0, 1.25, 1.4]])
    new, old = ratios.log().requires_grad_(), torch.zeros(1, 4)
    for gain, held in ((1.0, [False, False, False, True]), (-1.0, [True, False, False, False])):
        gains = torch.full((1, 1), gain)
        found = objectives.is_clipped(new.detach(), old, gains, 0.2, 0.28)
        assert found.tolist() == [held]
        (gradient,) = torch.autograd.grad(objectives.clipped(new, old, gains, 0.2, 0.28).sum(), new)
        assert (gradient == 0).tolist() == [held]


def test_weights_for_a_generator_that_computes_otherwise() -> None:
    """w = 0.25, 1, 1.5, 4 in one completion: sum of log w = log 1.5, geometric mean 1.5^(1/4) = 1.1067."""
    weights = torch.tensor([[0.25, 1.0, 1.5, 4.0, 9.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    old, generated = weights.log().requires_grad_(), torch.zeros(1, 5)

    def found(kind: str, low: float, high: float) -> list[float]:
        result = objectives.mismatch_weights(old, generated, mask, kind, low, high)  # type: ignore[arg-type]
        assert not result.requires_grad
        return result[0].tolist()

    assert found("tis", 0.5, 2.0) == pytest.approx([0.25, 1.0, 1.5, 2.0, 0.0])
    assert found("mask", 0.5, 2.0) == pytest.approx([0.0, 1.0, 1.5, 0.0, 0.0])
    assert found("seq_mask", 0.5, 2.0) == pytest.approx([0.25, 1.0, 1.5, 4.0, 0.0])
    assert found("seq_mask", 0.5, 1.1) == [0.0] * 5
    assert found("seq_trunc", 0.5, 2.0) == pytest.approx([1.5, 1.5, 1.5, 1.5, 0.0])
    assert found("seq_trunc", 0.5, 1.2) == pytest.approx([1.2, 1.2, 1.2, 1.2, 0.0])


def test_equal_logprobs_weigh_one_and_hopeless_ones_stay_finite() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    same = torch.tensor([[-0.3, -2.0, -9.0]])
    for kind in ("tis", "mask", "seq_mask", "seq_trunc"):
        assert torch.equal(objectives.mismatch_weights(same, same, mask, kind), torch.ones(1, 3))
        lost = objectives.mismatch_weights(torch.zeros(1, 3), torch.full((1, 3), -1e4), mask, kind)
        assert lost.isfinite().all()


def test_overlong_penalty_of_dapo() -> None:
    """Limit 20, over the last 4 tokens: free up to 16, then a quarter a token, −1 at the limit and beyond."""
    lengths = torch.tensor([1, 16, 17, 18, 20, 25])
    assert objectives.overlong_penalty(lengths, 20, 4).tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    assert objectives.overlong_penalty(lengths, 20, 0).tolist() == [0.0] * 6
