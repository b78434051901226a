"""How the tokens of one sequence lie over the ranks of the context axis, and what ranks know of each other's tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from bloomery.model.context import Context
from bloomery.parallel.collectives import gather_whole

Kind = Literal["zigzag", "contiguous"]
Seen = Literal["none", "some", "all", "causal"]
"""What a chunk of queries sees of a chunk of keys; `causal`: of itself, each token what is before it."""


@dataclass(frozen=True)
class Layout:
    """A sequence cut into equal chunks, numbered in order. Under `zigzag` rank r of c holds chunks r and 2c − 1 − r,
    which makes causal attention the same work for all (arXiv 2310.01889 and its successors); under `contiguous` one
    chunk, number r."""

    seq: int
    ranks: int
    kind: Kind = "zigzag"

    def __post_init__(self) -> None:
        if self.seq <= 0 or self.seq % self.num_chunks:
            below, above = self.seq - self.seq % self.num_chunks, self.padded(self.seq, self.ranks, self.kind)
            choices = f"{below} or {above}" if below > 0 else f"{above}"
            raise ValueError(
                f"sequence of {self.seq} tokens over {self.ranks} context ranks, {self.kind}: expected a multiple of "
                f"{self.num_chunks}; choose {choices} tokens, or pad with masked labels"
            )

    @staticmethod
    def padded(seq: int, ranks: int, kind: Kind = "zigzag") -> int:
        """The least length of at least `seq` tokens that can be laid out."""
        unit = ranks * _held(kind)
        return -(-max(seq, 1) // unit) * unit

    @property
    def num_chunks(self) -> int:
        return self.ranks * _held(self.kind)

    @property
    def chunk_len(self) -> int:
        """Tokens of a chunk."""
        return self.seq // self.num_chunks

    def chunks(self, rank: int) -> tuple[int, ...]:
        """Numbers of the chunks a rank holds, in the order in which it holds them."""
        return (rank,) if self.kind == "contiguous" else (rank, self.num_chunks - 1 - rank)

    def owner(self, chunk: int) -> int:
        """The rank that holds a chunk."""
        return min(chunk, self.num_chunks - 1 - chunk) if self.kind == "zigzag" else chunk

    def index(self, rank: int) -> Tensor:
        """Places in the sequence of the tokens a rank holds, (seq / ranks,) int64."""
        return torch.cat([torch.arange(self.chunk_len) + chunk * self.chunk_len for chunk in self.chunks(rank)])

    @cached_property
    def arrival(self) -> tuple[int, ...]:
        """Chunk numbers as they lie after a gather, rank by rank."""
        return tuple(chunk for rank in range(self.ranks) for chunk in self.chunks(rank))

    def in_order(self, gathered: Tensor, dim: int) -> Tensor:
        """Tokens as gathered, rank by rank, along `dim` → in the order of the sequence."""
        return self._arranged(gathered, dim, sorted(range(self.num_chunks), key=self.arrival.__getitem__))

    def by_rank(self, ordered: Tensor, dim: int) -> Tensor:
        """The way back from `in_order`."""
        return self._arranged(ordered, dim, list(self.arrival))

    def _arranged(self, t: Tensor, dim: int, places: list[int]) -> Tensor:
        if self.kind == "contiguous":
            return t
        chunks = t.split(self.chunk_len, dim)
        return torch.cat([chunks[place] for place in places], dim)


def zigzag(seq: int, ranks: int, rank: int) -> Tensor:
    """Places in the sequence of the tokens that `rank` of `ranks` holds, (seq / ranks,) int64."""
    return Layout(seq, ranks).index(rank)


class View:
    """Which tokens of a sequence see which: those before them, in their own document, inside the window.

    `ids` (batch, seq) are the documents in the order of the sequence, numbered in order; `None` where every row is one.
    """

    def __init__(self, layout: Layout, ids: Tensor | None, window: int | None, device: torch.device):
        self.layout, self.ids, self.window, self.device = layout, ids, window, device
        self.table = self._table()

    def _table(self) -> list[list[Seen]]:
        """How much each chunk of queries (row) sees of each chunk of keys (column)."""
        number, length = torch.arange(self.layout.num_chunks), self.layout.chunk_len
        queries, keys = number[:, None], number
        window = self.layout.seq if self.window is None else self.window
        some = (keys <= queries) & ((queries - keys - 1) * length + 1 < window)
        whole = (queries - keys + 1) * length - 1 < window
        if self.ids is not None:
            first, last = self.borders
            some &= (last[:, None, :] >= first[:, :, None]).any(0)
            whole &= (first[:, None, :] == last[:, :, None]).all(0)
        kinds: tuple[Seen, ...] = ("none", "some", "all", "causal")
        found = some.int() * (1 + whole.int() * (1 + (queries == keys).int()))
        return [[kinds[kind] for kind in row] for row in found.tolist()]

    @cached_property
    def borders(self) -> tuple[Tensor, Tensor]:
        """The documents in which each chunk starts and ends, (batch, chunks) each, on the CPU."""
        assert self.ids is not None
        chunked = self.ids.unflatten(1, (self.layout.num_chunks, -1))
        first, last = torch.stack([chunked[:, :, 0], chunked[:, :, -1]]).cpu()
        return first, last

    def mask(self, queries: int, keys: int, rows: slice) -> Tensor:
        """Which keys of a chunk some rows of a chunk of queries see, (batch or 1, rows, keys) bool."""
        length = self.layout.chunk_len
        asking = torch.arange(rows.start, rows.stop, device=self.device) + queries * length
        asked = torch.arange(length, device=self.device) + keys * length
        distance = asking[:, None] - asked
        seen = distance >= 0 if self.window is None else (distance >= 0) & (distance < self.window)
        if self.ids is None:
            return seen[None]
        return seen & (self.ids[:, asking, None] == self.ids[:, None, asked])

    @cached_property
    def whole(self) -> Context:
        """What a layer that sees all tokens needs to know of them; of one row where every row is one document."""
        rows = 1 if self.ids is None else len(self.ids)
        return Context(rows, self.layout.seq, self.device, self.ids, None, self.window)

    def sees(self, queries: Sequence[int], keys: Sequence[int]) -> bool:
        """Whether any of these chunks of queries sees anything of any of these chunks of keys."""
        return any(self.table[query][key] != "none" for query in queries for key in keys)


class ContextAxis:
    """The context axis as the layers of a model see it: this rank's place, and the view of the pass under way."""

    def __init__(self, group: ProcessGroup, kind: Kind = "zigzag", window: int | None = None):
        self.group, self.kind, self.window = group, kind, window
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self._of: tuple[int, Tensor | None] | None = None
        self._view: View | None = None

    def view(self, x: Tensor, dim: int, segment_ids: Tensor | None) -> View:
        """From what a layer gets: x with this rank's tokens along `dim`, and their documents (batch, seq / ranks).

        Collective at the first call of a pass; its other layers come with the same `segment_ids`. Raises `ValueError`
        for a length that cannot be cut.
        """
        held = x.shape[dim]
        if self._view is None or self._of is None or self._of[0] != held or self._of[1] is not segment_ids:
            layout = Layout(held * self.ranks, self.ranks, self.kind)
            self._view = View(layout, self._gathered(segment_ids, layout), self.window, x.device)
            self._of = held, segment_ids
        return self._view

    def _gathered(self, segment_ids: Tensor | None, layout: Layout) -> Tensor | None:
        if segment_ids is None:
            return None
        ids = layout.in_order(gather_whole(segment_ids, 1, self.group), 1)
        return None if bool((ids[:, 0] == ids[:, -1]).all()) else ids


def _held(kind: Kind) -> int:
    return 2 if kind == "zigzag" else 1
