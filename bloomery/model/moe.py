"""Mixture of experts: top-k routing, experts as stacked matrices, optional shared experts.

Router with sigmoid scores and selection bias: arXiv 2412.19437 §2.1.2. How the load is kept even: `model.balance`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bloomery.model import activation
from bloomery.model.balance import Balancing, Routing
from bloomery.model.config import ModelConfig
from bloomery.model.layers import MLP

_ALIGNED_BYTES = 16


class Router(nn.Module):
    """Which experts a token goes to, and with what weight."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        # Added to the scores for choosing only: moved by a balancing rule, never by gradients.
        bias = torch.zeros(config.n_routed_experts) if config.router_activation == "sigmoid" else None
        self.register_buffer("e_score_correction_bias", bias)
        self.e_score_correction_bias: Tensor | None

    def forward(self, x: Tensor) -> Routing:
        """x (tokens, hidden) → where they go, in float32 or better."""
        exact = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(exact), self.weight.to(exact))
        scores = logits.sigmoid() if self.config.router_activation == "sigmoid" else logits.softmax(-1)
        bias = self.e_score_correction_bias
        choice = scores if bias is None else scores + bias
        if self.config.n_group > 1:
            choice = self._best_groups(choice)
        indices = choice.topk(self.config.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(1, indices)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(indices, weights * self.config.routed_scaling_factor, scores, logits)

    def _best_groups(self, choice: Tensor) -> Tensor:
        """`choice` (tokens, experts) with −∞ outside the `topk_group` groups whose two best experts sum highest."""
        grouped = choice.unflatten(-1, (self.config.n_group, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.config.topk_group, dim=-1).indices
        other = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=choice.device).scatter_(1, best, False)
        return grouped.masked_fill(other.unsqueeze(-1), float("-inf")).flatten(-2)


class Experts(nn.Module):
    """All routed experts, stacked: up and gate (experts, inner, width), down (experts, width, inner). The width is
    `moe_latent_size` where that is set, else the hidden size."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        up = config.n_routed_experts, config.moe_intermediate_size, config.moe_latent_size or config.hidden_size
        self.gate_proj = nn.Parameter(torch.empty(up)) if config.mlp_gated else None
        self.up_proj = nn.Parameter(torch.empty(up))
        self.down_proj = nn.Parameter(torch.empty(up[0], up[2], up[1]))
        self.plain, self.gated = activation.PLAIN[config.mlp_hidden_act], activation.GATED[config.mlp_hidden_act]
        self.product = _grouped_linear  # swap point: who needs each product's input and gradient watches it here

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x (rows, width) sorted by expert, `counts` (experts,) rows of each → (rows, width)."""
        ends = counts.cumsum(0, dtype=torch.int32)
        inner = self.product(x, self.up_proj, ends)
        if self.gate_proj is None:
            inner = self.plain(inner)
        else:
            inner = self.gated(self.product(x, self.gate_proj, ends), inner)
        return self.product(inner, self.down_proj, ends)


def _grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows up to ends[e] (after those of e − 1) times weight[e]ᵀ: one grouped product where sizes suit its kernel."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    aligned = not any(size * x.element_size() % _ALIGNED_BYTES for size in weight.shape[1:])
    if not aligned or x.dtype == torch.float64:  # which the kernel does not know
        rows = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
        return torch.cat([F.linear(part, matrix) for part, matrix in zip(x.split(rows), weight, strict=True)])
    return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)


class Dispatch(nn.Module):
    """Brings tokens to experts and back. Swap point: replace `moe.dispatch` for expert parallelism or a kernel."""

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor, experts: Experts) -> Tensor:
        """x (…, width), indices and weights (tokens, k) → weighted sum of the chosen experts, the shape of x."""
        shape, x, choices = x.shape, x.flatten(0, -2), indices.shape[1]
        order = indices.flatten().argsort(stable=True)
        counts = torch.bincount(indices.flatten(), minlength=len(experts.up_proj))
        out = experts(x.index_select(0, order // choices), counts)
        out = out * weights.flatten()[order, None]
        return torch.zeros_like(x, dtype=out.dtype).index_add(0, order // choices, out).to(x.dtype).view(shape)


class MoE(nn.Module):
    """The `E` mixer."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        d, latent, shared = config.hidden_size, config.moe_latent_size, config.moe_shared_expert_intermediate_size
        self.fc1_latent_proj = nn.Linear(d, latent, bias=config.mlp_bias) if latent else None
        self.fc2_latent_proj = nn.Linear(latent, d, bias=config.mlp_bias) if latent else None
        self.shared_experts = MLP(config, shared) if shared else None
        self.shared_expert_gate = nn.Linear(d, 1, bias=False) if config.shared_expert_gate else None
        self.dispatch = Dispatch()
        self.balancing = Balancing(self.gate, config.pattern.count("E"))

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """x (batch, seq, hidden) → the same shape."""
        tokens = x.flatten(0, -2)
        routing = self.gate(tokens)
        weights = routing.weights
        if self.training and torch.is_grad_enabled():
            weights = self.balancing(routing, len(x))
        out = self._routed(tokens.view_as(x), routing.indices, weights)
        if self.shared_experts is None:
            return out
        shared = self.shared_experts(x)
        return out + (shared if self.shared_expert_gate is None else self.shared_expert_gate(x).sigmoid() * shared)

    def _routed(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        if self.fc1_latent_proj is None or self.fc2_latent_proj is None:
            return self.dispatch(x, indices, weights, self.experts)
        return self.fc2_latent_proj(self.dispatch(self.fc1_latent_proj(x), indices, weights, self.experts))
