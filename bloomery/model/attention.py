"""Grouped-query attention (arXiv 2305.13245) with optional rotation, biases, query/key norm and sliding window."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bloomery.model.config import ModelConfig
from bloomery.model.context import Context
from bloomery.model.norm import RMSNorm
from bloomery.model.rope import rotate
from bloomery.model.state import KeyValueCache


class AttentionCore(nn.Module):
    """softmax(q·kᵀ/√d)·v under the call's mask. Swap point: `attention.core` is replaced to change kernel or axis."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        """query (batch, heads, seq, head_dim), key and value (batch, key_value_heads, total, head_dim) → like query."""
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=context.mask,
            is_causal=context.causal and query.shape[2] > 1,
            enable_gqa=grouped,
        )


class Attention(nn.Module):
    """The `*` mixer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, bias = config.hidden_size, config.attention_bias or config.qkv_bias
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(d, config.query_size, bias=bias)
        self.k_proj = nn.Linear(d, config.key_value_size, bias=bias)
        self.v_proj = nn.Linear(d, config.key_value_size, bias=bias)
        self.o_proj = nn.Linear(config.query_size, d, bias=config.attention_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.core = AttentionCore()

    def forward(self, x: Tensor, context: Context, cache: KeyValueCache | None = None) -> Tensor:
        """x (batch, seq, hidden) → the same shape; `cache` is extended by the new tokens and attended to."""
        query, key, value = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if context.rope is not None:
            query, key = rotate(query, *context.rope), rotate(key, *context.rope)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            key, value = _extend(cache, key, value, context)
        return self.o_proj(self.core(query, key, value, context).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim)


def _extend(cache: KeyValueCache, key: Tensor, value: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Writes the new keys and values after the held ones and returns all up to the longest row."""
    if context.aligned:
        cache.keys[..., context.held : context.total] = key.transpose(2, 3)
        cache.values[:, :, context.held : context.total] = value
        if context.held == 0:
            return key, value
    else:
        rows = torch.arange(context.batch, device=key.device)[:, None]
        cache.keys[rows, :, :, context.positions] = key.transpose(1, 2)
        cache.values[rows, :, context.positions] = value.transpose(1, 2)
    keys = cache.keys[..., : context.total].transpose(2, 3)
    # torch's fused attention falls back to a form five times slower where a key's channels do not lie together.
    return keys.contiguous() if context.seq > 1 else keys, cache.values[:, :, : context.total]
