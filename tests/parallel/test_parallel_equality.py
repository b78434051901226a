"""Training under any mapping is training in one process: loss, every gradient, gradient norm, every parameter.

The first rows of `EIGHT` and `FOUR` run by default, the whole matrix under mark `slow`. Then what must not be equal.
"""

import equality
import pytest
from distributed import run

from bloomery.parallel.mapping import Mapping


def degrees(tensor, context, data, pipeline, expert_tensor, expert, expert_data, **others):
    return Mapping(
        tensor=tensor, context=context, data=data, pipeline=pipeline, expert_tensor=expert_tensor, expert=expert,
        expert_data=expert_data, **others,
    )  # fmt: skip


def shown(mapping):
    """Tensor, context, data, pipeline | expert_tensor, expert, expert_data, and what else is not 1."""
    dense, expert = ("tensor", "context", "data", "pipeline"), ("expert_tensor", "expert", "expert_data")
    listed = [",".join(str(getattr(mapping, axis)) for axis in axes) for axes in (dense, expert)]
    others = [f"{name}{getattr(mapping, name)}" for name in ("interleave", "zero") if getattr(mapping, name) > 1]
    return " ".join(["|".join(listed), *others])


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
]
FOUR = [degrees(2, 1, 1, 2, 1, 2, 1), degrees(2, 2, 1, 1, 2, 1, 2), degrees(1, 2, 2, 1, 1, 4, 1, zero=3)]


@pytest.fixture(scope="module")
def alone():
    traces = {name: equality.alone(name) for name in equality.MODELS}
    assert all(trace.gap > 1e-6 for trace in traces.values()), "near ties: rounding would choose other experts"
    return traces


@pytest.mark.parametrize("name", equality.MODELS)
@pytest.mark.parametrize("mapping", FOUR, ids=shown)
def test_four_ranks_train_as_one(mapping, name, alone):
    equality.assert_same(run(4, equality.together, name, mapping)[0], alone[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", equality.MODELS)
@pytest.mark.parametrize("mapping", EIGHT, ids=shown)
def test_eight_ranks_train_as_one(mapping, name, alone):
    equality.assert_same(run(8, equality.together, name, mapping)[0], alone[name])
