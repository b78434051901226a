"""The short causal convolution of Mamba-2 and its SiLU, in the (batch, seq, channels) layout."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor | None = None, segment_ids: Tensor | None = None
) -> Tensor:
    """SiLU(bias + Σ_k weight[:, k]·x_{t−(K−1)+k}), (batch, seq, channels) like x.

    `weight` (channels, K): the last tap multiplies the current token. `left` (batch, K − 1, channels) is what came
    before (zeros when absent); it belongs to the document of the first token. With `segment_ids` (batch, seq) a tap
    counts only inside the token's own document.
    """
    if left is None:
        return _Conv.apply(x, weight, bias, segment_ids)
    width = left.shape[1]
    if segment_ids is not None:
        segment_ids = torch.cat([segment_ids[:, :1].expand(-1, width), segment_ids], dim=1)
    return _Conv.apply(torch.cat([left, x], dim=1), weight, bias, segment_ids)[:, width:]


class _Conv(torch.autograd.Function):
    """K shifted multiply-adds: on CPU twice as fast as a depthwise convolution, and no transposed copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, segment_ids: Tensor | None) -> Tensor:
        taps = weight.T.contiguous()
        linear = x * taps[-1] if bias is None else torch.addcmul(bias, x, taps[-1])
        for back in range(1, min(len(taps), x.shape[1])):
            linear[:, back:].addcmul_(_same(x[:, :-back], segment_ids, back), taps[-1 - back])
        ctx.save_for_backward(x, taps, linear, segment_ids)
        ctx.has_bias = bias is not None
        return F.silu(linear)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, taps, linear, segment_ids = ctx.saved_tensors
        grad = torch.ops.aten.silu_backward(grad, linear)
        grad_x, grad_taps = grad * taps[-1], torch.zeros_like(taps)
        grad_taps[-1] = (grad * x).sum((0, 1))
        for back in range(1, min(len(taps), x.shape[1])):
            reaching = _same(grad[:, back:], segment_ids, back)
            grad_x[:, :-back].addcmul_(reaching, taps[-1 - back])
            grad_taps[-1 - back] = (reaching * x[:, :-back]).sum((0, 1))
        return grad_x, grad_taps.T, grad.sum((0, 1)) if ctx.has_bias else None, None


def _same(t: Tensor, segment_ids: Tensor | None, back: int) -> Tensor:
    """`t` where the token and the one `back` before it share a document, 0 elsewhere."""
    if segment_ids is None:
        return t
    return t * (segment_ids[:, back:] == segment_ids[:, :-back]).unsqueeze(-1)
