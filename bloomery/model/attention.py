"""Grouped-query attention (arXiv 2305.13245) with optional rotation, biases, query/key norm and sliding window."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bloomery.model.config import ModelConfig
from bloomery.model.context import Context
from bloomery.model.folded import AddedLinear, NormedLinear
from bloomery.model.norm import RMSNorm, rms_norm
from bloomery.model.rope import rotate, rotate_few
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
        query, key, value = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if context.rope is not None:
            query, key = rotate(query, *context.rope), rotate(key, *context.rope)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            key, value = _extend(cache, key, value, context)
        return self.o_proj(self.core(query, key, value, context).transpose(1, 2).flatten(2))

    def step(self, norm: RMSNorm) -> "AttentionStep":
        """x += self(norm(x)) for one token a row, with the weights of now."""
        return AttentionStep(self, norm)

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
    return cache.keys[..., : context.total].transpose(2, 3), cache.values[:, :, : context.total]


class AttentionStep:
    """x += attention(norm(x)) for one token a row, in few calls: on small models each costs as much as its arithmetic.

    Two batched products take a fraction of the time of the fused kernel, which is made for many queries.
    """

    def __init__(self, attention: Attention, norm: RMSNorm):
        query, key, value = attention.q_proj, attention.k_proj, attention.v_proj
        self._into = NormedLinear(norm, [query, key, value])
        self._out = AddedLinear(attention.o_proj)
        self._head_dim = attention.head_dim
        self._heads, self._key_heads = (linear.out_features // attention.head_dim for linear in (query, key))
        self._head_norm: Tensor | None = None
        if attention.q_norm is not None and attention.k_norm is not None:
            weights = [
                attention.q_norm.weight.expand(self._heads, -1),
                attention.k_norm.weight.expand(self._key_heads, -1),
            ]
            self._head_norm, self._norm_eps = torch.cat(weights).float(), attention.q_norm.eps

    def __call__(self, x: Tensor, context: Context, cache: KeyValueCache) -> Tensor:
        """x (batch, hidden) → x; `cache` is extended and attended to."""
        turned = self._heads + self._key_heads
        heads = self._into(x).view(len(x), -1, self._head_dim)
        both, value = heads[:, :turned], heads[:, turned:]
        if self._head_norm is not None:
            both = rms_norm(both.float(), self._head_norm, self._norm_eps).to(x.dtype)
        if context.rope is not None:
            both = rotate_few(both, *context.whole_rope).to(x.dtype)
        query = (both[:, : self._heads] * self._head_dim**-0.5).view(len(x) * self._key_heads, -1, self._head_dim)
        self._append(both[:, self._heads :], value, context, cache)
        scores = torch.bmm(query, cache.keys[..., : context.total].flatten(0, 1))
        if context.mask is not None:
            seen = context.mask[:, 0]
            scores = scores.view(len(x), -1, context.total).masked_fill(~seen, -math.inf).view_as(scores)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(x.dtype)
        return self._out(x, torch.bmm(weights, cache.values[:, :, : context.total].flatten(0, 1)).view(len(x), -1))

    def _append(self, key: Tensor, value: Tensor, context: Context, cache: KeyValueCache) -> None:
        """key and value (batch, key_value_heads, head_dim) go after what each row holds."""
        if context.aligned:
            cache.keys[..., context.held] = key
            cache.values[:, :, context.held] = value
        else:
            rows = torch.arange(len(key), device=key.device)
            cache.keys[rows, :, :, context.starts] = key
            cache.values[rows, :, context.starts] = value
