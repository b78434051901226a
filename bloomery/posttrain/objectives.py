"""Policy-gradient pieces as pure functions: group advantages, per-token objectives, aggregations.

Group-relative policy optimisation (Shao et al., arXiv 2402.03300) as used strictly on-policy by AceReason-Nemotron
(arXiv 2505.16400, eq. 2-4), with the variants of DAPO (arXiv 2503.14476) and Dr. GRPO (arXiv 2503.20783).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Baseline = Literal["group_mean", "leave_one_out"]
Scale = Literal["group_std", "none", "batch_std"]
Aggregation = Literal[
    "token_mean", "group_token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm", "domain_balanced"
]
Mismatch = Literal["tis", "mask", "seq_mask", "seq_trunc"]

SPREAD = 1e-8
"""Rewards of a group closer together than this carry no signal."""
_MAX_LOG_RATIO = 20.0


def degenerate(rewards: Tensor, valid: Tensor) -> Tensor:
    """Which groups carry no signal: fewer than two judged samples, or equal rewards. (groups, samples) → (groups,).

    By max − min and never by `std == 0`: equal rewards that binary floats cannot hold leave a tiny standard deviation,
    and dividing by it would turn rounding noise into an advantage of order one.
    """
    values = rewards.double()
    low = values.masked_fill(~valid, torch.inf).amin(-1)
    high = values.masked_fill(~valid, -torch.inf).amax(-1)
    return (valid.sum(-1) < 2) | (high - low <= SPREAD)


def advantages(
    rewards: Tensor,
    valid: Tensor,
    baseline: Baseline = "group_mean",
    scale: Scale = "group_std",
    ddof: int = 1,
    eps: float = 1e-6,
) -> Tensor:
    """Advantage of each sample against its own group, computed in fp64, returned as fp32 (groups, samples).

    `valid` is False where the verdict is missing: such a sample leaves its group and gets 0. A degenerate group gets
    exactly 0. `group_std`: arXiv 2505.16400 eq. 2; `none`: Dr. GRPO; `batch_std`: one spread for the whole batch.
    """
    values, weights = rewards.double().masked_fill(~valid, 0.0), valid.double()
    count = weights.sum(-1, keepdim=True)
    centred = (values - values.sum(-1, keepdim=True) / count.clamp(min=1)) * weights
    result = centred * count / (count - 1).clamp(min=1) if baseline == "leave_one_out" else centred
    if scale == "group_std":
        result = result / ((centred.square().sum(-1, keepdim=True) / (count - ddof).clamp(min=1)).sqrt() + eps)
    elif scale == "batch_std":
        deviations = (values - values.sum() / weights.sum().clamp(min=1)) * weights
        result = result / ((deviations.square().sum() / (weights.sum() - ddof).clamp(min=1)).sqrt() + eps)
    return result.masked_fill(degenerate(rewards, valid)[:, None], 0.0).float()


def on_policy(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Per-token loss whose gradient is −A ∇log π (arXiv 2505.16400, eq. 3-4): the ratio is 1 by construction.

    Shapes (batch, seq) and (batch, 1) → (batch, seq). Its value is −A at every token, so watch the gradient norm.
    """
    return -torch.exp(logprobs - logprobs.detach()) * advantages


def clipped(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, low: float = 0.2, high: float = 0.28,
    dual: float | None = None,
) -> Tensor:  # fmt: skip
    """PPO's clipped objective per token, with a wider upper bound ("clip-higher", DAPO section 3.1).

    The ratio π/π_old is held in [1 − low, 1 + high] where moving it further would pay. dual: where A < 0 the loss is at
    most −dual · A, so that one unlikely token cannot rule a step (dual clip, arXiv 1912.09729).
    logprobs, old_logprobs (batch, seq), advantages (batch, 1) → (batch, seq).
    """
    ratio = log_ratio(logprobs, old_logprobs).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    if dual is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -dual * advantages), loss)


def is_clipped(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """Where `clipped` gives no gradient: the ratio has left its bounds in the direction that pays. (batch, seq) bool"""
    ratio = log_ratio(logprobs, old_logprobs).exp()
    return ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))


def mismatch_weights(
    old_logprobs: Tensor, generated: Tensor, mask: Tensor, kind: Mismatch, low: float = 0.5, high: float = 2.0,
    total: Callable[[Tensor], Tensor] = lambda values: values,
) -> Tensor:  # fmt: skip
    """Weight of each token's loss where the generator is not exactly the policy: w = π_old / π_generator, no gradient.

    All (batch, seq); 0 outside `mask`. In any kind log w is kept within ±20.
    - `tis`: min(w, high), truncated importance sampling (Yao et al. 2025, "off-policy RL training").
    - `mask`: w where low ≤ w ≤ high, else 0.
    - `seq_mask`: w where low ≤ exp(mean over the completion of log w) ≤ high, else 0 for all of it.
    - `seq_trunc`: min(exp(sum over the completion of log w), high), for all of it.

    total: sums (batch, 1) over the processes that hold other tokens of the same completions.
    """
    gap = log_ratio(old_logprobs, generated).detach().masked_fill(~mask, 0.0)
    weights = gap.exp()
    if kind == "tis":
        weights = weights.clamp(max=high)
    elif kind == "mask":
        weights = weights * ((weights >= low) & (weights <= high))
    elif kind == "seq_mask":
        tokens = total(mask.sum(-1, keepdim=True)).clamp(min=1)
        mean = (total(gap.sum(-1, keepdim=True)) / tokens).exp()
        weights = weights * ((mean >= low) & (mean <= high))
    else:
        product = total(gap.sum(-1, keepdim=True)).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
        weights = product.clamp(max=high).expand_as(gap)
    return weights * mask


def overlong_penalty(lengths: Tensor, max_tokens: int, penalty_tokens: int) -> Tensor:
    """What a completion's length takes from its reward (DAPO eq. 13): 0 up to max_tokens − penalty_tokens, then falling
    to −1 at max_tokens and beyond. lengths: any shape, tokens → the same shape, fp64. No penalty_tokens: all 0."""
    if not penalty_tokens:
        return torch.zeros_like(lengths, dtype=torch.float64)
    return ((max_tokens - penalty_tokens - lengths.double()) / penalty_tokens).clamp(-1.0, 0.0)


def kl_penalty(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Per-token estimate of KL(policy ‖ reference), never negative: exp(q) − q − 1 with q = log π_ref − log π."""
    difference = log_ratio(reference_logprobs, logprobs)
    return difference.exp() - difference - 1


def log_ratio(logprobs: Tensor, other: Tensor) -> Tensor:
    """Difference of log-probabilities, kept where its exponential is finite in fp32."""
    return (logprobs - other).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def row_weights(
    lengths: Tensor, how: Aggregation, group_tokens: Tensor | None = None, max_tokens: int | None = None,
    domain_tokens: Tensor | None = None, domain_shares: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(weight of each token's loss, part of the denominator) for completions of `lengths` tokens, both (rows,) fp64.

    The aggregated loss of a step is Σ weight · loss / Σ part over all its rows, however they are split. A row of length
    0 counts for nothing.
    - `token_mean`: mean over all tokens of the step (DAPO).
    - `group_token_mean`: token mean inside each group, then mean over groups; `group_tokens` (rows,) is the number of
      tokens in the whole group a row belongs to, wherever its other rows are.
    - `seq_mean_token_mean`: mean inside each completion, then over completions (GRPO).
    - `seq_mean_token_sum_norm`: sum over each completion divided by the constant `max_tokens` (Dr. GRPO).
    - `domain_balanced`: token mean inside each domain, then the mean of domains by their shares: `domain_tokens` and
      `domain_shares` (rows,) are of the domain that a row belongs to, wherever its other rows are. So that long answers
      of one domain do not rule the step (Nemotron-CrossThink, arXiv 2504.13941).
    """
    sizes = lengths.double()
    present = (sizes > 0).double()
    if how == "token_mean":
        return present, sizes
    if how == "group_token_mean":
        assert group_tokens is not None, "group_token_mean needs the token count of each row's group"
        share = present / group_tokens.double().clamp(min=1)
        return share, sizes * share
    if how == "domain_balanced":
        assert domain_tokens is not None, "domain_balanced needs the token count of each row's domain"
        assert domain_shares is not None, "domain_balanced needs the share of each row's domain"
        share = present * domain_shares.double() / domain_tokens.double().clamp(min=1)
        return share, sizes * share
    if how == "seq_mean_token_mean":
        return present / sizes.clamp(min=1), present
    assert max_tokens is not None, "seq_mean_token_sum_norm needs the constant that divides each completion"
    return present / max_tokens, present


def aggregate(losses: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Σ weight · loss over the completion tokens that `mask` marks. (batch, seq) twice, (batch,) → scalar."""
    return (losses.masked_fill(~mask, 0.0) * weights.to(losses.dtype)[:, None]).sum()
