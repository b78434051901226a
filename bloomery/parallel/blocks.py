"""Attention of a block of queries to a block of keys, with what is needed to merge several blocks into the whole.

A block returns o = softmax(σ·q·kᵀ)·v and l = logsumexp(σ·q·kᵀ) over the keys it saw; blocks of the same queries merge
exactly (`merge`). The backward takes the output and the l of all keys together (arXiv 2307.08691 §3.1). Where nothing
is masked but the future, torch's fused kernels do it; plain products, a tile of queries at a time, are the other form.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Mask = Callable[[slice], Tensor]
"""Rows of queries → which keys they see, (batch or 1, rows, keys) bool."""

_TILE_SCORES = 2**22  # of one tile: 16 MiB in float32
_HALF = (torch.float16, torch.bfloat16)
_aten = torch.ops.aten


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Mask | None) -> tuple[Tensor, Tensor]:
    """q (batch, heads, queries, head_dim), k and v (batch, key_value_heads, keys, head_dim) → o like q and
    l (batch, heads, queries), float32 or float64; o is 0 and l −∞ for a query that sees no key.

    `causal`: queries and keys are the same tokens, and a query sees those up to itself.
    """
    if mask is None and _fused(q):
        return _fused_forward(q, k, v, causal)
    exact, outputs, sums = _exact(q.dtype), [], []
    k, v = k.to(exact).unsqueeze(2), v.to(exact).unsqueeze(2)
    for rows in _tiles(q, k):
        scores = _scores(q[:, :, rows], k, rows, causal, mask)
        total = scores.logsumexp(-1, keepdim=True)
        weights = (scores - total.masked_fill(total == -torch.inf, 0)).exp_()
        outputs.append((weights @ v).flatten(1, 2))
        sums.append(total.squeeze(-1).flatten(1, 2))
    return torch.cat(outputs, 2), torch.cat(sums, 2)


def attend_backward(
    of_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, total: Tensor, causal: bool, mask: Mask | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The block's share of the gradients of q, k and v, float32 or float64. `o` and `total` (the l) are those after
    all blocks were merged, of_o is the gradient of that o."""
    if mask is None and _fused(q):
        return _fused_backward(of_o, q, k, v, o, total, causal)
    exact = _exact(q.dtype)
    k, v = k.to(exact).unsqueeze(2), v.to(exact).unsqueeze(2)
    of_q, of_k, of_v = [], torch.zeros_like(k), torch.zeros_like(v)
    total = total.masked_fill(total == -torch.inf, 0)  # of queries that see nothing: their scores are −∞
    for rows in _tiles(q, k):
        part, by_group = q[:, :, rows], (k.shape[1], -1)
        gradient, output = (t[:, :, rows].to(exact).unflatten(1, by_group) for t in (of_o, o))
        weights = (_scores(part, k, rows, causal, mask) - total[:, :, rows, None].unflatten(1, by_group)).exp_()
        of_scores = weights * (gradient @ v.mT - (gradient * output).sum(-1, keepdim=True)) * _scale(q)
        of_q.append((of_scores @ k).flatten(1, 2))
        of_k += (of_scores.mT @ part.to(exact).unflatten(1, by_group)).sum(2, keepdim=True)
        of_v += (weights.mT @ gradient).sum(2, keepdim=True)
    return torch.cat(of_q, 2), of_k.squeeze(2), of_v.squeeze(2)


def merge(o: Tensor, total: Tensor, block_o: Tensor, block_total: Tensor) -> None:
    """Adds a block to what o and total (its l) hold, in place; to start with o is 0 and total −∞."""
    after = torch.logaddexp(total, block_total)
    finite = after.masked_fill(after == -torch.inf, 0)  # −∞ − −∞ would be NaN
    o.mul_((total - finite).exp_().unsqueeze(-1)).add_(block_o * (block_total - finite).exp_().unsqueeze(-1))
    total.copy_(after)


def _tiles(q: Tensor, k: Tensor) -> Sequence[slice]:
    rows = max(1, _TILE_SCORES // (q.shape[0] * q.shape[1] * k.shape[-2]))
    return [slice(start, min(start + rows, q.shape[2])) for start in range(0, q.shape[2], rows)]


def _scores(q: Tensor, k: Tensor, rows: slice, causal: bool, mask: Mask | None) -> Tensor:
    """σ·q·kᵀ of some rows, −∞ where a key is not seen, (batch, key_value_heads, heads of each, rows, keys)."""
    scores = q.to(k.dtype).unflatten(1, (k.shape[1], -1)) @ (k * _scale(q)).mT
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(rows.start + 1)
        scores.masked_fill_(future, -torch.inf)
    if mask is not None:
        scores.masked_fill_(~mask(rows)[:, None, None], -torch.inf)
    return scores


def _scale(q: Tensor) -> float:
    return float(q.shape[-1]) ** -0.5


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _fused(q: Tensor) -> bool:
    """Whether torch has a kernel that also returns l. The one of a GPU is of half precision only."""
    aligned = q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return q.device.type == "cpu" or (q.device.type == "cuda" and q.dtype in _HALF and aligned)


def _fused_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        o, total = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    else:
        k, v = _every_head(k, q), _every_head(v, q)
        o, total = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[:2]
    return o.to(_exact(q.dtype)), total.to(_exact(q.dtype))


def _fused_backward(
    of_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, total: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    of_o, o = of_o.to(q.dtype), o.to(q.dtype)
    if q.device.type == "cpu":
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(of_o, q, k, v, o, total, 0.0, causal)
    else:
        all_k, all_v, none = _every_head(k, q), _every_head(v, q), torch.empty(0, dtype=torch.uint64, device=q.device)
        of_q, of_k, of_v = _aten._scaled_dot_product_flash_attention_backward(
            of_o, q, all_k, all_v, o, total.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, none, none
        )
        grads = of_q, *(_by_key_head(t, k) for t in (of_k, of_v))
    exact = _exact(q.dtype)
    return tuple(t.to(exact) for t in grads)  # type: ignore[return-value]


def _every_head(t: Tensor, q: Tensor) -> Tensor:
    """A key or value head for every query head."""
    return t.repeat_interleave(q.shape[1] // t.shape[1], 1)


def _by_key_head(t: Tensor, k: Tensor) -> Tensor:
    return t.unflatten(1, (k.shape[1], -1)).sum(2, dtype=torch.float32)
