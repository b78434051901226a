"""Seconds and bytes of a training step from the work of a rank: an analytical model with eight fitted constants.

The constants in `CALIBRATION` are the least-squares fit of `bloomery claim folding` to published runs on H100 (arXiv
2504.14960, tables 1, 3, 4 and 5); `ERROR` is what that fit misses on models it has not seen.
"""

from dataclasses import dataclass

from bloomery.parallel.cluster import Cluster
from bloomery.parallel.mapping import Mapping
from bloomery.parallel.work import BF16, ENTRY, FLOAT32, HEAD, LayerWork, StepWork, Transfer

FRAGMENTATION = 0.06
RUNTIME_BYTES = 2e9


@dataclass(frozen=True)
class Calibration:
    """What hardware reaches of its data sheet, and what of the communication shows.

    half_rows: rows of a product at which it reaches half its rate. data_exposed: share of the data-parallel
    communication that no arithmetic hides. latency: seconds a collective takes whatever it sends.
    """

    product: float
    attention: float
    link: float
    network: float
    half_rows: float
    memory: float
    data_exposed: float
    latency: float


CALIBRATION = Calibration(
    product=0.8549, attention=0.3914, link=0.7226, network=0.5564, half_rows=347.5, memory=0.717, data_exposed=0.4858,
    latency=6.27e-5,
)  # fmt: skip
ERROR = 0.15
"""Nine in ten runs of a model that was not fitted are within this share of the prediction."""


@dataclass(frozen=True)
class Timing:
    """Seconds of a step, of the pipeline stage that decides, and what they buy."""

    products: float
    attention: float
    memory: float
    exposed: dict[str, float]
    bubble: float
    data: float
    optimizer: float
    seconds: float
    mfu: float


def timing(work: StepWork, cluster: Cluster, mapping: Mapping, calibration: Calibration = CALIBRATION) -> Timing:
    """The predicted step."""
    clock = _Clock(cluster, calibration, mapping.recompute)
    layers = {kind: clock.layer(layer) for kind, layer in work.layers.items()}
    totals = [_added([(layers[kind], number) for kind, number in stage.items()]) for stage in work.stages]
    pieces = mapping.interleave
    passing = 2 * clock.transfer(work.boundary) * (pieces if mapping.pipeline > 1 else 1)
    gathering = sum(clock.transfer(transfer) for transfer in work.gathered)
    seconds = [max(sum(total.values()) + passing, gathering) for total in totals]
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    warm_up = (sum(seconds) - seconds[slowest]) / pieces
    data = calibration.data_exposed * sum(clock.transfer(transfer) for transfer in work.sync)
    optimizer = work.optimizer / (calibration.memory * cluster.device.memory_rate)
    whole = work.micro_batches * seconds[slowest] + warm_up + data + optimizer
    count, total = work.micro_batches, totals[slowest]
    exposed = {name: count * value for name, value in total.items() if name not in _COMPUTE}
    exposed["pipeline"] = count * passing
    exposed["sharding"] = count * max(gathering - passing - sum(total.values()), 0.0)
    return Timing(
        products=count * total["products"], attention=count * total["attention"], memory=count * total["memory"],
        exposed=exposed, bubble=warm_up, data=data, optimizer=optimizer, seconds=whole,
        mfu=work.model_flops / (mapping.world_size * cluster.device.peak * whole),
    )  # fmt: skip


_COMPUTE = ("products", "attention", "memory")


@dataclass(frozen=True)
class _Clock:
    cluster: Cluster
    calibration: Calibration
    recompute: bool

    def layer(self, layer: LayerWork) -> dict[str, float]:
        """Seconds of forward, backward and recomputation of a layer, by part; what is hidden is left out."""
        known, device = self.calibration, self.cluster.device
        again = 1 if self.recompute else 0
        core = layer.core / (known.attention * device.peak)
        parts = {
            "products": (3 + again) * sum(p.flops / (self._rate(p.rows, p.width)) for p in layer.products),
            "attention": (3 + again) * core,
            "memory": (2.5 + again) * layer.moved / (known.memory * device.memory_rate),
        }
        for transfer in layer.transfers:
            seconds = self.transfer(transfer) - (core if transfer.hidden else 0)
            parts[transfer.axis] = parts.get(transfer.axis, 0.0) + (2 + again) * max(seconds, 0.0)
        return parts

    def transfer(self, transfer: Transfer) -> float:
        known, device = self.calibration, self.cluster.device
        inside = transfer.inside / (known.link * device.link)
        outside = transfer.outside / (known.network * device.network)
        return known.latency * transfer.messages + max(inside, outside)

    def _rate(self, rows: float, width: float) -> float:
        """Operations per second of a product: small ones reach less."""
        half = self.calibration.half_rows
        return self.calibration.product * self.cluster.device.peak * rows / (rows + half) * width / (width + half / 4)


def _added(parts: list[tuple[dict[str, float], int]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part, number in parts:
        for name, seconds in part.items():
            total[name] = total.get(name, 0.0) + number * seconds
    return total


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that needs most."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    gathered: float
    overhead: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.gathered + self.overhead


def memory(work: StepWork, mapping: Mapping) -> Memory:
    """Of the pipeline stage that needs most: AdamW in float32, weights bf16, gradients float32."""
    found = [_stage_memory(work, mapping, place) for place in range(mapping.pipeline)]
    return max(found, key=lambda stage: stage.total)


def _stage_memory(work: StepWork, mapping: Mapping, place: int) -> Memory:
    held = work.held[place]
    whole = held.dense + held.expert
    sharded = held.dense / (mapping.data * mapping.context) + held.expert / mapping.expert_data
    state = sharded if mapping.zero == 3 else whole
    layers = sum(work.stages[place].values())
    gathered = 2 * BF16 * whole / layers if mapping.zero == 3 else 0.0  # the layer at work, and the next
    activations = _activations(work, mapping, place)
    parts = (BF16 * state, FLOAT32 * state, 3 * FLOAT32 * sharded, activations, gathered)
    return Memory(*parts, overhead=FRAGMENTATION * sum(parts) + RUNTIME_BYTES)


def _activations(work: StepWork, mapping: Mapping, place: int) -> float:
    """Of the micro-batches in flight at a stage of the 1F1B schedule; interleaving keeps a little more."""
    pieces = mapping.interleave
    flying = min(work.micro_batches, mapping.pipeline - place)
    if pieces > 1 and flying > 1:
        flying *= 1 + (mapping.pipeline - 1) / (mapping.pipeline * pieces)
    stage = work.stages[place]
    layers = {kind: number for kind, number in stage.items() if kind != HEAD}
    kept = flying * sum(work.kept[ENTRY if mapping.recompute else kind] * number for kind, number in layers.items())
    working = max(work.kept[kind] for kind in layers) if mapping.recompute and layers else 0.0
    return kept + working + work.kept[HEAD] * stage[HEAD]
