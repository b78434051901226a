"""The engine's interface over the network: any OpenAI-compatible endpoint (our own server, vLLM, SGLang).

Prompts go as token ids and completions come back as token ids, so a trainer can use them as they are. Retries with
growing, jittered pauses, and the pauses that a server asks for by `Retry-After`, are the `openai` client's.
"""

import asyncio
import json
import os
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import openai

from bloomery.errors import BloomeryError, ConfigError
from bloomery.generate.journal import Journal, Ledger, digest
from bloomery.generate.request import Completion, Request

_ENDS = ("stop", "length", "abort")
_TOKEN = "token_id:"
Answer = tuple[str, Completion] | BaseException | None
ReloadingServer = Literal["vllm", "sglang"]
_RELOADS: dict[ReloadingServer, Callable[[str], list[tuple[str, dict[str, Any] | None]]]] = {
    "vllm": lambda folder: [
        ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}}),
        ("/reset_prefix_cache", None),
    ],
    "sglang": lambda folder: [("/update_weights_from_disk", {"model_path": folder, "flush_cache": True})],
}
"""What each server is asked, outside OpenAI's API, to take new weights: (path, body) in order."""


class RemoteEngine:
    """Generates at `base_url` (".../v1") with the model that the endpoint calls `model`.

    api_key: default: the environment's OPENAI_API_KEY, else none. concurrency: requests in flight. timeout_seconds: for
    one try of one request; max_retries: further tries after 408, 409, 429, 5xx and broken connections. journal: a file
    that keeps every answer; the same batch run again sends only what is missing. text_only: for endpoints that give no
    token ids; then only OpenAI's own fields are sent, `token_ids` stay empty and the endpoint's own end tokens end a
    text. prices: per million prompt and completion tokens, for `ledger.cost`.
    """

    def __init__(
        self, base_url: str, model: str, *, api_key: str | None = None, concurrency: int = 32,
        timeout_seconds: float = 600.0, max_retries: int = 8, journal: Path | None = None, text_only: bool = False,
        prices: tuple[float, float] | None = None,
    ):  # fmt: skip
        if concurrency < 1:
            raise ConfigError(f"concurrency: {concurrency}; expected at least 1")
        self.base_url, self.model, self.text_only = base_url, model, text_only
        self.weight_version = 0
        self.ledger = Ledger(*(prices or (None, None)))
        self._journal, self._concurrency = journal, concurrency
        self._client_settings: dict[str, Any] = {
            "base_url": base_url, "api_key": api_key or os.environ.get("OPENAI_API_KEY") or "none",
            "timeout": timeout_seconds, "max_retries": max_retries,
        }  # fmt: skip

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """The completions of `requests`, in their order."""
        completions = dict(self.stream(requests))
        return [completions[index] for index in range(len(requests))]

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """(index, completion) of each request as it finishes. Closing the iterator drops the others.

        Raises `ConfigError` for what the endpoint refuses, `BloomeryError` when retries do not help.
        """
        for index, request in enumerate(requests):
            self._check(index, request)
        return self._run(requests)

    def sync(self, folder: Path, server: ReloadingServer) -> None:
        """Have the endpoint take the weights in `folder`, a model directory that it can read, and forget what it
        remembers of prompts; a new `weight_version`. Raises `BloomeryError` where it does not, with its words."""
        for path, body in _RELOADS[server](str(folder.absolute())):
            self._post(path, body)
        self.weight_version += 1

    def _post(self, path: str, body: dict[str, Any] | None) -> None:
        url = self.base_url.rstrip("/").removesuffix("/v1") + path
        headers = {"content-type": "application/json", "authorization": f"Bearer {self._client_settings['api_key']}"}
        asked = urllib.request.Request(url, json.dumps(body or {}).encode(), headers)
        try:
            with urllib.request.urlopen(asked, timeout=self._client_settings["timeout"]) as answer:
                said = answer.read().decode(errors="replace")
        except OSError as error:  # HTTP statuses too
            hint = "; vLLM has it under VLLM_SERVER_DEV_MODE=1" if path == "/collective_rpc" else ""
            raise BloomeryError(f"{url}: the endpoint did not take new weights: {error}{hint}") from None
        if '"success":false' in said.replace(" ", "").lower():
            raise BloomeryError(f"{url}: the endpoint did not take new weights: {said[:300]}")

    def _check(self, index: int, request: Request) -> None:
        params = request.params
        used = [name for name in ("top_k", "min_p", "stop_token_ids", "prompt_logprobs") if getattr(params, name)]
        if self.text_only and used:
            raise ConfigError(f"request {index}: {used[0]} is not in OpenAI's API; leave it out or turn text_only off")

    def _run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        places: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            places.setdefault(digest(self.model, request), []).append(index)
        with Journal(self._journal) as journal:
            missing: dict[str, int] = {}
            for key, indices in places.items():
                kept = journal.get(key)
                if kept is None:
                    missing[key] = indices[0]
                    continue
                self.ledger.from_journal += 1
                yield from ((index, kept) for index in indices)
            for key, completion in self._answers(requests, missing):
                journal.put(key, completion)
                yield from ((index, completion) for index in places[key])

    def _answers(self, requests: Sequence[Request], missing: dict[str, int]) -> Iterator[tuple[str, Completion]]:
        """Answers as they come, from an event loop in a thread of its own."""
        answers: SimpleQueue[Answer] = SimpleQueue()
        loop = asyncio.new_event_loop()
        task = loop.create_task(self._send_all(requests, missing, answers))
        thread = threading.Thread(target=_run_loop, args=(loop, task), name="remote", daemon=True)
        thread.start()
        try:
            while (answer := answers.get()) is not None:
                if isinstance(answer, BaseException):
                    raise answer
                yield answer
        finally:
            with suppress(RuntimeError):  # the loop has ended by itself
                loop.call_soon_threadsafe(task.cancel)
            thread.join()

    async def _send_all(
        self, requests: Sequence[Request], missing: dict[str, int], answers: "SimpleQueue[Answer]"
    ) -> None:
        todo = iter(missing.items())

        async def work(client: openai.AsyncOpenAI) -> None:
            for key, index in todo:
                answers.put((key, await self._send(client, index, requests[index])))

        try:
            async with openai.AsyncOpenAI(**self._client_settings) as client, asyncio.TaskGroup() as group:
                for _ in range(min(self._concurrency, len(missing))):
                    group.create_task(work(client))
        except BaseExceptionGroup as errors:
            answers.put(errors.exceptions[0])
        else:
            answers.put(None)

    async def _send(self, client: openai.AsyncOpenAI, index: int, request: Request) -> Completion:
        try:
            raw = await client.completions.with_raw_response.create(**self._payload(request))
            body: dict[str, Any] = (await _parsed(raw)).model_dump()
        except openai.OpenAIError as error:
            raise self._explained(index, error) from None
        self.ledger.add(body.get("usage") or {}, raw.retries_taken)
        return self._completion(index, request, body["choices"][0])

    def _payload(self, request: Request) -> dict[str, Any]:
        params = request.params
        payload: dict[str, Any] = {
            "model": self.model, "prompt": list(request.prompt_ids), "max_tokens": params.max_new_tokens,
            "temperature": params.temperature, "top_p": params.top_p, "seed": params.seed,
        }  # fmt: skip
        if params.stop:
            payload["stop"] = list(params.stop)
        if params.logprobs or params.top_logprobs or params.prompt_logprobs:
            payload |= {"logprobs": params.top_logprobs, "echo": params.prompt_logprobs}
        if not self.text_only:
            own = {"top_k": params.top_k, "min_p": params.min_p, "stop_token_ids": list(params.stop_token_ids)}
            payload["extra_body"] = {name: value for name, value in own.items() if value} | {
                "ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True,
            }  # fmt: skip
        return payload

    def _completion(self, index: int, request: Request, choice: dict[str, Any]) -> Completion:
        reason, ids = choice["finish_reason"], choice.get("token_ids")
        if reason not in _ENDS:
            raise BloomeryError(f"{self._place(index)}: ended with {reason!r}, expected one of {', '.join(_ENDS)}")
        if ids is None and not self.text_only:
            raise ConfigError(
                f"{self._place(index)}: the endpoint gave no token ids; it must know return_token_ids (bloomery serve, "
                "vLLM), or use text_only=True where text is enough"
            )
        split = len(request.prompt_ids) if request.params.prompt_logprobs else 0
        logprobs, tops = _logprobs(choice.get("logprobs"), request)
        return Completion(
            token_ids=ids or [], finish_reason=reason, weight_version=self.weight_version,
            text=None if split else choice["text"],
            logprobs=logprobs[split:] if logprobs and request.params.logprobs else None,  # type: ignore[arg-type]
            top_logprobs=tops[split:] if tops else None,  # type: ignore[arg-type]
            prompt_logprobs=logprobs[:split] if logprobs and split else None,
            prompt_top_logprobs=tops[:split] if tops and split else None,
        )  # fmt: skip

    def _place(self, index: int) -> str:
        return f"{self.base_url}: request {index}"

    def _explained(self, index: int, error: openai.OpenAIError) -> BloomeryError:
        """The same in our words: where, what, what to do."""
        place, retries = self._place(index), self._client_settings["max_retries"]
        if isinstance(error, openai.APITimeoutError):
            seconds = self._client_settings["timeout"]
            return BloomeryError(f"{place}: no answer within {seconds:g} s, {retries + 1} times; raise timeout_seconds")
        if isinstance(error, openai.APIConnectionError):
            return BloomeryError(f"{place}: cannot connect ({error.__cause__ or error}); is the server running?")
        if not isinstance(error, openai.APIStatusError):
            return BloomeryError(f"{place}: {error}")
        said = f"{place}: {error.status_code}: {_message(error)}"
        if error.status_code in (401, 403):
            return ConfigError(f"{said}; give api_key or set OPENAI_API_KEY")
        if error.status_code == 404:
            return ConfigError(f"{said}; asked for model {self.model!r}: see what /models of the endpoint lists")
        if error.status_code == 429 or error.status_code >= 500:
            return BloomeryError(f"{said}; gave up after {retries} retries. Answers so far are in the journal, if any")
        return ConfigError(said)


def _run_loop(loop: asyncio.AbstractEventLoop, task: "asyncio.Task[None]") -> None:
    with suppress(asyncio.CancelledError):
        loop.run_until_complete(task)
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


async def _parsed(raw: Any) -> Any:
    found = raw.parse()
    return await found if asyncio.iscoroutine(found) else found


def _message(error: openai.APIStatusError) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or error.message)


def _logprobs(
    found: dict[str, Any] | None, request: Request
) -> tuple[list[float | None] | None, list[dict[int, float] | None] | None]:
    """Log-probabilities and alternatives of all tokens shown, those of an echoed prompt included."""
    if not found:
        return None, None
    tops = found.get("top_logprobs")
    if not (request.params.top_logprobs and tops and str(found["tokens"][0]).startswith(_TOKEN)):
        return found["token_logprobs"], None
    return found["token_logprobs"], [
        None if top is None else {int(token.removeprefix(_TOKEN)): logprob for token, logprob in top.items()}
        for top in tops
    ]
