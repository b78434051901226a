"""The HTTP side: routes, limits, refusals. Everything a client sees is an answer or OpenAI's error object."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from pydantic import Field
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from bloomery.config import Config
from bloomery.generate.engine import Engine
from bloomery.generate.serve.answer import Answer
from bloomery.generate.serve.errors import ApiError, invalid
from bloomery.generate.serve.metrics import Metrics
from bloomery.generate.serve.plan import Plan, ServedModel, plan_chat, plan_completion
from bloomery.generate.serve.protocol import ChatBody, CompletionBody, parse
from bloomery.generate.serve.worker import Call, Worker

Handler = Callable[[Request], Awaitable[Response]]
_BODY_SECONDS = 30.0
_CLIENT_LEFT = 499  # nobody reads it; it is counted


class ServeLimits(Config):
    """What the server takes at most."""

    queue: int = Field(default=256, ge=0, description="requests that may wait beside the running ones; past it, 429")
    timeout_seconds: float = Field(default=600.0, gt=0, description="longest time for a whole answer, seconds")
    drain_seconds: float = Field(default=30.0, ge=0, description="after SIGTERM, time for running answers, seconds")
    max_body_bytes: int = Field(default=4 * 2**20, ge=1024, description="largest request body, bytes")


class Service:
    """One model behind OpenAI's API. `app` is the ASGI application; `api_key` guards everything under /v1."""

    def __init__(self, engine: Engine, model: ServedModel, limits: ServeLimits, api_key: str | None = None):
        self.model, self.limits = model, limits
        self.worker = Worker(engine, engine.max_batch + limits.queue)
        self._api_key = api_key
        self._metrics, self._created = Metrics(), int(time.time())
        self._draining_since: float | None = None
        self.app = Starlette(
            routes=[
                Route("/v1/completions", self._guarded(self._completions), methods=["POST"]),
                Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
                Route("/v1/models", self._guarded(self._models)),
                Route("/v1/models/{name:path}", self._guarded(self._models)),
                Route("/health", self._health),
                Route("/metrics", self._show_metrics),
            ],
            exception_handlers={HTTPException: _no_such_page, Exception: _our_bug},
            lifespan=self._lifespan,
        )

    def drain(self) -> None:
        """Take no new requests; running ones may finish."""
        self._draining_since = self._draining_since or time.monotonic()

    def drained(self) -> bool:
        """Whether a drain is over: nothing runs, or its time is up and what ran has been told."""
        if self._draining_since is None:
            return False
        if time.monotonic() - self._draining_since > self.limits.drain_seconds:
            self.worker.refuse_all(ApiError(503, "the server is shutting down; send the request to another one"))
        return self.worker.open == 0

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.worker.start()
        yield
        await asyncio.to_thread(self.worker.stop)

    def _guarded(self, handler: Handler) -> Handler:
        """With the key checked, refusals turned into answers, and a count of both."""

        async def guarded(request: Request) -> Response:
            try:
                self._check_key(request)
                response = await handler(request)
            except ApiError as error:
                response = JSONResponse(error.body, error.status, error.headers)
            except ClientDisconnect:
                response = self._left()
            self._metrics.requests[request.scope["route"].path, response.status_code] += 1
            return response

        return guarded

    def _check_key(self, request: Request) -> None:
        if self._api_key is None:
            return
        given = request.headers.get("authorization", "")
        if not secrets.compare_digest(given.encode(), f"Bearer {self._api_key}".encode()):
            raise ApiError(
                401, "the API key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key"
            )

    async def _completions(self, request: Request) -> Response:
        return await self._answer(
            request, plan_completion(parse(CompletionBody, await self._read(request)), self.model)
        )

    async def _chat(self, request: Request) -> Response:
        body = parse(ChatBody, await self._read(request))
        return await self._answer(request, plan_chat(body, self.model))

    async def _models(self, request: Request) -> Response:
        card = {
            "id": self.model.name, "object": "model", "created": self._created, "owned_by": "bloomery",
            "max_model_len": self.model.window,
        }  # fmt: skip
        name = request.path_params.get("name")
        if name not in (None, self.model.name):
            raise invalid(
                f"model: found {name!r}; this server has {self.model.name!r}", "model", "model_not_found", 404
            )
        return JSONResponse(card if name else {"object": "list", "data": [card]})

    async def _health(self, _: Request) -> Response:
        problem = self.worker.failure and f"the engine has stopped ({self.worker.failure})"
        problem = problem or ("draining" if self._draining_since is not None else None)
        return JSONResponse({"status": problem or "ok"}, 503 if problem else 200)

    async def _show_metrics(self, _: Request) -> Response:
        stats, running = self.worker.stats, self.worker.stats.running
        gauges = {
            "requests_running": running, "requests_waiting": max(self.worker.open - running, 0),
            "requests_limit": self.worker.capacity, "cache_bytes": stats.cache_bytes,
            "prefix_cache_bytes": stats.prefix_bytes,
        }  # fmt: skip
        counters = {
            "prompt_tokens": stats.prompt_tokens, "cached_prompt_tokens": stats.cached_prompt_tokens,
            "generated_tokens": stats.generated_tokens,
        }  # fmt: skip
        return PlainTextResponse(self._metrics.text(gauges, counters), media_type="text/plain; version=0.0.4")

    async def _read(self, request: Request) -> Any:
        """The body's JSON, within limits of size and time."""
        if self._draining_since is not None:
            raise ApiError(503, "the server is shutting down; send the request to another one", code="draining")
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > self.limits.max_body_bytes:
                        raise ApiError(413, f"the body has more than {self.limits.max_body_bytes} bytes; send less")
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {_BODY_SECONDS:g} seconds") from None
        try:
            return json.loads(bytes(body))
        except (ValueError, RecursionError) as error:
            raise invalid(f"the body is not JSON: {error}") from None

    async def _answer(self, request: Request, plan: Plan) -> Response:
        call = self.worker.submit(plan.requests, self.limits.timeout_seconds)
        answer = Answer(plan, self.model)
        if plan.body.stream:
            return StreamingResponse(self._events(call, answer), media_type="text/event-stream")
        finished = asyncio.create_task(self._collect(call))
        left = asyncio.create_task(_wait_until_left(request))
        try:
            await asyncio.wait((finished, left), return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(answer.whole(finished.result())) if finished.done() else self._left()
        finally:
            finished.cancel()
            left.cancel()
            self.worker.cancel(call)

    async def _collect(self, call: Call) -> list[Any]:
        start, found = time.monotonic(), {}
        async for index, update in call:
            if update.completion:
                found[index] = update.completion
        self._metrics.whole.add(time.monotonic() - start)
        return [found[index] for index in range(len(call.jobs))]

    async def _events(self, call: Call, answer: Answer) -> AsyncIterator[str]:
        """Server-sent events. Whatever ends the stream early frees the rows."""
        try:
            for event in answer.opening():
                yield _event(event)
            async for index, update in self._timed(call):
                piece = answer.piece(index, update)
                if piece:
                    yield _event(piece)
            for event in answer.closing():
                yield _event(event)
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body)
        except (asyncio.CancelledError, GeneratorExit):
            self._left()
            raise
        finally:
            self.worker.cancel(call)

    async def _timed(self, call: Call) -> AsyncIterator[tuple[int, Any]]:
        """The updates of a call, with the times between them measured."""
        start = before = time.monotonic()
        seen: dict[int, float] = {}
        async for index, update in call:
            now = time.monotonic()
            if update.token_ids:
                (self._metrics.between_tokens if index in seen else self._metrics.first_token).add(
                    now - seen.get(index, start)
                )
                seen[index] = now
            yield index, update
        self._metrics.whole.add(time.monotonic() - before)

    def _left(self) -> Response:
        self._metrics.disconnects += 1
        return Response(status_code=_CLIENT_LEFT)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


async def _wait_until_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _no_such_page(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}; try /v1/models or /v1/completions"
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)


async def _our_bug(_: Request, error: Exception) -> Response:
    """The traceback goes to the server's log only."""
    return JSONResponse(ApiError(500, f"internal error ({type(error).__name__}); see the server's log").body, 500)
