"""The objective of reinforcement learning, `(model, batch) → Loss`, and its proof of being on-policy."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bloomery.data.pack import IGNORE, Batch
from bloomery.errors import DivergenceError
from bloomery.posttrain import objectives
from bloomery.train.losses import Loss, Metric, token_logprobs


class PolicyGradient:
    """Policy-gradient loss over the micro-batches of `batches.micro_batches`.

    temperature: the sampler's, so that log-probabilities are those of the policy that wrote the samples.
    clip: (low, high) of the clipped objective, whose batches also hold `old_logprobs` (batch, seq); None: on-policy.
    kl: weight of the penalty against `reference_logprobs` (batch, seq); 0: none.
    max_logprob_gap: largest mean |log π_trainer − log π_generator| of a micro-batch, in nats per token. The two are one
    model computed in two ways; beyond this, `DivergenceError` is raised before anything is learnt.
    """

    def __init__(
        self, temperature: float, max_logprob_gap: float, clip: tuple[float, float] | None = None, kl: float = 0.0
    ):
        self.temperature, self.max_logprob_gap, self.clip, self.kl = temperature, max_logprob_gap, clip, kl
        self.begin({})

    def begin(self, metrics: Mapping[str, float]) -> None:
        """A new step, whose rollouts have these metrics; they are reported with its first micro-batch."""
        self._rollout_metrics: dict[str, Metric] = {name: (value, 1.0) for name, value in metrics.items()}
        self.largest_gap = 0.0
        """Largest gap of a single token in this step, nats."""

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """Gradients of `sum`, over `weight`, ascend the expected advantage."""
        logprobs, entropy = token_logprobs(model, batch, self.temperature)
        mask = batch["labels"] != IGNORE
        losses = self._losses(logprobs, batch)
        metrics = self._rollout_metrics | self._certify(logprobs.detach(), batch["generator_logprobs"], mask)
        self._rollout_metrics = {}
        metrics["entropy"] = (entropy.detach()[mask].sum(), mask.sum())
        if self.kl:
            penalty = objectives.kl_penalty(logprobs, batch["reference_logprobs"])
            losses = losses + self.kl * penalty
            metrics["reference_kl"] = (penalty.detach()[mask].sum(), mask.sum())
        return Loss(objectives.aggregate(losses, mask, batch["row_weights"]), batch["loss_weight"].sum(), metrics)

    def _losses(self, logprobs: Tensor, batch: Batch) -> Tensor:
        gain = batch["advantages"][:, None]
        if self.clip is None:
            return objectives.on_policy(logprobs, gain)
        return objectives.clipped(logprobs, batch["old_logprobs"], gain, *self.clip)

    def _certify(self, logprobs: Tensor, generated: Tensor, mask: Tensor) -> dict[str, Metric]:
        """Compare the trainer's log-probabilities with the generator's. (batch, seq) each."""
        ours, theirs = logprobs[mask], generated[mask]
        gaps = (ours - theirs).abs()
        self.largest_gap = max(self.largest_gap, gaps.max().item())
        if not gaps.mean().item() <= self.max_logprob_gap:
            raise DivergenceError(
                f"the trainer's log-probabilities are {gaps.mean().item():.3g} nats per token (largest "
                f"{gaps.max().item():.3g}) away from the generator's, at most {self.max_logprob_gap:g} allowed: the "
                "samples are not from the policy being trained. Stale weights or caches in the generator, another "
                "temperature, or too low a precision do this; raise max_logprob_gap only if the precision explains it"
            )
        drift = objectives.kl_penalty(theirs, ours)
        return {"logprob_gap": (gaps.sum(), mask.sum()), "generator_kl": (drift.sum(), mask.sum())}


@torch.no_grad()
def add_reference_logprobs(reference: nn.Module, batches: list[Batch], temperature: float) -> None:
    """Give each batch the log-probabilities of a frozen model, as `reference_logprobs` (batch, seq)."""
    device = next(reference.parameters()).device
    for batch in batches:
        here = {name: batch[name].to(device) for name in ("input_ids", "labels")}
        batch["reference_logprobs"] = token_logprobs(reference, here, temperature)[0].to(batch["labels"].device)
