"""Norms, activations and the MLP: what several mixers share."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bloomery.model.config import ModelConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in float32, cast back (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class GatedRMSNorm(nn.Module):
    """RMSNorm of y·SiLU(gate) inside each of `groups` equal slices of the channels: gate first, norm after."""

    def __init__(self, size: int, groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.groups, self.eps = groups, eps

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        v = y.float() * F.silu(gate.float())
        v = v.unflatten(-1, (self.groups, -1))
        v = F.rms_norm(v, v.shape[-1:], None, self.eps).flatten(-2)
        return (v * self.weight).to(gate.dtype)


def squared_relu(x: Tensor) -> Tensor:
    """max(0, x)² (arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS = {"silu": F.silu, "relu2": squared_relu}


class MLP(nn.Module):
    """down(act(up(x))), or with a gate down(act(gate(x))·up(x))."""

    def __init__(self, config: ModelConfig, intermediate_size: int):
        super().__init__()
        sizes = config.hidden_size, intermediate_size
        self.gate_proj = nn.Linear(*sizes, bias=config.mlp_bias) if config.mlp_gated else None
        self.up_proj = nn.Linear(*sizes, bias=config.mlp_bias)
        self.down_proj = nn.Linear(*reversed(sizes), bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.mlp_hidden_act]

    def forward(self, x: Tensor, *_: object) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
