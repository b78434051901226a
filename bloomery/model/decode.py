"""One decoding step of each mixer: x += mixer(norm(x)) for one token a row, with the weights of when it was made.

`fixed`: products of a fixed number of rows, so that a row's result does not depend on the others.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bloomery.model import activation, native
from bloomery.model.attention import Attention
from bloomery.model.context import Context
from bloomery.model.folded import AddedLinear, NormedLinear, to_unit_length
from bloomery.model.layers import MLP
from bloomery.model.mamba import Mamba
from bloomery.model.moe import Experts, MoE
from bloomery.model.norm import RMSNorm, rms_norm
from bloomery.model.recurrence import Recurrence
from bloomery.model.rope import rotate_few
from bloomery.model.state import KeyValueCache, MambaCache


class AttentionStep:
    """x += attention(norm(x)), in few calls: on small models each costs as much as its arithmetic.

    Without the kernel, two batched products take a fraction of the time of torch's fused attention, which is made for
    many queries.
    """

    def __init__(self, attention: Attention, norm: RMSNorm, fixed: bool = False):
        query, key, value = attention.q_proj, attention.k_proj, attention.v_proj
        self._into = NormedLinear(norm, [query, key, value], fixed)
        self._out = AddedLinear(attention.o_proj, fixed=fixed)
        self._head_dim = attention.head_dim
        self._heads, self._key_heads = (linear.out_features // attention.head_dim for linear in (query, key))
        self._head_norm, self._norm_eps = _head_norm(attention, self._heads, self._key_heads)
        self._sizes = native.AttentionSizes(
            heads=self._heads, key_heads=self._key_heads, head_dim=self._head_dim, norm_eps=self._norm_eps,
            scale=self._head_dim**-0.5,
        )  # fmt: skip

    def __call__(self, x: Tensor, context: Context, cache: KeyValueCache) -> Tensor:
        """x (batch, hidden) → x; `cache` is extended and attended to."""
        heads = self._into(x)
        attend = self._kernel if native.serves(heads, cache.keys) else self._products
        return self._out(x, attend(heads, context, cache))

    def _kernel(self, heads: Tensor, context: Context, cache: KeyValueCache) -> Tensor:
        assert context.starts is not None
        self._sizes.window = context.sliding_window or 0
        return native.attend(
            self._sizes, heads, context.rope, self._head_norm, cache.keys, cache.values, context.starts
        )

    def _products(self, heads: Tensor, context: Context, cache: KeyValueCache) -> Tensor:
        rows, turned = len(heads), self._heads + self._key_heads
        each = heads.view(rows, -1, self._head_dim)
        both, value = each[:, :turned], each[:, turned:]
        if self._head_norm is not None:
            both = rms_norm(both.float(), self._head_norm, self._norm_eps).to(heads.dtype)
        if context.rope is not None:
            both = rotate_few(both, *context.whole_rope).to(heads.dtype)
        query = (both[:, : self._heads] * self._head_dim**-0.5).view(rows * self._key_heads, -1, self._head_dim)
        _append(both[:, self._heads :], value, context, cache)
        scores = torch.bmm(query, cache.keys[..., : context.total].flatten(0, 1))
        if context.mask is not None:
            seen = context.mask[:, 0]
            scores = scores.view(rows, -1, context.total).masked_fill(~seen, -math.inf).view_as(scores)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(heads.dtype)
        return torch.bmm(weights, cache.values[:, :, : context.total].flatten(0, 1)).view(rows, -1)


def _head_norm(attention: Attention, heads: int, key_heads: int) -> tuple[Tensor | None, float]:
    """The norm weights of all query and key heads, (heads + key_heads, head_dim) float32, and the epsilon."""
    if attention.q_norm is None or attention.k_norm is None:
        return None, 0.0
    weights = [attention.q_norm.weight.expand(heads, -1), attention.k_norm.weight.expand(key_heads, -1)]
    return torch.cat(weights).float(), attention.q_norm.eps


def _append(key: Tensor, value: Tensor, context: Context, cache: KeyValueCache) -> None:
    """key and value (batch, key_value_heads, head_dim) go after what each row holds."""
    if context.aligned:
        cache.keys[..., context.held] = key
        cache.values[:, :, context.held] = value
    else:
        rows = torch.arange(len(key), device=key.device)
        cache.keys[rows, :, :, context.starts] = key
        cache.values[rows, :, context.starts] = value


class MambaStep:
    """x += mamba(norm(x)): the recurrence itself, in place."""

    def __init__(self, mamba: Mamba, norm: RMSNorm, fixed: bool = False):
        self._into = NormedLinear(norm, [mamba.in_proj], fixed)
        self._recurrence = Recurrence(mamba)
        self._out = AddedLinear(mamba.out_proj, self._recurrence.scale, fixed)

    def __call__(self, x: Tensor, context: Context, cache: MambaCache) -> Tensor:
        """x (batch, hidden) → x; `cache` moves on."""
        return self._out(x, self._recurrence(self._into(x).unsqueeze(1), cache)[:, 0])


class MLPStep:
    """x += mlp(norm(x)); gate and up in one product."""

    def __init__(self, mlp: MLP, norm: RMSNorm, fixed: bool = False):
        gate = [] if mlp.gate_proj is None else [mlp.gate_proj]
        self._into = NormedLinear(norm, [*gate, mlp.up_proj], fixed)
        self._out = AddedLinear(mlp.down_proj, fixed=fixed)
        self._gated, self._plain = mlp.gated if gate else None, mlp.plain

    def __call__(self, x: Tensor, *_: object) -> Tensor:
        """x (rows, hidden) → x."""
        return self.add(x, x)

    def add(self, x: Tensor, to: Tensor) -> Tensor:
        """to += mlp(norm(x))."""
        inner = self._into(x)
        if native.serves(inner) and self._plain in _SQUARED:
            return self._out(to, native.activate(inner, self._gated is not None, _SQUARED[self._plain]))
        return self._out(to, self._plain(inner) if self._gated is None else self._gated(*inner.chunk(2, -1)))


class MoEStep:
    """x += moe(norm(x)). A few rows do not fill a grouped product of all experts: theirs are multiplied one by one.

    For a CPU. The experts' weights are read where they are: a copy would double most of the model.
    """

    def __init__(self, moe: MoE, norm: RMSNorm):
        size = moe.gate.config.hidden_size
        self._scale, self._eps = norm.weight.float() * math.sqrt(size), norm.eps * size
        self._router, self._dispatch, self._experts = moe.gate, moe.dispatch, moe.experts
        self._few = _FewExperts(moe.experts)
        self._into, self._out = moe.fc1_latent_proj, moe.fc2_latent_proj
        self._shared = None if moe.shared_experts is None else MLPStep(moe.shared_experts, norm)
        self._shared_gate = moe.shared_expert_gate

    def __call__(self, x: Tensor, *_: object) -> Tensor:
        """x (rows, hidden) → x."""
        normed = (to_unit_length(x.float(), self._eps) * self._scale).to(x.dtype)
        routed = self._routed(normed)
        if self._shared is None:
            return x.add_(routed)
        if self._shared_gate is None:
            return self._shared(x).add_(routed)
        shared = self._shared.add(x, torch.zeros_like(x))
        return x.addcmul_(self._shared_gate(normed).sigmoid_(), shared).add_(routed)

    def _routed(self, x: Tensor) -> Tensor:
        indices, weights, *_ = self._router(x)
        if self._into is not None:
            x = self._into(x)
        if indices.numel() <= self._few.experts:
            out = self._few(x, indices, weights)
        else:
            out = self._dispatch(x, indices, weights, self._experts)
        return out if self._out is None else self._out(out)


class _FewExperts:
    """The weighted sum of each row's experts, with a product for each expert that was chosen."""

    def __init__(self, experts: Experts):
        self._up, self._down = experts.up_proj.detach().unbind(), experts.down_proj.detach().unbind()
        self._gate = None if experts.gate_proj is None else experts.gate_proj.detach().unbind()
        self._plain, self._gated = experts.plain, experts.gated

    @property
    def experts(self) -> int:
        """How many there are."""
        return len(self._up)

    def __call__(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """x (rows, width), indices and weights (rows, k) → (rows, width)."""
        order = indices.flatten().argsort()
        experts, counts = indices.flatten()[order].unique_consecutive(return_counts=True)
        chosen, sizes, rows = experts.tolist(), counts.tolist(), order // indices.shape[1]
        parts = x.index_select(0, rows).split(sizes)
        inner = _products(parts, self._up, chosen)
        inner = self._plain(inner) if self._gate is None else self._gated(_products(parts, self._gate, chosen), inner)
        out = _products(inner.split(sizes), self._down, chosen) * weights.flatten()[order, None]
        return torch.zeros_like(x, dtype=out.dtype).index_add_(0, rows, out).to(x.dtype)


def _products(parts: Sequence[Tensor], weights: Sequence[Tensor], chosen: Sequence[int]) -> Tensor:
    """Each part times the transposed weight of its expert, one after the other."""
    return torch.cat([F.linear(part, weights[expert]) for part, expert in zip(parts, chosen, strict=True)])


_SQUARED = {F.silu: False, activation.squared_relu: True}
