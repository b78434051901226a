"""Reading prompts: each distinct prompt once, what is remembered not at all, a piece at a time."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bloomery.generate.prefix import BLOCK, Node, Prefix, PrefixCache, next_boundary, parting
from bloomery.generate.queue import Queue
from bloomery.generate.request import Prompt, Waiting
from bloomery.generate.scores import PromptScores
from bloomery.model.decoder import Decoder
from bloomery.model.state import DecodeState

_MASK = 2**25  # entries of an attention mask of a piece behind held tokens, bytes

Allocate = Callable[[int, int], DecodeState]  # rows, tokens a row


@dataclass(eq=False)
class Reading:
    """A distinct prompt to be read, for those who wait for it."""

    prompt: Prompt
    waiting: list[Waiting]
    prefix: Prefix
    scores: PromptScores | None
    stops: set[int] = field(default_factory=set)  # tokens after which its memory is kept for others
    follows: bool = False  # begins like one before it, and saves that part by waiting for it

    @property
    def kind(self) -> tuple[int, bool]:
        """Prompts are read together only where this is equal."""
        return self.prefix.held, self.scores is not None

    @property
    def unread(self) -> int:
        """Tokens to read."""
        return len(self.prompt) - self.prefix.held

    def members(self, row: int) -> list["Member"]:
        """Those who waited for it, once row `row` holds it."""
        continues = self.prefix.node.ends_text and self.unread > 0
        return [Member(one, row, self.prefix.held, continues, self.scores) for one in self.waiting]


@dataclass(frozen=True)
class Member:
    """A request whose prompt has been read, into row `row`."""

    waiting: Waiting
    row: int
    cached: int
    continues: bool  # its prompt went on from the end of an earlier text: a conversation
    scores: PromptScores | None


@dataclass(frozen=True)
class Prefilled:
    """Prompts that have been read: a row of memory each, and the logits of the token that follows, (rows, vocab)."""

    members: list[Member]
    state: DecodeState
    logits: Tensor

    def expanded(self, members: Sequence[Member]) -> tuple[DecodeState, Tensor]:
        """The row of each member, repeated where members share it. The logits are a copy."""
        rows = [member.row for member in members]
        if rows == list(range(self.state.batch)):
            return self.state, self.logits.clone()
        index = torch.tensor(rows, device=self.logits.device)
        return self.state.take(index), self.logits[index]


class PromptReader:
    """Turns waiting requests into prefilled rows: `begin` chooses some, each `advance` reads a piece.

    `budget` bounds the padded tokens of a piece. `fixed`: every prompt alone and in pieces of one size, so that what is
    computed for it does not depend on the others.
    """

    def __init__(self, model: Decoder, allocate: Allocate, budget: int, prefixes: PrefixCache, fixed: bool):
        self._model, self._allocate, self._budget = model, allocate, budget
        self._prefixes, self._fixed = prefixes, fixed
        self._group: list[Reading] = []

    @property
    def busy(self) -> bool:
        """Whether a prompt is being read."""
        return bool(self._group)

    @property
    def waiting(self) -> list[Waiting]:
        """Requests whose prompts are being read."""
        return [one for reading in self._group for one in reading.waiting]

    @torch.no_grad()
    def begin(self, candidates: Sequence[Waiting]) -> None:
        """Choose among these, who each have a row free: the first one, and what can be read together with it."""
        self._group = self._choose(self._readings(candidates))
        self._state = self._allocate(len(self._group), max(len(reading.prompt) for reading in self._group))
        self._position = self._group[0].prefix.held
        for row, reading in enumerate(self._group):
            reading.prefix.restore(self._state, row)

    @torch.no_grad()
    def advance(self, queue: Queue) -> tuple[int, Prefilled | None]:
        """Read a piece: its padded tokens, and the prompts when it was their last. `queue`: who comes later."""
        stop = self._next_stop()
        read = len(self._group) * (stop - self._position)
        hidden = self._read(stop) if read else None
        self._position = stop
        if stop < self._end:
            if stop in self._group[0].stops:
                self._prefixes.insert(self._group[0].prompt[:stop], self._state, 0)
            return read, None
        return read, self._finish(hidden, queue)

    def drop(self, tickets: Collection[int]) -> None:
        """Do not read for these any more."""
        for reading in self._group:
            reading.waiting = [one for one in reading.waiting if one.ticket not in tickets]
        if not self.waiting:
            self.forget()

    def forget(self) -> None:
        """Read nothing on."""
        self._group = []

    def _readings(self, candidates: Sequence[Waiting]) -> list[Reading]:
        by_prompt: dict[Prompt, list[Waiting]] = {}
        for one in candidates:
            by_prompt.setdefault(one.prompt, []).append(one)
        readings = [self._reading(prompt, waiting) for prompt, waiting in by_prompt.items()]
        if self._prefixes.limit:
            self._share(readings)
        return readings

    def _reading(self, prompt: Prompt, waiting: list[Waiting]) -> Reading:
        tops = [one.params.top_logprobs for one in waiting if one.params.prompt_logprobs]
        if tops:  # what is remembered has no scores, so the prompt is read whole
            return Reading(prompt, waiting, self._prefixes.find(()), PromptScores(max(tops)))
        return Reading(prompt, waiting, self._prefixes.find(prompt), None)

    def _share(self, readings: Sequence[Reading]) -> None:
        """Let prompts with a common beginning wait for the first of them, and have it kept where they part."""
        leaders: dict[tuple[Node, Prompt], Reading] = {}
        for one in readings:
            held, known = one.prefix.held, one.prefix.known
            boundary = next_boundary(held)
            if one.scores is not None or len(one.prompt) <= boundary:
                continue
            if self._prefixes.recurrent and held < known < len(one.prompt):
                one.stops.add(known)
            leader = leaders.setdefault((one.prefix.node, one.prompt[held:boundary]), one)
            if leader is not one:
                one.follows = True
                if self._prefixes.recurrent:
                    leader.stops.add(parting(leader.prompt, one.prompt, boundary))

    def _choose(self, readings: Sequence[Reading]) -> list[Reading]:
        """The first, and those that are read with it."""
        front = readings[0]
        if self._is_alone(front):
            return [front]
        mates = [one for one in readings if one.kind == front.kind and not one.follows and not self._is_alone(one)]
        return next(group for group in groups(mates, self._budget) if front in group)

    def _is_alone(self, one: Reading) -> bool:
        return self._fixed or bool(one.stops) or not one.unread or len(one.prompt) > self._budget

    @property
    def _end(self) -> int:
        return max(len(reading.prompt) for reading in self._group)

    def _next_stop(self) -> int:
        """Where the next piece ends. Only a prompt alone has several pieces."""
        here, end = self._position, self._end
        if len(self._group) > 1:
            return end
        if self._fixed:
            return min(end, next_boundary(here))
        size = min(self._budget, max(BLOCK, _MASK // (here + self._budget))) if here else self._budget
        return min(end, here + size, *(stop for stop in self._group[0].stops if stop > here), end)

    def _read(self, stop: int) -> Tensor:
        """Move on to `stop`, right-padded where a prompt is shorter; each row's last hidden state, (rows, hidden)."""
        start, scored = self._position, self._group[0].scores is not None
        pieces = [reading.prompt[start:stop] for reading in self._group]
        sizes = torch.tensor([len(piece) for piece in pieces], device=self._state.lengths.device)
        ids = torch.tensor([piece + (0,) * (stop - start - len(piece)) for piece in pieces], device=sizes.device)
        even = all(len(piece) == stop - start for piece in pieces)
        hidden = self._model(ids, state=self._state, lengths=None if even else sizes, only_last=not scored)
        if not scored:
            return hidden[:, 0]
        for states, reading in zip(hidden, self._group, strict=True):
            assert reading.scores is not None
            targets = reading.prompt[start + 1 : stop + 1]
            reading.scores.extend(states[: len(targets)], targets, self._model.lm_head, self._model.config.vocab_size)
        return hidden[torch.arange(len(pieces), device=sizes.device), sizes - 1]

    def _finish(self, hidden: Tensor | None, queue: Queue) -> Prefilled:
        if hidden is None:
            known = self._group[0].prefix.node.logits
            assert known is not None
            logits = known[None]
        else:
            logits = self._model.lm_head(hidden)
            self._keep_ends(logits, queue)
        members = [member for row, reading in enumerate(self._group) for member in reading.members(row)]
        self.forget()
        return Prefilled(members, self._state, logits)

    def _keep_ends(self, logits: Tensor, queue: Queue) -> None:
        """Remember prompts that are long, or that others wait for: to copy a short one costs more than it can save."""
        for row, one in enumerate(self._group):
            if self._prefixes.limit and (len(one.prompt) >= BLOCK or one.prompt in queue):
                self._prefixes.insert(one.prompt, self._state, row, logits[row], ends_text=True)


def groups(readings: Sequence[Reading], budget: int) -> Iterator[list[Reading]]:
    """Shortest first, in groups whose padded size stays within `budget` tokens (or of one prompt)."""
    group: list[Reading] = []
    for one in sorted(readings, key=lambda reading: len(reading.prompt)):
        if group and len(one.prompt) * (len(group) + 1) > budget:
            yield group
            group = []
        group.append(one)
    if group:
        yield group
