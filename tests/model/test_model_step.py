"""Flat decoding steps against whole forwards, and what they must not bypass."""

import pytest
import torch
from test_model_decoder import MODELS, SEQ, close, make, tokens
from torch import nn

from bloomery.model.attention import AttentionCore
from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder
from bloomery.model.moe import Dispatch
from bloomery.model.state import DecodeState
from bloomery.model.step import Step


@pytest.mark.parametrize("lengths", [[9, 9, 9], [5, 20, 13]], ids=["aligned", "ragged"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_steps_equal_one_forward(name: str, lengths: list[int]) -> None:
    decoder, ids, held = make(name), tokens(3), torch.tensor(lengths)
    for module_name, parameter in decoder.named_parameters():
        if "norm" in module_name:
            parameter.uniform_(0.5, 2)  # a weight of 1 would hide that it is left out
    whole = decoder.lm_head(decoder(ids))
    state = DecodeState.allocate(decoder.config, 3, SEQ)
    decoder(ids[:, : max(lengths)], state=state, lengths=held)
    step = Step(decoder)
    for _ in range(6):
        following = ids.gather(1, held[:, None])
        close(step(following, state), whole[torch.arange(3), held])
        held = held + 1
    assert state.lengths.tolist() == held.tolist()


@torch.no_grad()
def test_weights_are_those_of_the_moment_it_was_made() -> None:
    decoder = make("dense")
    state = DecodeState.allocate(decoder.config, 2, SEQ)
    old = Step(decoder)
    decoder.layers[0].norm.weight.mul_(3)
    ids = tokens(2)[:, :1]
    fresh, stale = (step(ids, DecodeState.allocate(decoder.config, 2, SEQ)) for step in (Step(decoder), old))
    assert not torch.allclose(fresh, stale)
    close(fresh, decoder.lm_head(decoder(ids, state=state))[:, 0])


class LoudCore(AttentionCore):
    """Stands at the swap point."""

    def forward(self, *args: object) -> torch.Tensor:
        return super().forward(*args) * 2


@torch.no_grad()
def test_replaced_and_hooked_modules_are_not_bypassed() -> None:
    decoder = make("dense")
    ids = tokens(2)
    seen: list[nn.Module] = []
    decoder.layers[1].mixer.up_proj.register_forward_hook(lambda module, *_: seen.append(module))
    decoder.layers[2].mixer.core = LoudCore()
    state = DecodeState.allocate(decoder.config, 2, SEQ)
    decoder(ids[:, :4], state=state)
    seen.clear()
    logits = Step(decoder)(ids[:, 4:5], state)
    assert len(seen) == 1
    close(logits, decoder.lm_head(decoder(ids[:, :5]))[:, -1])


@torch.no_grad()
def test_a_hook_on_the_whole_model_runs() -> None:
    decoder = make("clamped")
    calls: list[int] = []
    decoder.register_forward_pre_hook(lambda *_: calls.append(1))
    Step(decoder)(tokens(2)[:, :1], DecodeState.allocate(decoder.config, 2, SEQ))
    assert calls == [1]


@torch.no_grad()
def test_biases_of_every_layer() -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        pattern="*-", vocab_size=61, hidden_size=16, intermediate_size=24, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, attention_bias=True, mlp_bias=True, mlp_gated=True,
    )  # fmt: skip
    decoder = Decoder(config).eval()
    for parameter in decoder.parameters():
        parameter.normal_()
    ids = tokens(2)
    state = DecodeState.allocate(config, 2, SEQ)
    decoder(ids[:, :4], state=state)
    close(Step(decoder)(ids[:, 4:5], state), decoder.lm_head(decoder(ids[:, :5]))[:, -1])


MIXTURES = {
    "sigmoid": {},
    "gated": {"mlp_gated": True, "mlp_hidden_act": "silu", "router_activation": "softmax", "norm_topk_prob": False},
    "groups": {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    "shared": {"n_shared_experts": 1, "moe_shared_expert_intermediate_size": 20, "mlp_bias": True},
    "shared_gate": {"n_shared_experts": 1, "moe_shared_expert_intermediate_size": 20, "shared_expert_gate": True},
    "latent": {"moe_latent_size": 8, "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 20},
}


def mixture(name: str) -> Decoder:
    torch.manual_seed(0)
    config = ModelConfig(
        pattern="E*", vocab_size=61, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        n_routed_experts=16, num_experts_per_tok=3, moe_intermediate_size=12, **MIXTURES[name],
    )  # fmt: skip
    decoder = Decoder(config).eval()
    for tensor in (*decoder.parameters(), *decoder.buffers()):
        tensor.normal_()
    return decoder


@pytest.mark.parametrize("rows", [1, 4, 40], ids=["one", "few", "many"])
@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_experts_equal_their_layer(name: str, rows: int) -> None:
    decoder = mixture(name)
    layer, x = decoder.layers[0], torch.randn(rows, 16)
    expected = layer(x.unsqueeze(1), None)[:, 0]
    step = Step(decoder)
    grouped: list[int] = []
    layer.mixer.dispatch.register_forward_hook(lambda *_: grouped.append(1))
    torch.testing.assert_close(step._layers[0](x.clone(), None, None), expected, rtol=1e-4, atol=1e-4)
    assert bool(grouped) == (rows == 40)  # more choices than experts


@torch.no_grad()
def test_a_replaced_dispatch_is_not_bypassed() -> None:
    class Nothing(Dispatch):
        def forward(self, x: torch.Tensor, *_: object) -> torch.Tensor:
            return torch.zeros_like(x)

    decoder, x = mixture("sigmoid"), torch.randn(2, 16)
    decoder.layers[0].mixer.dispatch = Nothing()
    close(Step(decoder)._layers[0](x, None, None), x)
