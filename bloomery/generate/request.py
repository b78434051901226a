"""What goes into the engine and what comes out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from bloomery.generate.sampling import SamplingParams

FinishReason = Literal["stop", "length", "abort"]
Prompt = tuple[int, ...]
Alternatives = dict[int, float]
"""Token → log-probability, likeliest first."""


@dataclass(frozen=True)
class Request:
    """Continue `prompt_ids` as `params` say. `stream`: report tokens while they come (`Engine.step`)."""

    prompt_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    stream: bool = False


@dataclass(frozen=True)
class Completion:
    """The generated part of one request.

    `token_ids` holds every sampled token, the stop token or the tokens of the stop string included, so that it can be
    fed to a trainer as it is; `logprobs` has one entry per token, at the sampling temperature, over the distribution
    drawn from (`None` when the request switched them off). `text`, present when the engine has a decoder, ends before
    the stop token or stop string. `finish_reason` is `stop`, `length` (max_new_tokens reached) or `abort`
    (`Engine.sync` was called in the middle). `weight_version` is the engine's at the time of sampling.

    `top_logprobs` holds the likeliest tokens at each place, of the same distribution. `prompt_logprobs` and
    `prompt_top_logprobs` have one entry per prompt token, at temperature 1; the first has nothing before it: `None`.
    Each is `None` as a whole when the request did not ask. `cached_tokens` of the prompt were not read but remembered.
    """

    token_ids: list[int]
    logprobs: list[float] | None
    finish_reason: FinishReason
    weight_version: int
    text: str | None = None
    top_logprobs: list[Alternatives] | None = None
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[Alternatives | None] | None = None
    cached_tokens: int = 0


@dataclass(frozen=True)
class Update:
    """News of one request: with `Request.stream` the tokens since the last update, and at its end the completion.

    `logprobs` and `top_logprobs` go with `token_ids`; they are empty and `None` when the request did not ask.
    """

    ticket: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[Alternatives] | None = None
    completion: Completion | None = None


@dataclass(frozen=True)
class Waiting:
    """A request that has not begun. `label` names it in errors."""

    ticket: int
    label: str
    request: Request
    prompt: Prompt

    @property
    def params(self) -> SamplingParams:
        """The request's settings."""
        return self.request.params


def problem_of(request: Request, max_tokens: int, vocab_size: int, has_decode: bool) -> str | None:
    """Why an engine of this size cannot run the request; `None` when it can."""
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
