"""Rows of tokens to rows of experts and back, on one rank, in an order that does not depend on chance.

A *copy* is a token's visit to one of its k experts, numbered token·k + choice.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Order:
    """Which copy each row is, (rows,), and which row each copy has, (tokens, k).

    gaps: a copy may have no row (the number after the last row) and a row no copy (the number after the last copy); it
    is zero then.
    """

    copies: Tensor
    rows: Tensor
    gaps: bool = True

    @classmethod
    def by_expert(cls, experts: Tensor, count: int | None) -> "Order":
        """Rows sorted by `experts` (tokens, k), then by copy; `count`: rows there are, the first ones; `None`: all."""
        order = experts.flatten().argsort(stable=True)
        rows = torch.empty_like(order)
        rows[order] = torch.arange(len(order), device=order.device)
        if count is None:
            return cls(order, rows.view_as(experts), gaps=False)
        return cls(order[:count], rows.clamp(max=count).view_as(experts))

    @classmethod
    def in_slots(cls, experts: Tensor, count: int, slots: int) -> "Order":
        """`slots` rows for each of `count` experts, filled by copy; an expert of `count` is none. Nothing is read."""
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        taken = torch.zeros(count + 1, dtype=torch.int64, device=flat.device)
        begin = taken.scatter_add(0, flat, torch.ones_like(flat)).cumsum(0).roll(1)
        begin[0] = 0
        chosen = flat[order]
        places = torch.arange(len(flat), device=flat.device) - begin[chosen]
        rows = torch.where(chosen < count, chosen * slots + places, count * slots)
        copies = torch.full((count * slots + 1,), len(flat), device=flat.device).scatter(0, rows, order)
        return cls(copies[:-1], torch.empty_like(flat).scatter(0, order, rows).view_as(experts))


def spread(x: Tensor, order: Order, dtype: torch.dtype | None = None) -> Tensor:
    """x (tokens, width) → (rows, width), a row for each copy. Its gradient is summed over a token's copies in their
    order, in float32 or better."""
    return _Spread.apply(x, order, dtype or x.dtype)


def combine(rows: Tensor, order: Order, weights: Tensor) -> Tensor:
    """(rows, width) and weights (tokens, k) → (tokens, width): each token's sum over its choices in their order, in
    float32 or better."""
    return _Combine.apply(rows, order, weights)


def chunk_order(sizes: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows in chunks of `sizes` (sources, experts) → the rows in the order (experts, sources), and the way back."""
    starts, turned = (sizes.cumsum() - sizes.ravel()).reshape(sizes.shape), sizes.T.ravel()
    shift = starts.T.ravel() - (turned.cumsum() - turned)
    shifts, counts = (torch.from_numpy(x.astype(np.int64)).to(device, non_blocking=True) for x in (shift, turned))
    rows = torch.arange(int(turned.sum()), device=device)
    there = rows + shifts.repeat_interleave(counts, output_size=len(rows))
    return there, torch.empty_like(there).scatter(0, there, rows)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Order, dtype: torch.dtype) -> Tensor:
        ctx.order, ctx.dtype, ctx.choices = order, x.dtype, order.rows.shape[1]
        tokens = torch.div(order.copies, ctx.choices, rounding_mode="floor")
        if not order.gaps:
            return x.index_select(0, tokens).to(dtype)
        return torch.cat([x, x.new_zeros(1, x.shape[1])]).index_select(0, tokens.clamp(max=len(x))).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _summed(grad, ctx.order, None).to(ctx.dtype), None, None


class _Combine(torch.autograd.Function):
    """Choice by choice, forward and backward: all copies at once would be written and read several times."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Order, weights: Tensor) -> Tensor:
        ctx.order = order
        ctx.save_for_backward(rows, weights)
        return _summed(rows, order, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        (rows, weights), order = ctx.saved_tensors, ctx.order
        flat, tokens = weights.flatten(), torch.div(order.copies, weights.shape[1], rounding_mode="floor")
        if order.gaps:
            flat, tokens = torch.cat([flat, flat.new_zeros(1)]), tokens.clamp(max=max(len(grad) - 1, 0))
        to_rows = grad.index_select(0, tokens).mul_(flat.index_select(0, order.copies)[:, None])
        to_weights = torch.stack([(part * grad).sum(-1) for part in _by_choice(rows, order)], 1)
        return to_rows.to(rows.dtype), None, to_weights.to(weights.dtype)


def _summed(rows: Tensor, order: Order, weights: Tensor | None) -> Tensor:
    """Each token's rows, times `weights` (tokens, k), in float32 or better."""
    exact = torch.promote_types(rows.dtype, torch.float32)
    out = torch.zeros(len(order.rows), rows.shape[1], dtype=exact, device=rows.device)
    for choice, part in enumerate(_by_choice(rows, order)):
        if weights is None:
            out += part
        else:
            out.addcmul_(part.to(exact), weights[:, choice, None].to(exact))
    return out


def _by_choice(rows: Tensor, order: Order) -> Iterator[Tensor]:
    """(tokens, width) for each of k choices: the rows of the tokens' copies, zero for one that has none."""
    if order.gaps:
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    for places in order.rows.unbind(1):
        yield rows.index_select(0, places)
