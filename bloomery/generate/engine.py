"""Continuous batching: many requests through one model, each row refilled as soon as it ends."""

from collections import deque
from collections.abc import Iterator, Sequence

from bloomery.errors import ConfigError
from bloomery.generate.batch import Batch, Rows
from bloomery.generate.prefill import PromptReader, Waiting
from bloomery.generate.request import Completion, Request, check_requests
from bloomery.generate.stopping import Decode
from bloomery.model.decoder import Decoder
from bloomery.model.state import DecodeState
from bloomery.model.step import Step


class Engine:
    """Generates from `model`, up to `max_batch` sequences at a time, each of at most `max_tokens` with its prompt.

    `decode` turns token ids into text (`tokenizer.decode`); it is needed for stop strings and fills `Completion.text`.
    `prefill_tokens` bounds the padded tokens of prompts read at once. Memory for all sequences is allocated at the
    first call and kept. Call `sync` after every change of the weights.
    """

    def __init__(
        self, model: Decoder, max_batch: int, max_tokens: int, decode: Decode | None = None, prefill_tokens: int = 4096
    ):
        for name, value in (("max_batch", max_batch), ("max_tokens", max_tokens), ("prefill_tokens", prefill_tokens)):
            if value < 1:
                raise ConfigError(f"{name}: {value}; expected at least 1")
        self.model, self.max_batch, self.max_tokens = model, max_batch, max_tokens
        self.weight_version = 0
        self._decode, self._prefill_tokens = decode, prefill_tokens
        self._idle: DecodeState | None = None

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """The completions of `requests`, in their order."""
        completions = dict(self.stream(requests))
        return [completions[index] for index in range(len(requests))]

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """(index, completion) of each request as it finishes. Closing the iterator ends the others.

        Raises `ConfigError` at the call for a request that cannot run.
        """
        check_requests(requests, self.max_tokens, self.model.config.vocab_size, self._decode is not None)
        return self._run(requests)

    def sync(self) -> None:
        """Say that the weights have changed: what was computed with the old ones is dropped.

        Sequences of an open `stream` end with `abort`; those still waiting run with the new weights.
        """
        self.weight_version += 1
        self._idle = None

    def _run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        device = next(self.model.parameters()).device
        state, self._idle = self._idle or self._allocate(self.max_batch, self.max_tokens), None
        rows = Rows.allocate(min(self.max_batch, len(requests)), [request.params for request in requests], device)
        batch = Batch(Step(self.model), state, rows, self._decode, self.weight_version)
        reader = PromptReader(self.model, self._allocate, self._prefill_tokens, device)
        waiting = _queue(requests)
        was_training = self.model.training
        self.model.eval()
        try:
            while waiting or len(batch):
                if batch.weight_version != self.weight_version:
                    finished = batch.abort()
                    batch.renew(Step(self.model), self.weight_version)
                    reader.forget()
                elif waiting and len(batch) < self.max_batch:
                    finished = self._admit(batch, reader, waiting)
                else:
                    finished = batch.decode()
                yield from finished
        finally:
            self.model.train(was_training)
            self._idle = state

    def _admit(self, batch: Batch, reader: PromptReader, waiting: deque[Waiting]) -> list[tuple[int, Completion]]:
        """Begin as many waiting requests as there are free rows."""
        room = self.max_batch - len(batch)
        starting = [waiting.popleft() for _ in range(min(room, len(waiting)))]
        finished = []
        for members, prefilled in reader.read(starting, waiting[0].prompt if waiting else None):
            finished += batch.admit(members, prefilled)
        return finished

    def _allocate(self, rows: int, tokens: int) -> DecodeState:
        parameter = next(self.model.parameters())
        return DecodeState.allocate(self.model.config, rows, tokens, parameter.device, parameter.dtype)


def _queue(requests: Sequence[Request]) -> deque[Waiting]:
    """Requests in their order, except that equal prompts stand together, where the first of them is."""
    waiting = [Waiting(index, request, tuple(request.prompt_ids)) for index, request in enumerate(requests)]
    first: dict[tuple[int, ...], int] = {}
    for one in waiting:
        first.setdefault(one.prompt, one.index)
    return deque(sorted(waiting, key=lambda one: first[one.prompt]))
