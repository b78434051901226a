"""The training loop, once: a generator of optimizer steps. What happens between them is ordinary code in the stage."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import model_validator
from torch import nn
from torch.optim import Optimizer

from bloomery.config import RUN_ONLY, Config, Field
from bloomery.data.pack import Batch
from bloomery.errors import ConfigError
from bloomery.model import balance
from bloomery.model.balance import BalanceConfig
from bloomery.train.fp8 import Fp8, Fp8Config, Telemetry
from bloomery.train.losses import Loss
from bloomery.train.schedule import learning_rate
from bloomery.train.totals import Totals

if TYPE_CHECKING:  # FSDP and pipelines take two seconds to import, which one process does not need
    from bloomery.parallel.apply import Parallel

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
    balance: BalanceConfig = Field(default=BalanceConfig(), description="how the load of experts is kept even")
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
    """What training changes, and what a checkpoint holds. `position` counts the sequences trained on, over all ranks;
    `extra` holds plain JSON values that a stage's own batch generator needs to go on. `parallel`: how `model`, this
    rank's part, belongs to the whole; `None` in a single process."""

    model: nn.Module
    optimizer: Optimizer
    step: int = 0
    position: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    parallel: "Parallel | None" = None


@dataclass(frozen=True)
class Step:
    """One optimizer step, over all ranks. `grad_norm` is before clipping; `tokens` are positions; `seconds` include
    making the data.

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
    With `state.parallel`, they are those of this rank's rows, as many on every rank, and all ranks yield equal steps.
    Raises `DivergenceError` before the weights change when a loss or gradient is not finite or nothing was to be
    learnt, and `ConfigError` when `batches` ends early.
    """
    model, optimizer, parallel = state.model, state.optimizer, state.parallel
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = parameters[0].device
    around = _Around(model, parallel, config, device)
    routed, names = bool(balance.balancings(model)), list[str]()
    batches = iter(batches)
    optimizer.zero_grad(set_to_none=True)
    while state.step < config.max_steps:
        started = time.perf_counter()
        micro_batches = next(batches, [])
        rows, tokens = _seen(micro_batches, state, config)
        model.train()
        around.eight_bit.begin(watch=is_due(state.step + 1, config.fp8.measure_every_steps))
        where = f"step {state.step + 1}, sequences from {state.position}"
        here = [{name: value.to(device, non_blocking=True) for name, value in b.items()} for b in micro_batches]
        if parallel is None:
            losses = [_learn(model, batch, objective, around) for batch in here]
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            totals = Totals.of(losses, gradients)
        else:
            with around():
                losses = parallel.forward_backward([parallel.split(batch) for batch in here], objective)
            gradients = list(parallel.data.gradients().values())
            totals = Totals.over(losses, parallel, names)
        around.eight_bit.check(totals.sum + totals.grad_norm, where)
        totals.check(losses, where, parallel)
        clip = min(1.0, config.max_grad_norm / (totals.grad_norm + 1e-6)) if config.max_grad_norm else 1.0
        torch._foreach_mul_(gradients, clip / totals.weight)
        rate = _set_learning_rate(optimizer, state.step + 1, config)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if routed:
            balance.after_step(model)
        state.step += 1
        state.position += rows
        seconds, mean = time.perf_counter() - started, totals.sum / totals.weight
        found = around.eight_bit.telemetry()
        yield Step(state.step, mean, totals.metrics, totals.grad_norm, rate, tokens, seconds, found)


class _Around:
    """What a forward and backward pass run in: autocast, FP8 products, activation checkpointing."""

    def __init__(self, model: nn.Module, parallel: "Parallel | None", config: LoopConfig, device: torch.device):
        self.eight_bit = Fp8(model, config.fp8 if config.precision == "fp8" else None)
        # Weights that come and go are not to be kept as bf16 copies.
        keeps = parallel is None or parallel.mapping.zero == 1
        in_bf16 = computes_in_bf16(config, model, device)
        self._autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=in_bf16, cache_enabled=keeps)
        recompute = config.activation_checkpointing or (parallel is not None and parallel.mapping.recompute)
        roots = [model] if parallel is None else parallel.data.roots
        self._recomputed = roots if recompute else []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._autocast(), self.eight_bit.installed(), ExitStack() as stack:
            for root in self._recomputed:
                stack.enter_context(_recomputing(root))
            yield


def _learn(model: nn.Module, batch: Batch, objective: Objective, around: _Around) -> Loss:
    """Adds the gradients of one micro-batch's loss."""
    with around():
        loss = objective(model, batch)
        loss.sum.backward()
    return Loss(loss.sum.detach(), loss.weight, loss.metrics)


def is_due(step: int, every_steps: int) -> bool:
    """Whether something that happens every so many steps happens after this one; 0: never."""
    return every_steps > 0 and step % every_steps == 0


def _seen(micro_batches: list[Batch], state: TrainState, config: LoopConfig) -> tuple[int, int]:
    """Sequences and positions of the step, over all ranks. Raises `ConfigError` on all ranks when one has no data."""
    rows = sum(len(batch["input_ids"]) for batch in micro_batches)
    tokens = sum(batch["input_ids"].numel() for batch in micro_batches)
    count, ranks, parallel = len(micro_batches), 1, state.parallel
    if parallel is not None:
        numbers = torch.tensor([1, count, count * count, rows, tokens], device=parallel.device)
        ranks, total, squares, rows, tokens = parallel.sum(numbers).tolist()
        sharing = ranks // parallel.mapping.data
        rows, tokens = rows // sharing, tokens // sharing
        if ranks * squares != total * total:
            raise ConfigError(
                f"step {state.step + 1}: this rank has {count} micro-batches, all {ranks} ranks {total}; every "
                "rank must have as many, or the others would wait for it; give each data rank as many sequences"
            )
    if not count:
        raise ConfigError(
            f"max_steps: the data ended after step {state.step} of {config.max_steps}, at sequence {state.position}; "
            "lower max_steps or batch_size, or give more data"
        )
    return rows, tokens


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


def rate_at(step: int, config: LoopConfig) -> float:
    """The learning rate of a step, counted from 1."""
    return learning_rate(
        step,
        config.max_steps,
        config.learning_rate,
        config.schedule,
        config.warmup_steps,
        config.decay_fraction,
        config.min_ratio,
    )


def _set_learning_rate(optimizer: Optimizer, step: int, config: LoopConfig) -> float:
    rate = rate_at(step, config)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
