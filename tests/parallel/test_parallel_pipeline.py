"""Pipelines against one process: every gradient, for each schedule; and where a model is cut."""

import itertools
from collections import defaultdict

import pytest
import torch
import torch.distributed as dist
from distributed import run
from exact_training import alone, assert_equal, in_float64, micro_batches, next_token_exact, tiny
from test_parallel_data import replicated

from bloomery.errors import DivergenceError
from bloomery.parallel.data import shard_data
from bloomery.parallel.mapping import Mapping
from bloomery.parallel.mesh import Meshes
from bloomery.parallel.pipeline import bounds, cut
from bloomery.train.fp8 import Fp8Config, Plan


def of_many_shapes(batches):
    """Micro-batches that differ in rows and lengths."""
    cuts = [(slice(None), slice(0, 5)), (slice(0, 1), slice(None)), (slice(None), slice(None))]
    return [{name: value[cuts[i % 3]] for name, value in batch.items()} for i, batch in enumerate(batches)]


def pipeline_equals(settings, pattern, count, ragged=False, reshard=False, tied=False):
    meshes = Meshes.create(Mapping(**settings))
    with in_float64():
        model = tiny(pattern, tie_word_embeddings=tied)
        batches = micro_batches(count * meshes.size("data"))
        batches = of_many_shapes(batches) if ragged else batches
        total, weight, expected, norm = alone(model, batches)
        placements, whole = replicated(model), {name for name, _ in model.named_parameters()}
        pipeline = cut(model, meshes)
        sharded = shard_data(model, meshes, placements, reshard, pipeline.chunks)
        own = batches[count * meshes.place("data") :][:count]
        model.train()
        for mine in (own, own[:-1], own):  # also after steps of another number of micro-batches
            for parameter in sharded.parameters.values():
                parameter.grad = None
            losses = pipeline.forward_backward(mine, next_token_exact)
            sharded.finish()
        sums = [sum(float(y.sum) for y in losses), sum(float(y.weight) for y in losses)]
        found = torch.tensor(sums, dtype=torch.float64)
        dist.all_reduce(found)
        assert found.tolist() == pytest.approx([total, weight], rel=1e-9)
        assert sharded.grad_norm() == pytest.approx(norm, rel=1e-11)
        assert_equal(everywhere(sharded, whole, expected), expected)
        evaluated = pipeline.forward(own, next_token_exact)
        sharded.release()
    assert sum(float(loss.weight) for loss in evaluated) == sum(float(loss.weight) for loss in losses)
    return sorted(sharded.parameters)


def everywhere(sharded, whole, expected):
    """Whole gradients out of those of all stages. A tied table is on two of them, with equal gradients."""
    stages = sharded.meshes.mapping.pipeline
    found, mine = {}, sharded.gradients()
    for name in sorted(whole):
        full = torch.zeros(expected[name].shape, dtype=torch.float64)
        holders = torch.tensor(float(name in mine))
        if name in mine:
            sharded.placements[name].piece.put(mine[name] / sharded.copies(name), full)
        dist.all_reduce(full)
        dist.all_reduce(holders)
        found[name] = full * (sharded.meshes.mapping.world_size / stages) / holders
    return found


def test_one_forward_one_backward():
    names = run(2, pipeline_equals, {"pipeline": 2}, "*-M-", 4)
    assert set(names[0]).isdisjoint(names[1])
    assert "embeddings.weight" in names[0]
    assert {"norm.weight", "lm_head.weight"} <= set(names[1])


def test_interleaved_with_an_embedding_on_both_ends_and_micro_batches_of_many_shapes():
    names = run(2, pipeline_equals, {"pipeline": 2, "interleave": 2}, "*-M-", 4, True, False, True)
    assert set(names[0]) & set(names[1]) == {"embeddings.weight"}


def test_experts_far_from_the_loss_are_balanced():
    run(2, pipeline_equals, {"pipeline": 2}, "*E*E-", 3)


def test_with_sharded_data():
    run(4, pipeline_equals, {"pipeline": 2, "data": 2, "interleave": 2}, "*-M-*", 2, False, True)


MATRIX = list(
    itertools.product(
        [(2, {"pipeline": 2}), (4, {"pipeline": 4}), (4, {"pipeline": 2, "interleave": 2, "data": 2})],
        [1, 4, 5],
        [False, True],
        [False, True],
    )
)


@pytest.mark.slow
@pytest.mark.parametrize(("where", "count", "ragged", "tied"), MATRIX)
def test_every_schedule(where, count, ragged, tied):
    world, settings = where
    run(world, pipeline_equals, settings, "*-M-*E", count + 1, ragged, ragged, tied)


class Refusing:
    """A schedule as torch's: what a layer raises comes wrapped."""

    def step(self, *_: object, **__: object) -> None:
        raise RuntimeError("[Stage 0] failed to run forward") from DivergenceError("a router's logits are nan")


def test_what_a_layer_refuses_is_said_plainly(monkeypatch):
    pipeline = cut(tiny("*-"), Meshes.create(Mapping()))
    monkeypatch.setattr(pipeline, "_scheduled", lambda *_: Refusing())
    with pytest.raises(DivergenceError, match="^a router's logits are nan$"):
        pipeline.forward_backward(micro_batches(2), next_token_exact)


def test_a_stage_keeps_the_names_of_its_layers_and_fp8_knows_the_ends():
    decoder = tiny("*-*-*-", intermediate_size=32)
    whole = set(Plan.of(decoder, Fp8Config(high_precision_layers=1)).chosen)
    held, chosen = [], set()
    for stage in (0, 1):
        model = tiny("*-*-*-", intermediate_size=32)
        pipeline = cut(model, Meshes(Mapping(pipeline=2), stage, defaultdict(type(None))))
        held += [name for name, _ in model.named_parameters()]
        assert [name for name, _ in pipeline.chunks[0].layers.named_children()] == [
            name for name, _ in model.layers.named_children()
        ]
        chosen |= set(Plan.of(model, Fp8Config(high_precision_layers=1)).chosen)
    assert held == [name for name, _ in decoder.named_parameters()]
    assert chosen == whole


def test_pieces_are_of_equal_work_and_the_head_counts():
    config = tiny("*-" * 4).config
    assert bounds(config, 4) == [0, *bounds(config, 4)[1:4], 8]
    heavy = config.model_copy(update={"vocab_size": 4096})
    assert bounds(heavy, 2)[1] > bounds(config, 2)[1]
    assert all(a < b for a, b in itertools.pairwise(bounds(heavy, 8)))
