"""The ranking finds the layer whose numbers eight bits cannot hold."""

import pytest
import torch

from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder
from bloomery.train.fp8 import Fp8, Fp8Config
from bloomery.train.losses import next_token
from bloomery.train.sensitivity import sensitivity

SIZES = ModelConfig(
    pattern="-*-", vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2,
    head_dim=16,
)  # fmt: skip


@pytest.fixture
def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(SIZES)


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(64, (2, 4, 17), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": each[:, :-1], "labels": each[:, 1:]} for each in ids]


def test_a_layer_with_an_outlier_comes_first(model, batches):
    """One weight of 10⁷ in 0.02 puts all others of its matrix below the smallest number that e4m3 has."""
    weight = model.layers[2].mixer.up_proj.weight
    weight.data[0] = 0
    weight.data[0, 0] = 1e7
    model.layers[2].norm.weight.data[0] = 0  # what the outlier multiplies: it costs accuracy and adds nothing itself
    found = sensitivity(model, batches)
    assert found[0].name == "layers.2.mixer.up_proj"
    assert found[0].output_error > 0.9
    assert found[0].gradient_error > 3 * found[1].gradient_error
    assert len(found) == 8
    assert all(0.005 < each.output_error < 0.1 for each in found[1:])


def test_the_numbers_are_those_of_the_one_layer_alone(model, batches):
    name = "layers.0.mixer.down_proj"
    found = {each.name: each for each in sensitivity(model, batches)}[name]

    def mean_loss() -> float:
        return sum(float(next_token(model, batch).sum.detach()) for batch in batches) / (2 * 4 * 16)

    before = mean_loss()
    with Fp8(model, Fp8Config(high_precision_layers=0)).installed([name]):
        assert found.loss_change == pytest.approx(mean_loss() - before, abs=1e-6)
    assert found.loss_change != 0


def test_formats_count_and_the_model_is_left_as_it_was(model, batches):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fine, coarse = (
        sensitivity(model, batches, Fp8Config(forward=name, high_precision_layers=1)) for name in ("e4m3", "e5m2")
    )
    ranked = {each.name: each.output_error for each in fine}
    assert all(1.5 * ranked[each.name] < each.output_error for each in coarse), "two mantissa bits instead of three"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())
