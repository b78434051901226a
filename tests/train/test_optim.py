"""Which parameters decay."""

import torch
from tiny_training import TinyModel, loop
from torch import nn

from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder
from bloomery.train.optim import adamw, decay_groups


def hybrid() -> Decoder:
    return Decoder(
        ModelConfig(
            pattern="M*-E", vocab_size=32, hidden_size=16, intermediate_size=32, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, mamba_num_heads=2, mamba_head_dim=8, ssm_state_size=8,
            n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, attention_bias=True, mlp_bias=True,
        )
    )  # fmt: skip


def test_norms_biases_and_time_scales_never_decay():
    model = hybrid()
    decayed, plain = decay_groups(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(decayed) + len(plain) == len(names)
    spared = {names[id(parameter)] for parameter in plain}
    for name in ("A_log", "D", "dt_bias", "conv1d.bias", "norm.weight"):
        assert any(found.endswith(f"mixer.{name}") for found in spared), (name, spared)
    assert all("norm" in n or n.endswith(("bias", "A_log", ".D")) for n in spared), spared
    assert {n for n in names.values() if "norm" in n or "bias" in n.rpartition(".")[2]} <= spared
    assert "embeddings.weight" in {names[id(parameter)] for parameter in decayed}


def test_the_optimizer_uses_these_groups():
    model = TinyModel()
    decayed, plain = adamw(model, loop(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert {id(p) for p in plain["params"]} == {id(model.mixer.bias), id(model.norm.weight)}


def test_embeddings_on_request_and_frozen_parameters_never():
    model = TinyModel()
    model.lm_head.weight = model.embeddings.weight
    model.mixer.weight.requires_grad_(False)
    decayed, plain = decay_groups(model, decay_embeddings=False)
    assert decayed == []
    assert len(plain) == 3


def test_decay_shrinks_only_what_should_shrink():
    model = TinyModel()
    with torch.no_grad():
        nn.init.ones_(model.mixer.bias)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = adamw(model, loop(learning_rate=0.5, weight_decay=0.1))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 1.0 if name in ("mixer.bias", "norm.weight") else 0.95
        torch.testing.assert_close(p.detach(), before[name] * factor)
