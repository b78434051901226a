"""Grids of ranks: the groups of a worked example, equal pipeline groups by enumeration, and every refusal."""

import itertools

import numpy as np
import pytest

from bloomery.config import build
from bloomery.errors import ConfigError
from bloomery.model.config import ModelConfig
from bloomery.parallel.mapping import Mapping, axis_groups

MODEL = ModelConfig(
    family="mixtral", pattern="*E" * 4, vocab_size=64, hidden_size=64, num_attention_heads=8, num_key_value_heads=4,
    head_dim=8, n_routed_experts=8, moe_intermediate_size=48, router_activation="softmax",
)  # fmt: skip


def listed(groups: np.ndarray) -> str:
    return " · ".join(",".join(map(str, group)) for group in groups.tolist())


def test_the_worked_example_of_sixteen_ranks():
    mapping = Mapping(tensor=2, context=2, data=2, pipeline=2, expert=4, expert_data=2)
    data = "0,4 · 1,5 · 2,6 · 3,7 · 8,12 · 9,13 · 10,14 · 11,15"
    assert listed(mapping.groups("tensor")) == "0,1 · 2,3 · 4,5 · 6,7 · 8,9 · 10,11 · 12,13 · 14,15"
    assert listed(mapping.groups("context")) == "0,2 · 1,3 · 4,6 · 5,7 · 8,10 · 9,11 · 12,14 · 13,15"
    assert listed(mapping.groups("data")) == data
    assert listed(mapping.groups("pipeline")) == "0,8 · 1,9 · 2,10 · 3,11 · 4,12 · 5,13 · 6,14 · 7,15"
    assert listed(mapping.groups("expert_tensor")) == " · ".join(map(str, range(16)))
    assert listed(mapping.groups("expert")) == "0,1,2,3 · 4,5,6,7 · 8,9,10,11 · 12,13,14,15"
    assert listed(mapping.groups("expert_data")) == data
    folded = Mapping(tensor=2, context=2, data=2, pipeline=2, expert_tensor=2, expert=4)
    assert folded.expert_data == 1
    assert listed(folded.groups("expert_tensor")) == "0,1 · 2,3 · 4,5 · 6,7 · 8,9 · 10,11 · 12,13 · 14,15"
    assert listed(folded.groups("expert")) == "0,2,4,6 · 1,3,5,7 · 8,10,12,14 · 9,11,13,15"
    assert listed(mapping.groups("context", "tensor")) == "0,1,2,3 · 4,5,6,7 · 8,9,10,11 · 12,13,14,15"
    assert mapping.group(13, "expert") == (12, 13, 14, 15)
    assert [mapping.expert_rank(expert, 8) for expert in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def valid() -> list[tuple[int, ...]]:
    """(W, tensor, context, pipeline, expert, expert_tensor), these five among 1, 2, 4, 8; data follows."""
    degrees = (1, 2, 4, 8)
    found = []
    for world, tensor, context, pipeline in itertools.product((8, 16, 32, 64), *[degrees] * 3):
        for expert, expert_tensor in itertools.product(degrees, degrees):
            if world % (tensor * context * pipeline) == 0 == world % (expert * expert_tensor * pipeline):
                found.append((world, tensor, context, pipeline, expert, expert_tensor))
    return found


def as_listed_in_the_paper(mapping: Mapping) -> bool:
    """Pipeline groups of data-outermost grids agree."""
    dense, expert = mapping.sizes("dense"), mapping.sizes("expert")
    dense = {axis: dense[axis] for axis in ("data", "pipeline", "context", "tensor")}
    expert = {axis: expert[axis] for axis in ("expert_data", "pipeline", "expert", "expert_tensor")}
    families = [axis_groups(sizes, ("pipeline",)).tolist() for sizes in (dense, expert)]
    return sorted(families[0]) == sorted(families[1])


def test_pipeline_groups_coincide_in_every_valid_mapping():
    configurations = valid()
    assert len(configurations) == 1740
    in_the_paper = 0
    for world, tensor, context, pipeline, expert, expert_tensor in configurations:
        mapping = Mapping.over(
            world, tensor=tensor, context=context, pipeline=pipeline, expert=expert, expert_tensor=expert_tensor
        )
        families = [axis_groups(mapping.sizes(family), ("pipeline",)) for family in ("dense", "expert")]
        assert np.array_equal(*families)
        in_the_paper += as_listed_in_the_paper(mapping)
    assert len(configurations) - in_the_paper == 726


def test_coordinates_are_the_formulas_and_back():
    mapping = Mapping(tensor=2, context=2, data=3, pipeline=2, expert_tensor=2, expert=3, expert_data=2)
    for rank in range(mapping.world_size):
        stage, place = divmod(rank, mapping.stage_size)
        found = mapping.coordinates(rank)
        assert found == {
            "pipeline": stage, "tensor": place % 2, "context": place // 2 % 2, "data": place // 4,
            "expert_tensor": place % 2, "expert": place // 2 % 3, "expert_data": place // 6,
        }  # fmt: skip
        assert mapping.rank(**{axis: found[axis] for axis in mapping.sizes("dense")}) == rank
        assert mapping.rank(**{axis: found[axis] for axis in mapping.sizes("expert")}) == rank


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"tensor": 3}, "base.parallel: pipeline.* = 1·1·3 = 3 does not divide 16 ranks; for tensor 3 choose 1, 2, 4,"),
        ({"pipeline": 8, "tensor": 4}, "= 8·1·4 = 32 does not divide 16 ranks; for pipeline 8 choose 1, 2 or 4"),
        ({"tensor": 2, "data": 4}, r"= 2·1·4·1 = 8, but there are 16 ranks; for data 4 choose 8"),
        ({"expert": 3}, r"data = 1·1·16 = 16, .*1·3·\?: .*; for expert 3 choose 1, 2, 4, 8 or 16"),
        ({"expert": 4, "expert_data": 2}, r"= 16, but .* = 1·4·2: both .*; for expert 4 choose 8"),
        ({"expert": 32}, "for expert 32 choose 1, 2, 4, 8 or 16"),
        ({"tensor": 0}, "base.parallel.tensor: Input should be greater than or equal to 1"),
        ({"tensr": 2}, "base.parallel.tensr: unknown key; did you mean tensor?"),
    ],
)
def test_degrees_that_do_not_fill_the_world(degrees, message):
    with pytest.raises(ConfigError, match=message):
        Mapping.over(16, where="base.parallel", **degrees)


@pytest.mark.parametrize(
    ("degrees", "seq_len", "message"),
    [
        ({"tensor": 16}, 64, "m.tensor: 16 does not divide num_attention_heads 8; choose 1, 2, 4 or 8"),
        ({"expert": 16}, 64, "m.expert: 16 does not divide n_routed_experts 8; choose 1, 2, 4 or 8"),
        ({"expert_tensor": 32}, 64, "m.expert_tensor: 32 does not divide moe_intermediate_size 48; choose 1, 2, 3"),
        ({"context": 4}, 36, r"36 tokens is no multiple of 2·context·tensor = 2·4·1 = 8; choose 32 or 40 tokens"),
        ({"tensor": 4}, 34, r"34 tokens is no multiple of tensor = 4 = 4; choose 32 or 36 tokens"),
        ({"pipeline": 4, "interleave": 4}, 64, "pipeline·interleave = 4·4 is more than the model's 8 layers"),
    ],
)
def test_degrees_that_do_not_divide_the_model(degrees, seq_len, message):
    mapping = Mapping.over(32, **degrees)
    with pytest.raises(ConfigError, match=message):
        mapping.check_model(MODEL, seq_len, "m")


def test_more_ranks_than_key_heads_share_them_and_a_dense_model_has_no_experts():
    Mapping.over(8, tensor=8).check_model(MODEL, 64)
    uneven = MODEL.model_copy(update={"num_attention_heads": 12, "num_key_value_heads": 4})
    with pytest.raises(ConfigError, match="tensor: 6 does not divide num_key_value_heads 4; choose 1, 2 or 4"):
        Mapping.over(6, tensor=6).check_model(uneven, 60)
    dense = MODEL.model_copy(update={"pattern": "*-", "intermediate_size": 64})
    Mapping.over(8, tensor=4).check_model(dense, 64)
    with pytest.raises(ConfigError, match="expert: 2 does not divide one: the model has no experts"):
        Mapping.over(8, expert=2).check_model(dense, 64)


def test_a_rank_takes_whole_groups_of_mamba_heads():
    mamba = MODEL.model_copy(update={"pattern": "M", "mamba_num_heads": 8, "n_groups": 2})
    Mapping.over(2, tensor=2).check_model(mamba)
    with pytest.raises(ConfigError, match="tensor: 4 does not divide n_groups 2; choose 1 or 2"):
        Mapping.over(4, tensor=4).check_model(mamba)


def test_a_mapping_survives_its_own_dump():
    mapping = Mapping.over(16, tensor=2, pipeline=2, expert=4)
    assert build(Mapping, mapping.model_dump()) == mapping
