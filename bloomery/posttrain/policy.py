"""The objective of reinforcement learning, `(model, batch) → Loss`, and its proof of being on-policy."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bloomery.data.pack import IGNORE, Batch
from bloomery.errors import DivergenceError
from bloomery.model import balance
from bloomery.posttrain import objectives
from bloomery.posttrain.ranks import Ranks
from bloomery.posttrain.rl_config import Clip, Correction
from bloomery.train.losses import Loss, Metric, token_logprobs

if TYPE_CHECKING:
    from bloomery.parallel.apply import Parallel


class PolicyGradient:
    """Policy-gradient loss over the micro-batches of `batches.micro_batches`.

    temperature: the sampler's, so that log-probabilities are those of the policy that wrote the samples.
    clip: bounds of the clipped objective, whose batches also hold `old_logprobs` (batch, seq): those of the policy
    before the first update that learns from these samples; None: on-policy.
    kl: weight of the penalty against `reference_logprobs` (batch, seq); 0: none.
    correction: weights for a generator that is not exactly the policy; None: none.
    max_logprob_gap: largest mean |log π_old − log π_generator| of a micro-batch, in nats per token. The two are one
    model computed in two ways; beyond this, `DivergenceError` is raised before anything is learnt, on all ranks.
    ranks: those that call this together, each with its own tokens.
    """

    def __init__(
        self, temperature: float, max_logprob_gap: float, clip: Clip | None = None, kl: float = 0.0,
        correction: Correction | None = None, ranks: Ranks | None = None,
    ):  # fmt: skip
        self.max_logprob_gap, self.clip, self.kl, self.correction = max_logprob_gap, clip, kl, correction
        self.ranks = ranks or Ranks()
        self.begin({}, temperature)

    def begin(self, metrics: Mapping[str, float], temperature: float) -> None:
        """A new step, whose rollouts have these metrics; they are reported with its first micro-batch."""
        self.temperature = temperature
        reported = metrics if self.ranks.counts else {}
        self._rollout_metrics: dict[str, Metric] = {name: (value, 1.0) for name, value in reported.items()}
        self.largest_gap = 0.0
        """Largest gap of a single token of this rank in this step, nats."""

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """Gradients of `sum`, over `weight`, ascend the expected advantage. Layers with experts are balanced as
        `model.balance` says, over the learnt completions and their prompts."""
        balance.weigh(model, batch["labels"] != IGNORE, batch["counted"], batch["label_weight"])
        logprobs, entropy = token_logprobs(model, batch, self.temperature)
        mask = batch["labels"] != IGNORE
        old = batch.get("old_logprobs", logprobs.detach())
        metrics = self._rollout_metrics | self._certify(old, batch["generator_logprobs"], mask)
        self._rollout_metrics = {}
        losses = self._losses(logprobs, old, batch, mask, metrics)
        metrics["entropy"] = (entropy.detach()[mask].sum(), mask.sum())
        if self.kl:
            penalty = objectives.kl_penalty(logprobs, batch["reference_logprobs"])
            losses = losses + self.kl * penalty
            metrics["reference_kl"] = (penalty.detach()[mask].sum(), mask.sum())
        total = objectives.aggregate(losses, mask, batch["row_weights"])
        balancing = balance.terms(model)
        if balancing is not None:
            total, metrics = total + balancing[0], metrics | balancing[1]
        return Loss(total, batch["loss_weight"].sum(), metrics)

    def _losses(
        self, logprobs: Tensor, old: Tensor, batch: Batch, mask: Tensor, metrics: dict[str, Metric]
    ) -> Tensor:  # fmt: skip
        """Per token, (batch, seq); what was clipped or weighted goes into `metrics`."""
        gain, clip = batch["advantages"][:, None], self.clip
        if clip is None:
            losses = objectives.on_policy(logprobs, gain)
        else:
            losses = objectives.clipped(logprobs, old, gain, clip.low, clip.high, clip.dual)
            clipped = objectives.is_clipped(logprobs.detach(), old, gain, clip.low, clip.high)
            metrics["clipped"] = (clipped[mask].sum(), mask.sum())
        if self.correction is None:
            return losses
        kind, low, high = self.correction.kind, self.correction.low, self.correction.high
        generated = batch["generator_logprobs"]
        weights = objectives.mismatch_weights(old, generated, mask, kind, low, high, self.ranks.total)
        metrics["mismatch_weight"] = (weights[mask].sum(), mask.sum())
        return losses * weights

    def _certify(self, logprobs: Tensor, generated: Tensor, mask: Tensor) -> dict[str, Metric]:
        """Compare the trainer's log-probabilities with the generator's. (batch, seq) each."""
        ours, theirs = logprobs[mask], generated[mask]
        gaps = (ours - theirs).abs()
        mean, largest = self.ranks.mean(gaps), gaps.max().item() if len(gaps) else 0.0
        self.largest_gap = max(self.largest_gap, largest)
        if not mean <= self.max_logprob_gap:
            raise DivergenceError(
                f"the trainer's log-probabilities are {mean:.3g} nats per token (largest "
                f"{largest:.3g}) away from the generator's, at most {self.max_logprob_gap:g} allowed: the "
                "samples are not from the policy being trained. Stale weights or caches in the generator, another "
                "temperature, or too low a precision do this; raise max_logprob_gap only if the precision explains it"
            )
        drift = objectives.kl_penalty(theirs, ours)
        return {"logprob_gap": (gaps.sum(), mask.sum()), "generator_kl": (drift.sum(), mask.sum())}


@torch.no_grad()
def add_logprobs(
    model: "nn.Module | Parallel", batches: Sequence[Batch], name: str, temperature: float, in_bf16: bool = False,
    ranks: Ranks | None = None,
) -> None:  # fmt: skip
    """Give each batch the log-probabilities of `model` as it is now, as `name` (batch, seq).

    in_bf16: the products in bfloat16, as in training, so that the ratio to the same weights there is exactly 1. ranks:
    those that share `model`; all get all.
    """
    if not isinstance(model, nn.Module):
        assert ranks is not None, "ranks that share a model ask it together"
        _add_together(model, batches, name, temperature, in_bf16, ranks)
        return
    device = next(model.parameters()).device
    for batch in batches:
        here = {key: batch[key].to(device) for key in ("input_ids", "labels")}
        with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
            batch[name] = token_logprobs(model, here, temperature)[0].to(batch["labels"].device)


def _add_together(
    parallel: "Parallel", batches: Sequence[Batch], name: str, temperature: float, in_bf16: bool, ranks: Ranks
) -> None:
    """batches: as many as divide among the data ranks, or as few as have rows. Only the end of a pipeline finds any."""
    found: dict[int, Tensor] = {}

    def objective(model: nn.Module, batch: Batch) -> Loss:
        logprobs = token_logprobs(model, batch, temperature)[0]
        found[numbers[id(batch)]] = logprobs
        return Loss(logprobs.sum(), 1.0)

    kept = ("input_ids", "labels", "counted")
    here = [{key: batch[key].to(parallel.device) for key in kept} for batch in ranks.own(batches)]
    split = [parallel.split(batch) for batch in here]
    numbers = {id(batch): number for number, batch in enumerate(split)}
    with torch.autocast(parallel.device.type, torch.bfloat16, enabled=in_bf16):
        parallel.forward(split, objective)
    whole = ranks.joined(batches, [found[number] for number in sorted(found)])
    for batch, logprobs in zip(batches, whole, strict=True):
        batch[name] = logprobs.to(batch["labels"].device)
