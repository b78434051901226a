"""Training under any mapping is training in one process: loss, every gradient, gradient norm, every parameter."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from distributed import run
from exact_training import in_float64
from torch import Tensor

from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.decoder import Decoder
from bloomery.parallel.apply import Parallel, parallelize
from bloomery.parallel.mapping import Mapping
from bloomery.train.losses import Loss, hidden_states

STEPS, ROWS, SEQ, VOCABULARY = 3, 8, 16, 64
MODELS = {
    "biased": ModelConfig(
        pattern="*M-", vocab_size=VOCABULARY, hidden_size=32, max_position_embeddings=SEQ, initializer_range=0.2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, attention_bias=True, qk_norm=True, rope=RopeConfig(),
        intermediate_size=24, mlp_bias=True,
        mamba_num_heads=8, mamba_head_dim=4, ssm_state_size=4, n_groups=4, chunk_size=4,
    ),
}  # fmt: skip


def batches() -> list[list[dict[str, Tensor]]]:
    """For each step ROWS micro-batches of one row: two documents, some labels masked."""
    draw = torch.Generator().manual_seed(7)
    steps = []
    for _ in range(STEPS):
        micro = []
        for _ in range(ROWS):
            ids = torch.randint(VOCABULARY, (1, SEQ + 1), generator=draw)
            labels = torch.where(torch.rand(1, SEQ, generator=draw) < 0.3, -100, ids[:, 1:])
            cut = int(torch.randint(1, SEQ, (), generator=draw))
            places = torch.arange(SEQ)[None]
            segments = (places >= cut).long()
            micro.append({"input_ids": ids[:, :-1], "labels": labels, "segment_ids": segments,
                          "position_ids": places - cut * segments})  # fmt: skip
        steps.append(micro)
    return steps


def objective(model, batch) -> Loss:
    """Next-token loss, in float64."""
    hidden, labels = hidden_states(model, batch).flatten(0, 1), batch["labels"].flatten()
    logits = hidden @ model.lm_head.weight.T
    total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    return Loss(total, float((labels != -100).sum()))


@dataclass
class Trace:
    """What is compared."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)


def decoder(name: str) -> Decoder:
    torch.manual_seed(0)
    return Decoder(MODELS[name]).double().train()


def trained_alone(name: str) -> Trace:
    with in_float64():
        model, trace = decoder(name), Trace()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for micro in batches():
            losses = [objective(model, batch) for batch in micro]
            for loss in losses:
                loss.sum.backward()
            weight = sum(loss.weight for loss in losses)
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
            norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values())) / weight
            trace.gradients.append(gradients)
            trace.losses.append(sum(float(loss.sum.detach()) for loss in losses) / weight)
            trace.norms.append(norm)
            for parameter in model.parameters():
                parameter.grad *= min(1.0, 0.5 / norm) / weight
            optimizer.step()
            optimizer.zero_grad()
        trace.parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return trace


def trained_together(name: str, mapping: Mapping) -> Trace | None:
    with in_float64():
        parallel, trace = parallelize(decoder(name), mapping), Trace()
        parameters = list(parallel.model.parameters())
        optimizer = torch.optim.AdamW(parameters, 1e-2, foreach=False)
        for micro in batches():
            own = [parallel.split(batch) for batch in shared_out(micro, parallel)]
            losses = parallel.forward_backward(own, objective)
            total = torch.tensor(
                [[float(loss.sum), float(loss.weight)] for loss in losses] or [[0.0, 0.0]], dtype=torch.float64
            )
            summed, weight = parallel.sum(total.sum(0)).tolist()
            norm = parallel.grad_norm() / weight
            trace.gradients.append({name: full.clone() for name, full in parallel.full_gradients()})
            trace.losses.append(summed / weight)
            trace.norms.append(norm)
            for parameter in parameters:
                parameter.grad *= min(1.0, 0.5 / norm) / weight
            optimizer.step()
            optimizer.zero_grad()
        trace.parameters = dict(parallel.full_state())
    return trace if parallel.meshes.rank == 0 else None


def shared_out(micro: list[dict[str, Tensor]], parallel: Parallel) -> list[dict[str, Tensor]]:
    """Those of this data rank."""
    each = len(micro) // parallel.mapping.data
    place = parallel.meshes.place("data")
    return micro[place * each : (place + 1) * each]


def assert_same(found: Trace, expected: Trace) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=1e-9)
    assert found.norms == pytest.approx(expected.norms, rel=1e-9)
    pairs = [*zip(found.gradients, expected.gradients, strict=True), (found.parameters, expected.parameters)]
    for mine, theirs in pairs:
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-9, atol=1e-9 * float(value.abs().max()), msg=name)


def shown(mapping: Mapping) -> str:
    """Tensor, context, data, pipeline | expert_tensor, expert, expert_data, and what else is not 1."""
    dense, expert = ("tensor", "context", "data", "pipeline"), ("expert_tensor", "expert", "expert_data")
    degrees = [",".join(str(getattr(mapping, axis)) for axis in axes) for axes in (dense, expert)]
    others = [f"{name}{getattr(mapping, name)}" for name in ("interleave", "zero") if getattr(mapping, name) > 1]
    return " ".join(["|".join(degrees), *others])


@pytest.fixture(scope="module")
def alone():
    return {name: trained_alone(name) for name in MODELS}


ROWS_OF_EIGHT = [
    Mapping(data=8),
    Mapping(tensor=2, data=4),
    Mapping(tensor=4, data=2),
    Mapping(context=2, data=4),
    Mapping(tensor=2, context=2, data=2),
    Mapping(tensor=2, context=2, data=2, zero=3),
    Mapping(pipeline=2, tensor=2, data=2),
]


@pytest.mark.parametrize("mapping", ROWS_OF_EIGHT, ids=shown)
def test_eight_ranks_train_as_one(mapping, alone):
    found = run(8, trained_together, "biased", mapping)[0]
    assert_same(found, alone["biased"])
