"""What a client may ask: OpenAI's fields, checked. Nothing that would change the answer is ignored in silence.

Fields follow OpenAI's API reference for completions and chat completions; `top_k`, `min_p`, `stop_token_ids`,
`ignore_eos` and `return_token_ids` are the names vLLM uses for what that API lacks.
"""

from typing import Any, ClassVar, Self, TypeVar

from pydantic import ConfigDict, Field, model_validator

from bloomery.config import Config, build
from bloomery.errors import ConfigError
from bloomery.generate.serve.errors import invalid

MOST_ALTERNATIVES, MOST_STOPS = 20, 32

# Fields that need no support as long as they say what we do anyway.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,), "suffix": ("",), "presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,),
    "logit_bias": ({},), "min_tokens": (0,), "use_beam_search": (False,), "tools": ([],), "tool_choice": ("none",),
    "functions": ([],), "function_call": ("none",), "response_format": ({"type": "text"},), "modalities": (["text"],),
    "audio": (), "prediction": (), "reasoning_effort": ("none",), "verbosity": (), "web_search_options": (),
    "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (), "structured_outputs": (),
    "skip_special_tokens": (True,), "truncate_prompt_tokens": (), "allowed_token_ids": (), "bad_words": ([],),
}  # fmt: skip
# Fields about bookkeeping elsewhere, which no answer depends on.
_BOOKKEEPING = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
)  # fmt: skip


class StreamOptions(Config):
    """What a stream carries besides text."""

    include_usage: bool = Field(default=False, description="a last event with the numbers of tokens")
    include_obfuscation: bool = Field(default=False, description="accepted and without effect: nothing is padded")


class Body(Config):
    """What both endpoints take."""

    model_config = ConfigDict(strict=True)
    model: str = Field(description="the served model's name, as /v1/models gives it")
    n: int = Field(default=1, ge=1, le=128, description="completions of each prompt")
    temperature: float | None = Field(default=None, ge=0, le=100, description="divides the logits; 0 is greedy")
    top_p: float | None = Field(default=None, gt=0, le=1, description="smallest set of likeliest tokens, probability")
    top_k: int | None = Field(default=None, ge=-1, description="only this many likeliest tokens; 0 or −1: all")
    min_p: float | None = Field(default=None, ge=0, lt=1, description="least share of the likeliest one's probability")
    stop: str | list[str] | None = Field(default=None, description="end before the first of these strings")
    stop_token_ids: list[int] | None = Field(default=None, description="end at one of these tokens")
    ignore_eos: bool = Field(default=False, description="do not end at the model's own end tokens")
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="equal calls with equal seeds get equal texts")
    max_tokens: int | None = Field(default=None, ge=0, description="most tokens to write")
    stream: bool | None = Field(default=None, description="server-sent events instead of one answer")
    stream_options: StreamOptions | None = Field(default=None, description="only with stream")
    return_token_ids: bool | None = Field(default=None, description="token_ids and prompt_token_ids in every choice")
    return_tokens_as_token_ids: bool | None = Field(default=None, description="spell tokens of logprobs as token_id:N")

    foreign: ClassVar[tuple[str, ...]] = ()  # fields of the other endpoint, refused by name

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream: true")
        if len(self.stops) > MOST_STOPS or "" in self.stops:
            raise ValueError(f"stop holds at most {MOST_STOPS} strings, none of them empty")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


AnyBody = TypeVar("AnyBody", bound=Body)


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]] = Field(description="text or token ids, one or several")
    echo: bool | None = Field(default=None, description="begin the text with the prompt")
    logprobs: int | None = Field(default=None, ge=0, le=MOST_ALTERNATIVES, description="alternatives of each token")

    @model_validator(mode="after")
    def _echo_is_whole(self) -> Self:
        if self.echo and self.stream:
            raise ValueError("echo with stream: true is not supported; ask without stream")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 asks for nothing; with echo it scores the prompt")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One entry a prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]

    @property
    def alternatives(self) -> int | None:
        """Alternatives for each token; `None`: no log-probabilities at all."""
        return self.logprobs


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(description="the conversation: role and content of each message")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="the newer name of max_tokens")
    logprobs: bool | None = Field(default=None, description="the log-probability of each token")
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_ALTERNATIVES, description="alternatives of each token")

    foreign = ("echo", "prompt")

    @model_validator(mode="after")
    def _tokens_and_logprobs(self) -> Self:
        if self.max_tokens == 0:
            raise ValueError("max_tokens 0 asks for nothing; give at least 1")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are the same limit; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def alternatives(self) -> int | None:
        """Alternatives for each token; `None`: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def chat(self) -> list[dict[str, str]]:
        """Role and text of each message. Raises `ApiError` for anything but text."""
        if not self.messages:
            raise invalid("messages: empty; give at least one message", "messages")
        return [_message(number, message) for number, message in enumerate(self.messages)]


def _message(number: int, message: dict[str, Any]) -> dict[str, str]:
    name = f"messages.{number}"
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise invalid(f"{name}.role: found {role!r}, expected text such as 'user'", f"{name}.role")
    used = sorted(key for key, value in message.items() if key not in ("role", "content") and value)
    if used:
        raise invalid(f"{name}.{used[0]}: not supported; only role and content are read", f"{name}.{used[0]}")
    if isinstance(content, list):
        content = "".join(_part(f"{name}.content.{place}", part) for place, part in enumerate(content))
    if not isinstance(content, str):
        raise invalid(f"{name}.content: found {type(content).__name__}, expected text", f"{name}.content")
    return {"role": "system" if role == "developer" else role, "content": content}


def _part(name: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise invalid(f"{name}: {kind!r} is not supported; this model reads text only", name)
    return str(part["text"])


def parse(cls: type[AnyBody], data: Any) -> AnyBody:
    """The checked body; raises `ApiError` 400 naming the field."""
    if not isinstance(data, dict):
        raise invalid(f"the body is {type(data).__name__}, expected a JSON object")
    given = {name: value for name, value in data.items() if value is not None and name not in _BOOKKEEPING}
    for name in [*_NEUTRAL, *cls.foreign]:
        if name in given and name not in cls.model_fields and given.pop(name) not in _NEUTRAL.get(name, ()):
            raise invalid(f"{name}: not supported by this server; remove it", name, "unsupported_parameter")
    try:
        return build(cls, given)
    except ConfigError as error:
        raise invalid(str(error), _field(cls, str(error))) from None


def _field(cls: type[Body], message: str) -> str | None:
    """The field that a message begins with."""
    name = message.partition(":")[0]
    return None if name == cls.__name__ else name
