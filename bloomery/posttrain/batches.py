"""Rollouts as micro-batches: generated tokens as they are, their advantages, and what each counts in the mean."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bloomery.data.pack import IGNORE, Batch
from bloomery.posttrain.objectives import (
    Aggregation,
    Baseline,
    Scale,
    advantages,
    overlong_penalty,
    row_weights,
)
from bloomery.posttrain.rl_config import Overlong
from bloomery.posttrain.rollouts import Rollouts, Sample

_FEWEST_ROWS = 16
_MOST_PADDING = 0.25
_AT_FACE_VALUE = Overlong()


@dataclass(frozen=True)
class Row:
    """One completion to learn from."""

    sample: Sample
    advantage: float
    weight: float

    @property
    def length(self) -> int:
        """Positions trained on or read: prompt and completion without the last token."""
        return len(self.sample.prompt.ids) + self.sample.tokens - 1


def micro_batches(
    rollouts: Rollouts, micro_batch_size: int, pad_id: int, aggregation: Aggregation, max_new_tokens: int,
    baseline: Baseline = "group_mean", scale: Scale = "group_std", keep_all: bool = False,
    overlong: Overlong = _AT_FACE_VALUE, active_only: bool = False,
) -> list[Batch]:  # fmt: skip
    """The micro-batches of one optimizer step: rows of like length together, at most `micro_batch_size` of them.

    Beside the keys of every batch: `advantages` (batch,), `generator_logprobs` (batch, seq), `row_weights` (batch,)
    that multiply each token's loss, and `loss_weight` (1,): this micro-batch's part of the step's denominator;
    `counted` (batch, seq) bool: what is no padding; `label_weight` (1,): the denominator over the step's learnt tokens.
    A sample without verdict, one left alone in its group and, with `overlong.filter`, one cut off is masked: it is
    neither trained on nor counted. A sample with advantage 0 is counted, unless `active_only`, and, unless `keep_all`,
    not computed: its gradient is zero.
    """
    found = _weighed(rollouts, aggregation, max_new_tokens, baseline, scale, overlong, active_only)
    values, weights, parts = found.advantages, found.weights, found.parts
    counted = found.tokens > 0
    chosen = counted & (torch.ones_like(counted) if keep_all else values != 0)
    places = chosen.flatten().nonzero().flatten().tolist()
    rows = [Row(rollouts.samples[i], values.flatten()[i].item(), weights[i].item()) for i in places]
    batches = [_to_batch(part, pad_id) for part in split_by_length(rows, micro_batch_size)]
    learnt = sum(row.sample.tokens for row in rows)
    for batch in batches:
        batch["loss_weight"] = parts.sum(dtype=torch.float32)[None] / len(batches)
        batch["label_weight"] = parts.sum(dtype=torch.float32)[None] / learnt
    return batches


def gradient_shares(
    rollouts: Rollouts, aggregation: Aggregation, max_new_tokens: int, baseline: Baseline = "group_mean",
    scale: Scale = "group_std", overlong: Overlong = _AT_FACE_VALUE, active_only: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Domain → its share of Σ w · m · |A|, w being the aggregation's weight of a token (1 under `token_mean`), m the
    learnt tokens: how much each domain has to say in the step. Empty where nothing is learnt."""
    found = _weighed(rollouts, aggregation, max_new_tokens, baseline, scale, overlong, active_only)
    said = (found.weights * found.tokens.flatten() * found.advantages.flatten().abs()).tolist()
    sums: dict[str, float] = {}
    for sample, value in zip(rollouts.samples, said, strict=True):
        sums[sample.prompt.domain] = sums.get(sample.prompt.domain, 0.0) + value
    total = sum(sums.values())
    return {domain: value / total for domain, value in sums.items()} if total else {}


@dataclass(frozen=True)
class _Weighed:
    """Of each sample its advantage and the learnt tokens, (groups, samples); the weight of each token's loss and its
    part of the denominator, (samples,)."""

    advantages: Tensor
    tokens: Tensor
    weights: Tensor
    parts: Tensor


def _weighed(
    rollouts: Rollouts, aggregation: Aggregation, max_new_tokens: int, baseline: Baseline, scale: Scale,
    overlong: Overlong, active_only: bool,
) -> _Weighed:  # fmt: skip
    values = _advantages(rollouts, max_new_tokens, baseline, scale, overlong)
    counted = rollouts.valid & (rollouts.valid.sum(-1, keepdim=True) > 1)
    if overlong.filter:  # after the advantages: a cut-off sample still is part of its group's baseline
        counted = counted & ~rollouts.truncated
    if active_only:
        counted = counted & (values != 0)
    tokens = rollouts.lengths * counted
    group_tokens = tokens.sum(-1, keepdim=True).expand_as(tokens).flatten()
    domain = _domains(rollouts, tokens) if aggregation == "domain_balanced" else (None, None)
    weights, parts = row_weights(tokens.flatten(), aggregation, group_tokens, max_new_tokens, *domain)
    return _Weighed(values, tokens, weights, parts)


def _domains(rollouts: Rollouts, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of each sample's domain the learnt tokens and the share of the groups, among domains with any; (samples,)."""
    names = [group[0].prompt.domain for group in rollouts.groups]
    learnt: dict[str, int] = dict.fromkeys(names, 0)
    for name, count in zip(names, tokens.sum(-1).tolist(), strict=True):
        learnt[name] += count
    groups = sum(learnt[name] > 0 for name in names)
    shares = {name: names.count(name) / max(groups, 1) for name in learnt}
    size = tokens.shape[-1]
    spread = torch.tensor([[learnt[name], shares[name]] for name in names], dtype=torch.float64)
    return spread[:, 0].repeat_interleave(size), spread[:, 1].repeat_interleave(size)


def _advantages(
    rollouts: Rollouts, max_new_tokens: int, baseline: Baseline, scale: Scale, overlong: Overlong
) -> Tensor:
    """(groups, samples). Of verdicts shaped by length; a group whose bare verdicts are equal teaches nothing."""
    shaped = rollouts.rewards + overlong_penalty(rollouts.lengths, max_new_tokens, overlong.penalty_tokens)
    found = advantages(shaped, rollouts.valid, baseline, scale)
    return found.masked_fill(rollouts.degenerate[:, None], 0.0)


def split_by_length(rows: Sequence[Row], most: int) -> list[list[Row]]:
    """Rows sorted by length and cut after `most`, or earlier where a shorter row would be a quarter padding."""
    parts: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -row.length):
        last = parts[-1] if parts else []
        padded = last and len(last) >= _FEWEST_ROWS and row.length < (1 - _MOST_PADDING) * last[0].length
        if not last or len(last) == most or padded:
            parts.append([])
        parts[-1].append(row)
    return parts


def _to_batch(rows: Sequence[Row], pad_id: int) -> Batch:
    """Right-padded; what is learnt is marked by lengths, never by a token's value."""
    shape = (len(rows), max(row.length for row in rows))
    input_ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORE)
    logprobs, counted = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        completion, start = row.sample.completion, len(row.sample.prompt.ids) - 1
        assert completion.logprobs is not None, "training needs the generator's log-probabilities"
        input_ids[i, : row.length] = torch.tensor([*row.sample.prompt.ids, *completion.token_ids[:-1]])
        labels[i, start : row.length] = torch.tensor(completion.token_ids)
        logprobs[i, start : row.length] = torch.tensor(completion.logprobs)
        counted[i, : row.length] = True
    return {
        "input_ids": input_ids, "labels": labels, "counted": counted, "generator_logprobs": logprobs,
        "advantages": _column(row.advantage for row in rows), "row_weights": _column(row.weight for row in rows),
    }  # fmt: skip


def _column(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float32)


def to_json(batches: Sequence[Batch]) -> list[dict[str, Any]]:
    """Micro-batches as plain values, to the bit: what a checkpoint keeps of a batch of rollouts that is not used up."""
    return [
        {name: (str(value.dtype).removeprefix("torch."), value.tolist()) for name, value in batch.items()}
        for batch in batches
    ]


def from_json(batches: Sequence[dict[str, Any]]) -> list[Batch]:
    """The batches that `to_json` was given."""
    return [
        {name: torch.tensor(values, dtype=getattr(torch, dtype)) for name, (dtype, values) in batch.items()}
        for batch in batches
    ]
