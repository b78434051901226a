"""Reading prompts: each distinct prompt once, similar lengths together, at most a budget of tokens at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bloomery.generate.request import Request
from bloomery.model.decoder import Decoder
from bloomery.model.state import DecodeState

Prompt = tuple[int, ...]
Allocate = Callable[[int, int], DecodeState]


@dataclass(frozen=True)
class Waiting:
    """A request that has not begun: its place in the call, and its prompt as a tuple."""

    index: int
    request: Request
    prompt: Prompt


@dataclass(frozen=True)
class Prefilled:
    """Prompts that have been read: a row of memory each, and the logits of the token that follows, (rows, vocab)."""

    prompts: list[Prompt]
    state: DecodeState
    logits: Tensor

    def expand(self, prompts: list[Prompt]) -> "Prefilled":
        """The rows of `prompts`, repeated where a prompt is."""
        if prompts == self.prompts:
            return self
        row = {prompt: i for i, prompt in enumerate(self.prompts)}
        rows = torch.tensor([row[prompt] for prompt in prompts], device=self.logits.device)
        return Prefilled(prompts, self.state.take(rows), self.logits[rows])


class PromptReader:
    """Turns waiting requests into prefilled rows.

    Samples of one prompt share one reading, also when they begin at different times: while more of them wait, the
    prompt's row is kept. The queue puts equal prompts side by side, so one kept row is enough.
    """

    def __init__(self, model: Decoder, allocate: Allocate, budget: int, device: torch.device):
        self._model, self._allocate, self._budget, self._device = model, allocate, budget, device
        self._kept: Prefilled | None = None

    def forget(self) -> None:
        """Drop what was read with old weights."""
        self._kept = None

    def read(self, starting: Sequence[Waiting], then: Prompt | None) -> Iterator[tuple[list[Waiting], Prefilled]]:
        """`starting` in groups, each with a prefilled row per request. `then` is the prompt that waits next."""
        by_prompt: dict[Prompt, list[Waiting]] = {}
        for waiting in starting:
            by_prompt.setdefault(waiting.prompt, []).append(waiting)
        for prefilled in self._prefilled(list(by_prompt)):
            members = [waiting for prompt in prefilled.prompts for waiting in by_prompt[prompt]]
            if then in prefilled.prompts:
                self._kept = prefilled.expand([then])
            yield members, prefilled.expand([waiting.prompt for waiting in members])
        if self._kept and self._kept.prompts != [then]:
            self._kept = None

    def _prefilled(self, prompts: list[Prompt]) -> Iterator[Prefilled]:
        if self._kept and self._kept.prompts[0] in prompts:
            prompts.remove(self._kept.prompts[0])
            yield self._kept
        for group in groups(prompts, self._budget):
            yield prefill(self._model, group, self._allocate, self._device)


def groups(prompts: Sequence[Prompt], budget: int) -> Iterator[list[Prompt]]:
    """Distinct prompts, shortest first, in groups whose padded size stays within `budget` tokens (or of one prompt)."""
    group: list[Prompt] = []
    for prompt in sorted(prompts, key=len):
        if group and len(prompt) * (len(group) + 1) > budget:
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group


@torch.no_grad()
def prefill(model: Decoder, prompts: list[Prompt], allocate: Allocate, device: torch.device) -> Prefilled:
    """Read one group of prompts, right-padded, into fresh memory of just their length."""
    sizes = [len(prompt) for prompt in prompts]
    longest = max(sizes)
    ids = torch.tensor([prompt + (0,) * (longest - len(prompt)) for prompt in prompts], device=device)
    state = allocate(len(prompts), longest)
    lengths = None if min(sizes) == longest else torch.tensor(sizes, device=device)
    hidden = model(ids, state=state, lengths=lengths, only_last=True)
    return Prefilled(prompts, state, model.lm_head(hidden[:, 0]))
