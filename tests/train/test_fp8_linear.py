"""The eight-bit products against numbers worked out by hand, and against the kernel that multiplies float8 itself."""

import math

import pytest
import torch
from torch import nn

from bloomery.train import fp8_linear
from bloomery.train.fp8_linear import Fp8Product, Quantized, decode, product, quantize, scale_of

E4M3, E5M2, ONE = torch.float8_e4m3fn, torch.float8_e5m2, torch.tensor(1.0)


def bits(numbers, dtype, scale=1.0) -> list[int]:
    return quantize(torch.tensor(numbers), dtype, torch.tensor(scale)).view(torch.uint8).tolist()


def test_e4m3_bit_for_bit():
    """1 sign, 4 exponent (bias 7) and 3 mantissa bits: 448 = 0b0_1111_110; the smallest subnormal is 2⁻⁹."""
    assert bits([1.0, -1.0, 448.0, 2**-6, 2**-9], E4M3) == [0x38, 0xB8, 0x7E, 0x08, 0x01]
    assert bits([17.0, 19.0], E4M3) == [0x58, 0x5A], "ties between 16 and 18 and between 18 and 20 go to the even one"
    assert bits([3 * 2**-9, 2**-10, 1.01 * 2**-10, -(2**-11)], E4M3) == [0x03, 0x00, 0x01, 0x80], "subnormals, flush"
    assert bits([449.0, 500.0, 1e30, -1e30], E4M3) == [0x7E, 0x7E, 0x7E, 0xFE], "saturating, never NaN"


def test_e5m2_bit_for_bit():
    """1 sign, 5 exponent (bias 15) and 2 mantissa bits: 57344 = 0b0_11110_11; the smallest subnormal is 2⁻¹⁶."""
    assert bits([1.0, 57344.0, 2**-14, 2**-16], E5M2) == [0x3C, 0x7B, 0x04, 0x01]
    assert bits([1.125, 1.375], E5M2) == [0x3C, 0x3E], "ties to even"
    assert bits([2**-17, 1.01 * 2**-17], E5M2) == [0x00, 0x01]
    assert bits([61440.0, 1e30, -1e30], E5M2) == [0x7B, 0x7B, 0xFB], "saturating, never infinite"


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_decoding_is_exact_for_every_code(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).view(16, 16)
    torch.testing.assert_close(decode(codes), codes.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("amax", "largest", "expected"),
    [
        (2.0, 448.0, 224.0),
        (57344.0, 57344.0, 1.0),
        (0.0, 448.0, 1.0),
        (1e-45, 448.0, torch.finfo(torch.float32).max),
        (math.inf, 448.0, 0.0),
    ],
)
def test_scales(amax, largest, expected):
    assert scale_of(torch.tensor(amax), largest).item() == pytest.approx(expected, rel=1e-7)


def one_product(x, weight, dy, **settings) -> tuple[Fp8Product, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The layer, Y, dX and dW."""
    linear = nn.Linear(len(weight[0]), len(weight), bias=False)
    linear.weight.data = torch.tensor(weight)
    layer, x = Fp8Product(linear, **settings), torch.tensor(x, requires_grad=True)
    layer.begin(watch=True)
    y = layer(x)
    y.backward(torch.tensor(dy))
    return layer, y, x.grad, linear.weight.grad


def test_three_products_by_hand():
    """X: amax 4, s 112, so 1.03 → 115.36 → 112 → 1. W: amax 448, s 1, so 17 → 16. dY: amax 57344, s 1, so 1.2 → 1.25.

    Nothing of that happens to numbers with few bits: 4 and 2 → themselves, 448 and 57344 too.
    """
    layer, y, dx, dw = one_product([[1.03, 4.0], [2.0, 0.0]], [[17.0, 0.0], [448.0, 1.0]], [[1.2, 0.0], [0.0, 57344.0]])
    torch.testing.assert_close(y, torch.tensor([[16.0, 452.0], [32.0, 896.0]]))
    torch.testing.assert_close(dx, torch.tensor([[20.0, 0.0], [57344.0 * 448, 57344.0]]))
    torch.testing.assert_close(dw, torch.tensor([[1.25, 5.0], [114688.0, 0.0]]))
    assert {role: value.item() for role, value in layer.amax.items()} == {"X": 4.0, "W": 448.0, "dY": 57344.0}


def test_scaling_keeps_what_would_be_flushed():
    small = [[1e-6, 2e-6], [3e-6, 0.0]]
    _, scaled, _, _ = one_product(small, [[1.0, 1.0]], [[1.0], [1.0]])
    layer, plain, _, _ = one_product(small, [[1.0, 1.0]], [[1.0], [1.0]], scaled=False)
    torch.testing.assert_close(scaled, torch.tensor([[3e-6], [3e-6]]), rtol=0.07, atol=0)
    assert plain.abs().max() == 0
    assert layer.counts["X"].tolist() == [0, 3, 3, 4], "none saturated, three flushed, three not zero, four in all"
    layer, _, _, _ = one_product([[1e3, -1e3], [448.0, 449.0]], [[1.0, 1.0]], [[1.0], [1.0]], scaled=False)
    assert layer.counts["X"].tolist() == [3, 0, 4, 4]


@pytest.mark.parametrize("role", ["forward", "gradient"])
def test_formats_reach_their_products(role):
    """1.2 is 1.25 in both; 1.1 is 1.125 in e4m3 and 1 in e5m2."""
    other = {"forward": "e5m2"} if role == "forward" else {"gradient": "e4m3"}
    _, y, dx, _ = one_product([[1.1]], [[1.0]], [[1.1]], **other, scaled=False)
    assert (y.item(), dx.item()) == ((1.0, 1.0) if role == "forward" else (1.125, 1.125))


def test_zeros_stay_zeros():
    _, y, dx, dw = one_product([[0.0, 0.0]], [[0.0, 0.0]], [[0.0]])
    assert torch.cat([y.flatten(), dx.flatten(), dw.flatten()]).abs().sum() == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_makes_everything_nan(value):
    """So that it always reaches the loss or the gradient norm, where the step is refused."""
    _, y, _, dw = one_product([[value, 1.0], [0.0, 0.0]], [[1.0, 1.0]], [[1.0], [1.0]])
    assert y.isnan().all()
    assert dw.isnan().all()
    _, _, dx, dw = one_product([[1.0, 1.0], [0.0, 0.0]], [[1.0, 1.0]], [[value], [1.0]])
    assert dx.isnan().all()
    assert dw.isnan().all()


def test_bias_shape_and_type():
    torch.manual_seed(0)
    linear = nn.Linear(16, 32)
    x = torch.randn(2, 3, 16)
    exact = linear(x)
    found = Fp8Product(linear)(x)
    assert (found.shape, found.dtype) == ((2, 3, 32), torch.float32)
    assert 0 < (found - exact).norm() / exact.norm() < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        rounded = Fp8Product(linear)(x)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), found, rtol=2**-7, atol=0.02)


def test_autocast_does_not_round_what_goes_into_the_products():
    """dW comes in fp32 and equals the fp32 product of the eight-bit operands, whatever autocast says."""
    torch.manual_seed(0)
    linear, x, dy = nn.Linear(32, 16, bias=False), torch.randn(48, 32), torch.randn(48, 16)
    with torch.autocast("cpu", torch.bfloat16):
        Fp8Product(linear)(x).backward(dy.bfloat16())
    operands = [Fp8Product(linear).quantized(role, each) for role, each in (("dY", dy.bfloat16().float()), ("X", x))]
    expected = operands[0].values.T @ operands[1].values * operands[0].inverse_scale * operands[1].inverse_scale
    torch.testing.assert_close(linear.weight.grad, expected, rtol=1e-6, atol=1e-6)


def test_the_emulation_is_what_the_float8_kernel_computes(monkeypatch):
    """`torch._scaled_mm` exists on CPUs too: the path of a GPU, its layouts and padding included (48 + 7 rows)."""
    torch.manual_seed(0)
    linear, x, dy = nn.Linear(64, 32, bias=False), torch.randn(55, 64), torch.randn(55, 32) * 1e-4

    def run() -> list[torch.Tensor]:
        given, linear.weight.grad = x.clone().requires_grad_(), None
        y = Fp8Product(linear)(given)
        y.backward(dy)
        return [y, given.grad, linear.weight.grad]

    emulated = run()
    monkeypatch.setattr(fp8_linear, "multiplies", lambda *_: True)
    assert not Fp8Product(linear).emulated
    for ours, kernel in zip(emulated, run(), strict=True):
        torch.testing.assert_close(ours, kernel, rtol=1e-5, atol=1e-5 * kernel.abs().max().item())


def test_a_product_of_padded_operands():
    a, b = torch.ones(3, 5), torch.full((2, 5), 2.0)
    real = product(Quantized(a.to(E4M3), ONE), Quantized(b.to(E4M3), ONE / 2), torch.float32)
    torch.testing.assert_close(real, torch.full((3, 2), 5.0))
