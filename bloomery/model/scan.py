"""The Mamba-2 recurrence S_t = exp(dt_t·A)·S_{t−1} + dt_t·x_t ⊗ B_t, y_t = S_t·C_t as chunked matrix products.

State space duality, arXiv 2405.21060 §6, with documents that reset the state inside a row. All in float32.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
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
        segment_ids: Tensor | None = None,
        initial_state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Every y_t and the state after the last token.

        Args:
            x: (batch, seq, heads, head_dim).
            dt: (batch, seq, heads) float32, after softplus; 0 leaves the state untouched.
            A: (heads,) float32, negative.
            B, C: (batch, seq, groups, state); head j uses group j // (heads / groups).
            segment_ids: (batch, seq), non-decreasing; the state is forgotten where the value changes.
            initial_state: (batch, heads, head_dim, state) float32; belongs to the document of the first token.

        Returns:
            y (batch, seq, heads, head_dim) and the state (batch, heads, head_dim, state), float32.
        """
        with torch.autocast(x.device.type, enabled=False):
            chunk = min(self.chunk_size, x.shape[1])
            inputs = (_chunked(t.float(), chunk) for t in (x, dt, B, C))
            y, state = _scan(*inputs, A, _Documents.of(segment_ids, chunk), initial_state)
            return y[:, : x.shape[1]], state


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


@lru_cache(maxsize=8)
def _partial_sums(chunk: int, device: torch.device) -> Tensor:
    """The 0/1 matrix that takes a_0 … a_{Q−1} to all sums a_{s+1} + … + a_t, (Q, Q·Q); empty sums (s ≥ t) are 0.

    A product with it is exact where differences of running sums cancel, and needs no cumulative sum.
    """
    t, s, i = torch.meshgrid(*(torch.arange(chunk, device=device) for _ in range(3)), indexing="ij")
    return ((s < i) & (i <= t)).float().flatten(0, 1).T.contiguous()


def _scan(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, documents: _Documents, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, chunks, Q, heads, head_dim = x.shape
    groups, state = B.shape[-2:]
    a = dt * A
    decay = (a.transpose(2, 3) @ _partial_sums(Q, x.device)).exp().view(batch, chunks, heads, Q, Q)
    since_start = a.cumsum(2).exp()  # (batch, chunks, Q, heads): from the chunk's start through token t
    u = x * dt.unsqueeze(-1)

    B, C = B.transpose(2, 3), C.transpose(2, 3)  # (batch, chunks, groups, Q, state)
    scores = (C @ B.transpose(-1, -2)).tril()
    if documents.inside is not None:
        scores = scores * documents.inside
    mixed = (decay.unflatten(2, (groups, -1)) * scores.unsqueeze(3)).flatten(2, 3)
    inside = (mixed @ u.transpose(2, 3)).transpose(2, 3)

    to_end = decay[..., -1, :].transpose(2, 3)
    if documents.to_end is not None:
        to_end = to_end * documents.to_end
        since_start_seen = since_start * documents.from_start
    else:
        since_start_seen = since_start
    added = (u * to_end.unsqueeze(-1)).view(batch, chunks, Q, groups, -1).transpose(2, 3).transpose(-1, -2) @ B
    kept = since_start[:, :, -1]
    if documents.through is not None:
        kept = kept * documents.through

    carried, final = _carry(added.view(batch, chunks, heads, head_dim, state), kept, initial_state)
    outside = C @ carried.view(batch, chunks, groups, -1, state).transpose(-1, -2)
    outside = outside.transpose(2, 3).reshape(x.shape) * since_start_seen.unsqueeze(-1)
    return (inside + outside).flatten(1, 2), final


def _carry(added: Tensor, kept: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """States before each chunk (batch, chunks, heads, head_dim, state) and after the last."""
    state = torch.zeros_like(added[:, 0]) if initial is None else initial.float()
    before = []
    for addition, factor in zip(added.unbind(1), kept[..., None, None].unbind(1), strict=True):
        before.append(state)
        state = torch.addcmul(addition, state, factor)
    return torch.stack(before, dim=1), state
