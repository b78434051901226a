"""Every family on random small models, both ways: our folder in transformers, transformers' folder here, the same
logits; and our folder again, the same bytes."""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers.utils import logging

from bloomery.model import hf
from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.decoder import Decoder
from bloomery.model.state import DecodeState
from bloomery.model.step import Step

logging.set_verbosity_error()
logging.disable_progress_bar()

EXAMPLES = 20
VOCAB, CHUNK = 37, 4
SEQ = 2 * CHUNK + 5
DTYPES = [torch.float32, torch.float32, torch.bfloat16, torch.float16]
ROPES = st.one_of(
    st.builds(RopeConfig, rope_theta=st.sampled_from([100.0, 10000.0])),
    st.just(RopeConfig(rope_type="linear", factor=3.0)),
    st.just(RopeConfig(rope_type="llama3", factor=8.0, original_max_position_embeddings=16, rope_theta=500.0)),
    st.builds(
        RopeConfig, rope_type=st.just("yarn"), factor=st.sampled_from([2.0, 4.0]), rope_theta=st.just(50.0),
        original_max_position_embeddings=st.just(8), beta_fast=st.sampled_from([32.0, 2.0]),
        beta_slow=st.sampled_from([1.0, 0.25]), truncate=st.booleans(),
        attention_factor=st.sampled_from([None, 1.25]),
    ),
)  # fmt: skip


@st.composite
def attention(draw: st.DrawFn) -> dict[str, Any]:
    groups, key_value_heads = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    heads = groups * key_value_heads
    return {
        "num_attention_heads": heads, "num_key_value_heads": key_value_heads, "head_dim": draw(st.sampled_from([4, 8])),
        "hidden_size": heads * draw(st.sampled_from([4, 8])),
    }  # fmt: skip


@st.composite
def transformer(draw: st.DrawFn, kinds: str = "-", window: bool = False, **switches: Any) -> dict[str, Any]:
    """One of the families around Llama; `switches` are values or strategies."""
    blocks = draw(st.text(kinds, min_size=1, max_size=3).filter(lambda text: kinds == "-" or "E" in text))
    chosen = {key: draw(value) if isinstance(value, st.SearchStrategy) else value for key, value in switches.items()}
    return draw(attention()) | {
        "pattern": "*" + "*".join(blocks), "rope": draw(ROPES), "mlp_gated": True, "mlp_hidden_act": "silu",
        "intermediate_size": draw(st.sampled_from([10, 16])) if "-" in kinds else 0,
        "sliding_window": draw(st.sampled_from([None, 3, 6, 40])) if window else None,
        "tie_word_embeddings": draw(st.booleans()), **chosen,
    }  # fmt: skip


@st.composite
def softmax_experts(draw: st.DrawFn, norm: bool | None = None, shared: bool = False, **switches: Any) -> dict[str, Any]:
    count = draw(st.integers(1, 5))
    kinds = switches.pop("kinds")
    sizes = {
        "n_routed_experts": count, "num_experts_per_tok": draw(st.integers(1, count)),
        "moe_intermediate_size": draw(st.sampled_from([4, 12])), "router_activation": "softmax",
        "norm_topk_prob": draw(st.booleans()) if norm is None else norm,
    }  # fmt: skip
    if shared:
        sizes |= {"n_shared_experts": 1, "moe_shared_expert_intermediate_size": 10, "shared_expert_gate": True}
    return draw(transformer(kinds, **switches)) | sizes


@st.composite
def mamba(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.sampled_from([1, 2]))
    return {
        "n_groups": groups, "mamba_num_heads": groups * draw(st.sampled_from([1, 2, 3])),
        "mamba_head_dim": draw(st.sampled_from([4, 8])), "ssm_state_size": draw(st.sampled_from([3, 8])),
        "conv_kernel": draw(st.sampled_from([2, 4])), "use_conv_bias": draw(st.booleans()), "chunk_size": CHUNK,
        "tie_word_embeddings": draw(st.booleans()),
    }  # fmt: skip


@st.composite
def sigmoid_experts(draw: st.DrawFn) -> dict[str, Any]:
    groups, size = draw(st.sampled_from([1, 2])), draw(st.sampled_from([2, 3]))
    return {
        "n_routed_experts": groups * size, "n_group": groups, "topk_group": draw(st.integers(1, groups)),
        "num_experts_per_tok": draw(st.integers(1, size)), "moe_intermediate_size": 8, "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": 10, "moe_latent_size": draw(st.sampled_from([None, 8])),
        "norm_topk_prob": draw(st.booleans()), "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
    }  # fmt: skip


@st.composite
def nemotron_h(draw: st.DrawFn) -> dict[str, Any]:
    pattern = draw(st.text("M*-E", min_size=1, max_size=6).filter(lambda text: {"M", "*"} & set(text)))
    sizes = {"pattern": pattern, "hidden_size": draw(st.sampled_from([8, 12]))}
    if "*" in pattern:
        sizes = draw(attention()) | sizes
    if "M" in pattern:
        sizes |= draw(mamba()) | {"time_step_limit": (draw(st.sampled_from([0.0, 0.03])), math.inf)}
    if "E" in pattern:
        sizes |= draw(sigmoid_experts())
    if "-" in pattern:
        sizes["intermediate_size"] = draw(st.sampled_from([7, 12]))
    if {"-", "E"} & set(pattern):
        sizes["mlp_bias"] = draw(st.booleans())
    return sizes | {"tie_word_embeddings": draw(st.booleans())}


@st.composite
def mamba2(draw: st.DrawFn) -> dict[str, Any]:
    sizes = draw(mamba())
    return sizes | {
        "pattern": "M" * draw(st.integers(1, 3)),
        "hidden_size": sizes["mamba_num_heads"] * sizes["mamba_head_dim"] // draw(st.sampled_from([1, 2])),
        "time_step_limit": draw(st.sampled_from([(0.0, math.inf), (0.03, math.inf), (0.01, 0.08)])),
    }


CONFIGS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "llama": transformer(attention_bias=st.booleans(), mlp_bias=st.booleans()),
    "mistral": transformer(window=True),
    "qwen2": transformer(window=True, qkv_bias=True),
    "qwen3": transformer(window=True, qk_norm=True, attention_bias=st.booleans()),
    "mixtral": softmax_experts(kinds="E", norm=True, window=True),
    "qwen2_moe": softmax_experts(kinds="-E", shared=True, window=True, qkv_bias=st.booleans()),
    "qwen3_moe": softmax_experts(kinds="-E", window=True, qk_norm=True, attention_bias=st.booleans()),
    "nemotron_h": nemotron_h(),
    "mamba2": mamba2(),
}


@torch.no_grad()
def make(family: str, sizes: dict[str, Any], seed: int, dtype: torch.dtype) -> Decoder:
    """Weights large enough that every part of the model shows in the logits, and exact in `dtype`."""
    torch.manual_seed(seed)
    decoder = Decoder(ModelConfig(family=family, vocab_size=VOCAB, **sizes)).eval()
    for name, tensor in decoder.state_dict().items():
        if tensor.dim() == 1 and not name.endswith(("A_log", "dt_bias")):
            tensor.add_(torch.randn_like(tensor) / 4)
        elif tensor.dim() > 1 and "conv1d" not in name:
            tensor.mul_(8)
        if not name.endswith("e_score_correction_bias"):
            tensor.copy_(tensor.to(dtype))
    return decoder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = tokens()
    return model.lm_head(model(ids)) if isinstance(model, Decoder) else model(ids, use_cache=False).logits


@torch.no_grad()
def decoded(model: Decoder) -> torch.Tensor:
    """Logits after the last token, which is decoded alone."""
    state = DecodeState.allocate(model.config, 2, SEQ)
    model(tokens()[:, :-1], state=state)
    return Step(model)(tokens()[:, -1:], state)


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(3))


def require_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.std() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def check_both_ways(folder: Path, decoder: Decoder, dtype: torch.dtype) -> None:
    ours, again, theirs = folder / "ours", folder / "again", folder / "theirs"
    hf.save(decoder, ours, dtype, shard_bytes=12_000)
    peer_class = getattr(transformers, hf.FAMILIES[decoder.config.family].architecture)
    peer = peer_class.from_pretrained(ours, dtype=torch.float32).eval()
    require_same(logits(decoder), logits(peer))
    require_same(decoded(decoder), logits(decoder)[:, -1])

    loaded = hf.load(ours)
    assert loaded.config == decoder.config
    hf.save(loaded, again, shard_bytes=12_000)
    names = sorted(file.name for file in ours.iterdir())
    assert names == sorted(file.name for file in again.iterdir())
    assert [(ours / name).read_bytes() for name in names] == [(again / name).read_bytes() for name in names]

    peer.save_pretrained(theirs)
    back = hf.load(theirs)
    assert back.config == decoder.config
    require_same(logits(back), logits(peer))
    assert sum(p.numel() for p in peer.parameters()) - untied(peer) == decoder.config.count_parameters()


def untied(peer: Any) -> int:
    """Parameters of a head that the class keeps although the configuration ties it."""
    tied = peer.config.tie_word_embeddings and peer.config.model_type == "nemotron_h"
    return peer.lm_head.weight.numel() if tied else 0


def proof(family: str) -> Callable[[], None]:
    @settings(
        max_examples=EXAMPLES, derandomize=True, database=None, deadline=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(sizes=CONFIGS[family], seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
    def check(sizes: dict[str, Any], seed: int, dtype: torch.dtype) -> None:
        with tempfile.TemporaryDirectory() as folder:
            check_both_ways(Path(folder), make(family, sizes, seed, dtype), dtype)

    return check


@pytest.mark.parametrize("family", CONFIGS)
def test_transformers_and_we_agree_on_each_others_folders(family: str) -> None:
    proof(family)()


def test_every_family_is_proven() -> None:
    assert set(CONFIGS) == set(hf.FAMILIES)
