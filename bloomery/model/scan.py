"""The Mamba-2 recurrence S_t = exp(dt_t·A)·S_{t−1} + dt_t·x_t ⊗ B_t, y_t = S_t·C_t + D·x_t as chunked matrix products.

State space duality, arXiv 2405.21060 §6, with documents that reset the state inside a row. All in float32.

Letters: Q tokens a chunk; c_t the sum of dt·A from the chunk's start through t; L[t, s] = exp(c_t − c_s) for s ≤ t;
u = dt·x. "Native" tensors are (batch, chunks, Q, heads, …), "head-major" ones (batch, chunks, heads, Q, …).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class ChunkedScan(nn.Module):
    """Swap point: replace `mamba.scan` to change the kernel or the axis. This plain form is the oracle for others."""

    def __init__(self, chunk_size: int):
        super().__init__()
        self.chunk_size = chunk_size

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
        seq = x.shape[1]
        chunk = _even_chunk(seq, self.chunk_size)
        with torch.autocast(x.device.type, enabled=False):
            exact = torch.promote_types(dt.dtype, torch.float32)
            inputs = [_chunked(t.to(exact), chunk) for t in (x, dt, B, C)]
            if initial_state is None:
                initial_state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1], dtype=exact)
            y, state = _Scan.apply(*inputs, A, D, initial_state, _Documents.of(segment_ids, chunk))
        return y.flatten(1, 2)[:, :seq], state


def _even_chunk(seq: int, most: int) -> int:
    """Chunks of one size, as few as `most` allows, with next to no padding: 43 tokens are 2 × 22, not 2 × 32."""
    return -(-seq // -(-seq // most))


def _chunked(t: Tensor, chunk: int) -> Tensor:
    """(batch, seq, …) → (batch, chunks, chunk, …), zero-padded: a zero dt leaves the state untouched."""
    missing = -t.shape[1] % chunk
    if missing:
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing))
    return t.unflatten(1, (-1, chunk))


@dataclass
class _Documents:
    """Where state may flow, as 0/1 float masks; all `None` when a row is one document."""

    inside: Tensor | None = None  # (batch, chunks, 1, query, key): same document
    to_end: Tensor | None = None  # (batch, chunks, chunk, 1): of the document alive at the chunk's end
    from_start: Tensor | None = None  # (batch, chunks, chunk, 1): of the document alive at the end of the chunk before
    through: Tensor | None = None  # (batch, chunks, 1): one document from the chunk before to this one's end

    @classmethod
    def of(cls, segment_ids: Tensor | None, chunk: int) -> "_Documents":
        if segment_ids is None:
            return cls()
        missing = -segment_ids.shape[1] % chunk
        ids = torch.cat([segment_ids, segment_ids[:, -1:].expand(-1, missing)], dim=1).unflatten(1, (-1, chunk))
        last = ids[:, :, -1]
        before = torch.cat([ids[:, :1, 0], last[:, :-1]], dim=1)
        return cls(
            inside=(ids[:, :, None, :, None] == ids[:, :, None, None, :]).float(),
            to_end=(ids == last[:, :, None]).float().unsqueeze(-1),
            from_start=(ids == before[:, :, None]).float().unsqueeze(-1),
            through=(last == before).float().unsqueeze(-1),
        )


def _masked(t: Tensor, mask: Tensor | None) -> Tensor:
    return t if mask is None else t * mask


@lru_cache(maxsize=32)
def _partial_sums(chunk: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The 0/1 matrix that takes a_0 … a_{Q−1} to all sums a_{s+1} + … + a_t, (Q, Q·Q); empty sums (s ≥ t) are 0.

    A product with it is exact where differences of running sums cancel, and needs no cumulative sum.
    """
    t, s, i = torch.meshgrid(*(torch.arange(chunk, device=device) for _ in range(3)), indexing="ij")
    return ((s < i) & (i <= t)).to(dtype).flatten(0, 1).T.contiguous()


@dataclass
class _Decays:
    """exp of sums of dt·A, with what the documents cut set to 0."""

    inside: Tensor  # L, head-major (batch, chunks, heads, Q, Q); 1 above the diagonal, where scores are 0
    to_end: Tensor  # native (batch, chunks, Q, heads): from after the token through the chunk's end
    from_start: Tensor  # native: from the chunk's start through the token
    through: Tensor  # (batch, chunks, heads): over the whole chunk

    @classmethod
    def of(cls, dt: Tensor, A: Tensor, documents: _Documents) -> "_Decays":
        batch, chunks, Q, heads = dt.shape
        a = dt * A
        inside = (a.transpose(2, 3) @ _partial_sums(Q, dt.device, dt.dtype)).exp_().view(batch, chunks, heads, Q, Q)
        from_start = a.cumsum(2).exp_()
        return cls(
            inside=inside,
            to_end=_masked(inside[..., -1, :].transpose(2, 3), documents.to_end),
            from_start=_masked(from_start, documents.from_start),
            through=_masked(from_start[:, :, -1], documents.through),
        )


def _by_group(t: Tensor, groups: int) -> Tensor:
    """Native (batch, chunks, Q, heads, head_dim) → (batch, chunks, groups, Q, channels), a view for one group."""
    return t.unflatten(3, (groups, -1)).flatten(4).transpose(2, 3)


def _native(t: Tensor, heads: int) -> Tensor:
    """The way back: (batch, chunks, groups, Q, channels) → (batch, chunks, Q, heads, head_dim)."""
    return t.transpose(2, 3).flatten(3).unflatten(3, (heads, -1))


class _Scan(torch.autograd.Function):
    """Forward in five products; the backward is written out because autograd would keep and pass over each step."""

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
        heads, groups = x.shape[3], B.shape[3]
        B, C = B.transpose(2, 3), C.transpose(2, 3)  # (batch, chunks, groups, Q, state)
        decays = _Decays.of(dt, A, documents)
        scores = _masked((C @ B.transpose(-1, -2)).tril_(), documents.inside)
        u = (x * dt.unsqueeze(-1)).transpose(2, 3).contiguous()  # head-major
        inside = _mix(decays.inside, scores) @ u

        to_end = x * (dt * decays.to_end).unsqueeze(-1)
        added = _by_group(to_end, groups).transpose(-1, -2) @ B
        states = _carry(added.flatten(2, 3).unflatten(2, (heads, -1)), decays.through, initial)

        before = states[:, :-1].unflatten(2, (groups, -1)).flatten(3, 4)  # (batch, chunks, groups, channels, state)
        y = _native(C @ before.transpose(-1, -2), heads).contiguous()
        y.mul_(decays.from_start.unsqueeze(-1)).add_(inside.transpose(2, 3)).addcmul_(x, D.unsqueeze(-1))
        saved = x, dt, B, C, A, D, states, y, scores, decays.inside, decays.to_end, decays.from_start, decays.through
        ctx.save_for_backward(*saved)
        ctx.documents = documents
        return y, states[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, B, C, A, D, states, y, scores, *decay_tensors = ctx.saved_tensors
        decays = _Decays(*decay_tensors)
        heads, groups = x.shape[3], B.shape[2]
        dt_, from_start, to_end = (t.unsqueeze(-1) for t in (dt, decays.from_start, decays.to_end))
        grad_y = grad_y.contiguous()
        before, after = (t.unflatten(2, (groups, -1)).flatten(3, 4) for t in (states[:, :-1], states[:, 1:]))

        # Through the state at the chunk's start.
        of_outside = _by_group(grad_y * from_start, groups)
        grad_C = of_outside @ before
        grad_states, grad_initial = _carry_back(
            (of_outside.transpose(-1, -2) @ C).view_as(states[:, 1:]), decays.through, grad_final
        )
        of_states = grad_states.view_as(after)

        # Through the chunk's own contribution to the state.
        grad_B = _by_group(x * (dt_ * to_end), groups) @ of_states
        grad_u = _native(B @ of_states.transpose(-1, -2), heads).contiguous().mul_(to_end)

        # Inside the chunk.
        of_y, u = grad_y.transpose(2, 3).contiguous(), (x * dt_).transpose(2, 3).contiguous()
        grad_u.add_((_mix(decays.inside, scores).transpose(-1, -2) @ of_y).transpose(2, 3))
        grad_mix = (of_y @ u.transpose(-1, -2)).mul_(decays.inside).unflatten(2, (groups, -1)).sum(3)
        grad_scores = _masked(grad_mix.tril_(), ctx.documents.inside)
        grad_C += grad_scores @ B
        grad_B += grad_scores.transpose(-1, -2) @ C

        # c_t scales all that t reads, 1/c_s all that s writes, and c at the chunk's end the state handed on.
        x_grad_y, x_grad_u = _dot(x, grad_y), _dot(x, grad_u)
        grad_c = _dot(grad_y, y) - D * x_grad_y - dt * x_grad_u
        grad_c[:, :, -1] += _dot(states[:, 1:].flatten(3), grad_states.flatten(3))
        grad_a = grad_c.flip(2).cumsum(2).flip(2)

        grad_x = grad_u.mul_(dt_).addcmul_(grad_y, D.unsqueeze(-1))
        grad_dt = torch.addcmul(x_grad_u, grad_a, A)
        grad_A, grad_D = (grad_a * dt).sum((0, 1, 2)), x_grad_y.sum((0, 1, 2))
        return grad_x, grad_dt, grad_B.transpose(2, 3), grad_C.transpose(2, 3), grad_A, grad_D, grad_initial, None


def _mix(decay: Tensor, scores: Tensor) -> Tensor:
    """L ⊙ (C·Bᵀ), the heads of a group sharing their scores: (batch, chunks, heads, Q, Q)."""
    return (decay.unflatten(2, (scores.shape[2], -1)) * scores.unsqueeze(3)).flatten(2, 3)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _carry(added: Tensor, through: Tensor, initial: Tensor) -> Tensor:
    """States at all chunk borders, (batch, chunks + 1, heads, head_dim, state)."""
    batch, chunks = added.shape[:2]
    states = added.new_empty(batch, chunks + 1, *added.shape[2:])
    states[:, 0] = initial
    for k in range(chunks):
        torch.addcmul(added[:, k], states[:, k], through[:, k, :, None, None], out=states[:, k + 1])
    return states


def _carry_back(of_states: Tensor, through: Tensor, final: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradients that reach each chunk's first state by its outputs, all gradients of each chunk's last state,
    and that of the initial one."""
    chunks = of_states.shape[1]
    grads = torch.empty_like(of_states)
    grads[:, -1] = final
    for k in range(chunks - 1, 0, -1):
        torch.addcmul(of_states[:, k], grads[:, k], through[:, k, :, None, None], out=grads[:, k - 1])
    return grads, torch.addcmul(of_states[:, 0], grads[:, 0], through[:, 0, :, None, None])
