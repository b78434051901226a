"""All ways to a sketch agree: loop, vmap, hooks and ranks, for every kind of parameter."""

import functools

import pytest
import torch
from distributed import run
from exact_training import in_float64
from torch import nn

from bloomery.errors import ConfigError
from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.decoder import Decoder
from bloomery.parallel.apply import parallelize
from bloomery.parallel.mapping import Mapping
from bloomery.synthesize.gradients import by_loop, by_ranks, sketch
from bloomery.synthesize.hooks import GradientHooks
from bloomery.synthesize.sketch import SketchConfig, Sketcher

_SIZES = {
    "vocab_size": 48, "hidden_size": 16, "max_position_embeddings": 16, "initializer_range": 0.3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "rope": RopeConfig(), "intermediate_size": 12,
    "mamba_num_heads": 4, "mamba_head_dim": 4, "ssm_state_size": 4, "n_groups": 2, "chunk_size": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6,
}  # fmt: skip
MODELS = {
    "biased": ModelConfig(
        pattern="*ME-", attention_bias=True, qk_norm=True, mlp_bias=True, n_shared_experts=1,
        moe_shared_expert_intermediate_size=8, moe_latent_size=8, shared_expert_gate=True, **_SIZES,
    ),
    "tied": ModelConfig(
        pattern="E-M*", mlp_gated=True, mlp_hidden_act="silu", router_activation="softmax", tie_word_embeddings=True,
        sliding_window=3, use_conv_bias=False, **_SIZES | {"num_key_value_heads": 1},
    ),
}  # fmt: skip
SMALL = {"countsketch": SketchConfig(dim=16), "rademacher": SketchConfig(kind="rademacher", dim=16)}


def decoder(name):
    torch.manual_seed(0)
    model = Decoder(MODELS[name]).double()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("bias", "D")) or "norm" in parameter_name:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model.eval()


def samples(count, seq=9):
    """Right-padded rows whose first tokens are a prompt."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(48, (count, seq + 1), generator=draw)
    labels, places = ids[:, 1:].clone(), torch.arange(seq)
    prompt, end = torch.randint(0, 3, (count, 1), generator=draw), torch.randint(4, seq + 1, (count, 1), generator=draw)
    labels[(places < prompt) | (places >= end)] = -100
    return {"input_ids": ids[:, :-1], "labels": labels}


@functools.cache
def expected(name, kind, count):
    with in_float64():
        return by_loop(decoder(name), samples(count), Sketcher(SMALL[kind]))


def assert_same(found, wanted):
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=1e-7 * float(wanted[0].abs().max()))
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-7, atol=0)


def found_by(name, path, kind, count):
    with in_float64():
        return sketch(decoder(name), samples(count), Sketcher(SMALL[kind]), path)


def test_hooks_are_the_loop_on_64_samples():
    assert_same(found_by("biased", "hooks", "countsketch", 64), expected("biased", "countsketch", 64))


@pytest.mark.parametrize(
    ("name", "path", "kind"),
    [("tied", "hooks", "countsketch"), ("biased", "vmap", "countsketch"), ("tied", "hooks", "rademacher")],
)
def test_paths_agree(name, path, kind):
    assert_same(found_by(name, path, kind, 6), expected(name, kind, 6))


@pytest.mark.slow
@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("path", ["hooks", "vmap"])
@pytest.mark.parametrize("name", MODELS)
def test_every_path_agrees_on_64_samples(name, path, kind):
    assert_same(found_by(name, path, kind, 64), expected(name, kind, 64))


def of_ranks(name, mapping, kind, count):
    with in_float64():
        parallel = parallelize(decoder(name), Mapping(**mapping))
        return by_ranks(parallel, samples(count), Sketcher(SMALL[kind]))


MAPPINGS = [
    ("tied", {}, "countsketch"),
    ("biased", {"tensor": 2, "expert": 2}, "countsketch"),
    ("tied", {"tensor": 2, "data": 2, "expert": 4, "zero": 3}, "countsketch"),
    ("tied", {"data": 2, "zero": 3}, "rademacher"),
]
MORE = [
    ("tied", {"tensor": 2, "expert_tensor": 2}, "rademacher"),
    ("tied", {"pipeline": 2}, "countsketch"),
    ("biased", {"data": 4, "replicate": 2, "expert": 2}, "countsketch"),
    ("biased", {"context": 2, "tensor": 2, "expert": 2}, "countsketch"),
    ("tied", {"pipeline": 2, "data": 2, "zero": 3}, "rademacher"),
]


def ranks(mapping):
    grid = Mapping(**mapping)
    return grid.pipeline * grid.data * grid.context * grid.tensor


@pytest.mark.parametrize(
    ("name", "mapping", "kind"), MAPPINGS + [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]
)
def test_ranks_that_share_the_model_sketch_the_same(name, mapping, kind):
    for found in run(ranks(mapping), of_ranks, name, mapping, kind, 2):
        assert_same(found, expected(name, kind, 2))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_agree_on_64_samples(world):
    mapping = {1: {}, 2: {"tensor": 2, "expert": 2}, 4: {"tensor": 2, "data": 2, "expert": 4, "zero": 3}}[world]
    for found in run(world, of_ranks, "tied", mapping, "countsketch", 64):
        assert_same(found, expected("tied", "countsketch", 64))


def test_padding_neighbours_and_order_change_nothing():
    batch, model = samples(6), decoder("biased")
    with in_float64():
        whole, _ = sketch(model, batch, Sketcher(SMALL["countsketch"]))
        turned = {name: value.flip(0) for name, value in batch.items()}
        turned["input_ids"] = turned["input_ids"].masked_fill(
            (turned["labels"] != -100).flip(1).cumsum(1).flip(1) == 0, 7
        )
        other, _ = sketch(model, turned, Sketcher(SMALL["countsketch"]))
    torch.testing.assert_close(other.flip(0), whole, rtol=1e-8, atol=1e-8)


def test_a_row_without_labels_is_refused():
    batch = samples(2)
    batch["labels"][1] = -100
    with pytest.raises(ConfigError, match="row 1: no label, so its mean loss does not exist"):
        sketch(decoder("biased"), batch, Sketcher(SMALL["countsketch"]))


def test_hooks_leave_the_model_as_it_was_and_know_every_parameter():
    model = decoder("biased")
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    with GradientHooks(model, Sketcher(SMALL["countsketch"])):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.layers[0].extra = nn.Parameter(torch.ones(3))
    with pytest.raises(ConfigError, match=r"no rule for the gradient of layers\.0\.extra; use the path `loop`"):
        GradientHooks(model, Sketcher(SMALL["countsketch"])).__enter__()
    assert model.layers[0].extra.requires_grad
