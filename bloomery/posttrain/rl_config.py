"""The settings of the stage `rl`: the strictly on-policy default, and the published variants of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import model_validator

from bloomery.config import RUN_ONLY, Config, DatasetDir, Field, ModelDir, RawPath
from bloomery.data.prompt_blend import PromptBlend
from bloomery.parallel.settings import ParallelConfig
from bloomery.posttrain.objectives import Aggregation, Baseline, Mismatch, Scale
from bloomery.train.loop import LoopConfig
from bloomery.verify import Reward


class Phase(Config):
    """A part of the run. What is not given is as in the stage's own settings."""

    until_step: int | None = Field(
        default=None, gt=0, description="last optimizer step of this phase; left out: to the end"
    )
    max_new_tokens: int | None = Field(default=None, gt=0, description="longest completion, tokens")
    group_size: int | None = Field(default=None, ge=2, description="completions of each prompt")
    temperature: float | None = Field(default=None, gt=0, description="divides the logits")
    above: float | None = Field(default=None, ge=0, le=1, description="only prompts whose pass rate is above this")
    at_most: float = Field(
        default=1.0, ge=0, le=1, description="only prompts whose pass rate is at most this; AceReason's hard set: 0.375"
    )


@dataclass(frozen=True)
class Sampling:
    """What holds at one step: a phase with every gap filled. `number` counts the phases from 0."""

    number: int
    max_new_tokens: int
    group_size: int
    temperature: float
    above: float | None = None
    at_most: float = 1.0


class Clip(Config):
    """PPO's clipped objective, for batches of rollouts that several optimizer steps learn from."""

    low: float = Field(default=0.2, gt=0, lt=1, description="the ratio π/π_old is held above 1 − low")
    high: float = Field(default=0.28, gt=0, description="and below 1 + high; above low: clip-higher of DAPO")
    dual: float | None = Field(
        default=None, gt=1, description="where the advantage A is below 0, the loss is held below −dual · A; null: not"
    )


class Correction(Config):
    """Weights w = π_old/π_generator for samples of a generator that computes otherwise than the trainer."""

    kind: Mismatch = Field(
        default="tis",
        description="tis: min(w, high) a token · mask: w where low ≤ w ≤ high, else 0 · seq_mask: w where the "
        "completion's geometric mean of w lies there · seq_trunc: min(product of w, high) a completion",
    )
    low: float = Field(default=0.5, ge=0, description="lowest weight that mask and seq_mask keep")
    high: float = Field(default=2.0, gt=0, description="largest weight")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        return self


class Overlong(Config):
    """What a completion that reaches the limit is worth. By default what its verdict says."""

    filter: bool = Field(
        default=False, description="cut-off completions are not learnt; they still count in their group's baseline"
    )
    penalty_tokens: int = Field(
        default=0, ge=0, description="length over which the reward falls by up to 1 before max_new_tokens; 0: not"
    )


class DomainTripwires(Config):
    """When one domain of several stops the run; means over the draws of `tripwires.window`."""

    max_degenerate: float = Field(
        default=0.99, ge=0, le=1, description="share of a domain's groups with equal rewards; 1: never"
    )
    max_truncated: float = Field(
        default=0.95, ge=0, le=1, description="share of a domain's completions that are cut off; 1: never"
    )
    min_format: float = Field(
        default=0.02, ge=0, le=1, description="share of a domain's completions in the form that `reward` asks for"
    )
    min_label_entropy: float = Field(
        default=0.4, ge=0, le=1, description="multiple choice: entropy of the labels chosen, as a share of an even "
        "choice's",
    )  # fmt: skip


class Tripwires(Config):
    """When a run stops by itself, before it learns from what it sees."""

    max_logprob_gap: float = Field(
        default=0.05, gt=0, description="trainer against generator, mean nats per token of a micro-batch"
    )
    max_unjudged: float = Field(default=0.05, ge=0, le=1, description="share of a step's completions without a verdict")
    max_repeated: float = Field(
        default=0.5, ge=0, le=1, description="share of a step's prompts that stand in it before"
    )
    canaries: int = Field(
        default=1, ge=0, description="gold answers judged beside each step's completions, for every verifier"
    )
    max_degenerate: float = Field(
        default=0.95, ge=0, le=1, description="share of groups with equal rewards, mean over the window"
    )
    max_truncated: float = Field(default=0.9, ge=0, le=1, description="share of cut-off completions, window mean")
    min_entropy: float = Field(default=0.01, ge=0, description="nats per token, window mean")
    domains: DomainTripwires = Field(default=DomainTripwires(), description="limits of each domain, where several are")
    window: int = Field(default=20, gt=0, description="steps that the last four are averaged over")


class EngineGenerator(Config):
    """Completions by the engine in this process: the default."""

    type: Literal["engine"] = "engine"
    deterministic: bool = Field(
        default=False, json_schema_extra=RUN_ONLY,
        description="same tokens and log-probabilities to the bit whatever else is decoded beside them, so on any "
        "number of ranks (on a CPU); slower. Otherwise the same up to rounding",
    )  # fmt: skip


class EndpointGenerator(Config):
    """Completions by an endpoint that speaks OpenAI's API and takes new weights from a folder that both see."""

    type: Literal["endpoint"] = "endpoint"
    base_url: str = Field(description="address, for example http://host:8000/v1", json_schema_extra=RUN_ONLY)
    model: str = Field(description="name of the model there", json_schema_extra=RUN_ONLY)
    server: Literal["vllm", "sglang"] = Field(
        description="how it reloads weights: vllm by /collective_rpc (VLLM_SERVER_DEV_MODE=1), sglang by "
        "/update_weights_from_disk"
    )
    folder: Path | None = Field(
        default=None, json_schema_extra=RUN_ONLY,
        description="where the weights of each step go, for the server to read; default: in the stage's folder",
    )  # fmt: skip
    concurrency: int = Field(default=256, gt=0, description="requests in flight", json_schema_extra=RUN_ONLY)


class VllmGenerator(Config):
    """Completions by vLLM in this process (extra `vllm`)."""

    type: Literal["vllm"] = "vllm"
    settings: dict[str, Any] = Field(
        default={}, description="further settings of vllm.LLM, such as gpu_memory_utilization: 0.4"
    )


AnyGenerator = Annotated[EngineGenerator | EndpointGenerator | VllmGenerator, Field(discriminator="type")]


class RLConfig(Config):
    """Train a model on its own answers."""

    model: ModelDir = Field(description="the model to start from: a stage's folder or a Hugging Face directory")
    prompts: DatasetDir = Field(description="dataset of kind prompts; one too long for the context is left out")
    num_prompts: int = Field(gt=0, description="prompts in a batch of rollouts")
    group_size: int = Field(default=8, ge=2, description="completions of each prompt, compared with each other")
    max_new_tokens: int = Field(gt=0, description="longest completion, tokens")
    max_prompt_tokens: int | None = Field(
        default=None, gt=0, description="longest prompt, others are left out; null: what the context leaves"
    )
    temperature: float = Field(default=1.0, gt=0, description="divides the logits, in sampling and in training")
    phases: tuple[Phase, ...] = Field(
        default=(), description="what changes on the way: lengths, group sizes, difficulty; in order"
    )
    blend: PromptBlend | None = Field(
        default=None,
        description="shares of a step's prompts by domain, form or source; null: each prompt once an epoch",
    )
    blend_on_active: bool = Field(
        default=False, description="dynamic sampling part by part, so that the blend holds among the groups that are "
        "learnt; for max_gen_batches above 1",
    )  # fmt: skip
    rollouts: RawPath | None = Field(
        default=None, description="stored rollouts or an evaluation of these prompts: their pass rates before this run"
    )
    drop_solved: float | None = Field(
        default=None, gt=0, le=1, description="from this pass rate in one epoch a prompt is left out of all later ones"
    )
    reward: Reward | None = Field(
        default=None, description="how the answer and its form make the reward, {} for both together; null: the answer"
    )
    baseline: Baseline = Field(default="group_mean", description="what a reward is compared with")
    advantage_scale: Scale = Field(default="group_std", description="what the comparison is divided by; none: Dr. GRPO")
    aggregation: Aggregation = Field(default="token_mean", description="how token losses become one number")
    denominator: Literal["all", "active"] = Field(
        default="all", description="the mean counts all completions, or only those whose advantage is not 0"
    )
    overlong: Overlong = Field(default=Overlong(), description="what completions at the length limit are worth")
    updates_per_batch: int = Field(
        default=1, gt=0, description="optimizer steps that share a batch of rollouts, each with its own prompts of it"
    )
    clip: Clip | None = Field(default=None, description="holds the policy near its samples, for several updates")
    correction: Correction | None = Field(
        default=None, description="importance weights where generator and trainer differ; null: none"
    )
    kl: float = Field(default=0.0, ge=0, description="weight of the penalty for leaving the first model; 0: none")
    max_gen_batches: int = Field(
        default=1, gt=0, description="dynamic sampling: batches drawn at most until num_prompts groups have both right "
        "and wrong answers, only which are learnt; 1: off",
    )  # fmt: skip
    max_redraws: int = Field(
        default=20, ge=0, description="times in a row that other prompts are drawn when no group has any signal"
    )
    require_think: bool = Field(default=False, description="an answer counts only behind a </think>")
    check_answers: bool = Field(
        default=True, description="first judge every prompt's own answer and leave out what is refused; not needed "
        "after the stage curate",
    )  # fmt: skip
    tripwires: Tripwires = Field(default=Tripwires(), description="when the run stops by itself")
    loop: LoopConfig = Field(
        description="how it is optimised; batch_size is num_prompts × group_size / updates_per_batch, leave it out"
    )
    seed: int = Field(default=0, description="seed of the order of prompts and of the sampling")
    generator: AnyGenerator = Field(default=EngineGenerator(), description="what writes the completions")
    parallel: ParallelConfig = Field(
        default=ParallelConfig(), json_schema_extra=RUN_ONLY, description="how the work is spread over ranks"
    )
    max_batch: int = Field(
        default=256, gt=0, description="sequences decoded at a time, on each rank", json_schema_extra=RUN_ONLY
    )
    workers: int = Field(default=2, gt=0, description="processes that judge, on each rank", json_schema_extra=RUN_ONLY)
    verify_on: Literal["local", "ray"] = Field(
        default="local", description="where they run: on this machine, or on a Ray cluster (extra ray)",
        json_schema_extra=RUN_ONLY,
    )  # fmt: skip
    store_every_steps: int = Field(
        default=20, gt=0, description="steps between stored rollouts; the last are kept", json_schema_extra=RUN_ONLY
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_batch_size(cls, data: Any) -> Any:
        loop = data.get("loop") if isinstance(data, dict) else None
        if not isinstance(loop, dict) or "batch_size" in loop:
            return data
        names = ("num_prompts", "group_size", "updates_per_batch")
        sizes = [data.get(name, cls.model_fields[name].default) for name in names]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            return data
        return {**data, "loop": {**loop, "batch_size": max(1, sizes[0] * sizes[1] // sizes[2])}}

    @model_validator(mode="after")
    def _one_step_a_part(self) -> Self:
        if self.num_prompts % self.updates_per_batch:
            raise ValueError(
                f"updates_per_batch: {self.updates_per_batch} does not divide num_prompts {self.num_prompts}"
            )
        samples = self.num_prompts * self.group_size // self.updates_per_batch
        if self.loop.batch_size != samples:
            raise ValueError(
                f"loop.batch_size: {self.loop.batch_size}, but one optimizer step learns from num_prompts × "
                f"group_size / updates_per_batch = {samples} completions; leave batch_size out"
            )
        return self

    @model_validator(mode="after")
    def _without_idle_settings(self) -> Self:
        if self.clip is not None and self.updates_per_batch == 1:
            raise ValueError(
                "clip: without effect with one update per batch, where the ratio is always 1; set updates_per_batch"
            )
        if self.clip is None and self.updates_per_batch > 1:
            raise ValueError(
                f"updates_per_batch: {self.updates_per_batch} moves the policy away from its samples; say how far by "
                "clip, for example {low: 0.2, high: 0.28}"
            )
        asks_rates = any(phase.above is not None or phase.at_most < 1 for phase in self.phases)
        by_rate = self.blend is not None and self.blend.difficulty
        if self.rollouts is not None and not asks_rates and not by_rate:
            raise ValueError("rollouts: without effect, no phase asks for pass rates; set above or at_most in a phase")
        if self.blend_on_active and (self.blend is None or self.max_gen_batches == 1):
            raise ValueError("blend_on_active: without effect without a blend and max_gen_batches above 1; set both")
        if self.rollouts is None and by_rate:
            raise ValueError("blend.difficulty: weights by pass rates; give rollouts of these prompts")
        return self

    @model_validator(mode="after")
    def _nothing_is_dropped(self) -> Self:
        if self.loop.balance.capacity_factor is not None:
            raise ValueError(
                "loop.balance.capacity_factor: the generator drops no token, so the policy that writes would not be "
                "the one that learns; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _phases_in_order(self) -> Self:
        before = 0
        for number, phase in enumerate(self.phases):
            last, where = number == len(self.phases) - 1, f"phases.{number}"
            until = self.loop.max_steps if phase.until_step is None and last else phase.until_step
            if until is None or until <= before:
                raise ValueError(f"{where}.until_step: {until}, expected a step above {before}: phases follow in order")
            if last and until < self.loop.max_steps:
                raise ValueError(
                    f"{where}.until_step: {until}, but the run has {self.loop.max_steps} steps; leave it out: the last "
                    "phase holds to the end"
                )
            if phase.above is not None and phase.above >= phase.at_most:
                raise ValueError(f"{where}.above: {phase.above:g} is not below at_most {phase.at_most:g}")
            before = until
        if self.overlong.penalty_tokens > min(phase.max_new_tokens for phase in self.samplings()):
            raise ValueError(
                f"overlong.penalty_tokens: {self.overlong.penalty_tokens} is more than max_new_tokens, so that every "
                "completion would be punished; choose less"
            )
        return self

    def samplings(self) -> list[Sampling]:
        """Every phase with its gaps filled, in order; one where none is given."""
        return [
            Sampling(
                number, phase.max_new_tokens or self.max_new_tokens, phase.group_size or self.group_size,
                phase.temperature or self.temperature, phase.above, phase.at_most,
            )
            for number, phase in enumerate(self.phases or (Phase(),))
        ]  # fmt: skip

    def sampling(self, step: int) -> Sampling:
        """What holds at optimizer step `step`, counted from 1."""
        ended = sum(phase.until_step is not None and phase.until_step < step for phase in self.phases)
        every = self.samplings()
        return every[min(ended, len(every) - 1)]

    @property
    def longest(self) -> int:
        """Most new tokens of any phase."""
        return max(phase.max_new_tokens for phase in self.samplings())
