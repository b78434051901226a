"""Keeping experts evenly loaded: losses that only the router sees, and a selection bias that follows the load.

Balance loss: arXiv 2101.03961 §2.2; over the global batch: arXiv 2501.11873; z-loss: arXiv 2202.08906 §3.2;
selection bias: arXiv 2408.15664.

The losses reach the router without passing through the model's output: their gradient, known in the forward pass, joins
that of the experts' weights (`_Joined`). So they work in every piece of a model, also where another process computes
the loss. Whoever trains calls `weigh` before each forward pass, and `after_step` after each optimizer step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from bloomery.config import RUN_ONLY, Config, Field
from bloomery.errors import ConfigError

if TYPE_CHECKING:
    from bloomery.model.moe import Router

Metrics = dict[str, tuple[Tensor | float, Tensor | float]]


class BalanceConfig(Config):
    """How the load of experts is kept even; refused for a model that has none."""

    kind: Literal["batch", "sequence", "global"] = Field(
        default="batch",
        description="The load is to be even within each micro-batch, each sequence, or the batch of a step",
    )
    weight: float = Field(
        default=0.01, ge=0, description="Factor of the load-balancing loss, 1 when even (dimensionless)"
    )
    z_weight: float = Field(default=0.0, ge=0, description="Factor of the squared log-sum of router logits, often 1e-3")
    bias_rate: float = Field(
        default=0.0,
        ge=0,
        description="Change of the selection bias per step, towards experts with less load, often 1e-3",
    )
    capacity_factor: float | None = Field(
        default=None, gt=0, description="Copies of tokens an expert takes at most, over an even load; none: all"
    )
    drop: Literal["sub_sequence", "full_sequence"] = Field(
        default="sub_sequence", description="Whose tokens share a capacity: those of one rank, or of the micro-batch"
    )
    drop_policy: Literal["probs", "position"] = Field(
        default="probs", description="What an expert keeps: the copies with the greatest weights, or the earliest"
    )
    pad: bool = Field(
        default=False,
        json_schema_extra=RUN_ONLY,
        description="Send every expert its whole capacity, so that no shape depends on the data; same result",
    )

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.capacity_factor is None and (self.pad or self.drop != "sub_sequence" or self.drop_policy != "probs"):
            raise ValueError("drop, drop_policy and pad have no effect without capacity_factor; set it, often to 1")
        return self


class Routing(NamedTuple):
    """Of each token: experts and their weights (tokens, k), and scores and logits of all (tokens, experts)."""

    indices: Tensor
    weights: Tensor
    scores: Tensor
    logits: Tensor


class Balancing:
    """The balancing terms of one layer.

    Swap points: `total` and `total_step` sum a tensor, in place, over the processes that share the tokens of a
    micro-batch, and over all that hold tokens of the step; `more` gives metrics of the last forward pass.
    """

    def __init__(self, gate: "Router", layers: int):
        """layers: of the whole model that have experts; the terms are means over them."""
        self.config = BalanceConfig()
        self.gate, self.layers = gate, layers
        self.total: Callable[[Tensor], Tensor] = _alone
        self.total_step: Callable[[Tensor], Tensor] = _alone
        self.more: Callable[[], Metrics] = dict
        self.labels: Labels | None = None  # of the next forward pass, which uses them up
        self.found: Found | None = None
        self.load: Tensor | None = None  # choices of each expert so far in this step: this process's
        self._seen: Tensor | None = None  # and all processes', for `global`

    def __call__(self, routing: Routing, sequences: int) -> Tensor:
        """The weights (tokens, k), their backward now also that of the terms. Tokens are those of `sequences` equally
        long sequences, one after another."""
        scores, squares = routing.scores, None
        probability = scores / scores.sum(-1, keepdim=True)
        if self.config.z_weight:
            squares = routing.logits.logsumexp(-1, keepdim=True).square()
        slope, slope_z, mask = None, None, None
        if not _is_replay():
            mask = None if self.labels is None else self.labels.mask
            units = max(sequences, 1) if self.config.kind == "sequence" else 1
            counts = _count(routing.indices, mask, units, scores.shape[-1])
            slope, slope_z = self._measure(counts, *_sums(units, mask, probability, squares))
        weights = _Joined.apply(routing.weights, probability, slope, mask)
        return weights if squares is None else _Joined.apply(weights, squares, slope_z, mask)

    def _measure(self, counts: Tensor, sums: Tensor, squares: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Keeps the terms' values for the report, and returns their gradients for each token, (units, experts) and
        (1, 1), from what is summed over the tokens of each unit."""
        load = counts.sum(0)
        self.load = load if self.load is None else self.load + load
        shared = self.total(counts.clone())
        tokens = (shared.sum(-1, keepdim=True) // self.gate.config.num_experts_per_tok).to(sums.dtype).clamp(min=1)
        share = self._share(counts, shared).to(sums.dtype)
        experts, labels = sums.shape[-1], self.labels
        values = experts * (share * (sums / tokens)).sum(-1)
        z = None if squares is None else squares / tokens.sum()
        self.found = Found(_mean(values, labels), z, (share.amax(-1) * experts).mean(), labels)
        self.labels = None
        if labels is None:
            return None, None
        scale = labels.worth(self.config.weight, len(values), sums.dtype) / self.layers
        slope_z = labels.worth(self.config.z_weight, 1, sums.dtype) / self.layers / tokens.sum()
        return (scale[:, None] * experts) * share / tokens, slope_z[:, None]

    def _share(self, counts: Tensor, shared: Tensor) -> Tensor:
        """Of the choices, what fell on each expert; for `global` in all micro-batches of the step so far."""
        if self.config.kind == "global":
            own = self.total_step(counts.clone())
            shared = self._seen = own if self._seen is None else self._seen + own
        exact = shared.double()
        return exact / exact.sum(-1, keepdim=True).clamp(min=1)

    def take_load(self) -> Tensor | None:
        """(experts,) choices of this process since the last call, which begins a new step."""
        load, self.load, self._seen = self.load, None, None
        return load


@dataclass(frozen=True)
class Labels:
    """Of each sequence of a micro-batch, (batch,): over all processes that share it, and this process's own. mask:
    (tokens, 1) bool, which tokens are no padding."""

    all: Tensor
    own: Tensor
    mask: Tensor | None

    def worth(self, weight: float, units: int, dtype: torch.dtype) -> Tensor:
        """What the objective's sum gets for one of a term, for each sequence or, if `units` is 1, for all: (units,)."""
        labels = self.all if units == len(self.all) else self.all.sum(0, keepdim=True)
        return (weight * labels.double()).to(dtype)


@dataclass(frozen=True)
class Found:
    """A layer's terms in the last forward pass, this process's share of them: balance, z; and the fullest expert's load
    over the mean."""

    balance: Tensor
    z: Tensor | None
    peak: Tensor
    labels: Labels | None


class _Joined(torch.autograd.Function):
    """weights; backward, `term` (tokens, n) gets the gradient `slope` (units, n), that of the unit a token is in."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, term: Tensor, slope: Tensor | None, mask: Tensor | None) -> Tensor:
        # Attributes, not saved tensors: activations that are made again must not change them.
        ctx.slope, ctx.mask, ctx.tokens = slope, mask, len(term)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        if ctx.slope is None:
            return grad, None, None, None
        slope = ctx.slope[:, None].expand(-1, ctx.tokens // len(ctx.slope), -1).flatten(0, 1)
        return grad, slope if ctx.mask is None else slope * ctx.mask, None, None


def balancings(model: nn.Module) -> list[Balancing]:
    """Those of the layers with experts, in order."""
    found = (getattr(module, "balancing", None) for module in model.modules())
    return [each for each in found if isinstance(each, Balancing)]


def install(model: nn.Module, config: BalanceConfig) -> None:
    """Balance all layers with experts by `config`. Raises `ConfigError` for a bias that no router has, and for settings
    of a model without experts."""
    layers = balancings(model)
    if not layers and config != BalanceConfig():
        raise ConfigError("balance: without effect, the model has no layer with experts; leave it out")
    for each in layers:
        if config.bias_rate and each.gate.e_score_correction_bias is None:
            raise ConfigError(
                f"balance.bias_rate: {config.bias_rate:g}, but the model's softmax router has no selection bias; "
                "set it to 0, or train a model with router_activation sigmoid"
            )
        each.config = config


def weigh(
    model: nn.Module, labelled: Tensor, counted: Tensor | None = None, label_weight: Tensor | None = None
) -> None:
    """To be called before the forward pass of a micro-batch whose loss is a sum over labels.

    The terms of that pass get the weight of its labels, so that they are means like the loss. labelled: (batch, seq)
    bool, this process's part; counted: (batch, seq) bool, the tokens that are no padding; `None` for all.
    label_weight: (1,), what a label weighs where the loss is divided by something else than their number.
    """
    layers = balancings(model)
    if layers:
        own = labelled.sum(-1)
        if label_weight is not None:
            own = own * label_weight.double()
        mask = None if counted is None else counted.flatten()[:, None]
        labels = Labels(layers[0].total(own.clone()), own, mask)
        for each in layers:
            each.labels = labels


def terms(model: nn.Module) -> tuple[Tensor, Metrics] | None:
    """What the last forward pass adds to the objective's sum (without gradient, which it has already), and metrics.

    `None` for a model without experts, and where `weigh` was not called. Each process gives its share: sums over
    processes, also over those with other layers, are right.
    """
    own_layers = balancings(model)
    found = [each.found for each in own_layers if each.found is not None]
    if not found or found[0].labels is None:
        return None
    labels, config, layers = found[0].labels, own_layers[0].config, own_layers[0].layers
    own = labels.own.sum() * len(found) / layers
    balance = torch.stack([each.balance for each in found]).sum() / layers
    total = labels.worth(config.weight, 1, balance.dtype)[0] * balance
    metrics: Metrics = {"balance": (balance * labels.all.sum(), own)}
    metrics["imbalance"] = (torch.stack([each.peak for each in found]).sum(), len(found))
    squares = [each.z for each in found if each.z is not None]
    if squares:
        z = torch.stack(squares).sum() / layers
        total = total + labels.worth(config.z_weight, 1, z.dtype)[0] * z
        metrics["router_z"] = (z * labels.all.sum(), own)
    for each in own_layers:
        for name, (part, share) in each.more().items():
            before = metrics.get(name, (0.0, 0.0))
            metrics[name] = (before[0] + part, before[1] + share)
    return total, metrics


@torch.no_grad()
def after_step(model: nn.Module) -> None:
    """Moves the selection biases of routers that have a rate, and begins a new step. The load is that of all processes
    and micro-batches of the step."""
    moved = [(each, load) for each in balancings(model) if (load := each.take_load()) is not None]
    moved = [(each, load) for each, load in moved if each.config.bias_rate]
    if not moved:
        return
    load = moved[0][0].total_step(torch.stack([load for _, load in moved])).double()
    steps = (load.mean(-1, keepdim=True) - load).sign()
    for (each, _), step in zip(moved, steps, strict=True):
        bias = each.gate.e_score_correction_bias
        assert bias is not None, "install refuses a rate without a bias"
        bias += each.config.bias_rate * step.to(bias.dtype)


def _count(indices: Tensor, mask: Tensor | None, units: int, experts: int) -> Tensor:
    """Choices of each expert, (units, experts) int64."""
    unit = torch.arange(units, device=indices.device).repeat_interleave(len(indices) // units)
    ones = torch.ones_like(indices) if mask is None else mask.to(indices.dtype).expand_as(indices)
    counts = torch.zeros(units * experts, dtype=torch.int64, device=indices.device)
    counts.scatter_add_(0, (indices + unit[:, None] * experts).flatten(), ones.flatten())
    return counts.view(units, experts)


def _mean(values: Tensor, labels: Labels | None) -> Tensor:
    """Of the sequences' values, by their labels."""
    if len(values) == 1 or labels is None:
        return values.mean()
    weights = labels.all.to(values.dtype)
    total = weights.sum()
    return (values * weights).sum() / total.where(total > 0, torch.ones_like(total))


def _alone(x: Tensor) -> Tensor:
    return x


def _sums(units: int, mask: Tensor | None, probability: Tensor, squares: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Probabilities (units, experts) and squares () summed over the tokens that count, without gradient."""
    if mask is not None:
        probability, squares = probability * mask, None if squares is None else squares * mask
    probability = probability.detach()
    sums = probability.unflatten(0, (units, len(probability) // units)).sum(1)
    return sums, None if squares is None else squares.detach().sum()


def _is_replay() -> bool:
    """Whether this forward pass runs inside a backward pass, to make its activations again."""
    return torch._C._current_graph_task_id() != -1
