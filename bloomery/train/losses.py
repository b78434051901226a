"""Objectives: `(model, batch) → Loss`. They lead from hidden states to numbers; the model ends at its last norm."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bloomery.data.pack import IGNORE, Batch
from bloomery.errors import ConfigError
from bloomery.model import balance
from bloomery.train.cross_entropy import cross_entropy, logprobs_and_entropy

Metric = tuple[Tensor | float, Tensor | float]


@dataclass
class Loss:
    """What an objective returns for one micro-batch.

    `sum` is a scalar with gradient and `weight` what it must be divided by (tokens, pairs, …). Both are summed over the
    micro-batches of a step and divided once, which makes the mean global. `metrics`: name → (sum, weight), no gradient.
    """

    sum: Tensor
    weight: Tensor | float
    metrics: dict[str, Metric] = field(default_factory=dict)


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """(batch, seq, hidden): the model run over a micro-batch, documents kept apart."""
    return model(batch["input_ids"], segment_ids=batch.get("segment_ids"), position_ids=batch.get("position_ids"))


def next_token(model: nn.Module, batch: Batch, sources: Sequence[str] = ()) -> Loss:
    """Cross-entropy in nats summed over the labelled positions; the weight is their number.

    sources: names of the batch's `source_ids`, for the metrics `loss/{source}`; without names, their numbers are used.
    Layers with experts are balanced as `model.balance` says (metrics `balance`, `imbalance`).
    """
    if torch.is_grad_enabled():
        balance.weigh(model, batch["labels"] != IGNORE, batch.get("counted"))
    hidden, labels, places = _labelled(hidden_states(model, batch), batch["labels"])
    total, losses = cross_entropy(hidden, _head(model), labels)
    metrics = _by_source(losses, batch, places, sources)
    balancing = balance.terms(model) if torch.is_grad_enabled() else None
    if balancing is not None:
        total, metrics = total + balancing[0], metrics | balancing[1]
    return Loss(total, len(labels), metrics)


def token_logprobs(
    model: nn.Module, batch: Batch, temperature: float, forbidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """log p(label) and entropy of softmax(logits / temperature), each (batch, seq) fp32 with gradient.

    Both are 0 where there is no label. forbidden: (vocabulary,) bool, the tokens the sampler never draws: they get
    probability 0 here too. Raises `ConfigError` for a temperature of 0, whose policy is no distribution.
    AceReason-Nemotron, arXiv 2505.16400.
    """
    if not temperature > 0:
        raise ConfigError(
            f"temperature: {temperature:g} gives no distribution to learn from; choose a value above 0, usually 1"
        )
    labels = batch["labels"]
    hidden, kept, places = _labelled(hidden_states(model, batch), labels)
    values = logprobs_and_entropy(hidden, _head(model), kept, temperature, forbidden)
    if places is None:
        return values[0].view(labels.shape), values[1].view(labels.shape)
    empty = values[0].new_zeros(labels.numel())
    logprobs, entropy = (empty.index_copy(0, places, value).view(labels.shape) for value in values)
    return logprobs, entropy


def _head(model: nn.Module) -> Tensor:
    head = model.lm_head
    assert isinstance(head, nn.Linear), "lm_head is a plain matrix in every family"
    assert head.bias is None, "no family has a bias in lm_head"
    return head.weight


def _labelled(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden (n, hidden) and labels (n,) of the labelled positions, and their places in the flat batch; `None`: all."""
    hidden, labels = hidden.flatten(0, 1), labels.flatten()
    places = (labels != IGNORE).nonzero().squeeze(1)
    if len(places) == len(labels):
        return hidden, labels, None
    return hidden.index_select(0, places), labels[places], places


def _by_source(losses: Tensor, batch: Batch, places: Tensor | None, names: Sequence[str]) -> dict[str, Metric]:
    """`loss/{source}` → (sum, tokens), for the sources that the batch numbers."""
    if "source_ids" not in batch:
        return {}
    source = batch["source_ids"].flatten().long()
    source = source if places is None else source[places]
    count = len(names) or int(batch["source_ids"].max()) + 1
    sums = losses.new_zeros(count).index_add_(0, source, losses)
    weights = torch.bincount(source, minlength=count)
    return {f"loss/{names[i] if names else i}": (sums[i], weights[i]) for i in range(count)}
