"""The chunked head against plain PyTorch in fp64, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from bloomery.train import cross_entropy as module
from bloomery.train.cross_entropy import cross_entropy, logprobs_and_entropy


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(module, "_FEWEST_ROWS", 5)
    monkeypatch.setitem(module._CHUNK_ELEMENTS, "cpu", 5 * 11)


@pytest.fixture
def problem():
    torch.manual_seed(0)
    hidden = torch.randn(23, 7, requires_grad=True)
    weight = torch.randn(11, 7, requires_grad=True)
    return hidden, weight, torch.randint(11, (23,))


def gradients_in_fp64(problem, function):
    hidden, weight, labels = problem
    hidden, weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    value = function(hidden, weight, labels)
    return value, torch.autograd.grad(value, [hidden, weight])


def test_cross_entropy_equals_the_plain_form(problem):
    hidden, weight, labels = problem
    expected, expected_gradients = gradients_in_fp64(
        problem, lambda h, w, y: 0.37 * F.cross_entropy(h @ w.t(), y, reduction="sum")
    )
    total, losses = cross_entropy(hidden, weight, labels)
    gradients = torch.autograd.grad(0.37 * total, [hidden, weight])
    torch.testing.assert_close(0.37 * total.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses, F.cross_entropy(hidden @ weight.t(), labels, reduction="none"))
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_no_labelled_position_gives_zero_loss_and_zero_gradients(problem):
    hidden, weight, _ = problem
    total, losses = cross_entropy(hidden[:0], weight, torch.empty(0, dtype=torch.int64))
    total.backward()
    assert total.item() == 0
    assert losses.shape == (0,)
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_large_logits_stay_finite(problem):
    hidden, weight, labels = problem
    total, _ = cross_entropy(hidden * 1e4, weight, labels)
    assert torch.isfinite(total)
    torch.testing.assert_close(total, F.cross_entropy(hidden * 1e4 @ weight.t(), labels, reduction="sum"))


def test_a_frozen_head_gets_no_gradient(problem):
    hidden, weight, labels = problem
    cross_entropy(hidden, weight.detach(), labels)[0].backward()
    assert hidden.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("forbid", [False, True], ids=["all", "forbidden"])
def test_logprobs_and_entropy_equal_the_plain_form(problem, monkeypatch, keep, forbid):
    monkeypatch.setitem(module._KEPT_ELEMENTS, "cpu", 10**9 if keep else 0)
    hidden, weight, labels = problem
    forbidden = torch.zeros(11, dtype=torch.bool)
    if forbid:
        forbidden[[3, 9]] = True
        labels[forbidden[labels]] = 0
    of_logprobs, of_entropy = torch.randn(23), torch.randn(23)

    def plain(h, w, y):
        logits = (h @ w.t() / 0.7).masked_fill(forbidden, -1e4)
        distribution = torch.distributions.Categorical(logits=logits)
        return (distribution.log_prob(y) * of_logprobs).sum() + (distribution.entropy() * of_entropy).sum()

    expected, expected_gradients = gradients_in_fp64(problem, plain)
    logprobs, entropy = logprobs_and_entropy(hidden, weight, labels, 0.7, forbidden if forbid else None)
    value = (logprobs * of_logprobs).sum() + (entropy * of_entropy).sum()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(torch.autograd.grad(value, [hidden, weight]), expected_gradients, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_the_uniform_distribution_by_hand():
    logprobs, entropy = logprobs_and_entropy(torch.ones(1, 4), torch.zeros(8, 4), torch.tensor([5]), 1.0, None)
    assert logprobs.item() == pytest.approx(-2.0794415)  # −ln 8
    assert entropy.item() == pytest.approx(2.0794415)


def test_autocast_multiplies_in_bf16_and_normalises_in_fp32(problem):
    hidden, weight, labels = problem
    with torch.autocast("cpu", torch.bfloat16):
        total, losses = cross_entropy(hidden, weight, labels)
    total.backward()
    assert losses.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    exact = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    assert 0 < (total - exact).abs().item() < 0.02 * exact.item()
