"""Which copies of tokens an expert with a limited capacity keeps (arXiv 2504.14960 §3.3; arXiv 2101.03961 §2.2).

An expert takes factor · tokens · k / experts copies, rounded up, of the tokens that decide together; what it does not
take is left to the residual stream.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bloomery.parallel.collectives import Group, gather_whole

Drop = Literal["sub_sequence", "full_sequence"]
Policy = Literal["probs", "position"]


@dataclass(frozen=True)
class Capacity:
    """factor: of an even load. drop: whose tokens decide together: those of one rank, without asking another, so that
    the result depends on the mapping; or all of the micro-batch. policy: the copies with the greatest weights stay, or
    the earliest. pad: every rank sends every expert as many rows, so that no shape depends on the data."""

    factor: float
    drop: Drop = "sub_sequence"
    policy: Policy = "probs"
    pad: bool = False

    def rows(self, tokens: int, choices: int, experts: int) -> int:
        """Copies that an expert takes of `tokens` tokens, each with `choices` experts."""
        return math.ceil(self.factor * tokens * choices / experts)


@dataclass(frozen=True)
class Sequence:
    """The ranks that share a micro-batch's sequences: their group, how many they are, and where in a sequence of
    `tokens` tokens the ones of this rank are."""

    group: Group
    ranks: int
    places: Callable[[int], Tensor]

    def index(self, rows: int, tokens: int, device: torch.device) -> Tensor:
        """Number in the whole micro-batch of each of this rank's `tokens` tokens in `rows` sequences."""
        seq = tokens // max(rows, 1) * self.ranks
        places = self.places(seq) if tokens else torch.zeros(0, dtype=torch.int64)
        return (torch.arange(rows)[:, None] * seq + places).flatten().to(device)


def kept(weights: Tensor, indices: Tensor, experts: int, capacity: Capacity, sequence: Sequence, rows: int) -> Tensor:
    """(tokens, k) bool: the copies that stay. Tokens are of `rows` sequences, one after another; those with equal
    weights stay in their order. Collective over the sequence's ranks for `full_sequence`.

    For that, each rank tells for each expert the best copies it has, no more than the expert could take: the last one
    that the expert takes of all of them is where every rank then cuts.
    """
    tokens, choices = indices.shape
    scores = weights.detach() if capacity.policy == "probs" else torch.zeros_like(weights.detach())
    scores, chosen = scores.flatten(), indices.flatten()
    places = _places(scores, chosen, experts)
    if capacity.drop == "sub_sequence":
        return (places < capacity.rows(tokens, choices, experts)).view(tokens, choices)
    limit = capacity.rows(tokens * sequence.ranks, choices, experts)
    numbers = sequence.index(rows, tokens, scores.device).repeat_interleave(choices)
    best, whose = _best(scores, numbers, chosen, places, experts, min(limit, tokens))
    best, whose = (gather_whole(x, 1, sequence.group) for x in (best, whose))
    score, number = _last_taken(best, whose, limit)
    score, number = score[chosen], number[chosen]
    return ((scores > score) | ((scores == score) & (numbers <= number))).view(tokens, choices)


def _places(scores: Tensor, chosen: Tensor, experts: int) -> Tensor:
    """Place of each copy among those of its expert, the greatest score first, equal ones in their order."""
    order = scores.argsort(descending=True, stable=True)
    order = order[chosen[order].argsort(stable=True)]
    counts = torch.zeros(experts, dtype=torch.int64, device=chosen.device)
    counts.scatter_add_(0, chosen, torch.ones_like(chosen))
    begin = counts.cumsum(0) - counts
    places = torch.empty_like(chosen)
    places[order] = torch.arange(len(order), device=order.device) - begin[chosen[order]]
    return places


_NO_TOKEN = 2**62


def _best(
    scores: Tensor, numbers: Tensor, chosen: Tensor, places: Tensor, experts: int, most: int
) -> tuple[Tensor, Tensor]:
    """Scores and token numbers of each expert's first copies, (experts, most); −∞ where there are fewer."""
    slots = torch.where(places < most, chosen * most + places, experts * most)
    best = torch.full((experts * most + 1,), -torch.inf, dtype=scores.dtype, device=scores.device)
    whose = torch.full((experts * most + 1,), _NO_TOKEN, device=scores.device)
    best, whose = best.scatter(0, slots, scores), whose.scatter(0, slots, numbers)
    return best[:-1].view(experts, most), whose[:-1].view(experts, most)


def _last_taken(best: Tensor, whose: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Score and token number (experts,) of the last copy that each expert takes of all (experts, copies)."""
    if best.shape[1] < limit:  # so all copies are here
        return best.new_full((len(best),), -torch.inf), whose.new_full((len(best),), _NO_TOKEN)
    by_number = whose.argsort(dim=1, stable=True)
    order = by_number.gather(1, best.gather(1, by_number).argsort(dim=1, descending=True, stable=True))
    last = order[:, limit - 1 : limit]
    return best.gather(1, last)[:, 0], whose.gather(1, last)[:, 0]
