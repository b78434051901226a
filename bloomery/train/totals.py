"""The sums of one optimizer step, brought to the host in one transfer and checked before the weights change."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from bloomery.errors import DivergenceError
from bloomery.train.losses import Loss


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
        names = list(dict.fromkeys(name for loss in losses for name in loss.metrics))
        pairs = [loss.metrics[name] for name in names for loss in losses if name in loss.metrics]
        owners = [name for name in names for loss in losses if name in loss.metrics]
        norm = torch.nn.utils.get_total_norm(gradients)
        numbers = [norm, *(x for loss in losses for x in (loss.sum, loss.weight)), *(x for pair in pairs for x in pair)]
        values = torch.stack(
            [torch.as_tensor(x, dtype=torch.float64, device=losses[0].sum.device) for x in numbers]
        ).tolist()
        own, rest = values[1 : 1 + 2 * len(losses)], values[1 + 2 * len(losses) :]
        sums = dict.fromkeys(names, (0.0, 0.0))
        for name, part, share in zip(owners, rest[::2], rest[1::2], strict=True):
            sums[name] = (sums[name][0] + part, sums[name][1] + share)
        weight = sum(own[1::2])
        metrics = {name: part / share for name, (part, share) in sums.items() if share}
        return cls(sum(own[::2]), weight, values[0] / weight if weight else math.nan, metrics)

    def check(self, losses: Sequence[Loss], where: str) -> None:
        """Raises `DivergenceError` naming `where` and the sources, when this step must not be taken."""
        sources = [name.removeprefix("loss/") for name in self.metrics if name.startswith("loss/")]
        where += f" (sources {', '.join(sources)})" if sources else ""
        if not self.weight:
            raise DivergenceError(
                f"{where}: every label is masked, so there is nothing to learn; check the data's loss mask"
            )
        advice = "no weight was changed; lower learning_rate, warm up longer, or look at this data"
        if not math.isfinite(self.sum):
            sums = [float(loss.sum) for loss in losses]
            bad = next((i for i, value in enumerate(sums) if not math.isfinite(value)), len(sums) - 1)
            raise DivergenceError(f"{where}: the loss of micro-batch {bad + 1} of {len(sums)} is {sums[bad]}; {advice}")
        if not math.isfinite(self.grad_norm):
            raise DivergenceError(f"{where}: the loss is finite but the gradient norm is {self.grad_norm}; {advice}")
