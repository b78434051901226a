"""The loss on held-out batches."""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import nn

from bloomery.data.pack import Batch
from bloomery.parallel.apply import Parallel
from bloomery.train.fp8 import Fp8
from bloomery.train.loop import LoopConfig, Objective, computes_in_bf16
from bloomery.train.losses import Loss, next_token
from bloomery.train.spread import own_rows


@torch.no_grad()
def validation_losses(
    model: nn.Module,
    batches: Iterable[Batch],
    sources: Sequence[str],
    loop: LoopConfig,
    parallel: Parallel | None = None,
) -> dict[str, float]:
    """`validation_loss` over all learnt tokens and `validation_loss/{source}`, in nats per token; empty without any.

    Computed in the precision of training, so that the two losses can be compared. All ranks are given all batches and
    get the same numbers.
    """
    model.eval()
    device = next(model.parameters()).device
    names = ["loss", *(f"loss/{source}" for source in sources)]
    sums = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
    objective = partial(next_token, sources=sources)
    eight_bit = Fp8(model, loop.fp8 if loop.precision == "fp8" else None)
    in_bf16 = computes_in_bf16(loop, model, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16), eight_bit.installed():
        for batch in batches:
            found = {name: value.to(device) for name, value in own_rows(batch, parallel).items()}
            for loss in _losses(model, found, objective, parallel):
                for name, (total, weight) in {"loss": (loss.sum, loss.weight), **loss.metrics}.items():
                    if name in names:
                        sums[names.index(name)] += torch.tensor([float(total), float(weight)], device=device)
    if parallel is not None:
        parallel.sum(sums)
    return {f"validation_{name}": a / b for name, (a, b) in zip(names, sums.tolist(), strict=True) if b}


def _losses(model: nn.Module, batch: Batch, objective: Objective, parallel: Parallel | None) -> list[Loss]:
    return [objective(model, batch)] if parallel is None else parallel.forward([parallel.split(batch)], objective)
