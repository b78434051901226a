"""Log-probabilities of prompt tokens, without ever holding (tokens, vocabulary) for a long prompt."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bloomery.generate.request import Alternatives

_LOGITS = 2**23  # entries of a piece of logits, 32 MiB in float32


@dataclass
class PromptScores:
    """Of one prompt's tokens but the first, at temperature 1: grows as the prompt is read."""

    top: int  # alternatives per token
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[Alternatives] = field(default_factory=list)

    def of_all_tokens(self) -> list[float | None]:
        """One entry per prompt token."""
        return [None, *self.logprobs]

    def alternatives_of_all_tokens(self, count: int) -> list[Alternatives | None] | None:
        """At most `count` alternatives per prompt token."""
        if not count:
            return None
        return [None, *(dict(list(each.items())[:count]) for each in self.alternatives)]

    @torch.no_grad()
    def extend(self, hidden: Tensor, targets: Sequence[int], head: nn.Module, vocab_size: int) -> None:
        """hidden (n, hidden size) are the states before the n tokens `targets`; `head` turns them into logits."""
        ids = torch.tensor(targets, dtype=torch.int64, device=hidden.device)[:, None]
        width = max(1, _LOGITS // vocab_size)
        for start in range(0, len(ids), width):
            logits = head(hidden[start : start + width]).float()
            self._add(torch.log_softmax(logits, -1), ids[start : start + width])

    def _add(self, logprobs: Tensor, ids: Tensor) -> None:
        self.logprobs += logprobs.gather(1, ids).flatten().tolist()
        if self.top:
            values, tokens = logprobs.topk(min(self.top, logprobs.shape[-1]), dim=-1)
            wide = tokens.shape[1]
            self.alternatives += alternatives(tokens.flatten().tolist(), values.flatten().tolist(), wide, wide)


def alternatives(tokens: Sequence[int], logprobs: Sequence[float], wide: int, count: int) -> list[Alternatives]:
    """`wide` likeliest tokens a place, place after place, as a mapping of at most `count` for each."""
    pairs = list(zip(tokens, logprobs, strict=True))
    places = [pairs[start : start + min(wide, count)] for start in range(0, len(pairs), wide)]
    return [{token: value for token, value in place if value > -math.inf} for place in places]
