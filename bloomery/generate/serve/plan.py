"""From what a client asks to what the engine runs."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bloomery.config import build
from bloomery.errors import BloomeryError, ConfigError
from bloomery.generate.request import Request
from bloomery.generate.sampling import SamplingParams, derive_seed
from bloomery.generate.serve.errors import invalid
from bloomery.generate.serve.protocol import Body, ChatBody, CompletionBody

DEFAULT_COMPLETION_TOKENS = 16  # as OpenAI's API has it; a chat may fill the context


@dataclass(frozen=True)
class ServedModel:
    """What the server must know of a model beside its engine.

    `decode` leaves special tokens out, `spell` shows any single token; `render_chat` gives the ids of a chat up to
    where the assistant begins, `None` without a template. `window` is the most tokens of prompt and completion.
    """

    name: str
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    spell: Callable[[int], str]
    render_chat: Callable[[list[dict[str, str]]], list[int]] | None
    stop_token_ids: tuple[int, ...]
    vocab_size: int
    window: int

    def require(self, name: str) -> None:
        """Raises `ApiError` 404 for any name but this model's."""
        if name != self.name:
            raise invalid(f"model: found {name!r}; this server has {self.name!r}", "model", "model_not_found", 404)


@dataclass(frozen=True)
class Plan:
    """A call made ready: `n` requests for each prompt, prompt after prompt."""

    body: Body
    prompts: list[list[int]]
    requests: list[Request]

    @property
    def chat(self) -> bool:
        """Which of the two shapes the answer has."""
        return isinstance(self.body, ChatBody)

    @property
    def echo(self) -> bool:
        """Whether each text begins with its prompt."""
        return isinstance(self.body, CompletionBody) and bool(self.body.echo)

    @property
    def alternatives(self) -> int | None:
        """Alternatives for each token; `None`: no log-probabilities at all."""
        assert isinstance(self.body, ChatBody | CompletionBody)
        return self.body.alternatives

    def prompt(self, index: int) -> list[int]:
        """The prompt of request `index`."""
        return self.prompts[index // self.body.n]


def plan_completion(body: CompletionBody, model: ServedModel) -> Plan:
    """Raises `ApiError` for a prompt that cannot run."""
    prompts = [model.encode(_utf8(prompt)) if isinstance(prompt, str) else prompt for prompt in body.prompts]
    limit = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    return _plan(body, prompts, limit, model)


def plan_chat(body: ChatBody, model: ServedModel) -> Plan:
    """Raises `ApiError` for a chat that the template refuses."""
    if model.render_chat is None:
        raise invalid(f"{model.name} has no chat template; use /v1/completions", "messages")
    chat = body.chat
    for message in chat:
        _utf8(message["content"])
    try:
        prompt = model.render_chat(chat)
    except BloomeryError as error:
        raise invalid(str(error), "messages") from None
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return _plan(body, [prompt], limit, model)


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise invalid(f"the text has half a surrogate pair at character {error.start}; send valid Unicode") from None
    return text


def _plan(body: CompletionBody | ChatBody, prompts: list[list[int]], limit: int | None, model: ServedModel) -> Plan:
    model.require(body.model)
    if not prompts:
        raise invalid("prompt: empty; give at least one", "prompt")
    for prompt in prompts:
        _check_prompt(prompt, limit, model)
    seed = secrets.randbits(63) if body.seed is None else body.seed
    requests = [
        Request(prompt, _params(body, limit, model, len(prompt), derive_seed(seed, sample) if sample else seed),
                stream=bool(body.stream))
        for prompt in prompts
        for sample in range(body.n)
    ]  # fmt: skip
    return Plan(body, prompts, requests)


def _check_prompt(prompt: list[int], limit: int | None, model: ServedModel) -> None:
    if not prompt:
        raise invalid("prompt: empty; give at least one character or token", "prompt")
    outside = next((token for token in prompt if not 0 <= token < model.vocab_size), None)
    if outside is not None:
        raise invalid(f"prompt: token {outside} is outside the vocabulary of {model.vocab_size}", "prompt")
    wanted = 1 if limit is None else limit
    if len(prompt) + wanted > model.window:
        raise invalid(
            f"the prompt has {len(prompt)} tokens and {wanted} more are asked for; the context holds {model.window}. "
            "Shorten the prompt or lower max_tokens", "prompt", "context_length_exceeded",
        )  # fmt: skip


def _params(
    body: CompletionBody | ChatBody, limit: int | None, model: ServedModel, prompt_tokens: int, seed: int
) -> SamplingParams:
    own = () if body.ignore_eos else model.stop_token_ids
    scores_prompt = isinstance(body, CompletionBody) and bool(body.echo) and (limit == 0 or body.logprobs is not None)
    settings = {
        "max_new_tokens": model.window - prompt_tokens if limit is None else limit,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "stop": body.stops,
        "stop_token_ids": tuple(dict.fromkeys([*own, *(body.stop_token_ids or ())])),
        "seed": seed,
        "logprobs": body.alternatives is not None,
        "top_logprobs": body.alternatives or 0,
        "prompt_logprobs": scores_prompt,
    }
    if body.temperature != 0:  # greedy looks at the likeliest token only, so filters change nothing
        settings |= {"top_k": max(body.top_k or 0, 0), "top_p": body.top_p or 1.0, "min_p": body.min_p or 0.0}
    try:
        return build(SamplingParams, settings)
    except ConfigError as error:
        raise invalid(str(error), str(error).partition(":")[0]) from None
