"""What every training stage does around its steps: resume, log, save, stop on request."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn

from bloomery.artifact import Output
from bloomery.data.pack import Batch
from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder
from bloomery.parallel.world import any_rank, world
from bloomery.progress import Bar, say
from bloomery.train.checkpoint import Checkpoints
from bloomery.train.fp8 import Plan, summary
from bloomery.train.loop import LoopConfig, Objective, Step, TrainState, steps
from bloomery.train.trackers import Trackers, require


def what_runs_in_fp8(model: nn.Module | ModelConfig, config: LoopConfig, device: torch.device) -> dict[str, str]:
    """`fp8` → how many linear layers, in which formats, real or emulated; empty under another precision.

    Of a model that exists, or of its sizes. Raises `ConfigError` when none would.
    """
    if config.precision != "fp8":
        return {}
    if isinstance(model, ModelConfig):
        with torch.device("meta"):
            model = Decoder(model)
    return {"fp8": Plan.of(model, config.fp8).describe(config.fp8, device)}


def resumable(
    output: Output,
    state: TrainState,
    batches_from: Callable[[int], Iterator[list[Batch]]],
    objective: Objective,
    config: LoopConfig,
    headline: str = "loss",
    before_checkpoint: Callable[[], None] = lambda: None,
    branch_steps: Iterable[int] = (),
) -> Iterator[Step]:
    """`steps`, going on from the newest checkpoint in `output`, leaving new ones, a row of metrics per step and a bar.

    batches_from: position → batches; called once, after `state` is restored, so it may use `state.extra`.
    headline: the metric beside the bar; before_checkpoint: called by all ranks right before each, to check what was
    done and to bring `state.extra` up to date; branch_steps: steps after which a checkpoint is taken and stays.

    A checkpoint is taken after the caller's own lines for that step, so what they log is not lost. Ctrl-C and SIGTERM
    let the step finish and save; then `KeyboardInterrupt` is raised. A second one stops at once. Of several ranks, one
    that is asked to stop stops all after the same step; rank 0 alone logs and shows.
    """
    require(config.trackers)
    for name, text in what_runs_in_fp8(state.model, config, next(state.model.parameters()).device).items():
        say(f"{output.stage}  {name}: {text}")
    branches = frozenset(branch_steps)
    with Checkpoints(output.checkpoints, branch_steps=branches) as checkpoints, Interruption() as interruption:
        resumed = checkpoints.load_latest(state)
        output.metrics.rewind(state.step if resumed else -1)
        if resumed:
            say(f"{output.stage}  goes on after step {state.step} of {config.max_steps}")
        trackers_here = config.trackers if world().is_main else ()
        with Trackers(trackers_here, output, state.step + 1) as trackers, Bar(output.stage, config.max_steps) as bar:
            for step in steps(state, batches_from(state.position), objective, config):
                last = step.step == config.max_steps
                if last or step.step % config.log_every_steps == 0:
                    row = _row(step)
                    output.metrics.log(step.step, **row)
                    trackers.log(step.step, row)
                if step.fp8:
                    means = summary(step.fp8)
                    output.metrics.log(step.step, **means, fp8=step.fp8)
                    trackers.log(step.step, means)
                bar.update(step.step, _note(step, headline))
                yield step
                stop = any_rank(interruption.requested)
                if last or stop or step.step % config.checkpoint_every_steps == 0 or step.step in branches:
                    before_checkpoint()
                    checkpoints.save(state)
                if stop:
                    checkpoints.wait()
                    raise KeyboardInterrupt


def _row(step: Step) -> dict[str, Any]:
    """One row of metrics. `seconds` is the only value that differs between equal runs."""
    row = {"loss": step.loss, **step.metrics, "grad_norm": step.grad_norm, "learning_rate": step.learning_rate}
    return {**row, "tokens": step.tokens, "seconds": round(step.seconds, 4)}


def _note(step: Step, headline: str) -> str:
    value = step.metrics.get(headline, step.loss)
    return f"{headline} {value:.4g}  {step.tokens / max(step.seconds, 1e-9):,.0f} tokens/s"


class Interruption:
    """Remembers the first SIGINT or SIGTERM in `requested`; the second acts as if this were not here."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()
        say("interrupted: finishing this step and saving; interrupt again to stop at once")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __exit__(self, *_: object) -> None:
        self._restore()
