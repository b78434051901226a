"""The matched Transformer: within 1 %, never larger, and the pairs that were published."""

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from bloomery.errors import ConfigError
from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.matched import matched_transformer

E1 = ModelConfig(
    pattern="M-M-M-M*-M-M-M-M-M*-M-M-M-", vocab_size=8192, hidden_size=256, intermediate_size=1344,
    num_attention_heads=8, num_key_value_heads=4, head_dim=32,
    mamba_num_heads=16, mamba_head_dim=32, n_groups=4, ssm_state_size=64,
)  # fmt: skip
H8B = ModelConfig(
    pattern="M-M-M-" + "M*-M-M-M-M-" * 4 + "M-", vocab_size=131072, hidden_size=4096, intermediate_size=21504,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    mamba_num_heads=128, mamba_head_dim=64, n_groups=8, ssm_state_size=128,
)  # fmt: skip


@st.composite
def hybrids(draw: st.DrawFn) -> ModelConfig:
    experts = draw(st.integers(2, 8))
    shared = draw(st.integers(0, 1))
    return ModelConfig(
        pattern=draw(st.text("M*-E", min_size=2, max_size=30)) + "M",
        vocab_size=draw(st.integers(256, 8192)),
        hidden_size=draw(st.integers(4, 32)) * 8,
        intermediate_size=draw(st.integers(32, 1024)),
        mlp_gated=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        num_attention_heads=draw(st.sampled_from([2, 4])),
        num_key_value_heads=draw(st.sampled_from([1, 2])),
        head_dim=draw(st.sampled_from([16, 32])),
        attention_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        mamba_num_heads=8,
        mamba_head_dim=draw(st.sampled_from([16, 32])),
        n_groups=draw(st.sampled_from([1, 2, 4])),
        ssm_state_size=draw(st.sampled_from([16, 32])),
        n_routed_experts=experts,
        num_experts_per_tok=draw(st.integers(1, experts)),
        moe_intermediate_size=draw(st.integers(16, 128)),
        n_shared_experts=shared,
        moe_shared_expert_intermediate_size=64 * shared,
        tie_word_embeddings=draw(st.booleans()),
    )


@settings(max_examples=150, deadline=None)
@given(hybrids(), st.sampled_from(["nemotron_h", "llama"]))
def test_at_most_one_percent_smaller_and_never_larger(hybrid, family):
    try:
        found = matched_transformer(hybrid, family=family)
    except ConfigError:
        event("nothing fits")
        _nothing_fits(hybrid, family)
        return
    assert 0.99 <= found.count_parameters() / hybrid.count_parameters() <= 1
    assert found.pattern == "*-" * (len(found.pattern) // 2)
    for name in ("hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        assert getattr(found, name) == getattr(hybrid, name)


def _nothing_fits(hybrid: ModelConfig, family: str) -> None:
    """One block cannot be small enough, or its MLP of width w is too small and that of w + 1 too large."""
    target = hybrid.count_parameters()
    sizes = [_dense(hybrid, blocks, width, family) for blocks in range(1, 40) for width in range(1, 60)]
    assert not [size for size in sizes if 0.99 * target <= size <= target]


def _dense(hybrid: ModelConfig, blocks: int, width: int, family: str) -> int:
    """Parameters counted by hand."""
    d, heads, groups = hybrid.hidden_size, hybrid.query_size, hybrid.key_value_size
    matrices = 3 if family == "llama" or hybrid.mlp_gated else 2
    attention = 2 * d * (heads + groups) + hybrid.attention_bias * (heads + 2 * groups + d)
    mlp = matrices * d * width + hybrid.mlp_bias * ((matrices - 1) * width + d)
    tables = (1 if hybrid.tie_word_embeddings else 2) * d * hybrid.vocab_size
    return blocks * (attention + 2 * hybrid.qk_norm * hybrid.head_dim + mlp + 2 * d) + tables + d


def test_the_papers_own_pair():
    found = matched_transformer(H8B)
    assert (found.pattern, found.intermediate_size) == ("*-" * 32, 21504)  # Nemotron-T-8B
    assert found.mlp_hidden_act == "relu2"
    assert found.rope is None


def test_as_a_llama_it_is_llama_8b():
    found = matched_transformer(H8B, family="llama")
    assert (found.pattern, found.intermediate_size) == ("*-" * 32, 14336)
    assert (found.mlp_hidden_act, found.mlp_gated, found.rope) == ("silu", True, RopeConfig())


def test_the_small_pair_of_the_decoding_comparison():
    assert round(E1.count_parameters() / 1e6, 1) == 19.3
    found = matched_transformer(E1, blocks=16)
    assert round(found.model_copy(update={"intermediate_size": 1408}).count_parameters() / 1e6, 1) == 18.9
    assert found.intermediate_size == 1440  # 1,408 would be 2 % too few
    assert found.count_parameters() == 19_144_960


def test_experts_count_as_one_wide_mlp():
    mixtral = ModelConfig(
        pattern="*E" * 4, vocab_size=512, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        n_routed_experts=4, moe_intermediate_size=96,
    )  # fmt: skip
    found = matched_transformer(mixtral)
    assert found.pattern == "*-" * 4
    assert found.intermediate_size == 384  # and the router's 256 weights do not buy one channel more
    assert found.n_routed_experts == 0


def test_rotary_positions_are_taken_along_or_given():
    turned = RopeConfig(rope_theta=5e5)
    assert matched_transformer(E1, rope=turned).rope == turned
    assert matched_transformer(E1.model_copy(update={"rope": turned})).rope == turned


def test_a_pattern_without_attention_needs_heads():
    pure = ModelConfig(pattern="M-M-", vocab_size=512, hidden_size=64, intermediate_size=96, mamba_num_heads=4)
    with pytest.raises(ConfigError, match="set all three on the hybrid"):
        matched_transformer(pure)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    assert matched_transformer(pure.model_copy(update=heads)).num_attention_heads == 4


def test_too_many_blocks_are_refused():
    with pytest.raises(ConfigError, match=r"with 90, no MLP width gives between 99 and 100 % .* 19,260,736 parameters"):
        matched_transformer(E1, blocks=90)
    with pytest.raises(ConfigError, match="blocks: 0; expected at least 1"):
        matched_transformer(E1, blocks=0)
