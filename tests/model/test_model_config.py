"""Sizes against the published tables (arXiv 2504.03624) and against the tensors themselves."""

import math
import warnings

import pytest
import torch

from bloomery.config import build
from bloomery.errors import ConfigError
from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.decoder import Decoder
from bloomery.model.state import DecodeState

NEMOTRON = {"vocab_size": 131072, "num_key_value_heads": 8, "head_dim": 128, "mamba_head_dim": 64, "n_groups": 8}
PATTERN_52 = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
PATTERN_56B = "M-" * 3 + "M*-M-M-M-M-" * 10 + "M-"
PATTERN_47B = "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
PUBLISHED = {
    "8B": ({"pattern": PATTERN_52, "hidden_size": 4096, "intermediate_size": 21504, "num_attention_heads": 32,
            "mamba_num_heads": 128, "ssm_state_size": 128}, 8.101e9),
    "56B": ({"pattern": PATTERN_56B, "hidden_size": 8192, "intermediate_size": 32768, "num_attention_heads": 64,
             "mamba_num_heads": 256, "ssm_state_size": 256}, 56.32e9),
    "47B": ({"pattern": PATTERN_47B, "hidden_size": 8192, "intermediate_size": 30720, "num_attention_heads": 64,
             "mamba_num_heads": 256, "ssm_state_size": 256}, 46.79e9),
    "4B": ({"pattern": PATTERN_52, "hidden_size": 3072, "intermediate_size": 12288, "num_attention_heads": 32,
            "mamba_num_heads": 112, "ssm_state_size": 128}, 4.489e9),
}  # fmt: skip
SMALL = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 6, "n_groups": 2, "chunk_size": 8,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
}  # fmt: skip


def published(name: str) -> ModelConfig:
    return ModelConfig(**NEMOTRON, **PUBLISHED[name][0])


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_the_published_models(name: str) -> None:
    assert published(name).count_parameters() == pytest.approx(PUBLISHED[name][1], rel=1e-3)


def test_layers_of_the_published_patterns() -> None:
    assert [i for i, kind in enumerate(PATTERN_52) if kind == "*"] == [7, 18, 29, 40]
    assert (PATTERN_47B.count("M"), PATTERN_47B.count("*"), PATTERN_47B.count("-")) == (45, 5, 48)
    assert sum(published("8B").mamba_in_proj_sizes) == 18560
    assert published("4B").mamba_conv_size == 9216


@pytest.mark.parametrize(
    ("tokens", "mebibytes"), [(2048, 129), (8192, 225), (65536, 1.10 * 1024), (2**20, 16.1 * 1024)]
)
def test_cache_of_the_published_8b(tokens: int, mebibytes: float) -> None:
    assert published("8B").cache_bytes(1, tokens, torch.bfloat16) / 2**20 == pytest.approx(mebibytes, rel=5e-3)


def test_prefill_flops_at_65536_tokens() -> None:
    hybrid = published("8B")
    dense = ModelConfig(
        pattern="*-" * 32, vocab_size=131072, hidden_size=4096, intermediate_size=21504, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    attention = [65536 * 4 * m.query_size * 65537 / 2 * m.pattern.count("*") / 1e15 for m in (dense, hybrid)]
    assert attention == pytest.approx([1.13, 0.14], abs=0.005)
    forward = [m.flops_per_token(65536) * 65536 / 3e15 for m in (dense, hybrid)]
    assert forward[0] == pytest.approx(1.06 + 1.13, rel=0.05)
    assert forward[0] / forward[1] == pytest.approx(1.8, abs=0.1)


def test_flops_by_hand() -> None:
    config = ModelConfig(**SMALL | {"pattern": "M*-"})
    mamba = 2 * (24 * (32 + 56 + 4) + 32 * 24) + 2 * 8 * (2 * 6 + 32) + 4 * 32 * 6 + 2 * 4 * 56
    attention = 2 * (24 * (32 + 2 * 16) + 32 * 24) + 4 * 32 * (10 + 1) // 2
    assert config.flops_per_token(10) == 3 * (mamba + attention + 2 * 2 * 24 * 40 + 2 * 61 * 24)


def test_a_window_bounds_the_flops_of_attention() -> None:
    plain, windowed = (ModelConfig(**SMALL | {"pattern": "*-", "sliding_window": w}) for w in (None, 3))
    mean_context = (1 + 2 + 3 * 8) / 10
    assert plain.flops_per_token(10) - windowed.flops_per_token(10) == 3 * round(4 * 32 * (5.5 - mean_context))


VARIANTS = [
    {"pattern": "M-M*-E"},
    {"pattern": "M", "use_conv_bias": False, "tie_word_embeddings": True},
    {
        "pattern": "*-",
        "attention_bias": True,
        "mlp_bias": True,
        "mlp_gated": True,
        "qk_norm": True,
        "rope": RopeConfig(),
    },
    {"pattern": "E", "mlp_gated": True, "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 20},
]


@pytest.mark.filterwarnings("ignore:pattern")
@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_equal_the_tensors(variant: dict[str, object]) -> None:
    config = ModelConfig(**SMALL | variant)
    assert config.count_parameters() == sum(p.numel() for p in Decoder(config).parameters())
    state = DecodeState.allocate(config, 3, 17, dtype=torch.bfloat16)
    held = sum(t.nbytes for cache in state.layers if cache is not None for t in vars(cache).values())
    assert config.cache_bytes(3, 17, torch.bfloat16) == held


def test_active_parameters_leave_out_the_experts_not_chosen() -> None:
    config = ModelConfig(**SMALL | {"pattern": "M-E"})
    assert config.count_parameters() - config.count_parameters(active=True) == 2 * 2 * 24 * 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": ""}, "pattern is empty"),
        ({"pattern": "M-x"}, "unknown character 'x' at layer 2"),
        ({"n_groups": 3}, "n_groups 3 does not divide mamba_num_heads 4"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
        ({"intermediate_size": 0}, "intermediate_size must be at least 1"),
        ({"mamba_num_heads": 0}, "mamba_num_heads must be at least 1"),
        ({"time_step_limit": (0.5, 0.1)}, "expected 0 ≤ low < high"),
        ({"head_dim": 7, "rope": RopeConfig()}, "head_dim 7 is odd"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 must lie between 1 and n_routed_experts 4"),
        ({"n_shared_experts": 1}, "must both be zero or both be positive"),
        ({"eos_token_id": [2, 61]}, "eos_token_id 61 is outside the vocabulary of 61"),
        ({"hidden_sizes": 3}, "did you mean hidden_size?"),
        ({"family": "lama"}, "nemotron_h"),
    ],
)
def test_impossible_sizes_are_refused_with_the_value(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        build(ModelConfig, SMALL | {"pattern": "M*-E"} | change)


def test_a_model_that_sees_one_token_at_a_time_warns() -> None:
    with pytest.warns(UserWarning, match="no layer that sees other tokens"):
        ModelConfig(**SMALL | {"pattern": "--"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ModelConfig(**SMALL | {"pattern": "M-"})


def test_defaults_do_not_clamp_dt() -> None:
    assert ModelConfig(**SMALL | {"pattern": "M"}).time_step_limit == (0.0, math.inf)
