"""The loss on held-out batches."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from bloomery.data.pack import Batch
from bloomery.train.fp8 import Fp8
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
    eight_bit = Fp8(model, loop.fp8 if loop.precision == "fp8" else None)
    in_bf16 = computes_in_bf16(loop, model, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16), eight_bit.installed():
        for batch in batches:
            loss = next_token(model, {name: value.to(device) for name, value in batch.items()}, sources)
            for name, (total, weight) in {"loss": (loss.sum, loss.weight), **loss.metrics}.items():
                sums[name][0] += float(total)
                sums[name][1] += float(weight)
    return {f"validation_{name}": total / weight for name, (total, weight) in sums.items() if weight}
