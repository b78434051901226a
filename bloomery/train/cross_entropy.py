"""The output head and the softmax in one pass over chunks of tokens: full logits (tokens, vocabulary) never exist.

Both functions take `hidden` (tokens, hidden), the head's `weight` (vocabulary, hidden) and `labels` (tokens,) int64
without masked positions, multiply in the autocast type where autocast is on, and normalise in fp32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_FORBIDDEN = -1e30  # probability exactly 0, and 0 × logit stays 0, which −inf would turn into NaN
_FEWEST_ROWS = 256
_CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}  # CPU: a chunk of logits that stays in cache; GPU: 256 MiB in fp32
_KEPT_ELEMENTS = {
    "cpu": 2**26,
    "cuda": 2**28,
}  # below this, keeping log-probabilities is cheaper than computing them twice


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed −log p(label) with gradient, a scalar, and the same per token, (tokens,) fp32 without gradient.

    Gradients are formed in the forward pass, while a chunk's probabilities are at hand, so backward may run once only.
    """
    return _CrossEntropy.apply(hidden, weight, labels, _multiply_dtype(hidden), torch.is_grad_enabled())


def logprobs_and_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, forbidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """log p(label) and the entropy in nats of softmax(logits / temperature), each (tokens,) fp32 with gradient.

    forbidden: (vocabulary,) bool, the tokens that are never sampled; their probability is 0.
    """
    keep = torch.is_grad_enabled() and len(labels) * len(weight) <= _KEPT_ELEMENTS.get(hidden.device.type, 0)
    return _Logprobs.apply(hidden, weight, labels, temperature, forbidden, _multiply_dtype(hidden), keep)


def _multiply_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    rows = max(_FEWEST_ROWS, _CHUNK_ELEMENTS.get(hidden.device.type, 2**20) // len(weight))
    return [slice(start, start + rows) for start in range(0, len(hidden), rows)]


class _Gradients:
    """Gradients of hidden and weight, collected from the gradient of each chunk's logits."""

    def __init__(self, hidden: Tensor, weight: Tensor, wanted: tuple[bool, ...]):
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None

    def add(self, rows: slice, of_logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """of_logits: (rows, vocabulary) fp32; hidden, weight: as they were multiplied."""
        of_logits = of_logits.to(weight.dtype)
        if self.hidden is not None:
            self.hidden[rows] = of_logits @ weight
        if self.weight is not None and weight.dtype == torch.float32:
            self.weight.addmm_(of_logits.t(), hidden[rows])
        elif self.weight is not None:
            self.weight += of_logits.t() @ hidden[rows]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        inputs, table = hidden.to(dtype), weight.to(dtype)
        gradients = _Gradients(hidden, weight, ctx.needs_input_grad) if with_gradient else None
        losses = hidden.new_empty(len(labels), dtype=torch.float32)
        for rows in _chunks(hidden, weight):
            column = labels[rows, None]
            logprobs = torch.log_softmax((inputs[rows] @ table.t()).float(), -1)
            losses[rows] = -logprobs.gather(1, column).squeeze(1)
            if gradients is not None:
                of_logits = logprobs.exp_()
                of_logits.scatter_add_(1, column, of_logits.new_full((1, 1), -1.0).expand(len(column), 1))
                gradients.add(rows, of_logits, inputs, table)
        ctx.gradients, ctx.weight_dtype = gradients, weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "backward ran twice through the same cross-entropy"
        of_hidden = None if gradients.hidden is None else gradients.hidden.mul_(of_sum)
        of_weight = None if gradients.weight is None else gradients.weight.mul_(of_sum).to(ctx.weight_dtype)
        return of_hidden, of_weight, None, None, None


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, forbidden: Tensor | None,
        dtype: torch.dtype, keep: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        inputs, table = hidden.to(dtype), weight.to(dtype)
        logprobs = hidden.new_empty(len(labels), dtype=torch.float32)
        entropy = torch.empty_like(logprobs)
        ctx.kept = {}
        for rows in _chunks(hidden, weight):
            everything = _distribution(inputs[rows], table, temperature, forbidden)
            logprobs[rows] = everything.gather(1, labels[rows, None]).squeeze(1)
            entropy[rows] = -(everything.exp() * everything).sum(1)
            if keep:
                ctx.kept[rows.start] = everything
        ctx.save_for_backward(hidden, weight, labels, entropy)
        ctx.temperature, ctx.forbidden, ctx.dtype = temperature, forbidden, dtype
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logprobs: Tensor | None, of_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, entropy = ctx.saved_tensors
        inputs, table = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        gradients = _Gradients(hidden, weight, ctx.needs_input_grad)
        for rows in _chunks(hidden, weight):
            everything = ctx.kept.get(rows.start)
            if everything is None:
                everything = _distribution(inputs[rows], table, ctx.temperature, ctx.forbidden)
            probability = everything.exp()
            of_logits = torch.zeros_like(everything)
            if of_logprobs is not None:  # d log p(y) / dz = onehot(y) − p
                of_logits = (probability * -of_logprobs[rows, None]).scatter_add_(
                    1, labels[rows, None], of_logprobs[rows, None]
                )
            if of_entropy is not None:  # dH / dz = −p (log p + H)
                of_logits -= probability * (everything + entropy[rows, None]) * of_entropy[rows, None]
            gradients.add(rows, of_logits / ctx.temperature, inputs, table)
        of_weight = None if gradients.weight is None else gradients.weight.to(weight.dtype)
        return gradients.hidden, of_weight, None, None, None, None, None


def _distribution(hidden: Tensor, weight: Tensor, temperature: float, forbidden: Tensor | None) -> Tensor:
    """(rows, vocabulary) fp32 log-probabilities at the temperature."""
    logits = (hidden @ weight.t()).float() / temperature
    if forbidden is not None:
        logits = logits.masked_fill(forbidden, _FORBIDDEN)
    return torch.log_softmax(logits, -1)
