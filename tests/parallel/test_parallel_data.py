"""FSDP2 over data: every gradient and their norm against one process, for each way of sharding."""

import pytest
import torch
import torch.distributed as dist
from distributed import run
from exact_training import alone, assert_equal, in_float64, micro_batches, next_token_exact, tiny
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from bloomery.errors import ConfigError
from bloomery.parallel.data import local, shard_data
from bloomery.parallel.mapping import Mapping
from bloomery.parallel.mesh import Meshes
from bloomery.parallel.pieces import Piece, Placement
from bloomery.train.loop import LoopConfig
from bloomery.train.optim import adamw, decay_groups

STAGE = ("data", "context", "tensor")


def replicated(model):
    """The placements of a model that only data is to share."""
    return {
        name: Placement(Piece.whole(p.shape), ("expert_data",) if ".experts." in name else STAGE)
        for name, p in model.named_parameters()
    }


def learn(model, sharded, batches):
    model.train()
    for number, batch in enumerate(batches, 1):
        sharded.accumulate(last=number == len(batches))
        next_token_exact(model, batch).sum.backward()
    sharded.finish()


def gathered(sharded):
    """Whole gradients, out of what the ranks hold."""
    found = {}
    for name, gradient in sharded.gradients().items():
        full = torch.zeros(sharded.placements[name].piece.shape, dtype=gradient.dtype)
        sharded.placements[name].piece.put(gradient / sharded.copies(name), full)
        dist.all_reduce(full)
        found[name] = full
    return found


def gradients_equal(settings, pattern, reshard, unlabelled=False):
    meshes = Meshes.create(Mapping(**settings))
    with in_float64():
        model, place = tiny(pattern), meshes.place("data")
        batches = micro_batches(2 * meshes.size("data"))
        if unlabelled:  # rank 0 has nothing to learn, and must still take part
            for batch in batches[:2]:
                batch["labels"].fill_(-100)
        *_, expected, norm = alone(model, batches)
        sharded = shard_data(model, meshes, replicated(model), reshard)
        for _ in range(2):  # what the first step leaves must not enter the second
            for parameter in sharded.parameters.values():
                parameter.grad = None
            learn(model, sharded, batches[2 * place : 2 * place + 2])
        assert_equal(gathered(sharded), expected)
        assert sharded.grad_norm() == pytest.approx(norm, rel=1e-12)
    kinds = {p.device_mesh.shape if isinstance(p, DTensor) else () for p in sharded.parameters.values()}
    return (
        kinds,
        sum(p.to_local().numel() for p in sharded.parameters.values()),
        sum(g.numel() for g in expected.values()),
    )


@pytest.mark.parametrize("reshard", [False, True], ids=["zero1", "zero3"])
def test_gradients_are_those_of_one_process(reshard):
    for kinds, held, whole in run(2, gradients_equal, {"data": 2}, "M*E-", reshard):
        assert kinds == {(2,)}
        assert held == pytest.approx(whole / 2, rel=0.02)


@pytest.mark.parametrize("reshard", [False, True], ids=["zero1", "zero3"])
def test_shards_in_copies(reshard):
    for kinds, held, whole in run(4, gradients_equal, {"data": 4, "replicate": 2}, "*E", reshard):
        assert kinds == {(2, 2)}
        assert held == pytest.approx(whole / 2, rel=0.02)


def test_a_rank_without_labels_takes_part():
    run(2, gradients_equal, {"data": 2}, "*E", True, True)


def summed_axis_by_axis():
    """A layer whose norm is summed over more ranks than its other parameters."""
    meshes = Meshes.create(Mapping(data=2, tensor=2))
    with in_float64():
        model, batches = tiny("*-"), micro_batches(4)
        sums = [alone(model, batches[r : r + 1])[2] for r in range(4)]
        pair = [rank for rank in range(4) if rank % 2 == meshes.rank % 2]
        placements = replicated(model)
        for name in placements:
            if ".mixer." in name:
                placements[name] = Placement(placements[name].piece, ("data", "context"))
        sharded = shard_data(model, meshes, placements, True)
        learn(model, sharded, batches[meshes.rank : meshes.rank + 1])
        for name, gradient in sharded.gradients().items():
            expected = sum(sums[rank][name] for rank in (pair if ".mixer." in name else range(4)))
            part = sharded.placements[name].piece.take(expected)
            torch.testing.assert_close(gradient, part, rtol=1e-9, atol=1e-12)
    names = ("embeddings.weight", "layers.0.norm.weight", "layers.0.mixer.q_proj.weight")
    return [(sharded.copies(name), sharded.parameters[name].device_mesh.size()) for name in names]


def test_each_gradient_is_summed_over_exactly_its_axes():
    assert run(4, summed_axis_by_axis)[0] == [(1, 4), (2, 2), (1, 2)]


def reduced(reshard):
    """The share of gradients that are summed after each of three micro-batches."""
    meshes, found = Meshes.create(Mapping(data=2)), []
    with in_float64():
        model = tiny("*-")
        sharded = shard_data(model, meshes, replicated(model), reshard)
        for number, batch in enumerate(micro_batches(3)):
            sharded.accumulate(last=number == 2)
            next_token_exact(model, batch).sum.backward()
            found.append(len(sharded.gradients()) / len(sharded.parameters))
    return found


def test_gradients_wait_for_the_last_micro_batch_where_there_is_room():
    assert run(2, reduced, False)[0] == [0, 0, 1]
    assert run(2, reduced, True)[0] == [1, 1, 1]


def groups_of_the_optimizer():
    meshes = Meshes.create(Mapping(data=4, expert=2))
    model = tiny("*E", attention_bias=True).float()
    whole = {name: p.ndim for name, p in model.named_parameters()}
    expected = [{name for name, n in whole.items() if (n > 1) == matrix} for matrix in (True, False)]
    sharded = shard_data(model, meshes, replicated(model), False)
    names = {id(p): name for name, p in sharded.parameters.items()}
    assert [{names[id(p)] for p in part} for part in decay_groups(model)] == expected
    optimizer = adamw(model, LoopConfig(max_steps=1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: local(p.detach()).clone() for name, p in sharded.parameters.items()}
    optimizer.param_groups[0]["lr"] = 0.5
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    optimizer.step()
    for name, parameter in sharded.parameters.items():
        factor = 0.95 if whole[name] > 1 else 1.0
        torch.testing.assert_close(local(parameter.detach()), before[name] * factor)
    return [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]


def test_weight_decay_goes_by_the_whole_tensor_and_each_mesh_has_its_kernel():
    groups = run(4, groups_of_the_optimizer)[0]
    assert [decay for _, decay in groups] == [0.1, 0.1, 0.0]


def test_alone_nothing_is_sharded_and_nothing_is_sent():
    meshes = Meshes.create(Mapping())
    model = tiny("*E")
    before = dict(model.named_parameters())
    sharded = shard_data(model, meshes, replicated(model), True)
    assert not any(isinstance(module, FSDPModule) for module in model.modules())
    assert all(sharded.parameters[name] is parameter for name, parameter in before.items())
    learn(model, sharded, micro_batches(1))
    assert sharded.grad_norm() == pytest.approx(alone(tiny("*E"), micro_batches(1))[3])


def test_copies_that_do_not_divide_the_data_ranks_are_refused():
    with pytest.raises(ConfigError, match="replicate 3 does not divide data 4; choose 1, 2 or 4"):
        Mapping.over(4, replicate=3)
