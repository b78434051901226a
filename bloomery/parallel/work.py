"""What one rank does in a training step under a mapping: operations, bytes moved and sent, before any second is known.

Counts follow arXiv 2504.14960 (token dispatcher), Megatron-LM (arXiv 2104.04473) and `ModelConfig`. Weights and
activations are bf16, gradients float32. All counts of a layer are those of one micro-batch, forward only.
"""

import itertools
import math
from collections import Counter
from dataclasses import dataclass

from bloomery.model.config import ModelConfig
from bloomery.parallel.cluster import Cluster
from bloomery.parallel.mapping import AXES, Mapping

BF16, FLOAT32 = 2, 4
HEAD = "head"
ENTRY = "entry"
OPTIMIZER_BYTES = 6 * FLOAT32 + FLOAT32 + BF16
"""Moved for a weight: three float32 states read and written, the gradient read, the weight written."""


@dataclass(frozen=True)
class Batch:
    """What a step trains on. sequences: of the whole step. micro: sequences of one micro-batch of a data rank.

    imbalance: tokens of the fullest expert rank over the mean; 1 where experts have a fixed capacity.
    """

    seq_len: int
    sequences: int
    micro: int = 1
    imbalance: float = 1.0


@dataclass(frozen=True)
class Product:
    """Matrix products that share their rows and the narrowest width a rank holds of their weights."""

    flops: float
    rows: float
    width: float


@dataclass(frozen=True)
class Transfer:
    """Bytes a rank sends in `messages` collectives: over the links inside its node, and over the network."""

    axis: str
    inside: float
    outside: float
    messages: int = 1
    hidden: bool = False  # behind the attention of the same layer


@dataclass(frozen=True)
class LayerWork:
    """One layer on one rank. core: operations of attention scores or of the scan. moved: bytes to and from memory."""

    products: tuple[Product, ...]
    core: float
    moved: float
    transfers: tuple[Transfer, ...]


@dataclass(frozen=True)
class Parameters:
    """Weights, split by which grid shares them."""

    dense: float
    expert: float = 0.0


@dataclass(frozen=True)
class StepWork:
    """A whole step. stages: layers of each kind a pipeline stage holds, the head among them; held: its weights on one
    rank, kept: bytes of activations a layer keeps for one micro-batch."""

    layers: dict[str, LayerWork]
    stages: tuple[Counter[str], ...]
    held: tuple[Parameters, ...]
    kept: dict[str, float]
    micro_batches: float
    boundary: Transfer
    sync: tuple[Transfer, ...]
    gathered: tuple[Transfer, ...]
    optimizer: float
    model_flops: float


class ModelWork:
    """What a model asks of a rank for each layer kind, before it is shared out.

    parameters: weights of one layer. flops: forward operations per token, as (dense products, products of routed
    experts, attention or scan). `head` stands for one table of the vocabulary.
    """

    def __init__(self, model: ModelConfig, seq_len: int) -> None:
        self.model, self.seq_len = model, seq_len
        self.step_flops = float(model.flops_per_token(seq_len))
        self.parameters = parameters(model)
        self.flops = forward_flops(model, seq_len)

    def stages(self, pipeline: int, even: bool = False) -> tuple[Counter[str], ...]:
        """Layers of each pipeline stage: consecutive, so that the most operations of any stage are fewest.

        even: as many layers in each instead, which is how published runs were cut.
        """
        kinds = [*self.model.pattern]
        size = math.ceil(len(kinds) / pipeline)
        cuts = [i * size for i in range(1, pipeline)] if even else self.cuts(pipeline)
        found = [Counter(kinds[start:end]) for start, end in itertools.pairwise([0, *cuts, len(kinds)])]
        found[-1][HEAD] = 1
        return tuple(found)

    def cuts(self, pieces: int) -> list[int]:
        """The layers at which all pieces but the first begin, so that the most operations of any are fewest."""
        return _cuts([sum(self.flops[kind]) for kind in self.model.pattern], sum(self.flops[HEAD]), pieces)

    def held(self, mapping: Mapping, stages: tuple[Counter[str], ...]) -> tuple[Parameters, ...]:
        """Weights of a rank of each stage, before anything is sharded over data."""
        found = []
        for place, stage in enumerate(stages):
            embedding = place == 0 and not (self.model.tie_word_embeddings and HEAD in stage)
            layers = stage + Counter({HEAD: int(embedding)})
            dense = sum(self.parameters[kind].dense * number for kind, number in layers.items())
            expert = sum(self.parameters[kind].expert * number for kind, number in layers.items())
            found.append(Parameters(dense / mapping.tensor, expert / (mapping.expert * mapping.expert_tensor)))
        return tuple(found)


def parameters(model: ModelConfig) -> dict[str, Parameters]:
    """Weights of one layer of each kind in the pattern, and of `head`: one table of the vocabulary."""
    table = model.vocab_size * model.hidden_size
    found = {HEAD: Parameters(float(table))}
    for kind in sorted(set(model.pattern)):
        whole = _alone(model, kind).count_parameters() - table * (1 if model.tie_word_embeddings else 2)
        experts = _expert_parameters(model) * model.n_routed_experts if kind == "E" else 0.0
        found[kind] = Parameters(whole - model.hidden_size - experts, experts)
    return found


def forward_flops(model: ModelConfig, seq_len: int) -> dict[str, tuple[float, float, float]]:
    """Operations per token of a layer of each kind: (dense products, products of routed experts, attention or scan)."""
    head = 2.0 * model.vocab_size * model.hidden_size
    found = {HEAD: (head, 0.0, 0.0)}
    for kind in sorted(set(model.pattern)):
        whole = _alone(model, kind).flops_per_token(seq_len) / 3 - head
        experts = 2.0 * _expert_parameters(model) * model.num_experts_per_tok if kind == "E" else 0.0
        core = _core_flops(model, kind, seq_len, whole)
        found[kind] = (whole - experts - core, experts, core)
    return found


def _alone(model: ModelConfig, kind: str) -> ModelConfig:
    return model.model_copy(update={"pattern": kind})


def _expert_parameters(model: ModelConfig) -> float:
    """Weights of one routed expert."""
    matrices = 3 if model.mlp_gated else 2
    return float(matrices * (model.moe_latent_size or model.hidden_size) * model.moe_intermediate_size)


def _core_flops(model: ModelConfig, kind: str, seq_len: int, whole: float) -> float:
    """Of attention scores and values, or of scan and convolution: what no weight matrix takes part in."""
    if kind == "*":
        window = min(model.sliding_window or seq_len, seq_len)
        return 4.0 * model.query_size * (window - window * (window - 1) / (2 * seq_len))
    if kind == "M":
        return whole - 2.0 * model.hidden_size * (sum(model.mamba_in_proj_sizes) + model.mamba_inner_size)
    return 0.0


def _cuts(costs: list[float], head: float, count: int) -> list[int]:
    """Where to cut a row of layers into `count` pieces, the last with the head, so that the dearest is cheapest."""
    low, high = max(*costs, head), sum(costs) + head
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if len(_filled(costs, head, middle)) >= count else (low, middle)
    cuts = _filled(costs, head, high)
    spare = [place for place in range(1, len(costs)) if place not in cuts]  # one cut more makes no stage dearer
    return sorted(cuts + spare[len(spare) - (count - 1 - len(cuts)) :]) if len(cuts) < count - 1 else cuts


def _filled(costs: list[float], head: float, limit: float) -> list[int]:
    """Cuts of stages filled one after another up to `limit`."""
    cuts, used = [], 0.0
    for place, cost in enumerate(costs):
        last = place == len(costs) - 1
        if used and used + cost + head * last > limit * (1 + 1e-12):
            cuts.append(place)
            used = 0.0
        used += cost
    return cuts


def step_work(
    asked: ModelWork, mapping: Mapping, cluster: Cluster, batch: Batch, stages: tuple[Counter[str], ...]
) -> StepWork:
    """All that a rank of each stage does in one step; `stages` as `ModelWork.stages` cuts them."""
    counter = _LayerCounter(asked.model, mapping, cluster, batch)
    crosses = mapping.stage_size >= cluster.gpus_per_node
    sent = batch.micro * batch.seq_len / (mapping.context * mapping.tensor) * asked.model.hidden_size * BF16
    held = asked.held(mapping, stages)
    most = max(held, key=lambda stage: stage.dense + stage.expert)
    mine = most.dense / (mapping.data * mapping.context) + most.expert / mapping.expert_data
    kept = kept_bytes(asked.model, mapping, batch)
    return StepWork(
        layers={kind: counter.layer(kind, flops, kept[kind]) for kind, flops in asked.flops.items()},
        stages=stages, held=held, kept=kept, micro_batches=batch.sequences / (mapping.data * batch.micro),
        boundary=Transfer("pipeline", 0 if crosses else sent, sent if crosses else 0) if mapping.pipeline > 1
        else Transfer("pipeline", 0, 0, 0),
        sync=counter.sharded(most, FLOAT32 + BF16),
        gathered=counter.sharded(most, 2 * BF16 + FLOAT32) if mapping.zero == 3 else (),
        optimizer=mine * OPTIMIZER_BYTES,
        model_flops=asked.step_flops * batch.sequences * batch.seq_len,
    )  # fmt: skip


@dataclass(frozen=True)
class _LayerCounter:
    model: ModelConfig
    mapping: Mapping
    cluster: Cluster
    batch: Batch

    def layer(self, kind: str, flops: tuple[float, float, float], kept: float) -> LayerWork:
        model, mapping = self.model, self.mapping
        dense, experts, core = flops
        rows = self.batch.micro * self.batch.seq_len / mapping.context
        tokens = rows / mapping.tensor
        widths = {
            "*": model.query_size, "M": model.mamba_inner_size, "-": model.intermediate_size, HEAD: model.vocab_size,
            "E": model.moe_shared_expert_intermediate_size or model.hidden_size,
        }  # fmt: skip
        products = [Product(dense * tokens, rows, widths[kind] / mapping.tensor)]
        if experts:
            each = tokens * model.num_experts_per_tok * mapping.expert_tensor * mapping.expert / model.n_routed_experts
            width = model.moe_intermediate_size / mapping.expert_tensor
            products.append(Product(experts * tokens * self.batch.imbalance, each, width))
        moved = 2 * kept  # written once, read once
        return LayerWork(tuple(products), core * tokens, moved, tuple(self._transfers(kind, rows)))

    def _transfers(self, kind: str, rows: float) -> list[Transfer]:
        model, mapping, tokens = self.model, self.mapping, rows / self.mapping.tensor
        found = []
        if kind != "E" or model.n_shared_experts:
            found.append(self._gather("tensor", 2 * rows * model.hidden_size * BF16, 2))
        if kind == "*":
            found.append(self._ring(2 * rows * model.key_value_size / mapping.tensor * BF16))
        if kind == "M":
            state = model.mamba_inner_size * model.ssm_state_size / mapping.tensor * FLOAT32
            found.append(self._ring(self.batch.micro * state, hidden=False))
        if kind == "E":
            width = model.moe_latent_size or model.hidden_size
            copies = tokens * model.num_experts_per_tok * width * BF16 * self.batch.imbalance
            found.append(self._exchange(2 * copies))
            found.append(self._gather("expert_tensor", 2 * mapping.expert_tensor * copies, 2))
        return [transfer for transfer in found if transfer.messages]

    def _gather(self, axis: str, whole: float, messages: int) -> Transfer:
        """All-gathers or reduce-scatters of `whole` bytes: rings, one a network card, that share the bytes."""
        size, inside = self._places(axis)
        sent = whole * (size - 1) / size
        return Transfer(axis, sent, sent / inside if inside < size else 0.0, messages if size > 1 else 0)

    def _exchange(self, bytes_: float) -> Transfer:
        """All-to-all over the expert axis: as much to every member of the group."""
        size, inside = self._places("expert")
        share = bytes_ / size
        return Transfer("expert", share * (inside - 1), share * (size - inside), 2 if size > 1 else 0)

    def _ring(self, block: float, hidden: bool = True) -> Transfer:
        """Keys and values (or states) passed on from rank to rank; the slowest hop decides."""
        size, inside = self._places("context")
        sent = block * (size - 1)
        return Transfer("context", 0.0 if inside < size else sent, sent if inside < size else 0.0, size - 1, hidden)

    def _places(self, *axes: str) -> tuple[int, int]:
        return group_places(self.mapping, self.cluster, *axes)

    def sharded(self, held: Parameters, bytes_each: int) -> tuple[Transfer, ...]:
        """What sharding over data sends for each weight, of both families."""
        found = (
            self._shard(("data", "context"), held.dense * bytes_each),
            self._shard(("expert_data",), held.expert * bytes_each),
        )
        return tuple(transfer for transfer in found if transfer.messages)

    def _shard(self, axes: tuple[str, ...], whole: float) -> Transfer:
        size, inside = self._places(*axes)
        sent = whole * (size - 1) / size
        return Transfer(axes[0], sent, sent / inside if inside < size else 0.0, 1 if size > 1 else 0)


def group_places(mapping: Mapping, cluster: Cluster, *axes: str) -> tuple[int, int]:
    """Size of the group along neighbouring `axes` that holds rank 0, and how many of its members share its node."""
    names = AXES["dense"] if axes[-1] in AXES["dense"] else AXES["expert"]
    size = math.prod(getattr(mapping, axis) for axis in axes)
    stride = math.prod(getattr(mapping, axis) for axis in names[names.index(axes[-1]) + 1 :])
    return size, min(size, math.ceil(cluster.gpus_per_node / stride))


def kept_bytes(model: ModelConfig, mapping: Mapping, batch: Batch) -> dict[str, float]:
    """Activations that a layer of each kind keeps for its backward pass, on one rank and for one micro-batch.

    With sequence parallelism and an attention that keeps no scores. `head` is the logits and their gradient in float32,
    `entry` the input of a layer.
    """
    tokens = batch.micro * batch.seq_len / (mapping.context * mapping.tensor)
    h, copies = model.hidden_size, model.num_experts_per_tok * batch.imbalance
    gates = 3 if model.mlp_gated else 2  # inner activations kept: gate, up, their product
    attention = BF16 * (2 * h + 2 * model.query_size + 2 * model.key_value_size) + 4 * model.num_attention_heads
    mamba = BF16 * (2 * h + sum(model.mamba_in_proj_sizes) + model.mamba_conv_size + 2 * model.mamba_inner_size)
    routed = (
        BF16 * copies * (mapping.expert_tensor * (model.moe_latent_size or h) + gates * model.moe_intermediate_size)
    )
    shared = BF16 * gates * model.moe_shared_expert_intermediate_size
    by_kind = {
        "*": attention, "M": mamba, "-": BF16 * (2 * h + gates * model.intermediate_size),
        "E": BF16 * h + FLOAT32 * model.n_routed_experts + routed + shared, HEAD: 6 * model.vocab_size, ENTRY: BF16 * h,
    }  # fmt: skip
    return {kind: tokens * size for kind, size in by_kind.items()}
