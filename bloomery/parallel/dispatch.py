"""Tokens to the ranks that hold their experts and back, at the swap point `moe.dispatch` (arXiv 2504.14960 §3.2).

Every rank brings tokens of its own; how attention shares them is of no concern here. Ranks enter every collective
whether they have tokens or not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bloomery.errors import DivergenceError
from bloomery.model.balance import Metrics
from bloomery.model.moe import Dispatch, Experts
from bloomery.parallel.capacity import Capacity, Sequence, kept
from bloomery.parallel.collectives import Group, all_to_all, gather_tokens, gather_whole, scatter_tokens
from bloomery.parallel.permute import Order, chunk_order, combine, spread

Room = Callable[[np.ndarray, int], None]


@dataclass(frozen=True)
class Grid:
    """The ranks among which a layer's experts are shared, and this rank's place.

    `group` holds them all, row by row of (expert, expert_tensor); `expert` and `tensor` are this rank's column and row.
    """

    experts: int
    ranks: tuple[int, int]
    place: tuple[int, int]
    group: Group
    expert: Group
    tensor: Group

    @property
    def local(self) -> int:
        """Experts of one rank."""
        return self.experts // self.ranks[0]

    @property
    def own(self) -> slice:
        """This rank's experts."""
        return slice(self.place[0] * self.local, (self.place[0] + 1) * self.local)

    @property
    def number(self) -> int:
        """This rank's place in `group`."""
        return self.place[0] * self.ranks[1] + self.place[1]


class Dispatcher(Dispatch):
    """What both ways have in common. `metrics` are of the last forward pass."""

    def __init__(self, grid: Grid, sequence: Sequence, capacity: Capacity | None, room: Room):
        super().__init__()
        self.grid, self.sequence, self.capacity, self.room = grid, sequence, capacity, room
        self.metrics: Metrics = {}

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor, experts: Experts) -> Tensor:
        """x (sequences, seq, width), indices and weights (tokens, k) → weighted sum of the chosen experts, as x.

        Raises `DivergenceError` on all ranks when the weights of one are not finite, and `BloomeryError` before
        anything is allocated that does not fit.
        """
        tokens = x.flatten(0, -2)
        if self.capacity is not None:
            stays = kept(weights, indices, self.grid.experts, self.capacity, self.sequence, len(x))
            indices = indices.masked_fill(~stays, self.grid.experts)  # an expert that nobody has
        out = self.exchange(tokens, indices, weights, experts)
        return out.to(x.dtype).view_as(x)

    def exchange(self, x: Tensor, indices: Tensor, weights: Tensor, experts: Experts) -> Tensor:
        """x (tokens, width) → (tokens, width), float32 or better."""
        raise AssertionError("each dispatcher has its own")

    def tell(self, numbers: Tensor, weights: Tensor) -> np.ndarray:
        """Everyone's `numbers` (n,) int64 on the host, (ranks of the group, n): the one time that the host waits."""
        finite = torch.isfinite(weights).all()[None].to(numbers.dtype)
        told = gather_whole(torch.cat([numbers, finite])[None], 0, self.grid.group).cpu().numpy()
        if not told[:, -1].all():
            ranks = np.flatnonzero(told[:, -1] == 0).tolist()
            raise DivergenceError(
                f"experts: router weights of rank {', '.join(map(str, ranks))} of {len(told)} that share the experts "
                "are not finite; no token was sent; lower learning_rate, set balance.z_weight, or look at this data"
            )
        return told[:, :-1]

    def report(self, rows: np.ndarray, copies: float) -> None:
        """rows: that each rank of the group has for its experts; copies: that there are, dropped ones among them."""
        mean = rows.mean()
        self.metrics = {"rank_imbalance": (float(rows.max() / mean) if mean else 1.0, 1)}
        if self.capacity is not None:
            self.metrics["dropped"] = (copies - float(rows.sum()) / self.grid.ranks[1], copies)


class AllToAll(Dispatcher):
    """Each copy of a token goes to its expert's rank, and from there to all that share the expert's width."""

    def exchange(self, x: Tensor, indices: Tensor, weights: Tensor, experts: Experts) -> Tensor:
        grid = self.grid
        order, table = self._ordered(indices, weights)
        mine = table[:, grid.place[1], grid.own]  # (sources, local experts), of this rank's column
        received = table[:, :, grid.own].sum((0, 2))  # by each rank of the row
        there = table[grid.place[0], grid.place[1]].reshape(grid.ranks[0], -1).sum(1).tolist()
        back = mine.sum(1).tolist()
        rows = spread(x, order, _product_dtype(x))
        rows = gather_tokens(all_to_all(rows, there, back, grid.expert), 0, grid.tensor, received.tolist())
        rows = self._by_expert(rows, experts, table[:, :, grid.own].transpose(1, 0, 2).reshape(-1, grid.local))
        rows = scatter_tokens(rows, 0, grid.tensor, received.tolist())
        return combine(all_to_all(rows, back, there, grid.expert), order, weights)

    def _ordered(self, indices: Tensor, weights: Tensor) -> tuple[Order, np.ndarray]:
        """The order in which copies are sent, and how many every rank sends to every expert, (*ranks, experts)."""
        grid, tokens = self.grid, len(indices)
        if self.capacity is not None and self.capacity.pad:
            slots = min(self.capacity.rows(self._deciding(tokens), indices.shape[1], grid.experts), tokens)
            self._count_dropped(indices)
            return Order.in_slots(indices, grid.experts, slots), np.full((*grid.ranks, grid.experts), slots)
        counts = torch.zeros(grid.experts + 1, dtype=torch.int64, device=indices.device)
        counts.scatter_add_(0, indices.flatten(), torch.ones_like(indices).flatten())
        told = self.tell(counts, weights)
        table = told[:, :-1].reshape(*grid.ranks, grid.experts)
        held = table.reshape(-1, grid.ranks[0], grid.local).sum((0, 2)).repeat(grid.ranks[1])
        self.room(held, grid.local)
        self.report(held, float(told.sum()))
        sent = int(table[grid.place].sum())
        return Order.by_expert(indices, None if sent == indices.numel() else sent), table

    def _deciding(self, tokens: int) -> int:
        assert self.capacity is not None
        return tokens * self.sequence.ranks if self.capacity.drop == "full_sequence" else tokens

    def _count_dropped(self, indices: Tensor) -> None:
        self.metrics = {"dropped": ((indices == self.grid.experts).sum(), indices.numel())}

    def _by_expert(self, rows: Tensor, experts: Experts, sizes: np.ndarray) -> Tensor:
        """The experts' outputs for rows in chunks of `sizes` (sources, local experts), in the same order."""
        counts = torch.from_numpy(sizes.sum(0)).to(rows.device, non_blocking=True)
        if sizes.shape[1] == 1 or len(sizes) == 1:
            return experts(rows, counts)
        there, back = chunk_order(sizes, rows.device)
        return experts(rows.index_select(0, there), counts).index_select(0, back)


class AllGather(Dispatcher):
    """Every token goes to all ranks that share experts; each adds up what its own experts say. Fewer bytes than
    `AllToAll` where a token has more experts than there are ranks."""

    def exchange(self, x: Tensor, indices: Tensor, weights: Tensor, experts: Experts) -> Tensor:
        grid = self.grid
        told = self.tell(torch.tensor([len(x)], device=x.device), weights)
        sizes = told[:, 0].tolist()
        x = x.to(_product_dtype(x))
        x, weights = (gather_tokens(each, 0, grid.group, sizes) for each in (x, weights))
        indices = gather_tokens(indices, 0, grid.group, sizes)
        counts = torch.zeros(grid.experts + 1, dtype=torch.int64, device=x.device)
        counts.scatter_add_(0, indices.flatten(), torch.ones_like(indices).flatten())
        held = counts[:-1].view(grid.ranks[0], -1).sum(1).cpu().numpy().repeat(grid.ranks[1])
        self.room(held, grid.local)
        self.report(held, float(indices.numel()))
        local = indices - grid.own.start
        local = local.masked_fill((local < 0) | (local >= grid.local), grid.local)
        order = Order.by_expert(local, int(held[grid.number]))
        out = combine(experts(spread(x, order), counts[grid.own]), order, weights)
        return scatter_tokens(out.to(x.dtype), 0, grid.group, sizes)


def _product_dtype(x: Tensor) -> torch.dtype:
    """What the experts' products are made of: nothing finer needs to be sent."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
