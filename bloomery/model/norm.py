"""RMSNorm (arXiv 1910.07467), plain and gated, computed in float32."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bloomery.model.activation import silu_gate


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, cast back to the dtype of x."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x.float(), self.weight.float(), self.eps).to(x.dtype)


class GatedRMSNorm(nn.Module):
    """RMSNorm of y·SiLU(gate) inside each of `groups` equal slices of the channels: gate first, norm after."""

    def __init__(self, size: int, groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.groups, self.eps = groups, eps

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """y and gate (…, channels) → the dtype of the gate."""
        gated, weight = silu_gate(gate.float(), y.float()), self.weight.float()
        if self.groups == 1:
            return rms_norm(gated, weight, self.eps).to(gate.dtype)
        ones = weight.new_ones(len(weight) // self.groups)
        normed = rms_norm(gated.unflatten(-1, (self.groups, -1)), ones, self.eps).flatten(-2)
        return (normed * weight).to(gate.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (…, size) and weight (size,), both float32."""
    return _Norm.apply(x, weight, eps) if torch.is_grad_enabled() else (x * _scale(x, eps)).mul_(weight)


def _scale(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x²) + eps), (…, 1)."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _Norm(torch.autograd.Function):
    """The backward is that of a layer norm whose mean is 0, plus what the layer norm takes away for its mean; torch has
    a fused kernel for the first on every device, and for RMSNorm on some only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _scale(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        size = x.shape[-1]
        wanted = [True, ctx.needs_input_grad[1], False]
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, [size], torch.zeros_like(scale), scale, weight, None, wanted
        )
        mean = (grad @ weight).unsqueeze(-1).mul_(scale).div_(size)
        return grad_x.add_(mean), grad_weight, None
