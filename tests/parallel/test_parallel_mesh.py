"""Process groups of a mapping: the right ranks, made once, and a message where there is no world."""

import pytest
import torch
import torch.distributed as dist
from distributed import run

from bloomery.errors import ConfigError
from bloomery.parallel.mapping import Mapping
from bloomery.parallel.mesh import Meshes, group_of

FOLDED = Mapping(tensor=2, data=2, expert=2, expert_tensor=2)
AXES = [("tensor",), ("context",), ("data",), ("data", "context", "tensor"), ("expert",), ("expert", "expert_tensor")]


def sums(mapping):
    """Each group's ranks, added up by an all-reduce inside the group: 10 to the power of the rank."""
    meshes = Meshes.create(mapping)
    found = {}
    for axes in AXES:
        mine = torch.tensor(10**meshes.rank)
        group = meshes.group(*axes)
        if group is not None:
            dist.all_reduce(mine, group=group)
        assert sum(10**rank for rank in meshes.ranks(*axes)) == mine
        found["_".join(axes)] = int(mine)
    assert Meshes.create(mapping).group("tensor") is meshes.group("tensor")
    assert group_of((meshes.rank,), "alone") is None
    return found, [meshes.place(axis) for axis in ("data", "tensor", "expert", "expert_tensor")], meshes.size("data")


def test_groups_hold_the_ranks_of_the_formula():
    results = run(4, sums, FOLDED)
    assert [found["tensor"] for found, *_ in results] == [11, 11, 1100, 1100]
    assert [found["data"] for found, *_ in results] == [101, 1010, 101, 1010]
    assert [found["expert"] for found, *_ in results] == [101, 1010, 101, 1010]
    assert [found["context"] for found, *_ in results] == [1, 10, 100, 1000]
    assert all(found["expert_expert_tensor"] == found["data_context_tensor"] == 1111 for found, *_ in results)
    assert [places for _, places, _ in results] == [[0, 0, 0, 0], [0, 1, 0, 1], [1, 0, 1, 0], [1, 1, 1, 1]]
    assert results[0][2] == 2


def device_meshes():
    meshes = Meshes.create(FOLDED)
    timeout = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
    made = meshes.group("data")._get_backend(torch.device("cpu")).options._timeout
    return meshes.device_mesh("data").mesh.tolist(), meshes.device_mesh("context").mesh.tolist(), made == timeout


def test_device_meshes_and_the_timeout_of_the_world():
    assert run(4, device_meshes) == [([0, 2], [0], True), ([1, 3], [1], True), ([0, 2], [2], True), ([1, 3], [3], True)]


def too_few():
    Meshes.create(Mapping(data=8))


def test_a_mapping_for_another_world_is_refused():
    with pytest.raises(RuntimeError, match="= 8, but there are 4 ranks; for data 8 choose 4"):
        run(4, too_few)


def test_one_process_has_no_groups_and_cannot_be_two():
    meshes = Meshes.create(Mapping())
    assert meshes.group("data", "context", "tensor") is None
    with pytest.raises(ConfigError, match="mapping of 2 ranks, but this is one process; start it with `torchrun"):
        Meshes.create(Mapping(data=2))


def test_axes_of_two_families_make_no_group():
    with pytest.raises(AssertionError, match="not axes of one family"):
        Meshes.create(Mapping()).group("tensor", "expert")
