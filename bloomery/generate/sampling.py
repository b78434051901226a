"""How the next token is drawn: settings, randomness that belongs to the request, and the vectorised draw.

The uniform number behind the token at position `p` of a request is a pure function of `(seed, p)`. Neither the batch,
nor the slot, nor the order of scheduling enters, so a request keeps its text wherever it runs. One uniform a token is
enough because tokens are drawn by inverting the cumulative distribution; noise for every vocabulary entry would cost
more than the layers of a small model.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from torch.nn import functional as F

from bloomery.config import Config
from bloomery.model import native

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_LOWEST_TEMPERATURE = 1e-3
_BLOCK = 64  # tokens


class SamplingParams(Config):
    """How one request is continued. Filters apply in the order top_k, top_p, min_p, after the temperature."""

    max_new_tokens: int = Field(
        default=256, ge=0, description="most tokens to generate, the stop token included; 0 only scores the prompt"
    )
    temperature: float = Field(
        default=1.0, ge=0, description="divides the logits; 0 takes the likeliest token (greedy)"
    )
    top_k: int = Field(default=0, ge=0, description="keep only this many likeliest tokens; 0 keeps all")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="keep the fewest likeliest tokens that hold this probability; 1 keeps all"
    )
    min_p: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="drop tokens below this fraction of the likeliest one's probability; 0: none",
    )
    stop: tuple[str, ...] = Field(
        default=(), description="end as soon as the generated text contains one of these strings"
    )
    stop_token_ids: tuple[int, ...] = Field(
        default=(), description="end after one of these tokens, which stays in the completion"
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="chooses the text; equal requests with equal seeds get equal texts"
    )
    logprobs: bool = Field(default=True, description="return the log-probability of each generated token, nats")
    top_logprobs: int = Field(
        default=0, ge=0, description="return this many of the likeliest tokens at each place, with their logprobs"
    )
    prompt_logprobs: bool = Field(
        default=False, description="return the log-probability of each prompt token, nats, at temperature 1"
    )

    @field_validator("temperature")
    @classmethod
    def _usable_temperature(cls, value: float) -> float:
        if 0 < value < _LOWEST_TEMPERATURE:
            raise ValueError(f"{value} is neither 0 (greedy) nor at least {_LOWEST_TEMPERATURE}; use 0")
        return value

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("an empty stop string would end every text at once; remove it")
        return value

    @field_validator("stop_token_ids")
    @classmethod
    def _no_negative_stop(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(token < 0 for token in value):
            raise ValueError(f"token ids are at least 0, found {min(value)}")
        return value

    @model_validator(mode="after")
    def _no_setting_without_effect(self) -> "SamplingParams":
        if self.temperature == 0 and self.filtered:
            raise ValueError("temperature 0 always takes the likeliest token, so top_k, top_p and min_p must stay off")
        if self.max_new_tokens == 0 and not self.prompt_logprobs:
            raise ValueError("max_new_tokens 0 leaves nothing to do; give at least 1, or ask for prompt_logprobs")
        return self

    @property
    def filtered(self) -> bool:
        """Whether top_k, top_p or min_p is on."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def derive_seed(*parts: int | str) -> int:
    """A request's seed from what identifies it, e.g. `derive_seed(run_seed, step, prompt_id, sample)`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniforms(seeds: Sequence[int], count: int, starts: Sequence[int] | None = None) -> np.ndarray:
    """The numbers in (0, 1) behind `count` tokens of requests with these seeds, from token `starts` (default: the
    first) of each on: (requests, count) float64.

    Position `p` is output `p` of a SplitMix64 generator (Steele, Lea, Flood 2014) started at the mixed seed. 32 bits
    are used, so that `u * total` stays below `total` in float64.
    """
    start = _mix(np.asarray(seeds, dtype=np.uint64)[:, None])
    places = np.arange(1, count + 1, dtype=np.uint64)
    if starts is not None:
        places = places + np.asarray(starts, dtype=np.uint64)[:, None]
    words = _mix(start + places * _GOLDEN)
    return ((words >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32


def _mix(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint64(30))) * _MIX[0]
    words = (words ^ (words >> np.uint64(27))) * _MIX[1]
    return words ^ (words >> np.uint64(31))


@dataclass(frozen=True)
class RowSettings:
    """The sampling settings of a batch's rows. A setting all rows share is one number, otherwise a (rows, 1) tensor."""

    temperature: float | Tensor
    top_k: int | Tensor
    top_p: float | Tensor
    min_p: float | Tensor
    greedy: bool | Tensor
    sorts: bool
    filters: bool
    logprobs: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device) -> "RowSettings":
        """Settings of the rows that continue with `params`, in order."""

        def column(values: list[Any]) -> Any:
            return values[0] if len(set(values)) == 1 else torch.tensor(values, device=device)[:, None]

        return cls(
            temperature=column([p.temperature or 1.0 for p in params]),
            top_k=column([p.top_k for p in params]),
            top_p=column([p.top_p for p in params]),
            min_p=column([p.min_p for p in params]),
            greedy=column([p.temperature == 0 for p in params]),
            sorts=any(p.top_k > 0 or p.top_p < 1 for p in params),
            filters=any(p.filtered for p in params),
            logprobs=any(p.logprobs for p in params),
        )


def sample(logits: Tensor, settings: RowSettings, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row.

    Args:
        logits: (rows, vocab); overwritten when in float32, so that no second array of their size is needed.
        settings: of these rows.
        uniform: (rows, 1) float64, the numbers in (0, 1) behind the draws.

    Returns:
        tokens (rows, 1) int64 and their log-probabilities (rows, 1) float32, of the distribution drawn from: at the
        row's temperature, after its filters. Greedy rows have no such distribution; theirs are at temperature 1. A row
        whose logits are not finite gets NaN.
    """
    logits = logits.float()
    if not settings.filters and native.serves(logits):
        temperatures = _filled(settings.temperature, len(logits), torch.float32)
        greedy = _filled(settings.greedy, len(logits), torch.bool)
        return native.draw(logits.contiguous(), uniform.contiguous(), temperatures, greedy)
    if settings.greedy is True:
        return _likeliest(logits, settings.logprobs)
    weights = _weigh(logits, settings)
    token, total = _invert(weights, uniform)
    if settings.greedy is not False:
        token = torch.where(settings.greedy, weights.max(-1, keepdim=True).indices, token)
    return token, (weights.gather(-1, token) / total).log().float()


def _filled(setting: float | bool | Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """A setting as one value a row, (rows,)."""
    if isinstance(setting, Tensor):
        return setting.flatten().to(dtype)
    return torch.full((rows,), setting, dtype=dtype)


def likeliest(logits: Tensor, settings: RowSettings, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens of each row and their log-probabilities, of the distribution `sample` draws from:
    (rows, count) int64 and float32, falling. Tokens that a filter drops have −inf; `logits` stay as they are."""
    weights = _weigh(logits.float().clone(), settings)
    top, tokens = weights.topk(min(count, weights.shape[-1]), dim=-1)
    return tokens, (top / weights.sum(-1, keepdim=True, dtype=torch.float64)).log().float()


def _weigh(logits: Tensor, settings: RowSettings) -> Tensor:
    """Each token's share of its row, where the likeliest weighs 1 and a dropped one 0; in place."""
    weights = logits.sub_(logits.amax(-1, keepdim=True))
    if isinstance(settings.temperature, Tensor) or settings.temperature != 1:
        weights.div_(settings.temperature)
    weights.exp_()
    if settings.filters:
        weights.masked_fill_(weights < _threshold(weights, settings), 0.0)
    return weights


def _likeliest(logits: Tensor, logprobs: bool) -> tuple[Tensor, Tensor]:
    best, token = logits.max(-1, keepdim=True)
    if not logprobs:
        return token, best * 0.0  # keeps a NaN visible
    return token, -logits.sub_(best).exp_().sum(-1, keepdim=True).log()


def _invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The token in whose share of the row's total weight the uniform falls, and that total (float64), each (rows, 1).

    First the block of tokens, then the token in it: only the blocks' sums and one block are ever accumulated, which
    takes a third of the time of a running sum over the vocabulary, and no array of its size in float64.
    """
    vocab = weights.shape[-1]
    if vocab % _BLOCK:
        weights = F.pad(weights, (0, -vocab % _BLOCK))
    blocks = weights.view(len(weights), -1, _BLOCK)
    mass = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    total = mass[:, -1:]
    point = uniform * total
    block = torch.searchsorted(mass, point, right=True).clamp_(max=mass.shape[1] - 1)  # past the end only with NaN
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1).cumsum(-1, dtype=torch.float64)
    rest = (inside[:, -1:] - (mass.gather(1, block) - point)).clamp_(min=0)
    token = block * _BLOCK + torch.searchsorted(inside, rest, right=True)
    return token.clamp_(max=vocab - 1), total


def _threshold(weights: Tensor, settings: RowSettings) -> Tensor:
    """The smallest weight that each row keeps, (rows, 1), where the likeliest weighs 1. Ties with it are kept too."""
    least = torch.as_tensor(settings.min_p, device=weights.device)
    if not settings.sorts:
        return least
    rising = _sorted(weights)
    vocab = rising.shape[-1]
    top_k = torch.as_tensor(settings.top_k, device=rising.device)
    outside = vocab - torch.where(top_k > 0, top_k, vocab)  # negative when top_k exceeds the vocabulary: keeps all
    rising = torch.where(torch.arange(vocab, device=rising.device) < outside, 0.0, rising)
    mass = rising.cumsum(-1, dtype=torch.float64)
    dropped = (mass <= (1 - settings.top_p) * mass[:, -1:]).sum(-1, keepdim=True)
    return torch.maximum(least, rising.gather(-1, dropped.clamp_(max=vocab - 1)))


def _sorted(values: Tensor) -> Tensor:
    """Each row in rising order. numpy's vectorised sort is ten times torch's on a CPU, where no indices are needed."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(-1).values
