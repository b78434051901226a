"""Continuous batching: many requests through one model, each row refilled as soon as it ends."""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from bloomery.errors import ConfigError
from bloomery.generate.batch import Batch
from bloomery.generate.prefill import PromptReader
from bloomery.generate.prefix import PrefixCache
from bloomery.generate.queue import Queue
from bloomery.generate.request import Completion, Prompt, Request, Update, Waiting, problem_of
from bloomery.generate.stopping import Decode
from bloomery.generate.weights import Weights, copy_weights, fingerprint
from bloomery.model.captured import prepared
from bloomery.model.decoder import Decoder
from bloomery.model.state import DecodeState
from bloomery.model.step import Step

PREFIX_CACHE_BYTES = 256 * 2**20


@dataclass
class EngineStats:
    """What an engine has done since it was made, and what it holds now."""

    requests: int = 0  # accepted
    prompt_tokens: int = 0  # of requests whose prompt has been read
    cached_prompt_tokens: int = 0  # of these, remembered instead of read
    generated_tokens: int = 0
    running: int = 0  # sequences being generated
    waiting: int = 0  # requests that wait, or whose prompt is being read
    cache_bytes: int = 0  # keys, values and Mamba-2 memory of the running sequences
    prefix_bytes: int = 0  # the prefix cache
    weight_version: int = 0


class Engine:
    """Generates from `model`, up to `max_batch` sequences at a time, each of at most `max_tokens` with its prompt.

    `decode` turns token ids into text (`tokenizer.decode`); it is needed for stop strings and fills `Completion.text`.
    `prefill_tokens` bounds the padded tokens of prompts read at once; between two such pieces running sequences take a
    step. `prefix_cache_bytes` bounds what is remembered of prompts; 0 remembers nothing. `deterministic`: a request
    gets the same tokens and logprobs, to the bit, whatever else runs (on a CPU). Call `sync` after every change of the
    weights.

    `generate` and `stream` run a list of requests. A server uses `add`, `step` and `cancel`, from one thread.
    """

    def __init__(
        self,
        model: Decoder,
        max_batch: int,
        max_tokens: int,
        decode: Decode | None = None,
        prefill_tokens: int = 4096,
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
        deterministic: bool = False,
    ):
        for name, value, least in (
            ("max_batch", max_batch, 1), ("max_tokens", max_tokens, 1), ("prefill_tokens", prefill_tokens, 1),
            ("prefix_cache_bytes", prefix_cache_bytes, 0),
        ):  # fmt: skip
            if value < least:
                raise ConfigError(f"{name}: {value}; expected at least {least}")
        _require_positions(model, max_tokens)
        self.model, self.max_batch, self.max_tokens = model, max_batch, max_tokens
        self._decode, self._deterministic = decode, deterministic
        self._prefixes = PrefixCache(
            prefix_cache_bytes, "M" in model.config.pattern, deterministic, lambda: fingerprint(model)
        )
        self._reader = PromptReader(model, self._allocate, prefill_tokens, self._prefixes, deterministic)
        self._batch = Batch(self._allocate, max_batch, decode, self._remember, deterministic)
        self._queue = Queue()
        self._counts = EngineStats()
        self._step: Step | None = None
        self._was_training: bool | None = None  # none while idle
        self._just_read = False
        self._inboxes: dict[int, deque[Update]] = {}  # of tickets that an open `stream` waits for
        self._news: list[Update] = []  # of all others

    @property
    def weight_version(self) -> int:
        """How often `sync` was called."""
        return self._batch.weight_version

    @property
    def running(self) -> int:
        """Sequences being generated."""
        return len(self._batch)

    @property
    def waiting(self) -> int:
        """Requests that wait for a row, or whose prompt is being read."""
        return len(self._queue) + len(self._reader.waiting)

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self.running or self.waiting)

    @property
    def stats(self) -> EngineStats:
        """Counters and sizes as they are now."""
        return replace(
            self._counts, running=self.running, waiting=self.waiting, cache_bytes=self._batch.cache_bytes,
            prefix_bytes=self._prefixes.nbytes, weight_version=self.weight_version,
        )  # fmt: skip

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """The completions of `requests`, in their order."""
        completions = dict(self.stream(requests))
        return [completions[index] for index in range(len(requests))]

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """(index, completion) of each request as it finishes. Closing the iterator ends the others.

        Raises `ConfigError` at the call for a request that cannot run.
        """
        for index, request in enumerate(requests):
            self._require_possible(request, f"request {index}")
        return self._run(requests)

    def add(self, request: Request) -> int:
        """Accept a request; its number in the updates that `step` returns. `ConfigError` when it cannot run."""
        self._require_possible(request, "request")
        return self._accept(request, f"request {self._counts.requests}")

    def step(self) -> list[Update]:
        """Do one piece of work: read a piece of some prompts, or draw a token for every running sequence.

        Returns what is new of requests given to `add`; nothing when there is nothing to do.
        """
        if not self._news and self.busy:
            self._advance()
        news, self._news = self._news, []
        return news

    def cancel(self, ticket: int) -> None:
        """End a request without a completion and free its place; nothing when it has ended already."""
        self._drop({ticket})

    def sync(self, weights: Weights | None = None) -> None:
        """Say that the weights have changed: what was computed with the old ones is dropped.

        `weights` (names as in `model.state_dict()`) are copied into the model first, in place; as pairs, one after
        another. Sequences that run end with `abort`; requests that wait run with the new weights.
        """
        if weights is not None:
            copy_weights(self.model, weights)
        aborted = self._batch.abort()
        self._batch.weight_version += 1
        self._batch.free()
        self._queue.return_first(self._reader.waiting)
        self._reader.forget()
        self._prefixes.clear()
        self._step = None
        self._post(aborted)
        self._rest_if_idle()

    def _run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """A loop over the open use, for requests whose updates come to an inbox of their own."""
        if not self.busy:  # weights may have changed without a word
            self._prefixes.drop_if_stale()
            if self._step is not None and self._prepared_from != fingerprint(self.model):
                self._step = None
        inbox: deque[Update] = deque()
        indices: dict[int, int] = {}
        try:
            for index, request in enumerate(requests):
                ticket = self._accept(request, f"request {index}")
                indices[ticket], self._inboxes[ticket] = index, inbox
            while indices:
                if not inbox:
                    self._advance()
                while inbox:
                    update = inbox.popleft()
                    if update.completion:
                        yield indices.pop(update.ticket), update.completion
        finally:
            self._drop(indices)

    def _accept(self, request: Request, label: str) -> int:
        if self._was_training is None:
            self._was_training = self.model.training
            self.model.eval()
        ticket = self._counts.requests
        self._counts.requests += 1
        self._queue.append(Waiting(ticket, label, request, tuple(request.prompt_ids)))
        return ticket

    def _advance(self) -> None:
        self._post(self._work())
        self._rest_if_idle()

    def _work(self) -> list[Update]:
        """Read if a row is free, but never two pieces without a step of those that run between them."""
        room = self.max_batch - self.running
        may_read = self._reader.busy or (room and len(self._queue))
        if may_read and not (self.running and self._just_read):
            return self._read(room)
        self._just_read = False
        self._counts.generated_tokens += self.running
        if self._step is None:
            self._step = prepared(self.model, self._deterministic)
            self._prepared_from = fingerprint(self.model)
        return self._batch.decode(self._step)

    def _read(self, room: int) -> list[Update]:
        if not self._reader.busy:
            self._reader.begin(self._queue.first(room))
            for one in self._reader.waiting:
                self._queue.remove(one.ticket)
        read, prefilled = self._reader.advance(self._queue)
        self._just_read = read > 0
        if prefilled is None:
            return []
        for member in prefilled.members:
            self._counts.prompt_tokens += len(member.waiting.prompt)
            self._counts.cached_prompt_tokens += member.cached
            self._counts.generated_tokens += member.waiting.params.max_new_tokens > 0
        return self._batch.admit(prefilled)

    def _post(self, news: Sequence[Update]) -> None:
        """To the stream that waits for it, or to the next `step`."""
        for update in news:
            self._inboxes.get(update.ticket, self._news).append(update)
            if update.completion:
                self._inboxes.pop(update.ticket, None)

    def _drop(self, tickets: Collection[int]) -> None:
        for ticket in tickets:
            self._queue.remove(ticket)
            self._inboxes.pop(ticket, None)
        self._reader.drop(tickets)
        self._batch.cancel(tickets)
        self._rest_if_idle()

    def _rest_if_idle(self) -> None:
        """Memory is given back, and the model is in training again if it was."""
        if not self.busy and self._was_training is not None:
            self._batch.free()
            self.model.train(self._was_training)
            if self._was_training:
                self._step = None  # a copy of the weights, which training has better use for
            self._was_training = None

    def _remember(self, tokens: Prompt, state: DecodeState, row: int) -> None:
        """The end of an answer in a conversation."""
        if not self._deterministic:  # decoding and reading round differently
            self._prefixes.insert(tokens, state, row, ends_text=True)

    def _require_possible(self, request: Request, label: str) -> None:
        problem = problem_of(request, self.max_tokens, self.model.config.vocab_size, self._decode is not None)
        if problem:
            raise ConfigError(f"{label}: {problem}")

    def _allocate(self, rows: int, tokens: int) -> DecodeState:
        parameter = next(self.model.parameters())
        return DecodeState.allocate(self.model.config, rows, tokens, parameter.device, parameter.dtype)


def _require_positions(model: Decoder, max_tokens: int) -> None:
    config = model.config
    if config.rope and max_tokens > config.max_position_embeddings:
        raise ConfigError(
            f"max_tokens: {max_tokens}, but the model's rotary positions are meant for "
            f"{config.max_position_embeddings} tokens; lower max_tokens, or extend the model's context first"
        )
