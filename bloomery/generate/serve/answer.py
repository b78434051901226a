"""Completions and their pieces as the JSON objects of OpenAI's API."""

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from bloomery.generate.request import Completion, Update
from bloomery.generate.serve.plan import Plan, ServedModel
from bloomery.generate.serve.text import TextStream

_LOWEST = -9999.0  # JSON has no −∞
Tops = Sequence[dict[int, float] | None] | None
Json = dict[str, Any]


class Answer:
    """Writes one call's answer, whole or piece by piece."""

    def __init__(self, plan: Plan, model: ServedModel):
        self._plan, self._model = plan, model
        self._head = {
            "id": f"{'chatcmpl' if plan.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model.name,
        }
        self._texts = [TextStream(model.decode, request.params.stop) for request in plan.requests]
        self._spell = _as_id if plan.body.return_tokens_as_token_ids else model.spell
        self._written = [0] * len(plan.requests)  # characters sent of each
        self._completions: list[Completion] = []

    def whole(self, completions: list[Completion]) -> Json:
        """The answer to a call without stream."""
        self._completions = completions
        choices = [self._choice(index, completion) for index, completion in enumerate(completions)]
        kind = "chat.completion" if self._plan.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage()}

    def opening(self) -> list[Json]:
        """The events before any text: in a chat, who speaks."""
        if not self._plan.chat:
            return []
        role = {"role": "assistant", "content": ""}
        return [self._event([{"index": i, "delta": role, "finish_reason": None}]) for i in range(len(self._texts))]

    def piece(self, index: int, update: Update) -> Json | None:
        """The event for an update; `None` when it has nothing that can be sent yet."""
        text, completion = self._texts[index].push(update.token_ids), update.completion
        if completion is not None:
            self._completions.append(completion)
            assert completion.text is not None, "the served engine has a decoder"
            text += self._texts[index].finish(completion.text)
        shows_tokens = self._plan.alternatives is not None or self._plan.body.return_token_ids
        if not (text or completion or (shows_tokens and update.token_ids)):
            return None
        choice: Json = {"index": index, "finish_reason": completion.finish_reason if completion else None}
        choice["logprobs"] = self._logprobs(
            update.token_ids, update.logprobs, update.top_logprobs, self._written[index]
        )
        choice |= {"delta": {"content": text} if text else {}} if self._plan.chat else {"text": text}
        if self._plan.body.return_token_ids:
            choice |= {"token_ids": update.token_ids, "stop_reason": None}
        self._written[index] += len(text)
        return self._event([choice])

    def closing(self) -> list[Json]:
        """The events after all text: the numbers of tokens, where asked for."""
        return [self._event([]) | {"usage": self._usage()}] if self._plan.body.include_usage else []

    def _event(self, choices: list[Json]) -> Json:
        kind = "chat.completion.chunk" if self._plan.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices}

    def _choice(self, index: int, completion: Completion) -> Json:
        prompt, text = self._plan.prompt(index), completion.text or ""
        ids, logprobs, tops = completion.token_ids, completion.logprobs, completion.top_logprobs
        choice: Json = {"index": index, "finish_reason": completion.finish_reason}
        if self._plan.echo:
            text = self._model.decode(prompt) + text
            before = completion.prompt_top_logprobs or [None] * len(prompt)
            after: Sequence[dict[int, float] | None] = tops or [None] * len(ids)
            choice["logprobs"] = self._logprobs(
                [*prompt, *ids],
                [*(completion.prompt_logprobs or ()), *(logprobs or ())],
                [*before, *after],
                0,
            )
        else:
            choice["logprobs"] = self._logprobs(ids, logprobs, tops, 0)
        if self._plan.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        if self._plan.body.return_token_ids:
            choice |= {"token_ids": completion.token_ids, "prompt_token_ids": prompt}
        return choice

    def _logprobs(
        self, ids: list[int], logprobs: Sequence[float | None] | None, tops: Tops, offset: int
    ) -> Json | None:
        if self._plan.alternatives is None or logprobs is None:
            return None
        tops = tops or [None] * len(ids)
        if self._plan.chat:
            return _of_chat(self._spell, ids, logprobs, tops)
        return _of_text(self._spell, ids, logprobs, tops, offset)

    def _usage(self) -> Json:
        prompt = sum(map(len, self._plan.prompts))
        written = sum(len(completion.token_ids) for completion in self._completions)
        cached = sum(completion.cached_tokens for completion in self._completions)
        return {
            "prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip


def _as_id(token: int) -> str:
    return f"token_id:{token}"


def _sorted(top: dict[int, float] | None) -> list[tuple[int, float]]:
    """Alternatives, likeliest first."""
    return sorted(((token, _finite(logprob)) for token, logprob in (top or {}).items()), key=lambda pair: -pair[1])


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)


def _of_text(
    spell: Callable[[int], str], ids: list[int], logprobs: Sequence[float | None], tops: Tops, offset: int
) -> Json:
    """The four lists of /v1/completions. Alternatives always hold the chosen token; of tokens spelled alike, the
    likeliest is shown. The first token of a prompt, which nothing predicts, has neither."""
    tokens, offsets = [spell(token) for token in ids], []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    shown = [
        None if logprob is None else {spell(t): p for t, p in reversed(_sorted({**(top or {}), token: logprob}))}
        for token, logprob, top in zip(ids, logprobs, tops or (), strict=True)
    ]
    return {
        "tokens": tokens,
        "token_logprobs": [None if logprob is None else _finite(logprob) for logprob in logprobs],
        "top_logprobs": shown,
        "text_offset": offsets,
    }


def _of_chat(spell: Callable[[int], str], ids: list[int], logprobs: Sequence[float | None], tops: Tops) -> Json:
    """The list of objects of /v1/chat/completions."""

    def shown(token: int, logprob: float | None) -> Json:
        text = spell(token)
        return {"token": text, "logprob": _finite(logprob or 0.0), "bytes": list(text.encode())}

    content = [
        shown(token, logprob) | {"top_logprobs": [shown(*pair) for pair in _sorted(top)]}
        for token, logprob, top in zip(ids, logprobs, tops or (), strict=True)
    ]
    return {"content": content, "refusal": None}
