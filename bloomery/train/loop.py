"""The training loop, once: a generator of optimizer steps. What happens between them is ordinary code in the stage."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Self

import torch
from pydantic import model_validator
from torch import nn
from torch.optim import Optimizer

from bloomery.config import RUN_ONLY, Config, Field
from bloomery.data.pack import Batch
from bloomery.errors import ConfigError
from bloomery.train.fp8 import Fp8, Fp8Config, Telemetry
from bloomery.train.losses import Loss
from bloomery.train.schedule import learning_rate
from bloomery.train.totals import Totals

Objective = Callable[[nn.Module, Batch], Loss]
_BF16_HIDDEN_SIZE = 256  # narrower matrices spend more on casting than AMX saves


class LoopConfig(Config):
    """How a model is optimised."""

    max_steps: int = Field(gt=0, description="optimizer steps")
    batch_size: int = Field(default=32, gt=0, description="sequences per optimizer step, over all ranks")
    micro_batch_size: int = Field(
        default_factory=lambda given: given.get("batch_size", 1), gt=0, json_schema_extra=RUN_ONLY,
        description="sequences per forward pass; the batch where not given. Less memory, same result up to rounding",
    )  # fmt: skip
    learning_rate: float = Field(default=1e-3, gt=0, description="peak learning rate of AdamW")
    betas: tuple[float, float] = Field(
        default=(0.9, 0.95), description="AdamW: decay of the first and second moment per step"
    )
    eps: float = Field(default=1e-8, gt=0, description="AdamW: added to the root of the second moment")
    weight_decay: float = Field(
        default=0.1, ge=0, description="AdamW: decay per step and unit of learning rate; matrices only"
    )
    decay_embeddings: bool = Field(default=True, description="weight decay for the embedding table as well")
    warmup_steps: int = Field(default=0, ge=0, description="steps over which the learning rate rises to its peak")
    schedule: Literal["wsd", "cosine", "constant"] = Field(
        default="wsd", description="what the learning rate does after warm-up"
    )
    decay_fraction: float = Field(
        default=0.2, gt=0, le=1, description="wsd: share of all steps, at the end, that decays"
    )
    min_ratio: float = Field(
        default=0.01, ge=0, le=1, description="learning rate at the last step, as a share of the peak"
    )
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, description="gradients are scaled down to this norm; null: never"
    )
    precision: Literal["auto", "fp32", "bf16", "fp8"] = Field(
        default="auto",
        description="type of the matrix products; auto: bf16 on GPUs and on CPUs with AMX, else fp32; fp8: bf16 with "
        "the linear layers in eight bits",
    )
    fp8: Fp8Config = Field(default=Fp8Config(), description="which linear layers and formats precision fp8 means")
    activation_checkpointing: bool = Field(
        default=False,
        json_schema_extra=RUN_ONLY,
        description="recompute activations in backward: less memory, a third more time",
    )
    checkpoint_every_steps: int = Field(
        default=200, gt=0, json_schema_extra=RUN_ONLY, description="steps between checkpoints"
    )
    log_every_steps: int = Field(
        default=1, gt=0, json_schema_extra=RUN_ONLY, description="steps between rows of metrics.jsonl"
    )
    validate_every_steps: int = Field(
        default=0, ge=0, json_schema_extra=RUN_ONLY, description="steps between validations; 0: only at the end"
    )
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        default=(), json_schema_extra=RUN_ONLY, description="where metrics are shown besides metrics.jsonl"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        if self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} is more than max_steps {self.max_steps}")
        if self.precision != "fp8" and self.fp8 != Fp8Config():
            raise ValueError(f"fp8: without effect under precision {self.precision}; set precision: fp8")
        if self.schedule == "wsd" and self.warmup_steps > self.max_steps * (1 - self.decay_fraction) + 1e-9:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} reaches into the decay of the last {self.decay_fraction:g} of "
                f"{self.max_steps} steps; warm up for less, or lower decay_fraction"
            )
        return self


@dataclass
class TrainState:
    """What training changes, and what a checkpoint holds. `position` counts the sequences trained on; `extra` holds
    plain JSON values that a stage's own batch generator needs to go on."""

    model: nn.Module
    optimizer: Optimizer
    step: int = 0
    position: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One optimizer step. `grad_norm` is before clipping; `tokens` are positions; `seconds` include making the data.

    `fp8`: what precision fp8 measured in this step, on the steps where it does."""

    step: int
    loss: float
    metrics: dict[str, float]
    grad_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    fp8: Telemetry = field(default_factory=dict)


def steps(
    state: TrainState, batches: Iterator[list[Batch]], objective: Objective, config: LoopConfig
) -> Iterator[Step]:
    """Train from `state.step` to `config.max_steps`, yielding after each optimizer step.

    A step's micro-batches are pulled only when the step before is done, so `batches` may sample from current weights.
    Raises `DivergenceError` before the weights change when a loss or gradient is not finite or nothing was to be
    learnt, and `ConfigError` when `batches` ends early.
    """
    model, optimizer = state.model, state.optimizer
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = parameters[0].device
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=computes_in_bf16(config, model, device))
    eight_bit = Fp8(model, config.fp8 if config.precision == "fp8" else None)
    batches = iter(batches)
    optimizer.zero_grad(set_to_none=True)
    while state.step < config.max_steps:
        started = time.perf_counter()
        micro_batches = _pull(batches, state, config)
        model.train()
        eight_bit.begin(watch=is_due(state.step + 1, config.fp8.measure_every_steps))
        losses = []
        for batch in micro_batches:
            recomputing = _recomputing(model) if config.activation_checkpointing else nullcontext()
            with autocast(), eight_bit.installed(), recomputing:
                loss = objective(model, {name: value.to(device, non_blocking=True) for name, value in batch.items()})
                loss.sum.backward()
            losses.append(Loss(loss.sum.detach(), loss.weight, loss.metrics))
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        totals = Totals.of(losses, gradients)
        where = f"step {state.step + 1}, sequences from {state.position}"
        eight_bit.check(totals.sum + totals.grad_norm, where)
        totals.check(losses, where)
        clip = min(1.0, config.max_grad_norm / (totals.grad_norm + 1e-6)) if config.max_grad_norm else 1.0
        torch._foreach_mul_(gradients, clip / totals.weight)
        rate = _set_learning_rate(optimizer, state.step + 1, config)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.position += sum(len(batch["input_ids"]) for batch in micro_batches)
        tokens = sum(batch["input_ids"].numel() for batch in micro_batches)
        seconds, mean = time.perf_counter() - started, totals.sum / totals.weight
        found = eight_bit.telemetry()
        yield Step(state.step, mean, totals.metrics, totals.grad_norm, rate, tokens, seconds, found)


def is_due(step: int, every_steps: int) -> bool:
    """Whether something that happens every so many steps happens after this one; 0: never."""
    return every_steps > 0 and step % every_steps == 0


def _pull(batches: Iterator[list[Batch]], state: TrainState, config: LoopConfig) -> list[Batch]:
    micro_batches = next(batches, None)
    if micro_batches is None:
        raise ConfigError(
            f"max_steps: the data ended after step {state.step} of {config.max_steps}, at sequence {state.position}; "
            "lower max_steps or batch_size, or give more data"
        )
    return micro_batches


def computes_in_bf16(config: LoopConfig, model: nn.Module, device: torch.device) -> bool:
    """What `precision` means here. `auto` follows the hardware alone, never a timing, so that a resumed run agrees.

    CPUs with avx512_bf16 but without AMX took twice as long in bf16 as in fp32 at every width from 128 to 2048.
    """
    if config.precision != "auto":
        return config.precision in ("bf16", "fp8")
    if device.type != "cpu":
        return True
    width = getattr(getattr(model, "config", None), "hidden_size", 0)
    return torch.cpu._is_amx_tile_supported() and width >= _BF16_HIDDEN_SIZE


@contextmanager
def _recomputing(model: nn.Module) -> Iterator[None]:
    """Inside, the model's forward keeps no activations of its layers."""
    forward = model.forward
    model.forward = partial(forward, checkpoint_activations=True)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.forward


def _set_learning_rate(optimizer: Optimizer, step: int, config: LoopConfig) -> float:
    rate = learning_rate(
        step,
        config.max_steps,
        config.learning_rate,
        config.schedule,
        config.warmup_steps,
        config.decay_fraction,
        config.min_ratio,
    )
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
