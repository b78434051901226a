"""The three products of a linear layer with operands of eight bits: one scale a tensor, computed on the spot.

Per-tensor current scaling as in Nemotron-H (arXiv 2504.03624 §2.3): s = F/amax, cast to nearest even, the product of
the cast operands accumulated in fp32 and divided by both scales. On GPUs that have FP8 units `torch._scaled_mm`
multiplies; elsewhere the same numbers are multiplied in fp32, which differs by the order of summation alone.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Format = Literal["e4m3", "e5m2"]
Role = Literal["X", "W", "dY"]
ROLES: tuple[Role, ...] = get_args(Role)
"""Input, weight and gradient of the output."""
DTYPES: dict[Format, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
MULTIPLE = 16
"""Both sizes of a product must be a multiple of this."""

_FP8_UNITS = (8, 9)  # compute capability: Ada, Hopper and later
_WITHOUT_SIGN = 0x7F
_ROUND_OFF = 1e-6  # amax · (F / amax) may exceed F by this much, which is no saturation


def multiplies(forward: Format, gradient: Format, device: torch.device) -> bool:
    """Whether a device multiplies these formats as such; elsewhere the products are emulated.

    None multiplies e5m2 by e5m2, which exists to be compared with.
    """
    has_units = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8_UNITS
    return has_units and not forward == gradient == "e5m2"


@dataclass(frozen=True)
class Quantized:
    """values · inverse_scale ≈ the tensor. `values` (rows, columns) hold eight-bit numbers: as float8 where the device
    multiplies them, decoded to fp32 where it does not; `inverse_scale` is an fp32 scalar."""

    values: Tensor
    inverse_scale: Tensor

    def t(self) -> "Quantized":
        """Transposed, rows contiguous again where the kernel asks for it."""
        turned = self.values.t()
        return Quantized(turned if turned.dtype == torch.float32 else turned.contiguous(), self.inverse_scale)


def scale_of(amax: Tensor, largest: float) -> Tensor:
    """F / amax in fp32, 1 for amax = 0; an amax that is not finite gives a scale that makes every product NaN."""
    scale = (largest / amax.float()).clamp(max=torch.finfo(torch.float32).max)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def quantize(x: Tensor, dtype: torch.dtype, scale: Tensor) -> Tensor:
    """x · scale in `dtype`, clamped first: beyond the largest number the cast itself gives NaN or infinity."""
    largest = torch.finfo(dtype).max
    return (x.float() * scale).clamp_(-largest, largest).to(dtype)


def decode(values: Tensor) -> Tensor:
    """Eight-bit floats → fp32, exactly: by a table, which on a CPU takes a quarter of the time of `.float()`."""
    codes = values.view(torch.uint8).flatten().int()
    return _table(values.dtype, values.device).index_select(0, codes).view(values.shape)


@cache
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(dtype).float().to(device)


def product(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    """a (m, k) times bᵀ, b (n, k) → (m, n) in `dtype`, accumulated in fp32."""
    if a.values.dtype == torch.float32:
        return (torch.mm(a.values, b.values.t()) * a.inverse_scale * b.inverse_scale).to(dtype)
    left, right = (_padded(each.values) for each in (a, b))
    return torch._scaled_mm(
        left, right.t(), scale_a=a.inverse_scale, scale_b=b.inverse_scale, out_dtype=dtype, use_fast_accum=False
    )


def _padded(values: Tensor) -> Tensor:
    """With columns of zeros up to the next multiple that the kernel takes: rows of a batch may be any number."""
    missing = -values.shape[1] % MULTIPLE
    return F.pad(values.view(torch.uint8), (0, missing)).view(values.dtype) if missing else values


class Fp8Product:
    """What stands in for the `forward` of one `nn.Linear`; its parameters stay where and what they are.

    forward: format of X and W. gradient: format of dY. scaled: s = F/amax; else s = 1. It remembers, since the last
    `begin`, the amax of each tensor, and if asked also how many numbers saturated (|x·s| > F) or were flushed to zero.
    """

    def __init__(self, linear: nn.Linear, forward: Format = "e4m3", gradient: Format = "e5m2", scaled: bool = True):
        self.linear, self.scaled = linear, scaled
        self.dtypes: dict[Role, torch.dtype] = {"X": DTYPES[forward], "W": DTYPES[forward], "dY": DTYPES[gradient]}
        self.emulated = not multiplies(forward, gradient, linear.weight.device)
        self.begin(watch=False)

    def begin(self, watch: bool) -> None:
        """A new step; watch: count."""
        self.watch = watch
        self.amax: dict[Role, Tensor] = {}
        self.counts: dict[Role, Tensor] = {}
        """(saturated, flushed to zero, not zero, all) per role."""

    def __call__(self, x: Tensor) -> Tensor:
        """x (…, in) → (…, out), in the autocast type where autocast is on, else in that of x."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        y = _Products.apply(x.flatten(0, -2), self.linear.weight, self, dtype).unflatten(0, x.shape[:-1])
        return y if self.linear.bias is None else y + self.linear.bias.to(dtype)

    def quantized(self, role: Role, x: Tensor) -> Quantized:
        """x (rows, columns) in eight bits."""
        dtype, x = self.dtypes[role], x.detach()
        amax = torch.stack(torch.aminmax(x)).abs().max().float()
        self.amax[role] = torch.maximum(amax, self.amax[role]) if role in self.amax else amax
        scale = scale_of(amax, torch.finfo(dtype).max) if self.scaled else torch.ones_like(amax)
        values = quantize(x, dtype, scale)
        if self.watch:
            counts = _counts(x, values, scale)
            self.counts[role] = self.counts[role] + counts if role in self.counts else counts
        return Quantized(decode(values) if self.emulated else values, scale.reciprocal())


def _counts(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    saturated = x.abs() > torch.finfo(values.dtype).max * (1 + _ROUND_OFF) / scale
    present, left = (torch.count_nonzero(each) for each in (x, values.view(torch.uint8) & _WITHOUT_SIGN))
    return torch.stack([torch.count_nonzero(saturated), present - left, present, torch.full_like(left, x.numel())])


class _Products(torch.autograd.Function):
    """Y = X Wᵀ, dX = dY W and dW = dYᵀ X, each from eight-bit operands; dW in the weight's own type."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Fp8Product, dtype: torch.dtype) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x8, w8 = layer.quantized("X", x), layer.quantized("W", weight)
            ctx.layer, ctx.dtypes = layer, (x.dtype, weight.dtype, dtype)
            ctx.save_for_backward(x8.values, x8.inverse_scale, w8.values, w8.inverse_scale)
            return product(x8, w8, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(dy.device.type, enabled=False):
            x_values, x_inverse, w_values, w_inverse = ctx.saved_tensors
            dy8 = ctx.layer.quantized("dY", dy)
            of_x, of_weight, computed = ctx.dtypes
            dx = dw = None
            if ctx.needs_input_grad[0]:
                dx = product(dy8, Quantized(w_values, w_inverse).t(), computed).to(of_x)
            if ctx.needs_input_grad[1]:
                dw = product(dy8.t(), Quantized(x_values, x_inverse).t(), of_weight)
            return dx, dw, None, None
