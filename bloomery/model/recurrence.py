"""Mamba-2 token by token: convolution, state, gated norm. Decoding runs it, and on a CPU so does reading a prompt."""

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from bloomery.model import native
from bloomery.model.folded import to_unit_length
from bloomery.model.state import MambaCache

if TYPE_CHECKING:
    from bloomery.model.mamba import Mamba


class Recurrence:
    """What a mixer does between in_proj and out_proj, from its weights of now; `scale` is left to the caller.

    One pass over the state per token. The kernel keeps a block of the state in the CPU's first cache through all tokens
    of a call, so that prompts too are read faster than by the chunked scan's products.
    """

    def __init__(self, mamba: "Mamba"):
        config = mamba.config
        size = config.mamba_inner_size // config.n_groups
        self.scale = mamba.norm.weight.float() * math.sqrt(size)  # (inner,), of the normed output
        self._mamba, self._split, self._eps = mamba, config.mamba_in_proj_sizes, mamba.norm.eps * size
        self._taps = mamba.conv1d.weight[:, 0].T.contiguous()
        self._bias = mamba.conv1d.bias
        self._dt_bias, self._rates, self._D = (
            t.detach().float().contiguous() for t in (mamba.dt_bias, mamba.decay_rates(), mamba.D)
        )
        self._sizes = native.MambaSizes(
            heads=config.mamba_num_heads, head_dim=config.mamba_head_dim, groups=config.n_groups,
            state=config.ssm_state_size, taps=config.conv_kernel, eps=self._eps,
            low=config.time_step_limit[0], high=config.time_step_limit[1],
        )  # fmt: skip
        tensors = self._taps, self._bias, self._dt_bias, self._rates, self._D
        self._weights = native.MambaWeights(*(None if t is None else t.data_ptr() for t in tensors))

    def serves(self, x: Tensor, cache: MambaCache) -> bool:
        """Whether any number of tokens can be read, not one only."""
        return native.serves(x, cache.conv, self._taps) and self._sizes.taps <= native.MOST_TAPS

    def __call__(self, x: Tensor, cache: MambaCache, lengths: Tensor | None = None) -> Tensor:
        """x (batch, seq, in_proj) → (batch, seq, inner); `cache` moves on by each row's `lengths` (batch,)."""
        if self.serves(x, cache):
            return native.mamba(self._sizes, self._weights, x.contiguous(), cache.conv, cache.ssm, lengths)
        assert x.shape[1] == 1
        return self._step(x[:, 0], cache).unsqueeze(1)

    def _step(self, x: Tensor, cache: MambaCache) -> Tensor:
        z, conv_in, dt = x.split(self._split, dim=-1)
        inputs, B, C = self._mamba.split(self._conv(conv_in, cache.conv).float())
        y = self._recur(inputs.flatten(1), self._by_channel(self._mamba.time_steps(dt)), B, C, cache.ssm)
        y = y.addcmul_(inputs.flatten(1), self._by_channel(self._D)).mul_(F.silu(z.float()))
        gated = y.view(len(x), self._mamba.config.n_groups, -1)
        return to_unit_length(gated, self._eps).view(len(x), -1).to(x.dtype)

    def _recur(self, inputs: Tensor, dt: Tensor, B: Tensor, C: Tensor, ssm: Tensor) -> Tensor:
        """The state's update and what C reads from it, (batch, channels) like inputs and dt.

        Channels of a group share B and C.
        """
        state = ssm.view(-1, *ssm.shape[2:])
        rows, columns, channels = state.shape
        decay = (dt * self._by_channel(self._rates)).exp_().view(rows, 1, channels)
        update = (inputs * dt).view(rows, 1, channels)
        state.mul_(decay).addcmul_(B.reshape(rows, columns, 1), update)
        return torch.bmm(C.reshape(rows, 1, columns), state).view(inputs.shape)

    def _by_channel(self, heads: Tensor) -> Tensor:
        """A number a head, (…, heads), repeated for its channels."""
        return heads.unsqueeze(-1).expand(*heads.shape, self._mamba.config.mamba_head_dim).flatten(-2)

    def _conv(self, new: Tensor, held: Tensor) -> Tensor:
        """SiLU of the convolution at one new column (batch, channels); `held` (batch, K − 1, channels) moves on."""
        taps, bias = self._taps, self._bias
        mixed = new * taps[-1] if bias is None else torch.addcmul(bias, new, taps[-1])
        columns = [*held.unbind(1), new]
        for column, tap in zip(columns[:-1], taps[:-1], strict=True):
            mixed.addcmul_(column, tap)
        for column, following in pairwise(columns):
            column.copy_(following)
        return F.silu(mixed, inplace=True)
