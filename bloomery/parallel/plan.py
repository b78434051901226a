"""Which mapping to train with: every valid one is weighed by memory and by seconds, the fastest that fits is chosen.

Guided as published runs are (arXiv 2504.14960, section 6): tensor parallelism stays in a node, context parallelism is
tried for long sequences alone, layers are recomputed only where memory asks for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bloomery.errors import ConfigError
from bloomery.model.config import ModelConfig
from bloomery.parallel.cluster import Cluster
from bloomery.parallel.cost import ERROR, Memory, Timing, memory, timing
from bloomery.parallel.mapping import Mapping
from bloomery.parallel.work import Batch, ModelWork, step_work

LONG_SEQUENCE = 8192
MICRO_BATCHES = (1, 2, 4)
INTERLEAVES = (1, 2, 4, 8)
EXPERT_TENSOR = (1, 2, 4, 8)


@dataclass(frozen=True)
class Plan:
    """A mapping with its predicted step."""

    mapping: Mapping
    micro_batch_size: int
    timing: Timing
    memory: Memory
    tokens_per_second: float

    @property
    def mfu(self) -> tuple[float, float, float]:
        """Low, predicted, high: nine in ten of the published runs lie between when their model is not fitted."""
        middle = self.timing.mfu
        return middle / (1 + ERROR), middle, middle * (1 + ERROR)


@dataclass(frozen=True)
class Choice:
    """best: mappings that fit, fastest first. too_large: the fastest mapping that does not fit, where there is one."""

    cluster: Cluster
    batch: Batch
    best: tuple[Plan, ...]
    too_large: Plan | None
    tried: int


def choose(model: ModelConfig, cluster: Cluster, batch: Batch) -> Choice:
    """Weigh all mappings of a model on a cluster; `batch.micro` is chosen too.

    Raises `ConfigError` when no mapping is valid, or none fits.
    """
    plans = list(_plans(model, cluster, batch))
    fit = [plan for plan in plans if plan.memory.total <= cluster.device.memory]
    if not plans:
        raise ConfigError(_no_mapping(model, cluster, batch))
    if not fit:
        least = min(plans, key=lambda plan: plan.memory.total)
        raise ConfigError(
            f"{cluster.name}: no mapping fits: {describe(least.mapping)} needs least, {least.memory.total / 1e9:.0f} "
            f"GB a GPU of {cluster.device.memory / 1e9:.0f} GB; take more GPUs or shorter sequences"
        )
    best: dict[tuple[int, ...], Plan] = {}
    for plan in sorted(fit, key=lambda plan: plan.timing.seconds):
        best.setdefault(_degrees(plan.mapping), plan)
    ranked = tuple(best.values())
    lost = [plan for plan in plans if plan.memory.total > cluster.device.memory]
    faster = min(lost, key=lambda plan: plan.timing.seconds, default=None)
    kept = faster if faster and faster.timing.seconds < ranked[0].timing.seconds else None
    return Choice(cluster, batch, ranked, kept, len(plans))


def _degrees(mapping: Mapping) -> tuple[int, ...]:
    return (mapping.tensor, mapping.context, mapping.pipeline, mapping.expert, mapping.expert_tensor, mapping.zero)


def _no_mapping(model: ModelConfig, cluster: Cluster, batch: Batch) -> str:
    try:
        Mapping.over(cluster.gpus).check_model(model, batch.seq_len)
    except ConfigError as error:
        return f"{cluster.name}: no mapping is valid; the simplest fails: {error}"
    return (
        f"{cluster.name}: no mapping is valid: {batch.sequences} sequences a step are shared by a number of data ranks "
        f"that divides them; choose a batch that has more factors in common with {cluster.gpus}, such as {cluster.gpus}"
    )


def _plans(model: ModelConfig, cluster: Cluster, batch: Batch) -> Iterator[Plan]:
    asked = ModelWork(model, batch.seq_len)
    for pipeline in _divisors(cluster.gpus, model.num_layers):
        stages = asked.stages(pipeline)
        for mapping in _mappings(model, cluster, batch, pipeline):
            for micro in MICRO_BATCHES:
                if batch.sequences % (mapping.data * micro) == 0:
                    sized = Batch(batch.seq_len, batch.sequences, micro, batch.imbalance)
                    yield from _variants(asked, mapping, cluster, sized, stages)


def _mappings(model: ModelConfig, cluster: Cluster, batch: Batch, pipeline: int) -> Iterator[Mapping]:
    """Degrees that share the model's sizes evenly over the ranks of a stage."""
    size = cluster.gpus // pipeline
    longest = size if batch.seq_len >= LONG_SEQUENCE else 1
    has_experts = "E" in model.pattern
    for tensor in _divisors(size, cluster.gpus_per_node):
        for context in _divisors(size // tensor, longest):
            for expert in _divisors(size, model.n_routed_experts if has_experts else 1):
                for width in EXPERT_TENSOR if has_experts else (1,):
                    if size % (expert * width) == 0 and width <= cluster.gpus_per_node:
                        mapping = Mapping.over(
                            cluster.gpus, tensor=tensor, context=context, pipeline=pipeline, expert=expert,
                            expert_tensor=width,
                        )  # fmt: skip
                        if _valid(mapping, model, batch):
                            yield mapping


def _valid(mapping: Mapping, model: ModelConfig, batch: Batch) -> bool:
    try:
        mapping.check_model(model, batch.seq_len)
    except ConfigError:
        return False
    return batch.sequences % mapping.data == 0


def _variants(
    asked: ModelWork, mapping: Mapping, cluster: Cluster, batch: Batch, stages: tuple[Any, ...]
) -> Iterator[Plan]:
    """Ways to run a mapping: interleaved, sharded further where there is no pipeline, and recomputed if it must be."""
    for zero in (1, 3) if mapping.pipeline == 1 else (1,):
        sharded = mapping.model_copy(update={"zero": zero})
        work = step_work(asked, sharded, cluster, batch, stages)
        for pieces in _interleaves(mapping, work.micro_batches, asked.model.num_layers):
            for recompute in (False, True):
                changed = sharded.model_copy(update={"interleave": pieces, "recompute": recompute})
                needed = memory(work, changed)
                found = timing(work, cluster, changed)
                speed = batch.sequences * batch.seq_len / found.seconds
                yield Plan(changed, batch.micro, found, needed, speed)
                if needed.total <= cluster.device.memory:
                    break


def _interleaves(mapping: Mapping, micro_batches: float, layers: int) -> Iterator[int]:
    """One piece a stage always; more where the schedule can fill them."""
    for pieces in INTERLEAVES:
        fills = mapping.pipeline > 1 and micro_batches % mapping.pipeline == 0
        if pieces == 1 or (fills and mapping.pipeline * pieces <= layers):
            yield pieces


def _divisors(number: int, most: int) -> list[int]:
    return [value for value in range(1, min(number, most) + 1) if number % value == 0]


def describe(mapping: Mapping) -> str:
    """The degrees above one, on one line."""
    skipped = {"zero", "recompute", "expert_data"}
    degrees = {name: value for name, value in mapping.model_dump().items() if name not in skipped and value > 1}
    words = [f"{name} {value}" for name, value in degrees.items()]
    return ", ".join([*(words or ["one rank"]), f"ZeRO-{mapping.zero}", *(["recompute"] if mapping.recompute else [])])


def parts(plan: Plan) -> dict[str, float]:
    """Where the seconds of a step go; exposed communication by axis."""
    timing = plan.timing
    exposed = {f"{axis} communication": seconds for axis, seconds in timing.exposed.items() if seconds}
    return {
        "matrix products": timing.products, "attention and scan": timing.attention, "memory traffic": timing.memory,
        **exposed, "pipeline bubble": timing.bubble, "data communication": timing.data, "optimizer": timing.optimizer,
    }  # fmt: skip


def why_slower(plan: Plan, best: Plan) -> str:
    """How much slower than the choice, and in which part most of it is lost."""
    ours, theirs = parts(best), parts(plan)
    lost = {name: seconds - ours.get(name, 0.0) for name, seconds in theirs.items()}
    name = max(lost, key=lambda part: lost[part])
    slower = plan.timing.seconds / best.timing.seconds - 1
    return f"{slower:.1%} slower, most in {name}: {theirs[name]:.3g} s a step, {ours.get(name, 0.0):.3g} in the choice"


def scaling(model: ModelConfig, cluster: Cluster, batch: Batch, most: int, grow: bool) -> list[tuple[int, Plan]]:
    """The choice at each doubling of the cluster up to `most` GPUs, from the smallest that holds the model.

    grow: the batch grows with the GPUs, else it stays. Sizes for which no mapping fits are left out.
    """
    found = []
    gpus = 1 if cluster.gpus & (cluster.gpus - 1) == 0 else cluster.gpus
    while gpus <= most:
        sequences = max(batch.sequences * gpus // cluster.gpus, 1) if grow else batch.sequences
        sized = Cluster(f"{gpus}x{cluster.name.partition('x')[2]}", gpus, cluster.device, cluster.gpus_per_node)
        try:
            plan = choose(model, sized, Batch(batch.seq_len, sequences, imbalance=batch.imbalance)).best[0]
            found.append((gpus, plan))
        except ConfigError:
            pass  # too small for the model, or too large for the batch
        gpus *= 2
    return found
