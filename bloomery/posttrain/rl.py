"""The stage `rl`: strictly on-policy GRPO on prompts with verifiable answers.

Each optimizer step samples groups of completions from the current weights, judges them, and takes one
policy-gradient step on them (AceReason-Nemotron, arXiv 2505.16400: no KL, no entropy bonus, token mean). The published
variants of it are settings.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bloomery import artifact
from bloomery.artifact import Manifest, Output
from bloomery.data.chat import stop_token_ids
from bloomery.data.dataset import write_card
from bloomery.data.document import Drops
from bloomery.data.pack import Batch
from bloomery.data.prompts import Prompt, load_prompts
from bloomery.errors import ArtifactError, DivergenceError
from bloomery.model import hf
from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder
from bloomery.parallel.apply import Parallel
from bloomery.parallel.world import world
from bloomery.posttrain.audit import stored_rows
from bloomery.posttrain.batches import from_json, micro_batches, to_json
from bloomery.posttrain.blending import open_curriculum
from bloomery.posttrain.curate import PassRate, pass_rates
from bloomery.posttrain.curriculum import AllSolved
from bloomery.posttrain.domains import require_forms
from bloomery.posttrain.generators import Generator, open_generator
from bloomery.posttrain.policy import PolicyGradient, add_logprobs
from bloomery.posttrain.ranks import Ranks
from bloomery.posttrain.rl_config import EngineGenerator, RLConfig
from bloomery.posttrain.rollouts import Rollouts
from bloomery.posttrain.sampler import Drawn, Sampler, distinct, winnable
from bloomery.posttrain.traces import RolloutStore
from bloomery.progress import say
from bloomery.train.loop import TrainState, computes_in_bf16
from bloomery.train.model_folder import ModelFolder, open_model, placed
from bloomery.train.run import resumable
from bloomery.train.spread import rank_sizes, save_model, shared, spread
from bloomery.verify import open_pool, self_test

_ENDS = 5


def run(config: RLConfig, out: Path) -> Manifest:
    """Stage `rl`: writes `model/` and some steps' samples in `data/`; resumes from its newest checkpoint."""
    with Output(out, "rl", config) as output:
        if output.done:
            return artifact.read_manifest(output.path)  # type: ignore[return-value]
        start, drops = open_model(config.model), Drops()
        prompts = distinct(_load_prompts(config, start, drops), drops)
        require_forms(prompts, config)
        self_test(sorted({prompt.verifier for prompt in prompts}))
        state, whole = _spread(config, start)
        ranks = Ranks(state.parallel)
        with open_pool(config.verify_on, config.workers, config.require_think) as pool:
            if config.check_answers:
                prompts = winnable(prompts, pool, config.require_think, drops, ranks)
            curriculum = open_curriculum(prompts, config, _rates_before(config))
            generator = _generator(config, output, start, state, whole, prompts, ranks)
            sampler = Sampler(generator, pool, curriculum, stop_token_ids(start.tokenizer), config, ranks)
            solved = _Training(config, output, start, state, sampler, ranks).run()
        save_model(state, start.config, output.model)
        if not ranks.is_main:
            return output.finish("model", world=world().size)
        start.tokenizer.save(output.model)
        summary = _summary(output, prompts, drops) | ({"all_solved": True} if solved else {})
        return output.finish("model", summary, world().size)


def _spread(config: RLConfig, start: ModelFolder) -> tuple[TrainState, Decoder | None]:
    """What this rank trains and, where that is a part, a copy of the whole model for its engine."""
    model, whole = hf.load(start.path, dtype=torch.float32), None
    if world().size > 1 and isinstance(config.generator, EngineGenerator):
        whole = placed(copy.deepcopy(model))
    return spread(model, config.parallel, config.loop, None), whole


def _load_prompts(config: RLConfig, start: ModelFolder, drops: Drops) -> list[Prompt]:
    room = start.room(config.longest)
    return load_prompts(config.prompts, start.tokenizer, min(room, config.max_prompt_tokens or room), drops)


def _rates_before(config: RLConfig) -> dict[str, PassRate]:
    return {} if config.rollouts is None else pass_rates(stored_rows(config.rollouts))


def _generator(
    config: RLConfig, output: Output, start: ModelFolder, state: TrainState, whole: Decoder | None,
    prompts: Sequence[Prompt], ranks: Ranks,
) -> Generator:  # fmt: skip
    """As large as the longest prompt and completion and this rank's share of them need."""
    window = max(len(prompt.ids) for prompt in prompts) + config.longest
    count = config.num_prompts * max(each.group_size for each in config.samplings())
    rows = min(config.max_batch, max(1, len(ranks.share(count))))
    return open_generator(config.generator, state, whole, start, output.checkpoints, rows, window, ranks)


class _Training:
    """One run: the sampler's rollouts, step after step, into the model."""

    def __init__(
        self, config: RLConfig, output: Output, start: ModelFolder, state: TrainState, sampler: Sampler, ranks: Ranks
    ):
        self.config, self.output, self.sampler, self.pad_id = config, output, sampler, start.pad_id
        self.state, self.ranks = state, ranks
        limits = config.tripwires
        self.objective = PolicyGradient(
            config.temperature, limits.max_logprob_gap, config.clip, config.kl, config.correction, ranks
        )
        self.reference: nn.Module | Parallel | None = None
        if config.kl:
            first = hf.load(start.path, torch.float32)
            self.reference = placed(first) if state.parallel is None else shared(first, config.parallel)
        self.store = RolloutStore(output.data)
        self.seconds: dict[str, float] = {}

    def run(self) -> bool:
        """To the last step, or until every prompt is solved: then True. Metrics of a step's samples are logged with it.

        What made a tripwire stop the run is stored as the rollouts of the step that was not taken.
        """
        state, loop = self.state, self.config.loop
        if self.ranks.is_main:
            write_card(self.output.path, {"train": f"{artifact.DATA}/*.parquet"})
        try:
            for step in resumable(self.output, state, self._batches, self.objective, loop, headline="accuracy"):
                if step.step == loop.max_steps or step.step % loop.log_every_steps == 0:
                    largest = max(self.ranks.gather(self.objective.largest_gap))
                    self.output.metrics.log(step.step, logprob_gap_max=largest, **self.seconds)
                self.sampler.watch.see({"entropy": step.metrics["entropy"]}, state.extra)
        except AllSolved:
            say(f"rl  every prompt is solved after step {state.step}; the stage ends here")
            return True
        except DivergenceError:
            if self.sampler.latest is not None and self.ranks.is_main:
                self.store.write(state.step + 1, self.sampler.latest)
            self.ranks.gather(None)  # a rank that leaves has the others ended, also the one that writes
            raise
        return False

    def _batches(self, _: int) -> Iterator[list[Batch]]:
        """The micro-batches of each step. Several updates share the rollouts of one draw: those still to come are kept
        in the state, so that a cut run learns from the same."""
        if self.ranks.is_main:
            self.store.rewind(self.state.step)
        while True:
            waiting = self.state.extra.pop("waiting", [])
            if waiting:
                self.objective.begin({}, self.state.extra["temperature"])
                self.seconds = {}
                yield self._keep(waiting[1:], from_json(waiting[0]))
                continue
            drawn = self.sampler.draw(self.state.step + 1, self.state.extra)
            self._store_if_due(drawn.rollouts)
            self.objective.begin(drawn.metrics, drawn.sampling.temperature)
            self.seconds = dict(drawn.rollouts.seconds)
            self.state.extra["temperature"] = drawn.sampling.temperature
            first, *later = self._parts(drawn)
            yield self._keep([to_json(part) for part in later], first)

    def _keep(self, waiting: list[Any], batches: list[Batch]) -> list[Batch]:
        """What is learnt now; of several ranks, this one's part of it."""
        if waiting:
            self.state.extra["waiting"] = waiting
        return self.ranks.own(batches)

    def _parts(self, drawn: Drawn) -> list[list[Batch]]:
        """The micro-batches of each update that learns from these rollouts; an update without signal is left out."""
        config, temperature = self.config, drawn.sampling.temperature
        groups, count = drawn.rollouts.groups, config.updates_per_batch
        cuts = [len(groups) * number // count for number in range(count + 1)]
        pairs = pairwise(cuts)
        parts = [self._micro_batches(Rollouts(groups[low:high]), drawn) for low, high in pairs if high > low]
        parts = [self.ranks.evened(part) for part in parts if part]
        model, in_bf16 = self.state.parallel or self.state.model, self._in_bf16
        for part in parts:
            if self.reference is not None:
                add_logprobs(self.reference, part, "reference_logprobs", temperature, in_bf16, self.ranks)
            if config.clip is not None:
                add_logprobs(model, part, "old_logprobs", temperature, in_bf16, self.ranks)
        return parts

    @property
    def _in_bf16(self) -> bool:
        model = self.state.model
        return computes_in_bf16(self.config.loop, model, next(model.parameters()).device)

    def _micro_batches(self, rollouts: Rollouts, drawn: Drawn) -> list[Batch]:
        config = self.config
        return micro_batches(
            rollouts, config.loop.micro_batch_size, self.pad_id, config.aggregation, drawn.sampling.max_new_tokens,
            config.baseline, config.advantage_scale, keep_all=config.kl > 0, overlong=config.overlong,
            active_only=config.denominator == "active",
        )  # fmt: skip

    def _store_if_due(self, rollouts: Rollouts) -> None:
        """At the first of the steps that learn from them."""
        if not self.ranks.is_main:
            return
        first = self.state.step + 1
        steps = range(first, first + self.config.updates_per_batch)
        if self.config.loop.max_steps in steps or any(step % self.config.store_every_steps == 0 for step in steps):
            self.store.write(first, rollouts)


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


def _rank_sizes(config: RLConfig, model: ModelConfig) -> dict[str, Any]:
    """Beside what training needs: every rank has a copy of the weights to write with."""
    found = rank_sizes(model, config.parallel, config.loop)
    if found and isinstance(config.generator, EngineGenerator):
        found["rank_copy_bytes"] = 4 * model.count_parameters()
    return found


def check(config: RLConfig) -> dict[str, Any]:
    """Sizes of a step and the first prompt, as far as the inputs exist already."""
    samples, drops = config.num_prompts * config.group_size, Drops()
    sizes: dict[str, Any] = {
        "steps": config.loop.max_steps,
        "samples_per_step": samples,
        "most_tokens_per_step": samples * config.max_new_tokens,
    }
    if config.phases:
        sizes["phases"] = [asdict(sampling) for sampling in config.samplings()]
    try:
        start = open_model(config.model)
        prompts = distinct(_load_prompts(config, start, drops), drops)
    except ArtifactError as error:
        return {**sizes, **rank_sizes(None, config.parallel, config.loop), "inputs": str(error)}
    return {
        **sizes,
        **_rank_sizes(config, start.config),
        "prompts": len(prompts),
        "epochs": config.loop.max_steps * config.num_prompts / len(prompts),
        "longest_prompt_tokens": max(len(prompt.ids) for prompt in prompts),
        "left_out": str(drops),
        "first_prompt": start.tokenizer.decode(prompts[0].ids),
    }
