"""Live sequences, and the tokens drawn for them since they came together."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bloomery.errors import DivergenceError
from bloomery.generate.prefill import Member
from bloomery.generate.request import Alternatives, Completion, FinishReason, Update, Waiting
from bloomery.generate.sampling import RowSettings, SamplingParams, likeliest, sample, uniforms
from bloomery.generate.scores import PromptScores, alternatives
from bloomery.generate.stopping import Decode, StopStrings, cut

_AHEAD = 16  # tokens: random numbers made at a time


@dataclass(eq=False)
class Live:
    """One sequence being generated, as far as it has been looked at."""

    waiting: Waiting
    scores: PromptScores | None
    cached: int  # prompt tokens that were remembered, not read
    keep: bool  # its end is worth remembering
    watch: StopStrings | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[Alternatives] = field(default_factory=list)
    reported: int = 0

    @classmethod
    def begin(cls, member: Member, text_of: Decode | None) -> "Live":
        """The sequence of a request whose prompt has been read."""
        stop = member.waiting.params.stop
        watch = StopStrings(stop, text_of) if stop and text_of else None
        return cls(member.waiting, member.scores, member.cached, member.continues, watch)

    @property
    def params(self) -> SamplingParams:
        """The request's settings."""
        return self.waiting.params

    @property
    def held(self) -> int:
        """Tokens in the row's memory: the last one drawn has not been fed."""
        return len(self.waiting.prompt) + len(self.tokens) - 1

    @property
    def most(self) -> int:
        """Tokens the sequence has at the longest, prompt included."""
        return len(self.waiting.prompt) + self.params.max_new_tokens

    def update(self, completion: Completion | None = None) -> Update:
        """Tokens since the last update, if the request streams, and perhaps the end."""
        if not self.waiting.request.stream:
            return Update(self.waiting.ticket, completion=completion)
        start, self.reported = self.reported, len(self.tokens)
        logprobs = self.logprobs[start:] if self.params.logprobs else []
        top = self.top[start:] if self.params.top_logprobs else None
        return Update(self.waiting.ticket, self.tokens[start:], logprobs, top, completion)

    def complete(self, text_of: Decode | None, weight_version: int, reason: FinishReason | None = None) -> Completion:
        """Everything as the caller gets it. `reason`: why it ends here, unless for its own tokens."""
        self._require_finite()
        at_stop_token = self.tokens[-1:] != [] and self.tokens[-1] in self.params.stop_token_ids
        stopped = at_stop_token or bool(self.watch and self.watch.found)
        text = None
        if text_of:
            text = cut(text_of(self.tokens[:-1] if at_stop_token else self.tokens), self.params.stop)
        scores = self.scores if self.params.prompt_logprobs else None
        return Completion(
            self.tokens, self.logprobs if self.params.logprobs else None,
            reason or ("stop" if stopped else "length"), weight_version, text,
            self.top if self.params.top_logprobs else None,
            scores.of_all_tokens() if scores else None,
            scores.alternatives_of_all_tokens(self.params.top_logprobs) if scores else None, self.cached,
        )  # fmt: skip

    def _require_finite(self) -> None:
        damaged = next((place for place, logprob in enumerate(self.logprobs, 1) if math.isnan(logprob)), None)
        if damaged:
            raise DivergenceError(
                f"{self.waiting.label}: the model's logits for token {damaged} are not finite; "
                "its weights are damaged or diverged in training: use an earlier checkpoint"
            )


class Window:
    """Live rows with their settings and the tokens drawn since they came together. Made when the rows change.

    `apart`: draw for each row by itself, since the kernel that serves all depends on the settings of all.
    Drawn tokens stay on the model's device until `flush`: on an accelerator, looking at them waits for it.
    """

    def __init__(self, live: list[Live], device: torch.device, apart: bool = False):
        self._live, self._device = live, device
        every = [one.params for one in live]
        together = [[params] for params in every] if apart else [every]
        self._settings = [RowSettings.of(rows, device) for rows in together]
        self._watched = [(row, one.watch) for row, one in enumerate(live) if one.watch]
        self._top = max(one.params.top_logprobs for one in live)
        self._left = [one.params.max_new_tokens - len(one.tokens) for one in live]
        self._soonest, self._drawn = min(self._left), 0
        self._stops = _stop_table(live, device)
        self._places = [len(one.tokens) for one in live]
        self._pending: list[list[Tensor]] = []
        self.last = torch.tensor([one.tokens[-1:] or [0] for one in live], device=device)

    def draw(self, logits: Tensor) -> list[int]:
        """Draw and record a token for each row; logits (rows, vocab) are overwritten. Returns the rows that end."""
        parts = len(self._settings)
        rows = zip(logits.chunk(parts), self._settings, self._uniform().chunk(parts), strict=True)
        drawn = [self._draw(*each) for each in rows]
        columns = drawn[0] if len(drawn) == 1 else [torch.cat(column) for column in zip(*drawn, strict=True)]
        self.last = columns[0]
        self._pending.append(columns)
        self._drawn += 1
        return sorted(self._ended())

    def _draw(self, logits: Tensor, settings: RowSettings, uniform: Tensor) -> list[Tensor]:
        """Tokens, logprobs and, if asked for, alternatives: a column each."""
        top = likeliest(logits, settings, self._top) if self._top else ()
        return [*sample(logits, settings, uniform), *top]

    def flush(self) -> None:
        """Hand the drawn tokens to their sequences."""
        if not self._pending:
            return
        columns = zip(*self._pending, strict=True)
        tokens, logprobs, *top = (torch.cat(column, 1).tolist() for column in columns)
        for row, one in enumerate(self._live):
            one.tokens += tokens[row]
            one.logprobs += logprobs[row]
            if one.params.top_logprobs:
                ids, values = (each[row] for each in top)
                one.top += alternatives(ids, values, len(ids) // len(tokens[row]), one.params.top_logprobs)
        self._pending = []

    def _uniform(self) -> Tensor:
        """The random numbers of the next token, (rows, 1) float64, made for some tokens at a time."""
        ahead = self._drawn % _AHEAD
        if ahead == 0:
            starts = [place + self._drawn for place in self._places]
            numbers = uniforms([one.params.seed for one in self._live], _AHEAD, starts)
            self._uniforms = torch.from_numpy(numbers).to(self._device)
        return self._uniforms[:, ahead : ahead + 1]

    def _ended(self) -> set[int]:
        """Looks at the tokens only where one can end a text."""
        ended: set[int] = set()
        if self._drawn == self._soonest:
            ended.update(row for row, left in enumerate(self._left) if left == self._drawn)
        if self._stops is not None:
            ended.update((self._stops == self.last).any(1).nonzero().flatten().tolist())
        if self._watched:
            tokens = self.last.flatten().tolist()
            ended.update([row for row, watch in self._watched if watch.push(tokens[row])])
        return ended


def _stop_table(live: list[Live], device: torch.device) -> Tensor | None:
    """Each row's stop tokens, padded with −1: (rows, most of a row), or one row for all if they share them."""
    sets = [one.params.stop_token_ids for one in live]
    wide = max(map(len, sets))
    rows = (
        sets[:1]
        if all(ids is sets[0] or ids == sets[0] for ids in sets)
        else [(*ids, *[-1] * (wide - len(ids))) for ids in sets]
    )
    return torch.tensor(rows, device=device) if wide else None
