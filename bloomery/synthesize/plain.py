"""A decoder whose every operation torch can differentiate by itself, as `torch.func` asks: textbook forms of what the
model computes with kernels and written-out backwards. Slow (the scan is quadratic in the sequence, all experts see all
tokens) and independent of the fast forms, which makes it their oracle.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bloomery.model.attention import Attention
from bloomery.model.context import Context
from bloomery.model.decoder import Decoder
from bloomery.model.layers import MLP
from bloomery.model.mamba import Mamba
from bloomery.model.moe import Dispatch, Experts
from bloomery.model.norm import GatedRMSNorm, RMSNorm

_ACTIVATIONS = {"silu": F.silu, "relu2": lambda x: F.relu(x).square()}


@contextmanager
def plain(model: Decoder) -> Iterator[None]:
    """Inside, `model` runs in plain operations. Whole sequences without documents, padding or state."""
    activation = _ACTIVATIONS[model.config.mlp_hidden_act]
    with ExitStack() as undo:
        for module in model.modules():
            for name, value in _replacements(module, activation).items():
                undo.callback(setattr if name in module.__dict__ else _forget, module, name, module.__dict__.get(name))
                module.__dict__[name] = value
        yield


def _forget(module: nn.Module, name: str, _: object) -> None:
    del module.__dict__[name]


def _replacements(module: nn.Module, activation: Any) -> dict[str, Any]:
    """Attributes of a module and what stands for them."""
    if isinstance(module, RMSNorm):
        return {"forward": partial(_norm, module)}
    if isinstance(module, GatedRMSNorm):
        return {"forward": partial(_gated_norm, module)}
    if isinstance(module, Attention):
        return {"forward": partial(_attention, module)}
    if isinstance(module, MLP):
        return {"plain": activation, "gated": lambda gate, x: activation(gate) * x}
    if isinstance(module, Mamba):
        return {"convolve": _convolve, "scan": _scan}
    if isinstance(module, Dispatch):
        return {"forward": partial(_mixture, activation)}
    return {}


def _norm(module: RMSNorm, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.eps) * module.weight


def _gated_norm(module: GatedRMSNorm, y: Tensor, gate: Tensor) -> Tensor:
    gated = (y * F.silu(gate)).unflatten(-1, (module.groups, -1))
    return (gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + module.eps)).flatten(-2) * module.weight


def _attention(module: Attention, x: Tensor, context: Context, *_: object) -> Tensor:
    query, key, value = (
        proj(x).unflatten(2, (-1, module.head_dim)) for proj in (module.q_proj, module.k_proj, module.v_proj)
    )
    if module.q_norm is not None and module.k_norm is not None:
        query, key = module.q_norm(query), module.k_norm(key)
    if context.rope is not None:
        query, key = _rotate(query, *context.rope), _rotate(key, *context.rope)
    groups = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(groups, 2), value.repeat_interleave(groups, 2)
    scores = torch.einsum("bthd,bshd->bhts", query, key) / module.head_dim**0.5
    places = torch.arange(x.shape[1], device=x.device)
    distance = places[:, None] - places
    seen = (distance >= 0) & (distance < (context.sliding_window or len(places)))
    mixed = torch.einsum("bhts,bshd->bthd", scores.masked_fill(~seen, float("-inf")).softmax(-1), value)
    return module.o_proj(mixed.flatten(2))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, *_: object) -> Tensor:
    padded = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight.unsqueeze(1), bias, groups=len(weight))).transpose(1, 2)


def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *_: object) -> tuple[Tensor, None]:
    """y_t = Σ_{s ≤ t} exp(Σ_{s < r ≤ t} dt_r·A) (C_t·B_s) dt_s·x_s + D·x_t."""
    heads = x.shape[2]
    B, C = (t.repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    sums = (dt * A).cumsum(1)
    places = torch.arange(x.shape[1], device=x.device)
    later = (places[:, None] < places)[:, :, None]
    decay = (sums[:, :, None] - sums[:, None]).masked_fill(later, float("-inf")).exp()
    scores = torch.einsum("bthn,bshn->btsh", C, B) * decay * dt[:, None]
    return torch.einsum("btsh,bshp->bthp", scores, x) + D[:, None] * x, None


def _mixture(activation: Any, x: Tensor, indices: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    tokens, number = x.flatten(0, -2), torch.arange(len(experts.up_proj), device=x.device)
    shares = ((indices.unsqueeze(2) == number) * weights.unsqueeze(2)).sum(1)
    inner = torch.einsum("tw,eiw->tei", tokens, experts.up_proj)
    if experts.gate_proj is None:
        inner = activation(inner)
    else:
        inner = activation(torch.einsum("tw,eiw->tei", tokens, experts.gate_proj)) * inner
    return torch.einsum("tei,ewi,te->tw", inner, experts.down_proj, shares).view(x.shape)
