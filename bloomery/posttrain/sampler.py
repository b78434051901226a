"""Rollouts to learn from, by the current weights: the same again after a resume."""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from bloomery.data.document import Drops
from bloomery.data.prompts import Prompt
from bloomery.errors import ArtifactError, DivergenceError
from bloomery.generate import SamplingParams
from bloomery.posttrain.blending import BlendedCurriculum
from bloomery.posttrain.curriculum import Curriculum
from bloomery.posttrain.domains import DomainWatch, Wanted, domain_metrics, learnt_metrics
from bloomery.posttrain.generators import Generator
from bloomery.posttrain.ranks import Ranks
from bloomery.posttrain.rl_config import RLConfig, Sampling
from bloomery.posttrain.rollouts import Group, Rollouts, roll_out
from bloomery.posttrain.tripwires import Canaries, Watch, check_rollouts
from bloomery.verify import Pool, echo
from bloomery.verify.canaries import has_echo


@dataclass(frozen=True)
class Drawn:
    """`rollouts` to learn from, how they were sampled, and the metrics of all that were sampled for them."""

    rollouts: Rollouts
    sampling: Sampling
    metrics: dict[str, float]


class Sampler:
    """Draws prompts, rolls out and judges `num_prompts` × `group_size` completions at a time.

    `latest` holds the last rollouts, learnt from or not.
    """

    def __init__(
        self, generator: Generator, pool: Pool, curriculum: Curriculum | BlendedCurriculum,
        stop_token_ids: Sequence[int], config: RLConfig, ranks: Ranks,
    ):  # fmt: skip
        self.ranks, self.generator, self.pool, self.curriculum, self.config = ranks, generator, pool, curriculum, config
        self._stop, self.watch = tuple(stop_token_ids), Watch(config.tripwires)
        self.domains = DomainWatch(config)
        self.latest: Rollouts | None = None

    def draw(self, step: int, progress: MutableMapping[str, Any]) -> Drawn:
        """What optimizer step `step` learns from first. `progress` holds all that changes; resumed with it, a run draws
        the next prompts and writes the same texts.

        Draws again while no group has any signal; with `max_gen_batches` above 1, until `num_prompts` groups have one,
        with `blend_on_active` each part of the blend its number of them, or the cap is reached (dynamic sampling, DAPO
        section 3.2). Raises `DivergenceError` when `max_redraws` are used up, and what the tripwires raise.
        """
        config, sampling = self.config, self.config.sampling(step)
        self.generator.update()  # the weights may have changed since the last draw
        sampled: list[Rollouts] = []
        wanted = Wanted(config.num_prompts, config.blend if config.blend_on_active else None)
        while not wanted.kept or (wanted.missing and len(sampled) < config.max_gen_batches):
            if len(sampled) > max(config.max_redraws, config.max_gen_batches - 1):
                self._give_up(len(sampled))
            sampled.append(self._roll_out(sampling, progress, wanted.parts))
            wanted.add(sampled[-1], self._worth_learning(sampled[-1]))
        rollouts = Rollouts(wanted.kept, sampled[-1].seconds)
        return Drawn(rollouts, sampling, self._metrics(sampled, rollouts, sampling, progress))

    def _roll_out(
        self, sampling: Sampling, progress: MutableMapping[str, Any], parts: Sequence[str] | None
    ) -> Rollouts:
        config, first = self.config, progress.get("prompts_drawn", 0)
        if parts is None or isinstance(self.curriculum, Curriculum):
            positions = self.curriculum.take(config.num_prompts, sampling, progress)
        else:
            positions = self.curriculum.take(config.num_prompts, sampling, progress, parts)
        prompts = [self.curriculum.prompts[position] for position in positions]
        params = SamplingParams(
            max_new_tokens=sampling.max_new_tokens, temperature=sampling.temperature, stop_token_ids=self._stop
        )
        canaries = Canaries(self.pool, prompts, config.tripwires.canaries, config.require_think)
        rollouts = roll_out(
            self.generator, self.pool, prompts, sampling.group_size, params, (config.seed, first), self.ranks,
            config.reward, config.require_think,
        )  # fmt: skip
        self.latest = rollouts
        self.ranks.together(canaries.check)
        check_rollouts(rollouts, config.tripwires, self.generator.weight_version)
        if parts is None:  # what only a part of the blend gave says nothing of the whole
            flat = rollouts.degenerate.double().mean().item()
            self.watch.see({"degenerate": flat, "truncated": rollouts.metrics()["truncated"]}, progress)
        self.domains.see(rollouts, progress)
        right = (rollouts.rewards >= 1) & rollouts.valid
        for position, solved, judged in zip(positions, right.sum(-1), rollouts.valid.sum(-1), strict=True):
            self.curriculum.record(position, int(solved), int(judged), progress)
        return rollouts

    def _worth_learning(self, rollouts: Rollouts) -> Sequence[Group]:
        """Only groups with signal in dynamic sampling; else all, where one has some."""
        mixed = rollouts.mixed(self.config.overlong.filter)
        return rollouts.groups if mixed and self.config.max_gen_batches == 1 else mixed

    def _give_up(self, draws: int) -> None:
        assert self.latest is not None
        raise DivergenceError(
            f"in {draws} draws of {self.config.num_prompts} prompts no group had both right and wrong answers (right "
            f"in the last: {self.latest.metrics().get('accuracy', 0):.0%}), so there is nothing to learn; choose "
            "easier or harder prompts, a larger group_size, or a model whose answers vary more"
        )

    def _metrics(
        self, sampled: Sequence[Rollouts], learnt: Rollouts, sampling: Sampling, progress: MutableMapping[str, Any]
    ) -> dict[str, float]:
        """Of all samples, since those that are learnt from were chosen by their rewards; of the gradient, which domain
        rules it."""
        config, drawn = self.config, Rollouts([group for each in sampled for group in each.groups])
        found = drawn.metrics() | domain_metrics(drawn)
        found |= {"redrawn": len(sampled) - 1} | self.curriculum.metrics(progress)
        found |= learnt_metrics(learnt, config, sampling.max_new_tokens)
        if config.max_gen_batches > 1:
            found["groups_missing"] = config.num_prompts - len(learnt.groups)
        if config.phases:
            found["max_new_tokens"] = sampling.max_new_tokens
        return found


def distinct(prompts: Sequence[Prompt], drops: Drops) -> list[Prompt]:
    """Without those whose tokens are an earlier prompt's: they would be two groups of one question."""
    seen: set[tuple[int, ...]] = set()
    kept = []
    for prompt in prompts:
        if prompt.ids in seen:
            drops.add("same tokens as another prompt", prompt.id)
        else:
            seen.add(prompt.ids)
            kept.append(prompt)
    return kept


def winnable(
    prompts: Sequence[Prompt], pool: Pool, require_think: bool, drops: Drops, ranks: Ranks | None = None
) -> list[Prompt]:
    """Prompts whose own answer is judged right; any other could only ever punish, and is counted in `drops`.

    One that does not hold a whole answer, such as tests without a reference program, stays. Raises `ArtifactError` when
    none is left. ranks: those that share the work; all get the same.
    """
    ranks = ranks or Ranks()
    thought = "</think>" if require_think else ""
    known = [prompt for prompt in prompts if has_echo(prompt.verifier, prompt.answer)]
    own = [known[i] for i in ranks.share(len(known))]
    verdicts = pool.judge_all((p.verifier, thought + echo(p.verifier, p.answer), p.answer) for p in own)
    refused = set()
    for prompt, verdict in zip(known, [one for some in ranks.gather(verdicts) for one in some], strict=True):
        if verdict.status != "correct":
            refused.add(id(prompt))
            drops.add(f"its own answer is judged {verdict.status}", prompt.id)
    kept = [prompt for prompt in prompts if id(prompt) not in refused]
    if not kept:
        raise ArtifactError(f"no prompt is left to train on; dropped: {drops}")
    return kept
