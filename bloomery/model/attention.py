"""Grouped-query attention (arXiv 2305.13245) with optional rotation, biases, query/key norm and sliding window."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bloomery.model.config import ModelConfig
from bloomery.model.context import Context
from bloomery.model.norm import RMSNorm
from bloomery.model.rope import rotate, rotate_few
from bloomery.model.state import KeyValueCache


class AttentionCore(nn.Module):
    """softmax(q·kᵀ/√d)·v under the call's mask. Swap point: `attention.core` is replaced to change kernel or axis."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        """query (batch, heads, seq, head_dim), key and value (batch, key_value_heads, total, head_dim) → like query."""
        if query.shape[2] == 1 and query.device.type == "cpu":
            return _one_query(query, key, value, context.mask)
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=context.mask,
            is_causal=context.causal and query.shape[2] > 1,
            enable_gqa=grouped,
        )


def _one_query(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Decoding on a CPU: two batched products take half the time of the fused kernel, made for many queries."""
    batch, heads, _, head_dim = query.shape
    key_value_heads, total = key.shape[1:3]
    grouped = (query * head_dim**-0.5).reshape(batch * key_value_heads, -1, head_dim)
    scores = torch.bmm(grouped, key.flatten(0, 1).transpose(1, 2))
    if mask is not None:
        scores = scores.view(batch, heads, total).masked_fill(~mask[:, 0], -math.inf).view_as(scores)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    return torch.bmm(weights, value.flatten(0, 1)).view(query.shape)


class Attention(nn.Module):
    """The `*` mixer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, bias = config.hidden_size, config.attention_bias
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(d, config.query_size, bias=bias)
        self.k_proj = nn.Linear(d, config.key_value_size, bias=bias)
        self.v_proj = nn.Linear(d, config.key_value_size, bias=bias)
        self.o_proj = nn.Linear(config.query_size, d, bias=bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.core = AttentionCore()

    def forward(self, x: Tensor, context: Context, cache: KeyValueCache | None = None) -> Tensor:
        """x (batch, seq, hidden) → the same shape; `cache` is extended by the new tokens and attended to."""
        if cache is not None and context.seq == 1:
            return self._step(x[:, 0], context, cache).unsqueeze(1)
        query, key, value = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if context.rope is not None:
            query, key = rotate(query, *context.rope), rotate(key, *context.rope)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            key, value = _extend(cache, key, value, context)
        return self.o_proj(self.core(query, key, value, context).transpose(1, 2).flatten(2))

    def _step(self, x: Tensor, context: Context, cache: KeyValueCache) -> Tensor:
        """One token a row, x (batch, hidden): few calls, as on small models each costs as much as its arithmetic."""
        query, key, value = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if context.rope is not None:
            both = rotate_few(torch.cat([query, key], 1), *context.whole_rope)
            query, key = both.split([query.shape[1], key.shape[1]], 1)
        keys, values = _extend(cache, key.unsqueeze(2), value.unsqueeze(2), context)
        return self.o_proj(self.core(query.unsqueeze(2), keys, values, context).flatten(1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim)


def _extend(cache: KeyValueCache, key: Tensor, value: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Writes the new keys and values after the held ones and returns all up to the longest row."""
    for buffer, new in ((cache.keys, key), (cache.values, value)):
        if context.aligned:
            buffer[:, :, context.held : context.total] = new
        elif context.seq == 1:
            buffer.view(-1, buffer.shape[-1]).index_copy_(0, context.cache_rows(buffer.shape[1]), new.flatten(0, 2))
        else:
            rows = torch.arange(context.batch, device=new.device)[:, None]
            buffer[rows, :, context.positions] = new.transpose(1, 2)
    return cache.keys[:, :, : context.total], cache.values[:, :, : context.total]
