"""Norms and activations against their formulas, values and gradients, and by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bloomery.model.activation import silu_gate, squared_relu
from bloomery.model.norm import GatedRMSNorm, RMSNorm


def check(found: Callable[..., Tensor], expected: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    given = [torch.randn(shape).requires_grad_() for shape in shapes]
    outputs = found(*given), expected(*given)
    torch.testing.assert_close(*outputs)
    weights = torch.randn_like(outputs[0])
    for ours, true in zip(*(torch.autograd.grad(out, given, weights) for out in outputs), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(found(*given), outputs[0])


def test_rms_norm_by_hand() -> None:
    norm = RMSNorm(2, eps=0.0)
    norm.weight.data = torch.tensor([1.0, 10.0])
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([3.0, 40.0]) / 12.5**0.5)


def test_rms_norm_and_its_gradients() -> None:
    norm = RMSNorm(7, eps=0.1)
    norm.weight.data = torch.randn(7)

    def formula(x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 0.1).rsqrt() * norm.weight

    check(norm, formula, (3, 5, 7))
    x = torch.randn(4, 7)
    weights = torch.randn(4, 7)
    ours, true = (torch.autograd.grad(f(x), norm.weight, weights)[0] for f in (norm, formula))
    torch.testing.assert_close(ours, true)


def test_rms_norm_multiplies_the_weight_before_it_rounds() -> None:
    norm = RMSNorm(64, eps=1e-5)
    norm.weight.data.uniform_(0.5, 2)
    x = torch.randn(8, 64).bfloat16()
    exact = norm(x.float())
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x), exact.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("groups", [1, 2])
def test_gated_norm_gates_first_and_norms_inside_groups(groups: int) -> None:
    norm = GatedRMSNorm(8, groups, eps=1e-5)
    norm.weight.data = torch.randn(8)

    def formula(y: Tensor, gate: Tensor) -> Tensor:
        gated = (y * F.silu(gate)).unflatten(-1, (groups, -1))
        return (gated * (gated.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).flatten(-2) * norm.weight

    check(norm, formula, (2, 3, 8), (2, 3, 8))


def test_squared_relu() -> None:
    assert squared_relu(torch.tensor([-3.0, 0.0, 2.0])).tolist() == [0.0, 0.0, 4.0]
    check(squared_relu, lambda x: F.relu(x).square(), (4, 6))


def test_silu_gate() -> None:
    check(silu_gate, lambda gate, x: F.silu(gate) * x, (4, 6), (4, 6))
