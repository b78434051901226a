"""The loss on held-out batches."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from bloomery.data.pack import Batch
from bloomery.train.loop import LoopConfig, computes_in_bf16
from bloomery.train.losses import next_token


@torch.no_grad()
def validation_losses(
    model: nn.Module, batches: Iterable[Batch], sources: Sequence[str], loop: LoopConfig
) -> dict[str, float]:
    """`validation_loss` over all learnt tokens and `validation_loss/{source}`, in nats per token; empty without any.

    Computed in the precision of training, so that the two losses can be compared.
    """
    model.eval()
    device = next(model.parameters()).device
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    with torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bf16(loop, model, device)):
        for batch in batches:
            loss = next_token(model, {name: value.to(device) for name, value in batch.items()}, sources)
            for name, (total, weight) in {"loss": (loss.sum, loss.weight), **loss.metrics}.items():
                sums[name][0] += float(total)
                sums[name][1] += float(weight)
    return {f"validation_{name}": total / weight for name, (total, weight) in sums.items() if weight}
