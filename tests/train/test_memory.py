"""The estimate against the tensors that autograd really keeps."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder
from bloomery.train.memory import activation_bytes, state_bytes

BATCH, SEQ = 4, 96


def config(pattern: str, **settings) -> ModelConfig:
    return ModelConfig(
        pattern=pattern, vocab_size=64, hidden_size=96, intermediate_size=160, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, mamba_num_heads=6, mamba_head_dim=32, ssm_state_size=32, chunk_size=32,
        n_routed_experts=4, moe_intermediate_size=64, n_shared_experts=1,
        moe_shared_expert_intermediate_size=80, **settings,
    )  # fmt: skip


def measured(config: ModelConfig, recompute: bool = False) -> int:
    model, kept = Decoder(config), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.zeros(BATCH, SEQ, dtype=torch.int64), checkpoint_activations=recompute)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(storage.nbytes() for place, storage in kept.items() if place not in parameters)


@pytest.mark.parametrize(
    ("pattern", "settings"),
    [("****", {}), ("*---", {}), ("*---", {"mlp_gated": True}), ("MMMM", {}), ("*EEE", {}), ("M-M*-E", {})],
)
def test_the_estimate_is_close_to_what_autograd_keeps(pattern, settings):
    model = config(pattern, **settings)
    assert activation_bytes(model, BATCH, SEQ) == pytest.approx(measured(model), rel=0.25)


def test_recomputing_keeps_one_residual_stream_a_layer_and_one_layer():
    model = config("**--")
    largest = activation_bytes(config("*-"), BATCH, SEQ) - activation_bytes(config("*"), BATCH, SEQ)
    assert activation_bytes(model, BATCH, SEQ, recompute=True) == pytest.approx(
        measured(model, True) + largest, rel=0.1
    )


def test_state_is_four_fp32_numbers_a_parameter():
    assert state_bytes(1000) == 16_000


def test_heads_times_chunk_is_not_kept():
    """Many narrow heads and a long chunk: what is inside chunks would be a third of all."""
    sizes = {"mamba_num_heads": 16, "mamba_head_dim": 16, "ssm_state_size": 64, "chunk_size": 96}
    model = config("MMMM").model_copy(update=sizes)
    assert activation_bytes(model, BATCH, SEQ) == pytest.approx(measured(model), rel=0.15)
