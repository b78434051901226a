"""The sequences being generated: rows 0 … n−1 of memory that follows their number and length, always without a gap.

A row that ends is replaced by the last one, and newcomers are appended. So every decoding step runs on exactly the live
rows, as views, and the batch shrinks by itself when nothing waits.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from bloomery.generate.prefill import Allocate, Member, Prefilled
from bloomery.generate.request import FinishReason, Prompt, Update
from bloomery.generate.stopping import Decode
from bloomery.generate.window import Live, Window
from bloomery.model.state import DecodeState
from bloomery.model.step import Step

BLOCK = 128  # tokens: a row's memory grows by at least so many
_VECTOR = 16  # tokens: with as many to spare, kernels read whole vectors, and the same ones in memory of any size
_WORTH_FREEING = 64 * 2**20  # bytes: a smaller memory is not copied only to shrink it

Remember = Callable[[Prompt, DecodeState, int], None]  # the tokens that a row of a state holds


class Batch:
    """Live sequences, and what is done to them; `admit`, `decode` and `abort` return news.

    `apart`: no row's draw may depend on the others' settings.
    """

    def __init__(self, allocate: Allocate, max_rows: int, text_of: Decode | None, remember: Remember, apart: bool):
        self._allocate, self._max_rows, self._apart = allocate, max_rows, apart
        self._text_of, self._remember = text_of, remember
        self.weight_version = 0
        self._live: list[Live] = []
        self._window: Window | None = None
        self._longest = 0  # tokens held by the longest row
        self.free()

    def __len__(self) -> int:
        return len(self._live)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the memory: `config.cache_bytes` of the rows and tokens there is room for."""
        return self._state.nbytes

    def free(self) -> None:
        """Give back the memory of an empty batch."""
        assert not self._live
        self._state, self._window, self._longest = self._allocate(0, 0), None, 0

    @torch.no_grad()
    def admit(self, prefilled: Prefilled) -> list[Update]:
        """Append requests whose prompts have been read, and draw their first tokens; some wanted no more than that."""
        scored = [member for member in prefilled.members if not member.waiting.params.max_new_tokens]
        members = [member for member in prefilled.members if member.waiting.params.max_new_tokens]
        news = [self._last_update(Live.begin(member, self._text_of)) for member in scored]
        return news + self._start(members, *prefilled.expanded(members)) if members else news

    def _start(self, members: Sequence[Member], state: DecodeState, logits: Tensor) -> list[Update]:
        self._flush()
        start = len(self._live)
        new = [Live.begin(member, self._text_of) for member in members]
        self._live += new
        self._make_room(len(self._live), max(self._longest, *(len(one.waiting.prompt) for one in new)))
        self._state.put(torch.arange(start, len(self._live), device=logits.device), state)
        window = Window(new, logits.device, self._apart)
        ended = [start + row for row in window.draw(logits)]
        window.flush()
        news = self._news(ended, new)
        self._retire(ended)
        self._reshape()
        return news

    def decode(self, step: Step) -> list[Update]:
        """One step: feed each row's last token, draw its next."""
        window = self._window
        assert window is not None
        self._make_room(len(self._live), self._longest)
        with torch.inference_mode():
            ended = window.draw(step(window.last, self._memory))
        self._longest += 1
        if not ended and not self._streaming:
            return []
        window.flush()
        news = self._news(ended, self._streaming)
        if ended:
            self._retire(ended)
            self._reshape()
        return news

    def abort(self) -> list[Update]:
        """End every live sequence where it is."""
        self._flush()
        news = [self._last_update(one, "abort") for one in self._live]
        self._live = []
        return news

    def cancel(self, tickets: Collection[int]) -> None:
        """Take these sequences out without a word."""
        rows = [row for row, one in enumerate(self._live) if one.waiting.ticket in tickets]
        if rows:
            self._flush()
            self._close_gaps(rows)
            self._reshape()

    def _flush(self) -> None:
        if self._window is not None:
            self._window.flush()

    def _news(self, ended: list[int], heard: list[Live]) -> list[Update]:
        """The last update of the rows that ended, and the tokens of those of `heard` that stream."""
        finished = {id(self._live[row]) for row in ended}
        last = [self._last_update(self._live[row]) for row in ended]
        return last + [one.update() for one in heard if one.waiting.request.stream and id(one) not in finished]

    def _last_update(self, one: Live, reason: FinishReason | None = None) -> Update:
        return one.update(one.complete(self._text_of, self.weight_version, reason))

    def _retire(self, ended: list[int]) -> None:
        """Take out rows that ended, remembering those that are worth it."""
        for row in ended:
            one = self._live[row]
            if one.keep and one.held > len(one.waiting.prompt):
                self._remember((*one.waiting.prompt, *one.tokens[:-1]), self._state, row)
        self._close_gaps(ended)

    def _close_gaps(self, gone: list[int]) -> None:
        """Take these rows out; the last ones move into the gaps."""
        count = len(self._live) - len(gone)
        holes = [row for row in gone if row < count]
        movers = [row for row in range(count, len(self._live)) if row not in set(gone)]
        if holes:
            source, target = (torch.tensor(rows, device=self._state.lengths.device) for rows in (movers, holes))
            self._state.put(target, self._state.take(source))
            for mover, hole in zip(movers, holes, strict=True):
                self._live[hole] = self._live[mover]
        del self._live[count:]

    def _reshape(self) -> None:
        """What the next steps run on, after the rows have changed."""
        self._longest = max((one.held for one in self._live), default=0)
        if not self._live:
            return
        self._give_back()
        self._window = Window(self._live.copy(), self._state.lengths.device, self._apart)
        self._streaming = [one for one in self._live if one.waiting.request.stream]
        self._memory = self._state.head(len(self._live))

    def _make_room(self, rows: int, held: int) -> None:
        """Grow for so many rows and one more token than they hold: twofold, never beyond what they can come to."""
        tokens, new_rows, new_tokens = held + _VECTOR, self._state.batch, self._state.max_tokens
        if rows > new_rows:
            new_rows = min(self._max_rows, max(rows, 2 * new_rows))
        if tokens > new_tokens:
            most = max(one.most for one in self._live)
            new_tokens = min(_rounded(most + _VECTOR, _VECTOR), max(_rounded(tokens, BLOCK), 2 * new_tokens))
        if (new_rows, new_tokens) != (self._state.batch, self._state.max_tokens):
            self._state.resize(new_rows, new_tokens)
            self._memory = self._state.head(len(self._live))

    def _give_back(self) -> None:
        """Shrink memory of which less than a quarter is in use."""
        rows, tokens = len(self._live), min(_rounded(self._longest + _VECTOR, BLOCK), self._state.max_tokens)
        if self._state.nbytes > _WORTH_FREEING and self._state.batch * self._state.max_tokens > 4 * rows * tokens:
            self._state.resize(rows, tokens)


def _rounded(tokens: int, multiple: int) -> int:
    return -(-tokens // multiple) * multiple
