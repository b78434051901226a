"""Linear maps prepared for decoding: transposed once, since products of few rows by a (in, out) matrix run a quarter
faster on a CPU than by nn.Linear's (out, in), and with the weight of the norm before them folded in."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bloomery.model import native
from bloomery.model.norm import RMSNorm

_ROWS = 16  # of a product in deterministic mode


class NormedLinear:
    """The outputs of several linear layers on norm(x), side by side; a copy of their weights as they are now."""

    def __init__(self, norm: RMSNorm, linears: Sequence[nn.Linear], fixed: bool = False):
        self._product = product_of_fixed_rows if fixed else torch.mm
        size = linears[0].in_features
        self._weight = transposed([linear.weight for linear in linears], norm.weight.float() * math.sqrt(size))
        biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        self._bias = torch.cat(biases) if biases else None
        self._eps = norm.eps * size

    def __call__(self, x: Tensor) -> Tensor:
        """x (rows, in) → (rows, out)."""
        normed = to_unit_length(x.float(), self._eps).to(x.dtype)
        out = self._product(normed, self._weight)
        return out if self._bias is None else out.add_(self._bias)


class AddedLinear:
    """x += linear(inner · scale), in place; a copy of the weights as they are now."""

    def __init__(self, linear: nn.Linear, scale: Tensor | None = None, fixed: bool = False):
        self._fixed = fixed
        self._weight = transposed([linear.weight], scale)
        self._bias = None if linear.bias is None else linear.bias.clone()

    def __call__(self, x: Tensor, inner: Tensor) -> Tensor:
        """x (rows, out), inner (rows, in) → x."""
        if self._fixed:
            x.add_(product_of_fixed_rows(inner, self._weight))
        else:
            x.addmm_(inner, self._weight)
        return x if self._bias is None else x.add_(self._bias)


def product_of_fixed_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x (rows, in) · weight (in, out), `_ROWS` rows at a time: a library's product of another number of rows may add in
    another order, so that a row's result would depend on how many others there are."""
    padded = F.pad(x, (0, 0, 0, -len(x) % _ROWS))
    return torch.cat([torch.mm(rows, weight) for rows in padded.split(_ROWS)])[: len(x)]


def transposed(weights: Sequence[Tensor], scale: Tensor | None = None) -> Tensor:
    """Weights (out, in) stacked and transposed, (in, all out); `scale` (in,) float32 multiplies the inputs."""
    whole = torch.cat([weight.T for weight in weights], dim=1)
    return whole if scale is None else (whole.float() * scale[:, None]).to(whole.dtype)


def to_unit_length(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(Σx² + eps) over the last dimension: RMSNorm but for a factor √size, which the caller folds elsewhere."""
    if native.serves(x) and x.is_contiguous():
        return native.unit_length(x, eps)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * length.square_().add_(eps).rsqrt_()
