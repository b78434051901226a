"""What goes into the engine and what comes out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from bloomery.errors import ConfigError
from bloomery.generate.sampling import SamplingParams

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Request:
    """Continue `prompt_ids` as `params` say."""

    prompt_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True)
class Completion:
    """The generated part of one request.

    `token_ids` holds every sampled token, the stop token or the tokens of the stop string included, so that it can be
    fed to a trainer as it is; `logprobs` has one entry per token, at the sampling temperature, over the distribution
    drawn from (`None` when the request switched them off). `text`, present when the engine has a decoder, ends before
    the stop token or stop string. `finish_reason` is `stop`, `length` (max_new_tokens reached) or `abort`
    (`Engine.sync` was called in the middle). `weight_version` is the engine's at the time of sampling.
    """

    token_ids: list[int]
    logprobs: list[float] | None
    finish_reason: FinishReason
    weight_version: int
    text: str | None = None


def check_requests(requests: Sequence[Request], max_tokens: int, vocab_size: int, has_decode: bool) -> None:
    """Raises `ConfigError`, naming the request, for one that the engine cannot run."""
    for index, request in enumerate(requests):
        problem = _problem(request, max_tokens, vocab_size, has_decode)
        if problem:
            raise ConfigError(f"request {index}: {problem}")


def _problem(request: Request, max_tokens: int, vocab_size: int, has_decode: bool) -> str | None:
    prompt, params = request.prompt_ids, request.params
    if not len(prompt):
        return "the prompt is empty; give at least one token, for example the beginning-of-sequence token"
    if len(prompt) + params.max_new_tokens > max_tokens:
        return (
            f"a prompt of {len(prompt)} tokens and max_new_tokens {params.max_new_tokens} do not fit into max_tokens "
            f"{max_tokens}; shorten the prompt, lower max_new_tokens or give the engine a larger window"
        )
    outside = [token for token in (min(prompt), max(prompt), *params.stop_token_ids) if not 0 <= token < vocab_size]
    if outside:
        return f"token {outside[0]} is outside the model's vocabulary of {vocab_size}; use the model's own tokenizer"
    if params.stop and not has_decode:
        return "stop strings need text; give the engine a decode function, or use stop_token_ids"
    return None
