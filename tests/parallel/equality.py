"""One training run in float64, alone or under a mapping, and all that must come out equal."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from exact_training import in_float64, next_token_exact
from torch import Tensor, nn

from bloomery.model import balance
from bloomery.model.balance import BalanceConfig
from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.decoder import Decoder
from bloomery.parallel.apply import Parallel, parallelize
from bloomery.parallel.mapping import Mapping
from bloomery.train.loop import LoopConfig, TrainState, steps
from bloomery.train.optim import adamw

STEPS, ROWS, SEQ, VOCABULARY = 3, 8, 16, 64
LOOP = LoopConfig(
    max_steps=STEPS, batch_size=ROWS, micro_batch_size=1, learning_rate=1e-2, max_grad_norm=0.5, precision="fp32",
    schedule="constant",
)  # fmt: skip
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "max_position_embeddings": SEQ, "initializer_range": 0.2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rope": RopeConfig(), "intermediate_size": 24,
    "mamba_num_heads": 8, "mamba_head_dim": 4, "ssm_state_size": 4, "n_groups": 4, "chunk_size": 4,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
}  # fmt: skip
MODELS = {
    "biased": ModelConfig(
        pattern="*M-E", attention_bias=True, qk_norm=True, mlp_bias=True, n_shared_experts=1,
        moe_shared_expert_intermediate_size=8, **_SIZES,
    ),
    "tied": ModelConfig(
        pattern="E-M*", mlp_gated=True, mlp_hidden_act="silu", router_activation="softmax", tie_word_embeddings=True,
        sliding_window=6, **_SIZES | {"num_key_value_heads": 1},
    ),
}  # fmt: skip
BALANCES = {
    "biased": BalanceConfig(kind="batch", weight=0.1, bias_rate=1e-2),
    "tied": BalanceConfig(kind="sequence", weight=0.1, z_weight=0.1),
}
Batch = dict[str, Tensor]


@dataclass
class Trace:
    """What is compared: the loss, norm and clipped gradients of every step; at the end parameters and buffers."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    gap: float = float("inf")
    """Least distance of the last expert chosen from the first one not chosen."""

    def follow(
        self, state: TrainState, data: Iterator[list[Batch]], gradients: Callable[[], dict[str, Tensor]]
    ) -> None:
        """Trains `state` to the end."""
        state.optimizer.register_step_pre_hook(lambda *_: self.gradients.append(gradients()))
        for step in steps(state, data, next_token_exact, LOOP):
            self.losses.append(step.loss)
            self.norms.append(step.grad_norm)
            self.metrics.append(step.metrics)


def decoder(name: str) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(MODELS[name]).double()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias") or "norm" in parameter_name:
            nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=0.1)
    balance.install(model, BALANCES[name])
    return model


def batches() -> Iterator[list[Batch]]:
    """For each step ROWS micro-batches of one row: two documents, some labels masked."""
    draw = torch.Generator().manual_seed(7)
    while True:
        yield [_row(draw) for _ in range(ROWS)]


def _row(draw: torch.Generator) -> Batch:
    ids = torch.randint(VOCABULARY, (1, SEQ + 1), generator=draw)
    labels = torch.where(torch.rand(1, SEQ, generator=draw) < 0.3, -100, ids[:, 1:])
    cut, places = int(torch.randint(1, SEQ, (), generator=draw)), torch.arange(SEQ)[None]
    segments = (places >= cut).long()
    positions = places - cut * segments
    return {"input_ids": ids[:, :-1], "labels": labels, "segment_ids": segments, "position_ids": positions}


def alone(name: str) -> Trace:
    """Trained in this process."""
    with in_float64():
        model, trace = decoder(name), Trace()
        for mixer in (layer.mixer for layer in model.layers if layer.kind == "E"):
            mixer.gate.register_forward_hook(lambda gate, _, routing: _measure_gap(trace, gate, routing))
        state = TrainState(model, adamw(model, LOOP))
        trace.follow(state, batches(), lambda: {n: p.grad.clone() for n, p in model.named_parameters()})
        trace.weights = {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    return trace


def _measure_gap(trace: Trace, gate: nn.Module, routing: balance.Routing) -> None:
    bias = gate.e_score_correction_bias
    choice = routing.scores if bias is None else routing.scores + bias
    best = choice.detach().topk(routing.indices.shape[1] + 1).values
    trace.gap = min(trace.gap, float((best[:, -2] - best[:, -1]).min()))


def together(name: str, mapping: Mapping, change: Callable[[Parallel], None] | None = None) -> Trace | None:
    """Trained by all ranks, as rank 0 has it; `change` spoils it."""
    with in_float64():
        parallel, trace = parallelize(decoder(name), mapping), Trace()
        if change is not None:
            change(parallel)
        state = TrainState(parallel.model, adamw(parallel.model, LOOP), parallel=parallel)
        gradients = lambda: {name: full.clone() for name, full in parallel.full_gradients()}  # noqa: E731
        trace.follow(state, _rows_of(parallel), gradients)
        trace.weights = {name: full.clone() for name, full in parallel.full_state()}
    return None if parallel.meshes.rank else trace


def _rows_of(parallel: Parallel) -> Iterator[list[Batch]]:
    each, place = ROWS // parallel.mapping.data, parallel.meshes.place("data")
    return (micro[place * each : (place + 1) * each] for micro in batches())


def assert_same(found: Trace, expected: Trace) -> None:
    """To 1e-9 of the largest number of each tensor."""
    assert found.losses == pytest.approx(expected.losses, rel=1e-9)
    assert found.norms == pytest.approx(expected.norms, rel=1e-9)
    for mine, theirs in zip(found.metrics, expected.metrics, strict=True):
        shared = [name for name in theirs if name in ("balance", "router_z")]
        assert [mine[name] for name in shared] == pytest.approx([theirs[name] for name in shared], rel=1e-9)
    pairs = [*zip(found.gradients, expected.gradients, strict=True), (found.weights, expected.weights)]
    for mine, theirs in pairs:
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-9, atol=1e-9 * float(value.abs().max()), msg=name)
