"""The stage `rl`: strictly on-policy GRPO on prompts with verifiable answers.

Each optimizer step samples groups of completions from the current weights, judges them, and takes one
policy-gradient step on them (AceReason-Nemotron, arXiv 2505.16400: no KL, no entropy bonus, token mean).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import model_validator

from bloomery import artifact
from bloomery.artifact import Manifest, Output
from bloomery.config import RUN_ONLY, Config, DatasetDir, Field, ModelDir
from bloomery.data.chat import stop_token_ids
from bloomery.data.document import Drops
from bloomery.data.pack import Batch
from bloomery.data.prompts import Prompt, load_prompts
from bloomery.errors import ArtifactError
from bloomery.generate import Engine, SamplingParams
from bloomery.model import hf
from bloomery.model.decoder import Decoder
from bloomery.posttrain.batches import micro_batches
from bloomery.posttrain.objectives import Aggregation, Baseline, Scale
from bloomery.posttrain.policy import PolicyGradient, add_reference_logprobs
from bloomery.posttrain.rollouts import Rollouts, RolloutStore
from bloomery.posttrain.sampler import Sampler, winnable
from bloomery.train.loop import LoopConfig, TrainState
from bloomery.train.model_folder import ModelFolder, open_model, placed
from bloomery.train.optim import adamw
from bloomery.train.run import resumable
from bloomery.verify import Pool, self_test

_ENDS = 5


class RLConfig(Config):
    """Train a model on its own answers."""

    model: ModelDir = Field(description="the model to start from: a stage's folder or a Hugging Face directory")
    prompts: DatasetDir = Field(description="dataset of kind prompts; one too long for the context is left out")
    num_prompts: int = Field(gt=0, description="prompts per optimizer step")
    group_size: int = Field(default=8, ge=2, description="completions of each prompt, compared with each other")
    max_new_tokens: int = Field(gt=0, description="longest completion, tokens")
    temperature: float = Field(default=1.0, gt=0, description="divides the logits, in sampling and in training")
    baseline: Baseline = Field(default="group_mean", description="what a reward is compared with")
    advantage_scale: Scale = Field(default="group_std", description="what the comparison is divided by")
    aggregation: Aggregation = Field(default="token_mean", description="how token losses become one number")
    kl: float = Field(default=0.0, ge=0, description="weight of the penalty for leaving the first model; 0: none")
    require_think: bool = Field(default=False, description="an answer counts only behind a </think>")
    max_redraws: int = Field(
        default=20, ge=0, description="times in a row that other prompts are drawn when no group has any signal"
    )
    max_logprob_gap: float = Field(
        default=0.05, gt=0, description="stop where trainer and generator differ by more, mean nats per token"
    )
    max_unjudged: float = Field(
        default=0.05, ge=0, le=1, description="stop where a larger share of a step's completions cannot be judged"
    )
    loop: LoopConfig = Field(description="how it is optimised; batch_size is num_prompts × group_size, leave it out")
    seed: int = Field(default=0, description="seed of the order of prompts and of the sampling")
    max_batch: int = Field(default=256, gt=0, description="sequences decoded at a time", json_schema_extra=RUN_ONLY)
    workers: int = Field(default=2, gt=0, description="processes that judge", json_schema_extra=RUN_ONLY)
    store_every_steps: int = Field(
        default=20, gt=0, description="steps between stored samples; the last are kept", json_schema_extra=RUN_ONLY
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_batch_size(cls, data: Any) -> Any:
        loop = data.get("loop") if isinstance(data, dict) else None
        if not isinstance(loop, dict) or "batch_size" in loop:
            return data
        sizes = data.get("num_prompts"), data.get("group_size", cls.model_fields["group_size"].default)
        if not all(isinstance(size, int) for size in sizes):
            return data
        return {**data, "loop": {**loop, "batch_size": sizes[0] * sizes[1]}}

    @model_validator(mode="after")
    def _one_step_a_rollout(self) -> Self:
        samples = self.num_prompts * self.group_size
        if self.loop.batch_size != samples:
            raise ValueError(
                f"loop.batch_size: {self.loop.batch_size}, but one optimizer step learns from num_prompts × "
                f"group_size = {samples} completions; leave batch_size out"
            )
        return self


def run(config: RLConfig, out: Path) -> Manifest:
    """Stage `rl`: writes `model/` and some steps' samples in `data/`; resumes from its newest checkpoint."""
    with Output(out, "rl", config) as output:
        if output.done:
            return artifact.read_manifest(output.path)  # type: ignore[return-value]
        start, drops = open_model(config.model), Drops()
        prompts = _load_prompts(config, start, drops)
        self_test(sorted({prompt.verifier for prompt in prompts}))
        model = placed(hf.load(start.path, dtype=torch.float32))
        with Pool(config.workers, require_think=config.require_think) as pool:
            prompts = winnable(prompts, pool, config.require_think, drops)
            _train(config, output, start, _sampler(config, start, model, prompts, pool))
        hf.save(model, output.model)
        start.tokenizer.save(output.model)
        return output.finish("model", _summary(output, prompts, drops))


def _load_prompts(config: RLConfig, start: ModelFolder, drops: Drops) -> list[Prompt]:
    return load_prompts(config.prompts, start.tokenizer, start.room(config.max_new_tokens), drops)


def _sampler(
    config: RLConfig, start: ModelFolder, model: Decoder, prompts: Sequence[Prompt], pool: Pool
) -> Sampler:  # fmt: skip
    """With an engine as large as the longest prompt and completion need."""
    window = max(len(prompt.ids) for prompt in prompts) + config.max_new_tokens
    rows = min(config.max_batch, config.num_prompts * config.group_size)
    params = SamplingParams(
        max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        stop_token_ids=tuple(stop_token_ids(start.tokenizer)),
    )  # fmt: skip
    return Sampler(
        Engine(model, rows, window, decode=start.tokenizer.decode), pool, prompts, config.num_prompts,
        config.group_size, params, config.seed, config.max_redraws, config.max_unjudged,
    )  # fmt: skip


def _train(config: RLConfig, output: Output, start: ModelFolder, sampler: Sampler) -> None:
    """Train the sampler's model to the end. Metrics of a step's samples are logged with the step."""
    model, loop = sampler.engine.model, config.loop
    state = TrainState(model, adamw(model, loop))
    objective = PolicyGradient(config.temperature, config.max_logprob_gap, kl=config.kl)
    reference = placed(hf.load(start.path, torch.float32)) if config.kl else None
    store = RolloutStore(output.data)

    def batches_from(_: int) -> Iterator[list[Batch]]:
        store.rewind(state.step)
        while True:
            rollouts, redrawn = sampler.draw(state.extra)
            objective.begin(rollouts.metrics() | {"redrawn": redrawn})
            batches = _micro_batches(config, rollouts, start.pad_id)
            if reference is not None:
                add_reference_logprobs(reference, batches, config.temperature)
            yield batches

    for step in resumable(output, state, batches_from, objective, loop, headline="accuracy"):
        last = step.step == loop.max_steps
        if last or step.step % loop.log_every_steps == 0:
            output.metrics.log(step.step, logprob_gap_max=objective.largest_gap)
        if sampler.latest and (last or step.step % config.store_every_steps == 0):
            store.write(step.step, sampler.latest)


def _micro_batches(config: RLConfig, rollouts: Rollouts, pad_id: int) -> list[Batch]:
    return micro_batches(
        rollouts, config.loop.micro_batch_size, pad_id, config.aggregation, config.max_new_tokens, config.baseline,
        config.advantage_scale, keep_all=config.kl > 0,
    )  # fmt: skip


def _summary(output: Output, prompts: Sequence[Prompt], drops: Drops) -> dict[str, Any]:
    """Read from the metrics on disk, which hold the steps before a resume too."""
    rows = output.metrics.read()
    accuracy = [row["accuracy"] for row in rows if "accuracy" in row]
    return {
        "accuracy_first": float(np.mean(accuracy[:_ENDS])),
        "accuracy_last": float(np.mean(accuracy[-_ENDS:])),
        "logprob_gap_max": max(row["logprob_gap_max"] for row in rows if "logprob_gap_max" in row),
        "prompts": len(prompts),
        "left_out": dict(drops.counts),
    }


def check(config: RLConfig) -> dict[str, Any]:
    """Sizes of a step and the first prompt, as far as the inputs exist already."""
    samples, drops = config.num_prompts * config.group_size, Drops()
    sizes = {
        "steps": config.loop.max_steps,
        "samples_per_step": samples,
        "most_tokens_per_step": samples * config.max_new_tokens,
    }
    try:
        start = open_model(config.model)
        prompts = _load_prompts(config, start, drops)
    except ArtifactError as error:
        return {**sizes, "inputs": str(error)}
    return {
        **sizes,
        "prompts": len(prompts),
        "epochs": config.loop.max_steps * config.num_prompts / len(prompts),
        "longest_prompt_tokens": max(len(prompt.ids) for prompt in prompts),
        "left_out": str(drops),
        "first_prompt": start.tokenizer.decode(prompts[0].ids),
    }
