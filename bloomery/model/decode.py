"""One decoding step of each mixer: x += mixer(norm(x)) for one token a row, with the weights of when it was made."""

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from bloomery.model.attention import Attention
from bloomery.model.context import Context
from bloomery.model.folded import AddedLinear, NormedLinear, to_unit_length
from bloomery.model.layers import MLP
from bloomery.model.mamba import Mamba
from bloomery.model.norm import RMSNorm, rms_norm
from bloomery.model.rope import rotate_few
from bloomery.model.state import KeyValueCache, MambaCache


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


class MambaStep:
    """x += mamba(norm(x)) for one token a row: the recurrence itself, in place."""

    def __init__(self, mamba: Mamba, norm: RMSNorm):
        self._mamba, self._sizes, self._groups = mamba, mamba.config.mamba_in_proj_sizes, mamba.config.n_groups
        self._into = NormedLinear(norm, [mamba.in_proj])
        self._taps = mamba.conv1d.weight[:, 0].T.contiguous()
        self._rates, self._D = (self._by_channel(each) for each in (mamba.decay_rates(), mamba.D.float()))
        size = mamba.config.mamba_inner_size // self._groups
        self._eps = torch.tensor(mamba.norm.eps * size, device=self._taps.device)
        self._out = AddedLinear(mamba.out_proj, mamba.norm.weight.float() * math.sqrt(size))

    def __call__(self, x: Tensor, context: Context, cache: MambaCache) -> Tensor:
        """x (batch, hidden) → x; `cache` moves on."""
        z, conv_in, dt = self._into(x).split(self._sizes, dim=-1)
        inputs, B, C = self._mamba.split(self._conv(conv_in, cache.conv).float())
        inputs = inputs.flatten(1)
        y = self._recur(inputs, self._by_channel(self._mamba.time_steps(dt)), B, C, cache.ssm)
        gated = y.addcmul_(inputs, self._D).mul_(F.silu(z.float())).view(len(x), self._groups, -1)
        return self._out(x, to_unit_length(gated, self._eps).view(len(x), -1).to(x.dtype))

    def _recur(self, inputs: Tensor, dt: Tensor, B: Tensor, C: Tensor, ssm: Tensor) -> Tensor:
        """The state's update and what C reads from it, (batch, channels) like inputs and dt.

        Channels of a group share B and C.
        """
        state = ssm.view(-1, *ssm.shape[2:])
        rows, columns, channels = state.shape
        decay = (dt * self._rates).exp_().view(rows, 1, channels)
        update = (inputs * dt).view(rows, 1, channels)
        state.mul_(decay).addcmul_(B.reshape(rows, columns, 1), update)
        return torch.bmm(C.reshape(rows, 1, columns), state).view(inputs.shape)

    def _by_channel(self, heads: Tensor) -> Tensor:
        """A number a head, (…, heads), repeated for its channels."""
        return heads.unsqueeze(-1).expand(*heads.shape, self._mamba.config.mamba_head_dim).flatten(-2)

    def _conv(self, new: Tensor, held: Tensor) -> Tensor:
        """SiLU of the convolution at one new column (batch, channels); `held` (batch, K − 1, channels) moves on."""
        taps, bias = self._taps, self._mamba.conv1d.bias
        mixed = new * taps[-1] if bias is None else torch.addcmul(bias, new, taps[-1])
        columns = [*held.unbind(1), new]
        for column, tap in zip(columns[:-1], taps[:-1], strict=True):
            mixed.addcmul_(column, tap)
        for column, following in pairwise(columns):
            column.copy_(following)
        return F.silu(mixed, inplace=True)


class MLPStep:
    """x += mlp(norm(x)); gate and up in one product."""

    def __init__(self, mlp: MLP, norm: RMSNorm):
        gate = [] if mlp.gate_proj is None else [mlp.gate_proj]
        self._into = NormedLinear(norm, [*gate, mlp.up_proj])
        self._out = AddedLinear(mlp.down_proj)
        self._gated, self._plain = mlp.gated if gate else None, mlp.plain

    def __call__(self, x: Tensor, *_: object) -> Tensor:
        """x (rows, hidden) → x."""
        inner = self._into(x)
        return self._out(x, self._plain(inner) if self._gated is None else self._gated(*inner.chunk(2, -1)))
