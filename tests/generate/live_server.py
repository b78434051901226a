"""A service on a free port, run in a thread; and an engine of a few lines whose every answer is known."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn

from bloomery.errors import ConfigError
from bloomery.generate.engine import EngineStats
from bloomery.generate.request import Completion, Update
from bloomery.generate.serve import ServedModel, ServeLimits, Service, listen
from bloomery.generate.serve.server import _Server, address

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WINDOW = 60


class Typist:
    """Answers every prompt with the alphabet, a letter a step for each of `max_batch` running requests. It waits while
    `gate` is closed, and fails once `failure` is set."""

    def __init__(self, max_batch: int = 2):
        self.max_batch, self.gate, self.failure = max_batch, threading.Event(), None
        self.gate.set()
        self._written: dict[int, list] = {}  # ticket → [request, letters so far]
        self._tickets = 0
        self.cancelled: list[int] = []

    @property
    def stats(self) -> EngineStats:
        return EngineStats(running=self.running, waiting=self.waiting)

    busy = property(lambda self: bool(self._written))
    running = property(lambda self: min(self.max_batch, len(self._written)))
    waiting = property(lambda self: len(self._written) - self.running)

    def add(self, request) -> int:
        if list(request.prompt_ids) == [ord("!")]:
            raise ConfigError("this engine does not like exclamation marks")
        self._tickets += 1
        self._written[self._tickets] = [request, []]
        return self._tickets

    def cancel(self, ticket: int) -> None:
        self.cancelled.append(ticket)
        self._written.pop(ticket, None)

    def step(self) -> list[Update]:
        self.gate.wait(0.05)
        if self.failure:
            raise self.failure
        if not self.gate.is_set():
            return []
        return [update for ticket in list(self._written)[: self.max_batch] if (update := self._type(ticket))]

    def _type(self, ticket: int) -> Update | None:
        request, letters = self._written[ticket]
        letters.append(ord(LETTERS[len(letters) % 26]))
        text = "".join(map(chr, letters))
        stopped = next((text.index(stop) for stop in request.params.stop if stop in text), None)
        done = stopped is not None or len(letters) == request.params.max_new_tokens
        completion = None
        if done:
            del self._written[ticket]
            completion = Completion(
                letters, [-1.0] * len(letters), "length" if stopped is None else "stop", 0, text[:stopped]
            )
        if request.stream or done:
            return Update(
                ticket, letters[-1:] if request.stream else [], [-1.0] if request.stream else [], None, completion
            )
        return None


def typist_model(window: int = WINDOW) -> ServedModel:
    """A token is a character."""
    return ServedModel(
        name="typist", encode=lambda text: list(map(ord, text)), decode=lambda ids: "".join(map(chr, ids)), spell=chr,
        render_chat=lambda chat: [ord(char) for message in chat for char in message["content"]], stop_token_ids=(),
        vocab_size=256, window=window,
    )  # fmt: skip


def typist_service(engine: Typist | None = None, api_key: str | None = None, **limits) -> Service:
    return Service(engine or Typist(), typist_model(), ServeLimits(**limits), api_key)


@contextmanager
def running(service: Service) -> Iterator[str]:
    """The server's root address; it drains at the end."""
    with listen("127.0.0.1", 0, protected=False) as listening:
        config = uvicorn.Config(service.app, log_level="warning", access_log=False, lifespan="on")
        server = _Server(service, config)
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        wait_until(lambda: server.started or not thread.is_alive())
        try:
            yield address(listening).removesuffix("/v1")
        finally:
            service.drain()
            thread.join(timeout=20)
            assert not thread.is_alive(), "the server did not end"


def wait_until(true, seconds: float = 20.0) -> None:
    """Wait for a condition, not for a time."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def metric(root: str, name: str) -> float:
    """One number of /metrics."""
    for line in httpx.get(f"{root}/metrics").text.splitlines():
        if line.startswith((f"{name} ", f"{name}{{")):
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"no metric {name}")
