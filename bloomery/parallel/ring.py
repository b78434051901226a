"""Attention to keys and values that other ranks hold: passed around a ring (arXiv 2310.01889), or gathered.

Queries stay where they are. A rank's queries and the keys it looks at come in chunks of the sequence, and each pair of
chunks is one block of `blocks.attend`, left out where nothing is seen. Both forms keep no more for the backward than a
rank's own queries, keys, values and outputs: keys and values travel a second time.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bloomery.parallel import blocks
from bloomery.parallel.collectives import gather_tokens, scatter_tokens, start_shift
from bloomery.parallel.sequence import ContextAxis, View

Wait = Callable[[], list[Tensor]]


def ring_attention(q: Tensor, k: Tensor, v: Tensor, axis: ContextAxis, view: View) -> Tensor:
    """q (batch, heads, seq / ranks, head_dim), k and v (batch, key_value_heads, …) → like q, one step a rank: while it
    works on the keys it has, those of the rank before arrive."""
    return _Attention.apply(q, torch.stack([k, v]), axis, view, _ring_forward, _ring_backward)


def gathered_attention(q: Tensor, k: Tensor, v: Tensor, axis: ContextAxis, view: View) -> Tensor:
    """The same with all keys and values of the sequence on every rank while a layer works."""
    return _Attention.apply(q, torch.stack([k, v]), axis, view, _gathered_forward, _gathered_backward)


class _Queries:
    """A rank's queries and what has been made of them. In the forward: outputs and their l, `blocks.merge`."""

    def __init__(self, q: Tensor, axis: ContextAxis, view: View):
        self.q, self.view, self.own = q, view, view.layout.chunks(axis.rank)

    def pairs(self, held: Sequence[int]) -> list[tuple[slice, slice, dict[str, Any]]]:
        """(rows of the queries, rows of the held keys, what is seen) of each block that is worth looking at."""
        length, table, found = self.view.layout.chunk_len, self.view.table, []
        for row, query in enumerate(self.own):
            for column, key in enumerate(held):
                kind = table[query][key]
                mask = partial(self.view.mask, query, key) if kind == "some" else None
                if kind != "none":
                    rows, columns = (slice(place * length, (place + 1) * length) for place in (row, column))
                    found.append((rows, columns, {"causal": kind == "causal", "mask": mask}))
        return found

    def start(self) -> None:
        exact = torch.promote_types(self.q.dtype, torch.float32)
        self.o = torch.zeros_like(self.q, dtype=exact, memory_format=torch.contiguous_format)
        self.total = self.q.new_full(self.q.shape[:3], -torch.inf, dtype=exact)

    def attend(self, kv: Tensor, held: Sequence[int]) -> None:
        """To the keys and values (2, batch, key_value_heads, tokens, head_dim) of these chunks."""
        for rows, columns, seen in self.pairs(held):
            found = blocks.attend(self.q[:, :, rows], *kv[:, :, :, columns], **seen)
            blocks.merge(self.o[:, :, rows], self.total[:, :, rows], *found)

    def start_back(self, of_o: Tensor, o: Tensor, total: Tensor) -> None:
        self.of_o, self.o, self.total = of_o, o, total
        self.of_q = torch.zeros_like(self.q, dtype=total.dtype, memory_format=torch.contiguous_format)

    def attend_back(self, kv: Tensor, held: Sequence[int]) -> Tensor:
        """Adds to `of_q`; returns the gradient of kv, float32 or float64."""
        of_kv = torch.zeros_like(kv, dtype=self.total.dtype)
        for rows, columns, seen in self.pairs(held):
            of_o, q, o, total = (t[:, :, rows] for t in (self.of_o, self.q, self.o, self.total))
            k, v = kv[:, :, :, columns]
            of_q, of_k, of_v = blocks.attend_backward(of_o, q, k, v, o, total, **seen)
            self.of_q[:, :, rows] += of_q
            of_kv[0, :, :, columns] += of_k
            of_kv[1, :, :, columns] += of_v
        return of_kv


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, axis: ContextAxis, view: View, visit: Callable, visit_back: Callable
    ) -> Tensor:
        queries = _Queries(q, axis, view)
        queries.start()
        visit(queries, kv, axis)
        ctx.axis, ctx.view, ctx.visit_back = axis, view, visit_back
        o = queries.o.to(q.dtype)
        ctx.save_for_backward(q, kv, o, queries.total)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_o: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, o, total = ctx.saved_tensors
        queries = _Queries(q, ctx.axis, ctx.view)
        queries.start_back(of_o, o, total)
        of_kv = ctx.visit_back(queries, kv, ctx.axis)
        return queries.of_q.to(q.dtype), of_kv.to(kv.dtype), None, None, None, None


def _gathered_forward(queries: _Queries, kv: Tensor, axis: ContextAxis) -> None:
    queries.attend(gather_tokens(kv, 3, axis.group), queries.view.layout.arrival)


def _gathered_backward(queries: _Queries, kv: Tensor, axis: ContextAxis) -> Tensor:
    of_all = queries.attend_back(gather_tokens(kv, 3, axis.group), queries.view.layout.arrival)
    return scatter_tokens(of_all, 3, axis.group)


def _ring_forward(queries: _Queries, kv: Tensor, axis: ContextAxis) -> None:
    steps = _steps(axis, queries.view)
    for step in range(steps):
        following = start_shift([kv], axis.group) if step + 1 < steps else None
        queries.attend(kv, _held(axis, queries.view, step))
        if following is not None:
            (kv,) = following()


def _ring_backward(queries: _Queries, kv: Tensor, axis: ContextAxis) -> Tensor:
    """Gradients travel one step behind their keys and values, each rank adding its own; the last sends them home."""
    steps = _steps(axis, queries.view)
    of_kv, arriving = kv, None
    for step in range(steps):
        following = start_shift([kv], axis.group) if step + 1 < steps else None
        of_kv = queries.attend_back(kv, _held(axis, queries.view, step))
        if arriving is not None:
            of_kv += arriving()[0]
        if following is not None:
            (kv,) = following()
            arriving = start_shift([of_kv], axis.group)
    return of_kv if steps == 1 else start_shift([of_kv], axis.group, 1 - steps)()[0]


def _held(axis: ContextAxis, view: View, step: int) -> tuple[int, ...]:
    """Chunks whose keys and values a rank has at a step."""
    return view.layout.chunks((axis.rank - step) % axis.ranks)


def _steps(axis: ContextAxis, view: View) -> int:
    """Steps after which no rank has anything left to see: windows and documents end a ring early."""
    chunks = [view.layout.chunks(rank) for rank in range(axis.ranks)]
    seen = [step for step in range(axis.ranks) if any(view.sees(c, chunks[r - step]) for r, c in enumerate(chunks))]
    return 1 + max(seen)
