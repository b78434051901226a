"""What the ranks of an RL run do together.

Each writes and judges its share of a draw's completions with an engine of its own; then every rank is told of all of
them, and so decides the same: advantages, tripwires, the next prompts. Of the micro-batches, which are those of one
process, each data rank learns its own. In one process every method is the plain thing.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bloomery.data.pack import IGNORE, Batch
from bloomery.errors import BloomeryError
from bloomery.parallel.collectives import all_reduce_
from bloomery.parallel.tokens import join
from bloomery.parallel.world import Peers

if TYPE_CHECKING:  # FSDP and pipelines take two seconds to import, which one process does not need
    from bloomery.parallel.apply import Parallel

T = TypeVar("T")


class Ranks:
    """This rank among those that train `parallel`'s model; `None`: the only one. Made by all ranks at the same time."""

    def __init__(self, parallel: "Parallel | None" = None):
        self.parallel = parallel
        self._peers = None if parallel is None else Peers()

    @property
    def is_main(self) -> bool:
        """True for the rank that writes."""
        return self._peers is None or self._peers.is_main

    @property
    def counts(self) -> bool:
        """True for one of the ranks that call the objective: on it is counted what is no sum over tokens."""
        places = ("data", "context", "tensor")
        return self.parallel is None or not any(self.parallel.meshes.place(axis) for axis in places)

    def share(self, count: int) -> range:
        """Which of `count` things are this rank's to do: as many on every rank, give or take one."""
        if self._peers is None:
            return range(count)
        rank, size = self._peers.rank, self._peers.size
        return range(count * rank // size, count * (rank + 1) // size)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, on every rank."""
        return [value] if self._peers is None else self._peers.gather(value)

    def together(self, act: Callable[[], None]) -> None:
        """Do it on every rank. What is refused on one raises `BloomeryError` on all, before any goes on."""
        if self._peers is None:
            act()
            return
        problem = None
        try:
            act()
        except BloomeryError as error:
            problem = error
        for rank, found in enumerate(self._peers.gather(problem)):
            if found is not None:
                raise type(found)(f"rank {rank}: {found}")

    def own(self, batches: Sequence[Batch]) -> list[Batch]:
        """The micro-batches that this rank's data rank learns from, as many on each: where there are too few, halves;
        where there are too few rows, rows without labels. What they weigh is counted on one rank of each data rank."""
        if self.parallel is None:
            return list(batches)
        found = _dealt(batches, *self._data)
        if not self._counts_rows:
            found = [{**batch, "loss_weight": torch.zeros_like(batch["loss_weight"])} for batch in found]
        return found

    def evened(self, batches: Sequence[Batch]) -> list[Batch]:
        """The same micro-batches, the largest halved until all data ranks have as many."""
        return list(batches) if self.parallel is None else _evened(batches, self._data[1])

    def mean(self, values: Tensor) -> float:
        """Over the elements that the ranks sharing this micro-batch's tokens have together; of the data ranks, which
        have other micro-batches, the largest. Not finite on all where it is so on one."""
        if self.parallel is None:
            return values.mean().item()
        meshes = self.parallel.meshes
        sums = torch.stack([values.double().sum(), values.new_tensor(values.numel(), dtype=torch.float64)])
        total, count = all_reduce_(sums, meshes.group("context", "tensor")).tolist()
        mean = total / count if count else 0.0
        found = sums.new_tensor([mean if math.isfinite(mean) else math.inf])
        return all_reduce_(found, meshes.group("data"), dist.ReduceOp.MAX).item()

    def total(self, values: Tensor) -> Tensor:
        """Summed over the ranks that hold other tokens of the same rows."""
        return values if self.parallel is None else all_reduce_(values, self.parallel.meshes.group("context", "tensor"))

    def joined(self, batches: Sequence[Batch], found: Sequence[Tensor]) -> list[Tensor]:
        """What ranks have `found` (batch, seq) for their tokens of what `own` gave them of these batches: for each of
        them, whole, on every rank. Without anything on pipeline stages before the last."""
        assert self.parallel is not None
        meshes, seqs = self.parallel.meshes, [batch["input_ids"].shape[1] for batch in batches]
        place = tuple(meshes.place(axis) for axis in ("data", "context", "tensor"))
        everyone = [(at, parts) for at, parts in self.gather((place, [t.cpu() for t in found])) if parts]
        everyone.sort(key=lambda one: one[0])
        whole = []
        for number, seq in enumerate(seqs):
            turn, data = divmod(number, self._data[1])
            parts = [parts[turn] for at, parts in everyone if at[0] == data]
            whole.append(join(parts, meshes, self.parallel.modes.layout)[:, :seq].contiguous())
        return whole

    @property
    def _data(self) -> tuple[int, int]:
        assert self.parallel is not None
        return self.parallel.meshes.place("data"), self.parallel.meshes.size("data")

    @property
    def _counts_rows(self) -> bool:
        assert self.parallel is not None
        return not any(self.parallel.meshes.place(axis) for axis in ("context", "tensor"))


def _dealt(batches: Sequence[Batch], place: int, count: int) -> list[Batch]:
    """Those of one of `count` data ranks."""
    evened = _evened(batches, count)
    missing = -len(evened) % count
    return [*evened, *[_without_labels(evened[-1])] * missing][place::count]


def _evened(batches: Sequence[Batch], count: int) -> list[Batch]:
    found = list(batches)
    while len(found) % count:
        sizes = [len(batch["input_ids"]) for batch in found]
        widest = sizes.index(max(sizes))
        if sizes[widest] == 1:
            break
        found[widest : widest + 1] = _halves(found[widest])
    return found


def _halves(batch: Batch) -> list[Batch]:
    """Rows apart, each half only as long as its longest row; their weights add up to the batch's exactly."""
    rows, seq = batch["input_ids"].shape
    halves = []
    for part in (slice(None, rows - rows // 2), slice(rows - rows // 2, None)):
        longest = int(batch["counted"][part].sum(-1).max())
        half = {name: x[part] for name, x in batch.items() if len(x) == rows and name not in _OF_THE_BATCH}
        half = {name: x[:, :longest] if x.dim() > 1 and x.shape[1] == seq else x for name, x in half.items()}
        weights = {"loss_weight": batch["loss_weight"] / 2, "label_weight": batch["label_weight"]}
        halves.append(half | weights)
    return halves


_OF_THE_BATCH = ("loss_weight", "label_weight")


def _without_labels(batch: Batch) -> Batch:
    """Its first row, to be read and not learnt: every rank takes part in what ranks do together."""
    row = {name: x[:1] for name, x in batch.items()}
    nothing = {"loss_weight": torch.zeros_like(row["loss_weight"]), "counted": torch.zeros_like(row["counted"])}
    return row | nothing | {"labels": torch.full_like(row["labels"], IGNORE)}
