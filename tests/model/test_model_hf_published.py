"""The published checkpoints: their configurations give their parameters, and their odd corners are read or refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from bloomery.errors import ArtifactError, ConfigError
from bloomery.model import hf
from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.decoder import Decoder
from bloomery.model.rope import attention_factor, inverse_frequencies
from bloomery.model.state import DecodeState

LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {
    # config.json, parameters in the files, parameters a token passes through
    "Llama-2-7b": ({
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096,
    }, 6_738_415_616, 6_738_415_616),
    "Llama-3.2-1B": ({
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "tie_word_embeddings": True, "rope_theta": 500000.0, "rope_scaling": LLAMA3, "max_position_embeddings": 131072,
    }, 1_235_814_400, 1_235_814_400),
    "Qwen2.5-7B": ({
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "rope_theta": 1e6,
        "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28,
    }, 7_615_616_512, 7_615_616_512),
    "Qwen3-0.6B": ({
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": True,
    }, 596_049_920, 596_049_920),
    "Mistral-7B-v0.1": ({
        "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096,
    }, 7_241_732_096, 7_241_732_096),
    "Mixtral-8x7B": ({
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }, 46_702_792_704, 12_879_925_248),
    "Qwen1.5-MoE-A2.7B": ({
        "model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 60,
        "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "decoder_sparse_step": 1, "norm_topk_prob": False, "use_sliding_window": False, "sliding_window": 32768,
    }, 14_315_784_192, 2_689_173_504),
    "Qwen3-30B-A3B": ({
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "norm_topk_prob": True,
    }, 30_532_122_624, 3_353_032_704),
    "Mamba-Codestral-7B": ({
        "model_type": "mamba2", "vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 64, "num_heads": 128,
        "head_dim": 64, "state_size": 128, "n_groups": 8, "expand": 2, "conv_kernel": 4,
        "time_step_limit": [0.0, math.inf],
    }, 7_285_403_648, 7_285_403_648),
    "Nemotron-3-Nano-30B-A3B": ({
        "model_type": "nemotron_h", "vocab_size": 131072, "hidden_size": 2688, "hybrid_override_pattern": NANO,
        "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "mamba_num_heads": 64,
        "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4, "n_routed_experts": 128,
        "num_experts_per_tok": 6, "moe_intermediate_size": 1856, "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": 3712, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1,
    }, 31_577_937_344, 3_580_073_408),
}  # fmt: skip


def write(folder: Path, raw: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_gives_the_published_parameters(name: str, tmp_path: Path) -> None:
    raw, parameters, active = PUBLISHED[name]
    config = hf.load_config(write(tmp_path, raw))
    assert (config.count_parameters(), config.count_parameters(active=True)) == (parameters, active)
    assert hf.load_config(write(tmp_path, hf.export_config(config))) == config


SMALL = {
    "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 4, "mlp_gated": True, "mlp_hidden_act": "silu", "rope": RopeConfig(),
}  # fmt: skip
EXPERTS = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "router_activation": "softmax",
}  # fmt: skip
SHARED = {"n_shared_experts": 1, "moe_shared_expert_intermediate_size": 8, "shared_expert_gate": True}
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 6, "n_groups": 2, "chunk_size": 4}
HYBRID = {
    "vocab_size": 37, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 4, **MAMBA,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"pattern": "*-*-", **SMALL},
    "qwen2": {"pattern": "*-*-", "qkv_bias": True, **SMALL},
    "mixtral": {"pattern": "*E*E", **SMALL, **EXPERTS},
    "qwen2_moe": {"pattern": "*E*-*E", **SMALL, **EXPERTS, **SHARED},
    "qwen3_moe": {"pattern": "*E*-*E", "qk_norm": True, **SMALL, **EXPERTS},
}


def saved(family: str, folder: Path, **changes: object) -> Decoder:
    torch.manual_seed(1)
    decoder = Decoder(ModelConfig(**{"family": family, **MODELS.get(family, HYBRID), **changes})).eval()
    hf.save(decoder, folder)
    return decoder


def edit(folder: Path, **changes: object) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def require_equal(one: Decoder, other: Decoder) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "nemotron_h"])
def test_experts_are_read_as_transformers_holds_them_in_memory(family: str, tmp_path: Path) -> None:
    sizes = {"n_routed_experts": 4, "moe_intermediate_size": 12, "n_shared_experts": 1,
             "moe_shared_expert_intermediate_size": 8, "pattern": "*EM"} if family == "nemotron_h" else {}  # fmt: skip
    decoder = saved(family, tmp_path / "ours", **sizes)
    peer = getattr(transformers, hf.FAMILIES[family].architecture).from_pretrained(tmp_path / "ours")
    peer.save_pretrained(tmp_path / "theirs", save_original_format=False)
    names = load_file(tmp_path / "theirs" / "model.safetensors")
    assert any(name.endswith(("experts.gate_up_proj", "experts.up_proj")) for name in names)
    require_equal(decoder, hf.load(tmp_path / "theirs"))


def test_published_names_of_experts(tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "mixtral")
    saved("qwen2_moe", tmp_path / "qwen")
    layer = "model.layers.0.block_sparse_moe"
    expected = {f"{layer}.gate.weight"} | {f"{layer}.experts.{e}.w{w}.weight" for e in range(4) for w in (1, 2, 3)}
    assert expected <= load_file(tmp_path / "mixtral" / "model.safetensors").keys()
    names = load_file(tmp_path / "qwen" / "model.safetensors").keys()
    assert {"model.layers.2.mlp.shared_expert_gate.weight", "model.layers.1.mlp.gate_proj.weight"} <= names
    raw = json.loads((tmp_path / "qwen" / "config.json").read_text())
    assert (raw["decoder_sparse_step"], raw["mlp_only_layers"]) == (1, [1])


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"decoder_sparse_step": 2, "mlp_only_layers": []}, "*-*E*-*E"),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, "*-*E*-*-"),
        ({"decoder_sparse_step": 1, "mlp_only_layers": [0]}, "*-*E*E*E"),
    ],
)
def test_which_layers_have_experts(changes: dict[str, Any], pattern: str, tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path)
    edit(tmp_path, num_hidden_layers=4, **changes)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        peer = transformers.AutoModelForCausalLM.from_config(config)
    theirs = ["E" if hasattr(layer.mlp, "experts") else "-" for layer in peer.model.layers]
    assert hf.load_config(tmp_path).pattern == pattern == "*" + "*".join(theirs)


def test_layers_for_multi_token_prediction_are_left_out(tmp_path: Path) -> None:
    decoder = saved("nemotron_h", tmp_path, pattern="M*")
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"mtp.layers.0.mixer.q_proj.weight": torch.ones(4)}, file)
    edit(tmp_path, num_nextn_predict_layers=1)
    require_equal(decoder, hf.load(tmp_path))


@torch.no_grad()
@pytest.mark.parametrize("family", ["nemotron_h", "mamba2"])
@pytest.mark.parametrize("low", [0.0, 0.05])
def test_dt_is_clamped_as_the_configuration_says_also_when_decoding(family: str, low: float, tmp_path: Path) -> None:
    """transformers clamps dt in a forward over many tokens and never in one over a single token. Ours always does, so
    the two agree on prompts, and in decoding only where nothing is to clamp."""
    pattern = {"nemotron_h": "M*M", "mamba2": "MM"}[family]
    decoder = saved(family, tmp_path, pattern=pattern, time_step_limit=(low, math.inf), initializer_range=0.5)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 37, (1, 13), generator=torch.Generator().manual_seed(2))
    whole = decoder.lm_head(decoder(ids))
    torch.testing.assert_close(whole, peer(ids, use_cache=False).logits, rtol=0, atol=1e-4)

    state = DecodeState.allocate(decoder.config, 1, 13)
    decoder(ids[:, :-1], state=state)
    ours = decoder.lm_head(decoder(ids[:, -1:], state=state))[0, -1]
    torch.testing.assert_close(ours, whole[0, -1], rtol=0, atol=1e-4)

    memory = transformers.DynamicCache(config=peer.config)
    given = {"cache_params" if family == "mamba2" else "past_key_values": memory, "use_cache": True}
    peer(ids[:, :-1], **given)
    theirs = peer(ids[:, -1:], **given).logits[0, -1]
    assert ((ours - theirs).abs().max() < 1e-4) == (low == 0)


ROPE = "rope_parameters"
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {ROPE: {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported, .* set rope_type to"),
    ("llama", {ROPE: {"rope_type": "longrope"}}, "rope_type 'longrope' is not supported, .* load the model with"),
    ("llama", {ROPE: {"rope_type": "new"}}, "rope_type 'new' is not supported, only default, linear, llama3, yarn"),
    ("llama", {ROPE: {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; only 'silu' is"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None},
     "layer_types: 1 of 2 attention layers have a sliding window; .* use_sliding_window: false"),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 8, "layer_types": None}, "layer_types: missing"),
    ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "must both be zero or both be positive"),
    ("qwen3_moe", {"num_experts_per_tok": 5}, "num_experts_per_tok 5 must lie between 1 and n_routed_experts 4"),
    ("mamba2", {"use_bias": True}, "use_bias True is not supported"),
    ("mamba2", {"time_step_limit": 3}, "time_step_limit: 3, expected the two bounds"),
    ("nemotron_h", {"n_group": 3}, "n_group 3 must divide n_routed_experts 4"),
    ("nemotron_h", {"n_group": 2, "topk_group": 3}, "topk_group 3 must be at most n_group 2"),
    ("nemotron_h", {"moe_latent_size": 0}, "moe_latent_size"),
    ("mixtral", {"num_local_experts": None}, "n_routed_experts"),
    ("mixtral", {"quantization_config": {"bits": 4}}, "quantised weights are not supported; load the original"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    sizes = {"nemotron_h": {"pattern": "E*", "n_routed_experts": 4, "moe_intermediate_size": 8, "n_shared_experts": 1,
                            "moe_shared_expert_intermediate_size": 8}, "mamba2": {"pattern": "M"}}  # fmt: skip
    saved(family, tmp_path, **sizes.get(family, {}))
    edit(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        hf.load(tmp_path)


def change(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name, None)
    save_file(tensors | ({} if tensor is None else {name: tensor}), folder / "model.safetensors")


EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (EXPERT, None, f"missing tensors: {EXPERT}"),
        (EXPERT, torch.ones(3, 16), "the experts' shapes differ"),
        (EXPERT.replace("3", "4"), torch.ones(12, 16), "no place in the model: model.layers.0.mlp.experts.4.up_proj"),
        ("model.layers.0.mlp.shared_expert_gate.weight", torch.ones(2, 16), r"shape \(2, 16\) .*expected \(1, 16\)"),
        ("model.layers.1.mlp.gate.weight", torch.ones(4, 16), "layer 3 is MLP in the pattern|no place in the model"),
        ("model.layers.3.mlp.up_proj.weight", torch.ones(24, 16), "tensors of layer 7, but the pattern has 6"),
    ],
)
def test_tensors_that_contradict_the_configuration_are_refused(
    name: str, tensor: torch.Tensor | None, message: str, tmp_path: Path
) -> None:
    saved("qwen2_moe", tmp_path)
    change(tmp_path, name, tensor)
    with pytest.raises(ArtifactError, match=message):
        hf.load(tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("mistral", {"pattern": "*-", "attention_bias": True, **SMALL}, "its attention_bias is always False"),
        ("qwen3", {"pattern": "*-", **SMALL}, "its qk_norm is always True"),
        ("mixtral", {"norm_topk_prob": False}, "its norm_topk_prob is always True"),
        ("mixtral", {"pattern": "*E*-"}, "pattern '[*]E[*]-' is not '[*]E' repeated"),
        ("qwen2_moe", {"pattern": "*-"}, "is not '[*]-' or '[*]E' repeated with an E somewhere"),
        ("qwen2_moe", {"shared_expert_gate": False}, "always have one shared expert with a gate"),
        ("qwen3_moe", SHARED, "it has no shared experts"),
        ("mamba2", {"pattern": "M*"}, "pattern 'M[*]' is not M alone"),
        ("mamba2", {"pattern": "M", "hidden_size": 24}, "32 is not a whole multiple of hidden_size 24"),
        ("nemotron_h", {"pattern": "*E", **EXPERTS, **SHARED}, "router is sigmoid; its shared experts have no gate"),
    ],
)
def test_a_model_that_a_class_cannot_hold_is_refused(
    family: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"cannot hold this model: .*{reason}"):
        saved(family, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_yarn_as_old_configurations_write_it(tmp_path: Path) -> None:
    saved("qwen2", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw[ROPE]
    yarn = {"type": "yarn", "factor": 4.0, "mscale": 0.5, "mscale_all_dim": 1.0}
    write(tmp_path, raw | {"rope_theta": 1000.0, "rope_scaling": yarn, "max_position_embeddings": 64})
    rope = hf.load_config(tmp_path).rope
    assert rope is not None
    assert (rope.rope_type, rope.rope_theta, rope.original_max_position_embeddings) == ("yarn", 1000.0, 64)
    assert rope.attention_factor == pytest.approx((0.05 * math.log(4) + 1) / (0.1 * math.log(4) + 1))


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("beta_fast", [32.0, 6.5])
@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_yarn_frequencies_are_those_of_transformers(factor: float, beta_fast: float, truncate: bool) -> None:
    yarn = {"rope_type": "yarn", "factor": factor, "beta_fast": beta_fast, "beta_slow": 1.5, "truncate": truncate,
            "rope_theta": 1e4, "original_max_position_embeddings": 2048}  # fmt: skip
    config = transformers.LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64, rope_parameters=dict(yarn))
    frequencies, scale = ROPE_INIT_FUNCTIONS["yarn"](config)
    rope = RopeConfig(**yarn)
    torch.testing.assert_close(inverse_frequencies(rope, 64), frequencies, rtol=1e-5, atol=0)
    assert attention_factor(rope) == pytest.approx(scale)
