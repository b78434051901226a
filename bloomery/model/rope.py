"""Rotary position embedding (arXiv 2104.09864) in Hugging Face's half-split channel order."""

import math
from typing import Any

import torch
from torch import Tensor

from bloomery.model.config import RopeConfig


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Radians per token of each channel pair, (head_dim / 2,) float32, after the context-extension rule."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_type == "linear":
        return frequencies / config.factor
    if config.rope_type == "yarn":
        return _yarn(frequencies, config, head_dim)
    return _llama3(frequencies, config) if config.rope_type == "llama3" else frequencies


def attention_factor(config: RopeConfig) -> float:
    """What rotated queries and keys are multiplied by: 1 but for `yarn` (arXiv 2309.00071 §3.4)."""
    if config.rope_type != "yarn":
        return 1.0
    return 0.1 * math.log(config.factor) + 1.0 if config.attention_factor is None else config.attention_factor


def _llama3(frequencies: Tensor, config: RopeConfig) -> Tensor:
    """Llama 3.1: slow pairs are slowed by `factor`, fast ones kept, those between blended linearly in turns."""
    turns = config.original_max_position_embeddings * frequencies / (2 * math.pi)
    span = config.high_freq_factor - config.low_freq_factor
    keep = ((turns - config.low_freq_factor) / span).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / config.factor)


def _yarn(frequencies: Tensor, config: RopeConfig, head_dim: int) -> Tensor:
    """YaRN (arXiv 2309.00071 §3.2): as Llama 3.1 does later, but blended linearly in the pair's number."""

    def pair(turns: float) -> float:
        """The (fractional) pair that makes this many turns in the old context."""
        wavelengths = config.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(config.rope_theta))

    low, high = pair(config.beta_fast), pair(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    slow = (torch.arange(len(frequencies), dtype=torch.float32) - low) / (high - low or 0.001)
    slow = slow.clamp(0, 1)
    return frequencies / config.factor * slow + frequencies * (1 - slow)


class Rope:
    """Tables of cos and sin that grow to the longest position asked for."""

    def __init__(self, config: RopeConfig, head_dim: int):
        self.config, self.head_dim = config, head_dim
        self._table: Tensor | None = None

    def __call__(self, positions: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """cos and sin for `positions` (batch, seq), all below `longest`: each (batch, seq, 1, head_dim / 2) float32."""
        cos_sin = self.table(longest, positions.device)[positions]
        cos, sin = cos_sin.unsqueeze(-2).chunk(2, -1)
        return cos, sin

    def table(self, longest: int, device: torch.device) -> Tensor:
        """cos ‖ sin of at least the first `longest` positions, (positions, head_dim) float32."""
        if self._table is None or len(self._table) < longest or self._table.device != device:
            rows = torch.arange(1 << max(longest - 1, 1).bit_length(), dtype=torch.float32)
            angles = torch.outer(rows, inverse_frequencies(self.config, self.head_dim))
            table = torch.cat([angles.cos(), angles.sin()], dim=-1) * attention_factor(self.config)
            self._table = table.to(device)
        return self._table


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns channel pairs (i, i + head_dim / 2) of x (batch, seq, heads, head_dim) by the angle in cos and sin."""
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _turn(x, cos, sin, 1.0)


def rotate_few(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` with cos and signed sin (−, +) repeated over the whole head: more arithmetic, half the calls."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class _Rotate(torch.autograd.Function):
    """The backward of a rotation is the rotation back, so nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1.0), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    first, second = x.chunk(2, -1)
    out_first, out_second = out.chunk(2, -1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=sign)
    return out
