"""Which linear layers suffer most from FP8: each one alone in eight bits, everything else in fp32."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bloomery.data.pack import Batch
from bloomery.model.decoder import Decoder
from bloomery.train.fp8 import Fp8, Fp8Config
from bloomery.train.losses import next_token


@dataclass(frozen=True)
class Sensitivity:
    """What eight bits in one linear layer alone do. Errors are relative: ‖with − without‖ / ‖without‖.

    loss_change: of the mean loss, nats per token. output_error: of the layer's own output. gradient_error: of the
    gradients of all weights.
    """

    name: str
    loss_change: float
    output_error: float
    gradient_error: float


def sensitivity(model: Decoder, batches: Iterable[Batch], config: Fp8Config | None = None) -> list[Sensitivity]:
    """Every linear layer that FP8 could take, the worst gradient error first: candidates for `Fp8Config.keep`.

    batches: micro-batches of training data; a few thousand tokens suffice. config: formats and scaling; its choice of
    layers does not count here. Costs one forward and backward pass a layer and batch; gradients of `model` are cleared.
    """
    held = [{name: value.to(model.lm_head.weight.device) for name, value in batch.items()} for batch in batches]
    eight_bit = Fp8(model, (config or Fp8Config()).model_copy(update={"high_precision_layers": 0, "keep": ()}))
    plain = _run(model, held, eight_bit, None)
    found = [_compare(name, plain, _run(model, held, eight_bit, name)) for name in eight_bit.products]
    model.zero_grad(set_to_none=True)
    return sorted(found, key=lambda each: -each.gradient_error)


@dataclass
class _Pass:
    """Mean loss, gradients of all weights, and outputs of the watched linear layers, batch after batch."""

    loss: float
    gradients: list[Tensor]
    outputs: dict[str, list[Tensor]]


def _run(model: Decoder, batches: Sequence[Batch], eight_bit: Fp8, only: str | None) -> _Pass:
    """One pass over the batches with the layer `only` in eight bits; None: with none, all of their outputs kept."""
    watched = {name: each.linear for name, each in eight_bit.products.items() if only in (None, name)}
    outputs: dict[str, list[Tensor]] = {name: [] for name in watched}
    hooks = [linear.register_forward_hook(partial(_keep, outputs[name])) for name, linear in watched.items()]
    model.zero_grad(set_to_none=True)
    total = weight = 0.0
    with eight_bit.installed(() if only is None else (only,)):
        for batch in batches:
            loss = next_token(model, batch)
            loss.sum.backward()
            total, weight = total + float(loss.sum.detach()), weight + float(loss.weight)
    for hook in hooks:
        hook.remove()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return _Pass(total / weight, gradients, outputs)


def _keep(outputs: list[Tensor], linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    outputs.append(output.detach())


def _compare(name: str, plain: _Pass, quantized: _Pass) -> Sensitivity:
    return Sensitivity(
        name,
        quantized.loss - plain.loss,
        _relative_error(quantized.outputs[name], plain.outputs[name]),
        _relative_error(quantized.gradients, plain.gradients),
    )


def _relative_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    squares = [
        torch.stack([(a - b).float().square().sum(), b.float().square().sum()])
        for a, b in zip(found, exact, strict=True)
    ]
    difference, whole = torch.stack(squares).double().sum(0).sqrt().tolist()
    return difference / whole if whole else 0.0
