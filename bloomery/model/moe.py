"""Mixture of experts: top-k routing, experts as stacked matrices, optional shared experts.

Router with sigmoid scores and selection bias: arXiv 2412.19437 §2.1.2; balance loss: arXiv 2101.03961 §2.2.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bloomery.model import activation
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

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (tokens, hidden) → expert indices and weights (tokens, k), and scores (tokens, experts), float32."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
        scores = logits.sigmoid() if self.config.router_activation == "sigmoid" else logits.softmax(-1)
        bias = self.e_score_correction_bias
        choice = scores if bias is None else scores + bias
        if self.config.n_group > 1:
            choice = self._best_groups(choice)
        indices = choice.topk(self.config.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(1, indices)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return indices, weights * self.config.routed_scaling_factor, scores

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

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x (rows, width) sorted by expert, `counts` (experts,) rows of each → (rows, width)."""
        ends = counts.cumsum(0, dtype=torch.int32)
        inner = _grouped_linear(x, self.up_proj, ends)
        if self.gate_proj is None:
            inner = self.plain(inner)
        else:
            inner = self.gated(_grouped_linear(x, self.gate_proj, ends), inner)
        return _grouped_linear(inner, self.down_proj, ends)


def _grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows up to ends[e] (after those of e − 1) times weight[e]ᵀ: one grouped product where sizes suit its kernel."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if any(size * x.element_size() % _ALIGNED_BYTES for size in weight.shape[1:]):
        rows = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
        return torch.cat([F.linear(part, matrix) for part, matrix in zip(x.split(rows), weight, strict=True)])
    return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)


class Dispatch(nn.Module):
    """Brings tokens to experts and back. Swap point: replace `moe.dispatch` for expert parallelism or a kernel."""

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor, experts: Experts) -> Tensor:
        """x (tokens, width), indices and weights (tokens, k) → weighted sum of the chosen experts (tokens, width)."""
        choices = indices.shape[1]
        order = indices.flatten().argsort(stable=True)
        counts = torch.bincount(indices.flatten(), minlength=len(experts.up_proj))
        out = experts(x.index_select(0, order // choices), counts)
        out = out * weights.flatten()[order, None]
        return torch.zeros_like(x, dtype=out.dtype).index_add(0, order // choices, out).to(x.dtype)


class MoE(nn.Module):
    """The `E` mixer. `balance` holds the last call's load-balancing loss, 1 when the experts share the load evenly."""

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
        self.balance: Tensor | None = None

    def forward(self, x: Tensor, *_: object) -> Tensor:
        tokens = x.flatten(0, -2)
        indices, weights, scores = self.gate(tokens)
        self.balance = balance_loss(indices, scores) if self.training else None
        out = self._routed(tokens, indices, weights).view_as(x)
        if self.shared_experts is None:
            return out
        shared = self.shared_experts(x)
        return out + (shared if self.shared_expert_gate is None else self.shared_expert_gate(x).sigmoid() * shared)

    def _routed(self, tokens: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        if self.fc1_latent_proj is None or self.fc2_latent_proj is None:
            return self.dispatch(tokens, indices, weights, self.experts)
        return self.fc2_latent_proj(self.dispatch(self.fc1_latent_proj(tokens), indices, weights, self.experts))


def balance_loss(indices: Tensor, scores: Tensor) -> Tensor:
    """experts · Σ_e (share of choices that fell on e) · (mean normalised score of e): 1 at perfect balance."""
    experts = scores.shape[-1]
    share = torch.bincount(indices.flatten(), minlength=experts) / indices.numel()
    probability = (scores / scores.sum(-1, keepdim=True)).mean(0)
    return experts * (share * probability).sum()
