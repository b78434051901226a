"""Training under any mapping is training in one process: loss, every gradient, gradient norm, every parameter.

Four ranks by default, the whole matrix of eight under mark `slow`. Then mistakes that must not go unseen.
"""

from dataclasses import replace
from functools import partial

import equality
import pytest
import torch
from distributed import run

from bloomery.model import balance
from bloomery.parallel import apply
from bloomery.parallel.data import local
from bloomery.parallel.mapping import Mapping
from bloomery.parallel.tensor import apply_tensor


def degrees(tensor, context, data, pipeline, expert_tensor, expert, expert_data, **others):
    return Mapping(
        tensor=tensor, context=context, data=data, pipeline=pipeline, expert_tensor=expert_tensor, expert=expert,
        expert_data=expert_data, **others,
    )  # fmt: skip


def shown(mapping):
    """Tensor, context, data, pipeline | expert_tensor, expert, expert_data, and what else is not 1."""
    dense, expert = ("tensor", "context", "data", "pipeline"), ("expert_tensor", "expert", "expert_data")
    listed = [",".join(str(getattr(mapping, axis)) for axis in axes) for axes in (dense, expert)]
    settings = {name: getattr(mapping, name) for name in ("interleave", "zero", "replicate", "recompute")}
    others = [f"{name}{value}" for name, value in settings.items() if value != Mapping.model_fields[name].default]
    return " ".join(["|".join(listed), *others])


def named(value):
    return shown(value) if isinstance(value, Mapping) else value


EIGHT = [
    degrees(1, 1, 8, 1, 1, 8, 1),
    degrees(2, 1, 4, 1, 1, 8, 1),
    degrees(2, 2, 2, 1, 1, 8, 1),
    degrees(2, 2, 2, 1, 2, 4, 1),
    degrees(2, 1, 2, 2, 1, 4, 1),
    degrees(2, 2, 1, 2, 1, 4, 1),
    degrees(1, 2, 2, 2, 2, 2, 1),
    degrees(1, 1, 2, 4, 1, 2, 1),
    degrees(4, 1, 2, 1, 2, 2, 2),
    degrees(1, 4, 1, 2, 4, 1, 1),
    degrees(2, 1, 2, 2, 2, 1, 2, zero=3),
    degrees(1, 1, 4, 2, 1, 1, 4, zero=3),
    degrees(1, 2, 2, 2, 1, 2, 2, interleave=2),
    degrees(2, 2, 1, 2, 1, 4, 1, recompute=True),
    degrees(2, 1, 4, 1, 1, 2, 4, zero=3, replicate=2),
]
FOUR = [degrees(2, 1, 1, 2, 1, 2, 1), degrees(2, 2, 1, 1, 2, 1, 2), degrees(1, 2, 2, 1, 1, 4, 1, zero=3)]


@pytest.fixture(scope="module")
def alone():
    traces = {name: equality.alone(name) for name in equality.MODELS}
    assert all(trace.gap > 1e-6 for trace in traces.values()), "near ties: rounding would choose other experts"
    return traces


@pytest.mark.parametrize(("mapping", "name"), list(zip(FOUR, ["biased", "tied", "biased"], strict=True)), ids=named)
def test_four_ranks_train_as_one(mapping, name, alone):
    equality.assert_same(run(4, equality.together, name, mapping)[0], alone[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", equality.MODELS)
@pytest.mark.parametrize("mapping", EIGHT, ids=shown)
def test_eight_ranks_train_as_one(mapping, name, alone):
    equality.assert_same(run(8, equality.together, name, mapping)[0], alone[name])


def experts_averaged(parallel):
    """Over the ranks that have the same experts, as for a mean over data."""
    finish = parallel.data.finish

    def wrong():
        finish()
        for name, gradient in parallel.data.gradients().items():
            if ".experts." in name:
                gradient /= parallel.mapping.expert_data

    parallel.data.finish = wrong


def router_of_own_tokens(name, mapping):
    """Router gradients not summed over tensor."""

    def wrong(model, meshes):
        found = apply_tensor(model, meshes)
        gate = "layers.3.mixer.gate.weight"
        return found | {gate: replace(found[gate], summed_over=("data", "context"))}

    apply.apply_tensor = wrong
    try:
        return equality.together(name, mapping)
    finally:
        apply.apply_tensor = apply_tensor


def loads_of_own_tokens(parallel):
    """The balance loss with this rank's counts."""
    for balancing in balance.balancings(parallel.model):
        balancing.total = lambda counts: counts * parallel.meshes.size("context", "tensor")


def tokens_not_cut(parallel):
    """Every rank along tensor with all tokens of its sequences."""
    parallel.split = lambda batch: batch


def experts_drawn_by_rank(parallel):
    torch.manual_seed(parallel.meshes.rank)
    for name, parameter in parallel.data.parameters.items():
        if ".experts." in name:
            torch.nn.init.normal_(local(parameter.data), std=0.2)


MISTAKES = {
    "experts averaged": (partial(equality.together, change=experts_averaged), FOUR[1], True),
    "router of own tokens": (router_of_own_tokens, FOUR[1], True),
    "loads of own tokens": (partial(equality.together, change=loads_of_own_tokens), FOUR[1], False),
    "tokens not cut": (partial(equality.together, change=tokens_not_cut), FOUR[0], False),
    "experts drawn by rank": (partial(equality.together, change=experts_drawn_by_rank), FOUR[0], False),
}


@pytest.mark.parametrize(("spoilt", "mapping", "hidden"), MISTAKES.values(), ids=MISTAKES)
def test_what_is_wrong_is_found(spoilt, mapping, hidden, alone):
    """`hidden`: the loss of the first step does not show it."""
    found, expected = run(4, spoilt, "biased", mapping)[0], alone["biased"]
    assert (found.losses[0] == pytest.approx(expected.losses[0], rel=1e-9)) == hidden
    with pytest.raises(AssertionError):
        equality.assert_same(found, expected)
