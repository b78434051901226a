"""The Mamba-2 recurrence S_t = exp(dt_t·A)·S_{t−1} + dt_t·x_t ⊗ B_t, y_t = S_t·C_t + D·x_t as chunked matrix products.

State space duality, arXiv 2405.21060 §6, with documents that reset the state inside a row. All in float32.

Letters: Q tokens a chunk; c_t the sum of dt·A from the chunk's start through t; L[t, s] = exp(c_t − c_s) for s ≤ t;
u = dt·x. "Native" tensors are (n, Q, heads, …), "head-major" ones (n, heads, Q, …); n counts the chunks of all rows.

What is inside chunks, (n, heads, Q, Q), exists for a block of chunks at a time that stays in the cache, and is computed
again in the backward. Kept for it are inputs, outputs and the states at the chunks' starts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_LONGEST_CHUNK = {"cpu": 64}  # more slow a CPU down; published models say 128 and 256
_BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}  # of (heads, Q, Q): CPU: 1 MiB, half of a core's cache; GPU: 256 MiB
_FORGOTTEN = -60.0  # exp(−60) = 9e-27 is as good as 0; numbers too small for float32 slow products down twentyfold

Scan = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, int], tuple[Tensor, Tensor]
]
"""Arguments and results of `ChunkedScan.forward`, and the chunk size as last argument."""


class ChunkedScan(nn.Module):
    """Swap point: replace `mamba.scan` to change the kernel or the axis. This plain form is the oracle for others."""

    def __init__(self, chunk_size: int):
        super().__init__()
        self.chunk_size = chunk_size
        self.kernel: Scan | None = None  # `model.gpu`: the same by other means, for tensors that are not on a CPU

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
        """Every y_t and the state after the last token.

        Args:
            x: (batch, seq, heads, head_dim).
            dt: (batch, seq, heads) float32, after softplus; 0 leaves the state untouched.
            A: (heads,) float32, negative.
            B, C: (batch, seq, groups, state); head j uses group j // (heads / groups).
            D: (heads,) float32, the share of x that passes by the state.
            segment_ids: (batch, seq), non-decreasing; the state is forgotten where the value changes.
            initial_state: (batch, heads, head_dim, state) float32; belongs to the document of the first token.

        Returns:
            y (batch, seq, heads, head_dim) and the state (batch, heads, head_dim, state), float32.
        """
        if self.kernel is not None and x.device.type != "cpu":
            return self.kernel(x, dt, A, B, C, D, segment_ids, initial_state, self.chunk_size)
        seq = x.shape[1]
        chunk = _even_chunk(seq, min(self.chunk_size, _LONGEST_CHUNK.get(x.device.type, seq)))
        with torch.autocast(x.device.type, enabled=False):
            exact = torch.promote_types(dt.dtype, torch.float32)
            inputs = [_chunked(t.to(exact), chunk) for t in (x, dt, B, C)]
            if initial_state is None:
                initial_state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1], dtype=exact)
            y, state = _Scan.apply(*inputs, A, D, initial_state, _Documents.of(segment_ids, chunk))
        return y.unflatten(0, (len(x), -1)).flatten(1, 2)[:, :seq], state


def _even_chunk(seq: int, most: int) -> int:
    """Chunks of one size, as few as `most` allows, with next to no padding: 43 tokens are 2 × 22, not 2 × 32."""
    return -(-seq // -(-seq // most))


def _chunked(t: Tensor, chunk: int) -> Tensor:
    """(batch, seq, …) → (n, chunk, …), zero-padded: a zero dt leaves the state untouched."""
    missing = -t.shape[1] % chunk
    if missing:
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing))
    return t.unflatten(1, (-1, chunk)).flatten(0, 1)


@dataclass
class _Documents:
    """Where state may flow, as 0/1 float masks; all `None` when a row is one document."""

    inside: Tensor | None = None  # (n, Q, Q): the query sees the key
    to_end: Tensor | None = None  # (n, Q, 1): of the document alive at the chunk's end
    from_start: Tensor | None = None  # (n, Q, 1): of the document alive at the end of the chunk before
    through: Tensor | None = None  # (n, 1): one document from the chunk before to this one's end

    @classmethod
    def of(cls, segment_ids: Tensor | None, chunk: int) -> "_Documents":
        if segment_ids is None:
            return cls()
        missing = -segment_ids.shape[1] % chunk
        ids = torch.cat([segment_ids, segment_ids[:, -1:].expand(-1, missing)], dim=1).unflatten(1, (-1, chunk))
        last = ids[:, :, -1]
        before = torch.cat([ids[:, :1, 0], last[:, :-1]], dim=1)
        to_end, from_start, through = (ids == last[..., None]), (ids == before[..., None]), (last == before)
        masks = (ids[..., :, None] == ids[..., None, :]).tril(), *(m[..., None] for m in (to_end, from_start, through))
        return cls(*(mask.float().flatten(0, 1) for mask in masks))

    def sums(self, a: Tensor) -> Tensor:
        """Of native a from the start of the chunk or document through each token. What one document holds leaves the
        sums of the next untouched to the bit."""
        return a.cumsum(1) if self.inside is None else self.inside.to(a.dtype) @ a

    def sums_back(self, a: Tensor) -> Tensor:
        """The transpose of `sums`: from each token to the end of the chunk or document."""
        return a.flip(1).cumsum(1).flip(1) if self.inside is None else self.inside.to(a.dtype).mT @ a


def _masked(t: Tensor, mask: Tensor | None) -> Tensor:
    return t if mask is None else t * mask


def _seen(scores: Tensor, inside: Tensor | None) -> Tensor:
    """Scores (n, groups, Q, Q) with 0 for keys that a query does not see; in place."""
    return scores.tril_() if inside is None else scores.mul_(inside.unsqueeze(1))


@dataclass
class _Decays:
    """exp of sums of dt·A, with what the documents cut set to 0.

    Differences of float32 sums lose precision at strong decay, so c is summed in float64 and kept as float32 `whole`
    and what that leaves, whose exp is a factor next to 1: L[t, s] = exp(whole_t − whole_s)·rest_t / rest_s.
    """

    whole: Tensor  # head-major (n, heads, Q)
    rest: Tensor  # native (n, Q, heads)
    to_end: Tensor  # native: from after the token through the chunk's end
    from_start: Tensor  # native: from the chunk's start through the token
    through: Tensor  # (n, heads): over the whole chunk

    @classmethod
    def of(cls, dt: Tensor, A: Tensor, documents: _Documents) -> "_Decays":
        c = documents.sums(dt.double() * A.double())
        whole = c.to(dt.dtype)
        from_start = c.clamp(min=_FORGOTTEN).exp_().to(dt.dtype)
        return cls(
            whole=whole.transpose(1, 2).contiguous(),
            rest=(c - whole).exp_().to(dt.dtype),
            to_end=_masked((c[:, -1:] - c).clamp_(_FORGOTTEN, 0).exp_().to(dt.dtype), documents.to_end),
            from_start=_masked(from_start, documents.from_start),
            through=_masked(from_start[:, -1], documents.through),
        )

    def of_block(self, at: slice) -> "_Decays":
        """Those of some chunks, with a last dimension of 1 for head_dim but for `whole`."""
        return _Decays(
            self.whole[at], *(t[at].unsqueeze(-1) for t in (self.rest, self.to_end, self.from_start, self.through))
        )


@dataclass
class _Block:
    """Some chunks, few enough to stay in the cache with all that is made of them."""

    at: slice  # which of the n
    x: Tensor  # (n, Q, heads, head_dim)
    dt: Tensor  # (n, Q, heads, 1), and so its decays but for `whole`
    B: Tensor  # (n, groups, Q, state)
    C: Tensor
    decays: _Decays
    seen: Tensor | None  # (n, Q, Q), 1 where the query sees the key; all before it when absent

    def written(self) -> Tensor:
        """What tokens add to the state at the chunk's end before B, (n, groups, Q, channels)."""
        return _by_group(self.x * (self.dt * self.decays.to_end), self.B.shape[1])

    def scores(self) -> Tensor:
        """C·Bᵀ, (n, groups, 1, Q, Q), 0 for keys that a query does not see."""
        return _seen(self.C @ self.B.mT, self.seen).unsqueeze(2)

    def inside(self) -> Tensor:
        """L but for `rest`, (n, groups, heads of a group, Q, Q); 1 above the diagonal, where scores are 0."""
        c = self.decays.whole.unflatten(1, (self.B.shape[1], -1))
        return torch.sub(c.unsqueeze(-1), c.unsqueeze(-2)).clamp_(_FORGOTTEN, 0).exp_()

    def inside_inputs(self) -> Tensor:
        """u / rest, head-major."""
        return _head_major(self.x, self.dt / self.decays.rest)


def _blocks(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, decays: _Decays, documents: _Documents) -> Iterator[_Block]:
    n, Q, heads = dt.shape
    size = max(1, _BLOCK_ELEMENTS.get(x.device.type, 2**18) // (heads * Q * Q))
    for start in range(0, n, size):
        at = slice(start, start + size)
        seen = None if documents.inside is None else documents.inside[at]
        yield _Block(at, x[at], dt[at].unsqueeze(-1), B[at], C[at], decays.of_block(at), seen)


def _by_group(t: Tensor, groups: int) -> Tensor:
    """Native (n, Q, heads, head_dim) → (n, groups, Q, channels), a view for one group."""
    return t.unflatten(2, (groups, -1)).flatten(3).transpose(1, 2)


def _native(t: Tensor, heads: int) -> Tensor:
    """The way back: (n, groups, Q, channels) → (n, Q, heads, head_dim)."""
    return t.transpose(1, 2).flatten(2).unflatten(2, (heads, -1))


def _head_major(t: Tensor, factor: Tensor) -> Tensor:
    """t (n, Q, heads, head_dim) times factor (n, Q, heads, 1), laid out as (n, heads, Q, head_dim)."""
    n, Q, heads, head_dim = t.shape
    return torch.mul(t.transpose(1, 2), factor.transpose(1, 2), out=t.new_empty(n, heads, Q, head_dim))


class _Scan(torch.autograd.Function):
    """Forward in five products; the backward is written out because autograd would keep and pass over each step.

    All inputs are native, B and C (n, Q, groups, state), but for the initial state (batch, heads, head_dim, state).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        A: Tensor,
        D: Tensor,
        initial: Tensor,
        documents: _Documents,
    ) -> tuple[Tensor, Tensor]:
        heads, groups = x.shape[2], B.shape[2]
        B, C = B.transpose(1, 2), C.transpose(1, 2)
        decays = _Decays.of(dt, A, documents)
        states = x.new_empty(len(x), groups, x[0, 0].numel() // groups, B.shape[-1])
        for block in _blocks(x, dt, B, C, decays, documents):
            states[block.at] = block.written().mT @ block.B
        final = _carry(states.view(len(initial), -1, *initial.shape[1:]), decays.through, initial)

        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        for block in _blocks(x, dt, B, C, decays, documents):
            outside = _native(block.C @ states[block.at].mT, heads)
            inside = block.inside().mul_(block.scores()).flatten(1, 2) @ block.inside_inputs()
            torch.mul(block.x, D[:, None], out=y[block.at]).addcmul_(outside, block.decays.from_start)
            y[block.at].addcmul_(inside.transpose(1, 2), block.decays.rest)
        ctx.save_for_backward(x, dt, B, C, A, D, states, final, y)
        ctx.documents = documents
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, B, C, A, D, states, final, y = ctx.saved_tensors
        decays = _Decays.of(dt, A, ctx.documents)
        of_states, of_B, of_C = torch.empty_like(states), torch.empty_like(B), torch.empty_like(C)
        for block in _blocks(x, dt, B, C, decays, ctx.documents):  # through the state at the chunk's start
            of_outside = _by_group(grad_y[block.at] * block.decays.from_start, B.shape[1])
            of_C[block.at] = of_outside @ states[block.at]
            of_states[block.at] = of_outside.mT @ block.C
        by_row = len(final), -1, *final.shape[1:]
        of_ends, of_initial = _carry_back(
            of_states.view(by_row), decays.through, states.view(by_row), final, grad_final
        )

        of_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        y_of_y, x_of_y, x_of_u = (torch.empty_like(dt) for _ in range(3))
        for block in _blocks(x, dt, B, C, decays, ctx.documents):
            at, of_y = block.at, grad_y[block.at]
            of_u = _backward_of_block(block, of_y, of_states[at], of_B[at], of_C[at])
            y_of_y[at], x_of_y[at], x_of_u[at] = _dot(y[at], of_y), _dot(block.x, of_y), _dot(block.x, of_u)
            torch.mul(of_u, block.dt, out=of_x[at]).addcmul_(of_y, D[:, None])

        # c_t scales all that t reads, 1/c_s all that s writes, and c at the chunk's end the state handed on.
        of_c = y_of_y - D * x_of_y - dt * x_of_u
        of_c[:, -1] += of_ends
        of_a = ctx.documents.sums_back(of_c)
        of_dt = torch.addcmul(x_of_u, of_a, A)
        of_A, of_D = (of_a * dt).sum((0, 1)), x_of_y.sum((0, 1))
        return of_x, of_dt, of_B.transpose(1, 2), of_C.transpose(1, 2), of_A, of_D, of_initial, None


def _backward_of_block(block: _Block, of_y: Tensor, of_states: Tensor, of_B: Tensor, of_C: Tensor) -> Tensor:
    """The gradient of u, native. Writes that of B and adds to that of C. `of_states` are those at the chunks' ends."""
    decays, inside, scores = block.decays, block.inside(), block.scores()
    of_inside_y = _head_major(of_y, decays.rest)
    of_mix = (of_inside_y @ block.inside_inputs().mT).view_as(inside)
    of_scores = _seen(of_mix.mul_(inside).sum(2), block.seen)
    of_C += of_scores @ block.B
    torch.matmul(block.written(), of_states, out=of_B)
    of_B += of_scores.mT @ block.C
    of_u = _native(block.B @ of_states.mT, of_y.shape[2]) * decays.to_end
    of_inside_u = inside.mul_(scores).flatten(1, 2).mT @ of_inside_y
    return of_u.addcdiv_(of_inside_u.transpose(1, 2), decays.rest)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _carry(states: Tensor, through: Tensor, initial: Tensor) -> Tensor:
    """Replaces what each chunk adds to the state, (batch, chunks, heads, head_dim, state), by the state at its start;
    returns the state at the end."""
    through = through.view(*states.shape[:3], 1, 1)
    state = initial
    for k in range(states.shape[1]):
        following = torch.addcmul(states[:, k], state, through[:, k])
        states[:, k] = state
        state = following
    return state


def _carry_back(
    grads: Tensor, through: Tensor, states: Tensor, final: Tensor, of_final: Tensor
) -> tuple[Tensor, Tensor]:
    """Replaces the gradients that reach each chunk's first state by its outputs by all gradients of its last state.

    Returns those of the logarithm of `through`, (n, heads), and those of the initial state.
    """
    by_row = through.view(*states.shape[:3], 1, 1)
    of_log = torch.empty_like(through).view(states.shape[:3])
    after, of_after = final, of_final
    for k in reversed(range(states.shape[1])):
        of_log[:, k] = _dot(after.flatten(2), of_after.flatten(2))
        of_before = torch.addcmul(grads[:, k], of_after, by_row[:, k])
        grads[:, k] = of_after
        after, of_after = states[:, k], of_before
    return of_log.view_as(through), of_after
