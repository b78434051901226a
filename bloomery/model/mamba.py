"""The Mamba-2 mixer (arXiv 2405.21060) as used by Nemotron-H (arXiv 2504.03624)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bloomery.model.config import ModelConfig
from bloomery.model.context import Context
from bloomery.model.conv import causal_conv
from bloomery.model.norm import GatedRMSNorm
from bloomery.model.recurrence import Recurrence
from bloomery.model.scan import ChunkedScan
from bloomery.model.state import MambaCache


class Mamba(nn.Module):
    """The `M` mixer. `in_proj` rows are z | x | B | C | dt; heads are contiguous by group."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        heads, inner, conv = config.mamba_num_heads, config.mamba_inner_size, config.mamba_conv_size
        self.config = config
        self.in_proj = nn.Linear(config.hidden_size, sum(config.mamba_in_proj_sizes), bias=False)
        self.conv1d = nn.Conv1d(conv, conv, config.conv_kernel, groups=conv, bias=config.use_conv_bias)
        self.A_log = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.ones(heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.norm = GatedRMSNorm(inner, config.n_groups, config.norm_eps)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.scan = ChunkedScan(config.chunk_size)
        self.convolve = causal_conv  # `model.gpu` may put a kernel here
        self._reset_time_scales()

    @torch.no_grad()
    def _reset_time_scales(self) -> None:
        """dt log-uniform in [time_step_min, time_step_max], A uniform in [1, 16] (the Mamba-2 reference)."""
        low, high = math.log(self.config.time_step_min), math.log(self.config.time_step_max)
        dt = torch.empty_like(self.dt_bias).uniform_(low, high).exp().clamp(min=self.config.time_step_floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        self.A_log.copy_(torch.empty_like(self.A_log).uniform_(1, 16).log())

    def forward(self, x: Tensor, context: Context, cache: MambaCache | None = None) -> Tensor:
        """x (batch, seq, hidden) → the same shape; `cache` is read as what came before and moved on."""
        projected = self.in_proj(x)
        if cache is not None and not torch.is_grad_enabled() and self._plain():
            recurrence = Recurrence(self)
            if x.shape[1] == 1 or recurrence.serves(projected, cache):
                inner = recurrence(projected, cache, context.lengths)
                return self.out_proj(inner * recurrence.scale.to(inner.dtype))
        z, conv_in, dt = projected.split(self.config.mamba_in_proj_sizes, dim=-1)
        left = None if cache is None else cache.conv
        mixed = self.convolve(conv_in, self.conv1d.weight[:, 0], self.conv1d.bias, left, context.segment_ids)
        inputs, B, C = self.split(mixed)
        dt = self.time_steps(dt)
        if context.valid is not None:
            dt = dt * context.valid.unsqueeze(-1)
        start = None if cache is None else self._by_head(cache.ssm).flatten(1, 2)
        y, final = self.scan(inputs, dt, self.decay_rates(), B, C, self.D.float(), context.segment_ids, start)
        if cache is not None:
            self._by_head(cache.ssm).copy_(final.unflatten(1, (self.config.n_groups, -1)))
            cache.conv.copy_(_last_columns(cache.conv, conv_in, context.lengths))
        return self.out_proj(self.norm(y.flatten(2), z))

    def _plain(self) -> bool:
        """Whether nothing was put at the swap point or hooked into what the recurrence passes by."""
        inside = (self.scan, ChunkedScan), (self.norm, GatedRMSNorm), (self.conv1d, nn.Conv1d)
        return all(type(module) is kind and not module._forward_hooks for module, kind in inside)

    def split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Convolution output → x (…, heads, head_dim), B and C (…, groups, state)."""
        shared = self.config.n_groups * self.config.ssm_state_size
        x, B, C = mixed.split([self.config.mamba_inner_size, shared, shared], dim=-1)
        before = mixed.shape[:-1]
        groups = (*before, self.config.n_groups, self.config.ssm_state_size)
        return x.view(*before, -1, self.config.mamba_head_dim), B.view(groups), C.view(groups)

    def _by_head(self, ssm: Tensor) -> Tensor:
        """A memory (batch, groups, state, channels) seen as (batch, groups, heads of a group, head_dim, state)."""
        return ssm.unflatten(-1, (-1, self.config.mamba_head_dim)).permute(0, 1, 3, 4, 2)

    def time_steps(self, raw: Tensor) -> Tensor:
        dt = F.softplus(raw.float() + self.dt_bias)
        low, high = self.config.time_step_limit
        return dt if low == 0 and high == math.inf else dt.clamp(low, high)

    def decay_rates(self) -> Tensor:
        return -self.A_log.float().exp()


def _last_columns(held: Tensor, new: Tensor, lengths: Tensor | None) -> Tensor:
    """The last K − 1 columns of [held ‖ new] up to each row's last valid token."""
    both = torch.cat([held, new], dim=1)
    width = held.shape[1]
    if lengths is None:
        return both[:, both.shape[1] - width :]
    columns = lengths[:, None] + torch.arange(width, device=new.device)
    return both.gather(1, columns[:, :, None].expand(-1, -1, new.shape[-1]))
