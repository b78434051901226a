"""The sums of one optimizer step, brought to the host in one transfer and checked before the weights change.

Of several ranks, each has the same totals, and so decides the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bloomery.errors import DivergenceError
from bloomery.train.losses import Loss, Metric

if TYPE_CHECKING:  # FSDP and pipelines take two seconds to import, which one process does not need
    from bloomery.parallel.apply import Parallel

T = TypeVar("T")


@dataclass(frozen=True)
class Totals:
    """`sum` and `weight` over all micro-batches; `grad_norm` is that of the mean loss; `metrics` are means."""

    sum: float
    weight: float
    grad_norm: float
    metrics: dict[str, float]

    @classmethod
    def of(cls, losses: Sequence[Loss], gradients: Sequence[Tensor]) -> Self:
        """gradients: those of the summed loss, not yet divided by the weight."""
        pairs, owners = _metrics(losses)
        norm = torch.nn.utils.get_total_norm(gradients)
        numbers = [norm, *(x for loss in losses for x in (loss.sum, loss.weight)), *(x for pair in pairs for x in pair)]
        values = _values(numbers, losses[0].sum.device).tolist()
        own, rest = values[1 : 1 + 2 * len(losses)], values[1 + 2 * len(losses) :]
        return cls._from(sum(own[::2]), sum(own[1::2]), values[0], _added(owners, rest))

    @classmethod
    def over(cls, losses: Sequence[Loss], parallel: "Parallel", known: list[str]) -> Self:
        """Those of all ranks, whose gradients are sums over all ranks already.

        known: the names of metrics that all ranks agree on; it grows, on all alike, when one meets another.
        """
        norm = parallel.grad_norm()
        pairs, owners = _metrics(losses)
        own: list[Tensor | float] = [x for loss in losses for x in (loss.sum, loss.weight)]
        mine = _values([*own, *(x for pair in pairs for x in pair)], parallel.device)
        ends = 2 * len(losses)
        total = torch.stack([mine[:ends:2].sum(), mine[1:ends:2].sum()])
        unknown = mine.new_tensor([float(not set(owners) <= set(known))])
        summed = parallel.sum(torch.cat([unknown, total, _placed(owners, mine[ends:], known)]))
        if summed[0]:
            met = _everyone([*known, *owners], parallel)
            known[:] = list(dict.fromkeys(name for names in met for name in names))
            summed = torch.cat([summed[:3], parallel.sum(_placed(owners, mine[ends:], known))])
        values = summed[1:].tolist()
        return cls._from(values[0], values[1], norm, _added(known, values[2:]))

    @classmethod
    def _from(cls, total: float, weight: float, norm: float, sums: dict[str, tuple[float, float]]) -> Self:
        metrics = {name: part / share for name, (part, share) in sums.items() if share}
        return cls(total, weight, norm / weight if weight else math.nan, metrics)

    def check(self, losses: Sequence[Loss], where: str, parallel: "Parallel | None" = None) -> None:
        """Raises `DivergenceError` naming `where` and the sources, when this step must not be taken; on all ranks."""
        sources = [name.removeprefix("loss/") for name in self.metrics if name.startswith("loss/")]
        where += f" (sources {', '.join(sources)})" if sources else ""
        if not self.weight:
            raise DivergenceError(
                f"{where}: every label is masked, so there is nothing to learn; check the data's loss mask"
            )
        advice = "no weight was changed; lower learning_rate, warm up longer, or look at this data"
        if not math.isfinite(self.sum):
            raise DivergenceError(f"{where}: the loss of {_culprit(losses, parallel)}; {advice}")
        if not math.isfinite(self.grad_norm):
            raise DivergenceError(f"{where}: the loss is finite but the gradient norm is {self.grad_norm}; {advice}")


def _metrics(losses: Sequence[Loss]) -> tuple[list[Metric], list[str]]:
    """All metrics of all micro-batches, and their names."""
    names = list(dict.fromkeys(name for loss in losses for name in loss.metrics))
    pairs = [loss.metrics[name] for name in names for loss in losses if name in loss.metrics]
    return pairs, [name for name in names for loss in losses if name in loss.metrics]


def _values(numbers: Sequence[Tensor | float], device: torch.device) -> Tensor:
    if not numbers:
        return torch.zeros(0, dtype=torch.float64, device=device)
    return torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device) for x in numbers])


def _added(owners: Sequence[str], values: Sequence[float]) -> dict[str, tuple[float, float]]:
    """(sum, weight) of each name over all micro-batches; values: sum, weight, sum, weight, …"""
    sums: dict[str, tuple[float, float]] = dict.fromkeys(owners, (0.0, 0.0))
    for name, part, share in zip(owners, values[::2], values[1::2], strict=True):
        sums[name] = (sums[name][0] + part, sums[name][1] + share)
    return sums


def _placed(owners: Sequence[str], values: Tensor, known: Sequence[str]) -> Tensor:
    """sum, weight, sum, weight, … of all known names in order; what has another name is left out."""
    places = {name: place for place, name in enumerate(known)}
    kept = [i for i, name in enumerate(owners) if name in places]
    found = values.new_zeros(len(known), 2)
    to = torch.tensor([places[owners[i]] for i in kept], dtype=torch.int64, device=values.device)
    rows = torch.tensor(kept, dtype=torch.int64, device=values.device)
    return found.index_add_(0, to, values.view(-1, 2)[rows]).flatten()


def _culprit(losses: Sequence[Loss], parallel: "Parallel | None") -> str:
    """The first micro-batch of the first rank whose loss is not finite."""
    sums = [float(loss.sum) for loss in losses]
    bad = next((i for i, value in enumerate(sums) if not math.isfinite(value)), None)
    said = None if bad is None else f"micro-batch {bad + 1} of {len(sums)} is {sums[bad]}"
    if parallel is None:
        return said or f"micro-batch {len(sums)} of {len(sums)} is {sums[-1]}"
    found = [(rank, text) for rank, text in enumerate(_everyone(said, parallel)) if text is not None]
    return f"{found[0][1]} on rank {found[0][0]}" if found else "all ranks together is not finite"


def _everyone(value: T, parallel: "Parallel") -> list[T]:
    """Every rank's value, by rank."""
    from bloomery.parallel.data import WORLD

    group = parallel.meshes.group(*WORLD)
    if group is None:
        return [value]
    found: list[T] = [value] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found
