"""Mamba-2 over the context axis: what stands at the swap points `mamba.convolve` and `mamba.scan`.

The convolution needs the last K − 1 columns before each chunk. The scan needs the state before each chunk, which is
what the chunks before it added, decayed: every rank scans its chunks from nothing, the ranks tell each other the decay
and the state of each chunk, and each adds to its outputs what the state before contributes. Exact, one gather of a size
that does not grow with the sequence. Or each rank scans all tokens of some heads (`HeadScan`).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bloomery.parallel.collectives import all_to_all, gather_tokens
from bloomery.parallel.heads import enough, to_heads, to_tokens
from bloomery.parallel.sequence import ContextAxis, Layout, View

Convolution = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]


class ContextConvolution:
    """As `causal_conv`, over the whole sequence; columns go straight from their rank to the next chunk's."""

    def __init__(self, inner: Convolution, axis: ContextAxis):
        self.inner, self.axis = inner, axis

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        left: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """x (batch, seq / ranks, channels) → like x."""
        assert left is None, "decoding over the context axis"
        view, width = self.axis.view(x, 1, segment_ids), weight.shape[1] - 1
        held = view.layout.chunks(self.axis.rank)
        chunks = x.unflatten(1, (len(held), -1))
        before = self._before(chunks, width, view.layout)
        ids = None if view.ids is None or segment_ids is None else _cut(segment_ids, len(held))
        if view.ids is not None:
            before = before * _continued(view.ids, view.layout, held, width)
        mixed = self.inner(chunks.flatten(0, 1), weight, bias, before.flatten(0, 1), ids)
        return mixed.unflatten(0, (-1, len(held))).flatten(1, 2)

    def _before(self, chunks: Tensor, width: int, layout: Layout) -> Tensor:
        """The `width` columns before each of this rank's chunks (batch, held, chunk, channels), 0 before the first of
        all. Each chunk's end goes to the chunks that it reaches, by one all-to-all in which most ranks have nothing for
        each other."""
        rank, ranks, tail = self.axis.rank, self.axis.ranks, min(width, layout.chunk_len)
        held, far = layout.chunks(rank), -(-width // max(tail, 1))
        near = [(source, source + back) for source in range(layout.num_chunks) for back in range(1, far + 1)]
        near = [(source, target) for source, target in near if target < layout.num_chunks]
        leaving = sorted((layout.owner(target), target, source) for source, target in near if source in held)
        coming = sorted((layout.owner(source), target, source) for source, target in near if target in held)
        ends = chunks[:, :, layout.chunk_len - tail :].movedim(1, 0)
        there, here = (
            [sum(other == peer for other, *_ in part) for peer in range(ranks)] for part in (leaving, coming)
        )
        received = all_to_all(ends[[held.index(source) for *_, source in leaving]], there, here, self.axis.group)
        parts = {(target, source): end for (_, target, source), end in zip(coming, received, strict=True)}
        # Also a rank that receives nothing takes part in the backward, where it is the others that receive.
        none = torch.zeros_like(ends[0]) + received[:0].sum()
        rows = [[parts.get((target, target - back), none) for back in range(far, 0, -1)] for target in held]
        return torch.stack([torch.cat([none[:, :0], *row], 1) for row in rows], 1)[:, :, far * tail - width :]


class StateScan(nn.Module):
    """As `ChunkedScan`, over the whole sequence, by passing states; `inner` scans chunks from nothing."""

    def __init__(self, inner: nn.Module, axis: ContextAxis):
        super().__init__()
        self.inner, self.axis = inner, axis

    def forward(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        segment_ids: Tensor | None = None,
        initial_state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x, dt, B, C of this rank's tokens → y of them, and the state after the last token of the sequence."""
        assert initial_state is None, "decoding over the context axis"
        view = self.axis.view(x, 1, segment_ids)
        held = view.layout.chunks(self.axis.rank)
        ids = None if view.ids is None or segment_ids is None else _cut(segment_ids, len(held))
        x, dt, B, C = (_cut(t, len(held)) for t in (x, dt, B, C))
        y, added = self.inner(x, dt, A, B, C, D, ids)
        with torch.autocast(x.device.type, enabled=False):
            decay = (dt.double() * A.double()).cumsum(1)  # float32 loses too much over a long chunk
            states = self._states(decay[:, -1].to(added.dtype), added, view)
            before = states[:-1].movedim(0, 1).flatten(0, 1)
            kept = decay.exp().to(added.dtype) * _same_document(view, held, ids)
            y = y + _outputs(before, C) * kept.unsqueeze(-1)
        return y.unflatten(0, (-1, len(held))).flatten(1, 2), states[-1]

    def _states(self, decay: Tensor, added: Tensor, view: View) -> Tensor:
        """The states before each of this rank's chunks and after the last of all, (held + 1, batch, heads, head_dim,
        state), from the sum of dt·A (batch · held, heads) and the state added over each chunk."""
        layout = view.layout
        held = layout.chunks(self.axis.rank)
        told = torch.cat([decay.unsqueeze(-1), added.flatten(2)], -1).unflatten(0, (-1, len(held))).movedim(1, 0)
        everything = gather_tokens(told, 0, self.axis.group)  # (chunks, batch, heads, 1 + head_dim · state)
        weights = _weights(everything[..., 0], (*held, layout.num_chunks), view).to(added.dtype)
        states = torch.einsum("kjbh,jbhs->kbhs", weights, everything[..., 1:])
        return states.unflatten(-1, added.shape[2:])


class HeadScan(nn.Module):
    """As `ChunkedScan`, over the whole sequence, for this rank's share of the heads; `inner` does it."""

    def __init__(self, inner: nn.Module, axis: ContextAxis):
        super().__init__()
        self.inner, self.axis = inner, axis

    def forward(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        segment_ids: Tensor | None = None,
        initial_state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x, dt, B, C of this rank's tokens → y of them, and the last state of this rank's heads alone.

        Gradients of A and D are this rank's heads' only: to be summed over the axis, as those of any weight.
        """
        assert initial_state is None, "decoding over the context axis"
        view = self.axis.view(x, 1, segment_ids)
        shared = enough(torch.cat([B, C], -1), self.axis)
        x, dt, shared = (to_heads(t, self.axis, view.layout) for t in (x, dt, shared))
        B, C = (t.contiguous() for t in shared.chunk(2, -1))
        A, D = (t.chunk(self.axis.ranks)[self.axis.rank] for t in (A, D))
        y, state = self.inner(x, dt, A, B, C, D, view.ids)
        return to_tokens(y, self.axis, view.layout), state


def _continued(ids: Tensor, layout: Layout, held: tuple[int, ...], width: int) -> Tensor:
    """1 for the columns before each chunk that are of the document it starts in, (batch, held, width, 1)."""
    starts = torch.tensor([chunk * layout.chunk_len for chunk in held], device=ids.device)
    columns = (starts[:, None] + torch.arange(-width, 0, device=ids.device)).clamp(min=0)
    return (ids[:, columns] == ids[:, starts, None]).unsqueeze(-1)


def _cut(t: Tensor, held: int) -> Tensor:
    """(batch, seq / ranks, …) → (batch · held, chunk, …)."""
    return t.unflatten(1, (held, -1)).flatten(0, 1)


def _same_document(view: View, held: tuple[int, ...], ids: Tensor | None) -> Tensor | float:
    """1 where a token is of the document alive at the end of the chunk before, (batch · held, chunk, 1)."""
    if view.ids is None or ids is None:
        return 1.0
    ends = [max(chunk * view.layout.chunk_len - 1, 0) for chunk in held]
    return (ids == view.ids[:, ends].flatten()[:, None]).unsqueeze(-1)


def _weights(sums: Tensor, targets: tuple[int, ...], view: View) -> Tensor:
    """How much of what each chunk adds is left at the starts of the target chunks, (targets, chunks, batch, heads).

    `sums` (chunks, batch, heads) of dt·A over each chunk, chunks here as gathered from the ranks.
    """
    layout, chunks = view.layout, torch.tensor(view.layout.arrival, device=sums.device)
    until = sums.double()[chunks.argsort()].cumsum(0)  # through each chunk, in order
    starts = torch.tensor(targets, device=sums.device)
    reached = (chunks < starts[:, None])[:, :, None]
    if view.ids is not None:  # of chunk j the document at its end, if it is the one at the end before the target
        ends = view.ids.T.view(layout.num_chunks, layout.chunk_len, -1)[:, -1]
        reached = reached & (ends[chunks] == ends[(starts - 1).clamp(min=0)][:, None])
    logarithm = until[(starts - 1).clamp(min=0)][:, None] - until[chunks]
    return logarithm.masked_fill(~reached[..., None], -torch.inf).exp()


def _outputs(states: Tensor, C: Tensor) -> Tensor:
    """C·state of every token: states (n, heads, head_dim, state), C (n, chunk, groups, state) → (n, chunk, heads,
    head_dim)."""
    by_group = states.flatten(1, 2).unflatten(1, (C.shape[2], -1))
    outputs = C.to(states.dtype).transpose(1, 2) @ by_group.mT
    return outputs.transpose(1, 2).reshape(*C.shape[:2], *states.shape[1:3])
