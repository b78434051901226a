"""The sequences being generated: rows 0 … n−1 of preallocated memory, always without a gap.

A row that ends is replaced by the last one, and newcomers are appended. So every decoding step runs on exactly the live
rows, as views, and the batch shrinks by itself when nothing waits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from bloomery.errors import DivergenceError
from bloomery.generate.prefill import Prefilled, Waiting
from bloomery.generate.request import Completion, FinishReason
from bloomery.generate.sampling import RowSettings, SamplingParams, sample, uniforms
from bloomery.generate.stopping import Decode, StopStrings, cut
from bloomery.model.state import DecodeState
from bloomery.model.step import Step


@dataclass
class Rows:
    """What is kept for each row, on the model's device; the last three have a column per new token."""

    last: Tensor  # (rows, 1) int64: the token to feed next
    produced: Tensor  # (rows, 1) int64: tokens generated so far
    stops: Tensor  # (rows, widest set of stop tokens) int64, padded with −1
    tokens: Tensor  # int64
    logprobs: Tensor  # float32
    uniforms: Tensor  # float64

    @classmethod
    def allocate(cls, count: int, params: Sequence[SamplingParams], device: torch.device) -> "Rows":
        """Room for `count` rows, each for any of `params`."""
        wide = max((p.max_new_tokens for p in params), default=0)
        stops = max((len(p.stop_token_ids) for p in params), default=0)
        widths = [1, 1, stops, wide, wide, wide]
        dtypes = [torch.int64] * 4 + [torch.float32, torch.float64]
        return cls(*(torch.zeros(count, w, dtype=t, device=device) for w, t in zip(widths, dtypes, strict=True)))

    def view(self, start: int, stop: int) -> "Rows":
        """Rows start … stop−1, sharing memory."""
        return Rows(*(getattr(self, field.name)[start:stop] for field in fields(self)))

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy rows `source` onto rows `target`."""
        for field in fields(self):
            buffer = getattr(self, field.name)
            buffer[target] = buffer[source]

    def start(self, params: Sequence[SamplingParams]) -> None:
        """Begin all rows afresh with these settings, one a row."""
        self.produced.zero_()
        wide, stops = max(p.max_new_tokens for p in params), self.stops.shape[1]
        self.stops.copy_(torch.tensor([[*p.stop_token_ids, *[-1] * (stops - len(p.stop_token_ids))] for p in params]))
        self.uniforms[:, :wide].copy_(torch.from_numpy(uniforms([p.seed for p in params], wide)))


@dataclass
class Live:
    """One sequence being generated."""

    waiting: Waiting
    watch: StopStrings | None

    @property
    def params(self) -> SamplingParams:
        """The request's settings."""
        return self.waiting.request.params


class Window:
    """Some consecutive live rows with their settings: made when the rows change, used every step."""

    def __init__(self, rows: Rows, live: list[Live]):
        self.rows = rows
        self._settings = RowSettings.of([one.params for one in live], rows.last.device)
        self._watched = [(row, one.watch) for row, one in enumerate(live) if one.watch]
        self._stops = any(one.params.stop_token_ids for one in live)
        produced = rows.produced.flatten().tolist()
        self._left = [one.params.max_new_tokens - count for one, count in zip(live, produced, strict=True)]
        self._soonest, self._drawn = min(self._left), 0

    def draw(self, logits: Tensor) -> list[int]:
        """Draw and record a token for each row; logits (rows, vocab) are overwritten. Returns the rows that end."""
        rows = self.rows
        token, logprob = sample(logits, self._settings, rows.uniforms.gather(1, rows.produced))
        rows.tokens.scatter_(1, rows.produced, token)
        rows.logprobs.scatter_(1, rows.produced, logprob)
        rows.last.copy_(token)
        rows.produced += 1
        self._drawn += 1
        return sorted(self._ended(token))

    def _ended(self, token: Tensor) -> set[int]:
        """Looks at the tokens only where one can end a text: on an accelerator, looking waits for it."""
        ended: set[int] = set()
        if self._drawn == self._soonest:
            ended.update(row for row, left in enumerate(self._left) if left == self._drawn)
        if self._stops:
            ended.update((self.rows.stops == token).any(1).nonzero().flatten().tolist())
        if self._watched:
            tokens = token.flatten().tolist()
            ended.update([row for row, watch in self._watched if watch.push(tokens[row])])
        return ended


class Batch:
    """Live sequences, and what is done to them: each of `admit`, `decode`, `abort` returns what ended, as
    (index, Completion)."""

    def __init__(self, step: Step, state: DecodeState, rows: Rows, text_of: Decode | None, weight_version: int):
        self._step, self._state, self._rows, self._text_of = step, state, rows, text_of
        self.weight_version = weight_version
        self._live: list[Live] = []

    def __len__(self) -> int:
        return len(self._live)

    @torch.no_grad()
    def admit(self, starting: list[Waiting], prefilled: Prefilled) -> list[tuple[int, Completion]]:
        """Append requests whose prompts have been read, and draw their first tokens."""
        start, stop = len(self._live), len(self._live) + len(starting)
        self._state.put(torch.arange(start, stop, device=prefilled.logits.device), prefilled.state)
        self._live += [Live(waiting, self._watch(waiting)) for waiting in starting]
        rows = self._rows.view(start, stop)
        rows.start([waiting.request.params for waiting in starting])
        ended = Window(rows, self._live[start:]).draw(prefilled.logits.clone())
        finished = self._retire([start + row for row in ended])
        self._reshape()
        return finished

    def renew(self, step: Step, weight_version: int) -> None:
        """Go on with new weights."""
        self._step, self.weight_version = step, weight_version

    @torch.inference_mode()
    def decode(self) -> list[tuple[int, Completion]]:
        """One step: feed each row's last token, draw its next."""
        finished = self._retire(self._window.draw(self._step(self._window.rows.last, self._memory)))
        if finished:
            self._reshape()
        return finished

    def abort(self) -> list[tuple[int, Completion]]:
        """End every live sequence where it is."""
        finished = [self._complete(row, "abort") for row in range(len(self._live))]
        self._live = []
        return finished

    def _watch(self, waiting: Waiting) -> StopStrings | None:
        stop = waiting.request.params.stop
        return StopStrings(stop, self._text_of) if stop and self._text_of else None

    def _reshape(self) -> None:
        count = len(self._live)
        if count:
            self._window = Window(self._rows.view(0, count), self._live)
            self._memory = self._state.head(count)

    def _retire(self, ended: list[int]) -> list[tuple[int, Completion]]:
        """Take out the rows that ended and close the gaps with the last rows."""
        if not ended:
            return []
        finished = [self._complete(row) for row in ended]
        count = len(self._live) - len(ended)
        gone = set(ended)
        holes = [row for row in ended if row < count]
        movers = [row for row in range(count, len(self._live)) if row not in gone]
        if holes:
            source, target = (torch.tensor(rows, device=self._rows.last.device) for rows in (movers, holes))
            self._state.put(target, self._state.take(source))
            self._rows.move(source, target)
            for mover, hole in zip(movers, holes, strict=True):
                self._live[hole] = self._live[mover]
        del self._live[count:]
        return finished

    def _complete(self, row: int, reason: FinishReason | None = None) -> tuple[int, Completion]:
        live, rows, params = self._live[row], self._rows, self._live[row].params
        count = int(rows.produced[row])
        tokens, logprobs = rows.tokens[row, :count].tolist(), rows.logprobs[row, :count].tolist()
        damaged = [position for position, logprob in enumerate(logprobs, 1) if math.isnan(logprob)]
        if damaged:
            raise DivergenceError(
                f"request {live.waiting.index}: the model's logits for token {damaged[0]} are not finite; "
                "its weights are damaged or diverged in training: use an earlier checkpoint"
            )
        at_stop_token = tokens[-1] in params.stop_token_ids
        stopped = at_stop_token or bool(live.watch and live.watch.found)
        text = None
        if self._text_of:
            text = cut(self._text_of(tokens[:-1] if at_stop_token else tokens), params.stop)
        reason = reason or ("stop" if stopped else "length")
        return live.waiting.index, Completion(
            tokens, logprobs if params.logprobs else None, reason, self.weight_version, text
        )
