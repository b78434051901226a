"""Attention against its formula, one query at a time."""

import math

import pytest
import torch
from torch import Tensor

from bloomery.model.attention import Attention
from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.decoder import Decoder

SIZES = {
    "pattern": "*", "vocab_size": 31, "hidden_size": 24, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
VARIANTS = {
    "plain": {},
    "everything": {"attention_bias": True, "qk_norm": True, "sliding_window": 3, "rope": RopeConfig(rope_theta=20.0)},
}


def head_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean() + 1e-5).rsqrt() * weight


def turned(x: Tensor, position: int) -> Tensor:
    """Pairs (i, i + 4) as complex numbers times e^(i·position·frequency)."""
    angles = position / 20.0 ** (torch.arange(4) / 4)
    pairs = torch.complex(x[:4], x[4:]) * torch.polar(torch.ones(4), angles)
    return torch.cat([pairs.real, pairs.imag])


def formula(mixer: Attention, config: ModelConfig, x: Tensor) -> Tensor:
    """x (seq, hidden) → the same shape."""
    queries, keys, values = (p(x).unflatten(-1, (-1, 8)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    outputs = []
    for t in range(len(x)):
        first = 0 if config.sliding_window is None else max(0, t + 1 - config.sliding_window)
        heads = []
        for head in range(4):
            query, past = queries[t, head], list(keys[first : t + 1, head // 2])
            if config.qk_norm:
                query, past = head_norm(query, mixer.q_norm.weight), [head_norm(k, mixer.k_norm.weight) for k in past]
            if config.rope:
                query, past = turned(query, t), [turned(k, first + i) for i, k in enumerate(past)]
            weights = torch.softmax(torch.stack([query @ k / math.sqrt(8) for k in past]), 0)
            heads.append(weights @ values[first : t + 1, head // 2])
        outputs.append(mixer.o_proj(torch.cat(heads)))
    return torch.stack(outputs)


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_attention_equals_its_formula(name: str) -> None:
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig(**SIZES | VARIANTS[name]))
    for parameter in decoder.parameters():
        parameter.copy_(torch.randn_like(parameter) / 2)
    hidden = decoder.embeddings(torch.arange(9)[None])
    layer = decoder.layers[0]
    expected = hidden[0] + formula(layer.mixer, decoder.config, layer.norm(hidden[0]))
    torch.testing.assert_close(decoder(torch.arange(9)[None])[0], decoder.norm(expected), rtol=1e-4, atol=1e-5)
