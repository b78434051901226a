"""The training loop over several ranks: the same steps as in one process, and the same decisions on every rank."""

import math

import pytest
import torch
from distributed import run
from exact_training import in_float64, micro_batches, next_token_exact, tiny
from tiny_training import loop

from bloomery.errors import ConfigError, DivergenceError
from bloomery.parallel.apply import parallelize
from bloomery.parallel.data import local
from bloomery.parallel.mapping import Mapping
from bloomery.train.loop import TrainState, steps
from bloomery.train.losses import Loss
from bloomery.train.optim import adamw

CONFIG = {"max_steps": 3, "batch_size": 8, "micro_batch_size": 2, "max_grad_norm": 0.5}


def data(seed, labels=None):
    """Micro-batches of four steps; the second half of each is masked much more."""
    for step in range(3):
        batches = micro_batches(4, seed=seed + step, masked=0.1)
        for batch in batches[2:]:
            batch["labels"][:, 1:] = -100
        yield batches


def train(model, config, mapping=None, change=None):
    """State and steps; on several ranks each takes its data rank's share of every step's micro-batches."""
    parallel = parallelize(model, mapping) if mapping else None
    model = parallel.model if parallel else model
    state = TrainState(model, adamw(model, config), parallel=parallel)
    place, ranks = (parallel.meshes.place("data"), mapping.data) if parallel else (0, 1)
    share = 4 // ranks
    own = (batches[place * share : (place + 1) * share] for batches in data(0))
    return state, list(steps(state, change(own, place) if change else own, next_token_exact, config))


def same_steps(settings, pattern):
    config = loop(**CONFIG)
    with in_float64():
        expected, plain = train(tiny(pattern), config)
        state, found = train(tiny(pattern), config, Mapping(**settings))
        for mine, theirs in zip(found, plain, strict=True):
            assert (mine.step, mine.tokens) == (theirs.step, theirs.tokens)
            assert (mine.loss, mine.grad_norm) == pytest.approx((theirs.loss, theirs.grad_norm), rel=1e-9)
            shared = {name: mine.metrics[name] for name in theirs.metrics}  # ranks have some of their own
            assert shared == pytest.approx(theirs.metrics, rel=1e-9)
            assert mine.learning_rate == theirs.learning_rate
        assert state.position == expected.position == 24
        weights = dict(expected.model.named_parameters())
        for name, parameter in state.parallel.data.parameters.items():
            part = state.parallel.placements[name].piece.take(weights[name].detach())
            torch.testing.assert_close(local(parameter.detach()), part, rtol=1e-9, atol=1e-11)
    return [step.loss for step in found]


@pytest.mark.parametrize(
    ("world", "settings", "pattern"),
    [
        (2, {"data": 2}, "*-M"),
        (4, {"data": 4, "zero": 3, "expert": 2}, "*E"),
        (4, {"data": 2, "pipeline": 2}, "*-E-"),
    ],
    ids=["data", "experts", "pipeline"],
)
def test_steps_are_those_of_one_process(world, settings, pattern):
    losses = run(world, same_steps, settings, pattern)
    assert all(rank == losses[0] for rank in losses)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [{"data": 4}, {"data": 4, "replicate": 2}, {"pipeline": 2, "data": 2, "interleave": 2}],
)
def test_steps_of_every_way_to_shard(settings, zero):
    run(4, same_steps, settings | {"zero": zero}, "*-M-")


def test_alone_the_parallel_path_is_the_plain_one():
    config = loop(**CONFIG)
    with in_float64():
        plain, expected = train(tiny("*E"), config)
        state, found = train(tiny("*E"), config, Mapping())
    assert [step.loss for step in found] == pytest.approx([step.loss for step in expected], rel=1e-12)
    for mine, theirs in zip(state.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def poisoned(own, place):
    for number, batches in enumerate(own):
        if number == 1 and place == 1:
            batches[1]["poison"] = torch.ones(1)
        yield batches


def next_token_poisoned(model, batch):
    loss = next_token_exact(model, batch)
    return Loss(loss.sum * math.nan, loss.weight) if "poison" in batch else loss


def stops_on_nan(settings):
    parallel = parallelize(tiny("*-").float(), Mapping(**settings))
    config = loop(**CONFIG)
    state = TrainState(parallel.model, adamw(parallel.model, config), parallel=parallel)
    share, place = 4 // parallel.mapping.data, parallel.meshes.place("data")
    own = poisoned((batches[place * share : (place + 1) * share] for batches in data(0)), place)
    taken = steps(state, own, next_token_poisoned, config)
    next(taken)
    before = [local(p.detach()).clone() for p in state.model.parameters()]
    with pytest.raises(DivergenceError) as caught:
        next(taken)
    after = [local(p.detach()) for p in state.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return str(caught.value), state.step, state.position


@pytest.mark.parametrize(
    ("settings", "rank"), [({"data": 2}, 1), ({"data": 2, "pipeline": 2}, 3)], ids=["data", "both"]
)
def test_a_nan_on_one_rank_stops_all_with_its_cause(settings, rank):
    said = run(math.prod(settings.values()), stops_on_nan, settings)
    assert all(each == said[0] for each in said)
    message, step, position = said[0]
    assert f"step 2, sequences from 8: the loss of micro-batch 2 of 2 is nan on rank {rank}; no weight" in message
    assert (step, position) == (1, 8)


def fewer(own, place):
    return (batches[: 2 - place] for batches in own)


def nothing(own, place):
    return iter(())


def refused(change):
    with pytest.raises(ConfigError) as caught:
        train(tiny("*-").float(), loop(**CONFIG), Mapping(data=2), change)
    return str(caught.value)


def test_ranks_with_different_numbers_of_micro_batches_are_refused_on_all():
    first, second = run(2, refused, fewer)
    assert "step 1: this rank has 2 micro-batches, all 2 ranks 3; every rank must have as many" in first
    assert "step 1: this rank has 1 micro-batches" in second


def test_data_that_ends_is_said_by_all():
    assert all("the data ended after step 0 of 3" in said for said in run(2, refused, nothing))
