"""Model folders against transformers: same logits, every tensor accounted for, nothing dropped in silence."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, NemotronHConfig, NemotronHForCausalLM

from bloomery.errors import ArtifactError, ConfigError
from bloomery.model import hf
from bloomery.model.config import ModelConfig, RopeConfig
from bloomery.model.decoder import Decoder

SIZES = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 6, "n_groups": 2, "chunk_size": 8}
EXPERTS = {
    "n_routed_experts": 4, "moe_intermediate_size": 12, "n_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 20, "routed_scaling_factor": 1.5,
}  # fmt: skip
NO_ATTENTION = {"intermediate_size": 0, "num_attention_heads": 0, "num_key_value_heads": 0, "head_dim": 0}
LLAMA = {"family": "llama", "pattern": "*-*-", "mlp_gated": True, "mlp_hidden_act": "silu", "rope": RopeConfig()}
SCALED = RopeConfig(rope_type="llama3", factor=8, original_max_position_embeddings=16, rope_theta=500.0)
MODELS = {
    "hybrid": {"pattern": "M-M*-", **MAMBA},
    "experts": {"pattern": "ME*E-", "tie_word_embeddings": True, **MAMBA, **EXPERTS},
    "clamped": {
        "pattern": "M*-",
        **MAMBA,
        "time_step_limit": (0.02, math.inf),
        "mlp_bias": True,
        "use_conv_bias": False,
    },
    "mamba only": {"pattern": "MM", **MAMBA, **NO_ATTENTION},
    "llama": LLAMA,
    "llama tied": LLAMA | {"tie_word_embeddings": True, "rope": SCALED, "attention_bias": True, "mlp_bias": True},
    "llama linear": LLAMA | {"rope": RopeConfig(rope_type="linear", factor=4)},
}
SEQ = 2 * 8 + 5


@torch.no_grad()
def make(name: str) -> Decoder:
    torch.manual_seed(5)
    decoder = Decoder(ModelConfig(**SIZES | MODELS[name])).eval()
    for parameter_name, parameter in decoder.named_parameters():
        if parameter.dim() == 1 and not parameter_name.endswith(("A_log", "dt_bias")):
            parameter.add_(torch.randn_like(parameter) / 4)
        elif parameter.dim() > 1:
            parameter.mul_(6 if "conv1d" not in parameter_name else 1)
    for buffer_name, buffer in decoder.named_buffers():
        if buffer_name.endswith("correction_bias"):
            buffer.uniform_(-0.2, 0.2)
    return decoder


@pytest.fixture(params=MODELS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return make(request.param)


def tokens() -> torch.Tensor:
    return torch.randint(3, 61, (2, SEQ), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_transformers_gives_the_same_logits_and_text(decoder: Decoder, tmp_path: Path) -> None:
    hf.save(decoder, tmp_path)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours, theirs = decoder.lm_head(decoder(tokens())), peer(tokens()).logits
    assert theirs.std() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    if decoder.config.time_step_limit[0] == 0:  # transformers does not clamp when it decodes
        text = peer.generate(tokens()[:1], max_new_tokens=8, do_sample=False)
        assert text[0, SEQ:].tolist() == greedy(decoder, 8)


def greedy(decoder: Decoder, count: int) -> list[int]:
    ids, new = tokens()[:1], []
    while len(new) < count and 2 not in new:
        new.append(int(decoder.lm_head(decoder(ids)[:, -1]).argmax()))
        ids = torch.cat([ids, torch.tensor([new[-1:]])], 1)
    return new


def test_export_import_export_is_identical_to_the_byte(decoder: Decoder, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for dtype in (None, torch.bfloat16):
        hf.save(decoder, first, dtype, shard_bytes=20_000)
        hf.save(hf.load(first), second, shard_bytes=20_000)
        names = sorted(file.name for file in first.iterdir())
        assert names == sorted(file.name for file in second.iterdir())
        assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    assert hf.load_config(first) == decoder.config


def test_shards_have_an_index_and_old_files_go(tmp_path: Path) -> None:
    decoder = make("hybrid")
    hf.save(decoder, tmp_path, shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in decoder.parameters())
    (tmp_path / "tokenizer.json").write_text("{}")
    hf.save(decoder, tmp_path)
    assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]
    assert (tmp_path / "tokenizer.json").exists()


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("clamp", [0.001, 0.05])
def test_a_nemotron_h_saved_by_transformers(clamp: float, tmp_path: Path) -> None:
    """Its forward clamps dt at time_step_min whatever time_step_limit says; parity needs the limit to say so too."""
    config = NemotronHConfig(hybrid_override_pattern="M-M*E", **SIZES, **MAMBA, **EXPERTS, time_step_min=clamp)
    peer = randomised(NemotronHForCausalLM(config))
    peer.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert hf.load_config(tmp_path).time_step_limit == (0.0, math.inf)
    raw["time_step_limit"] = [clamp, {"__float__": "Infinity"}]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ours = hf.load(tmp_path)
    assert ours.config.pattern == "M-M*E"
    torch.testing.assert_close(ours.lm_head(ours(tokens())), peer(tokens()).logits, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_saved_by_transformers(tied: bool, tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES, num_hidden_layers=2, tie_word_embeddings=tied, rope_theta=700.0)
    peer = randomised(LlamaForCausalLM(config))
    peer.save_pretrained(tmp_path)
    ours = hf.load(tmp_path)
    torch.testing.assert_close(ours.lm_head(ours(tokens())), peer(tokens()).logits, rtol=0, atol=1e-4)


def test_exported_head_width_has_both_spellings_and_the_pattern_both_forms(tmp_path: Path) -> None:
    hf.save(make("experts"), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["head_dim"] == raw["attention_head_dim"] == 8
    assert raw["hybrid_override_pattern"] == "ME*E-"
    assert raw["layers_block_type"] == ["linear_attention", "moe", "full_attention", "moe", "mlp"]
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {f"backbone.layers.1.mixer.experts.{e}.up_proj.weight" for e in range(4)} <= set(names)


def test_time_scales_stay_in_float32(tmp_path: Path) -> None:
    hf.save(make("hybrid"), tmp_path, torch.bfloat16)
    decoder = hf.load(tmp_path)
    assert decoder.embeddings.weight.dtype == torch.bfloat16
    assert {decoder.layers[0].mixer.A_log.dtype, decoder.layers[0].mixer.dt_bias.dtype} == {torch.float32}
    assert hf.load(tmp_path, torch.float32).embeddings.weight.dtype == torch.float32


def edit(folder: Path, **changes: object) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hybrid_override_pattern": "-MM*-"},
            "layer 0 is MLP in the pattern '-MM[*]-', but its tensors are those of Mamba-2",
        ),
        ({"hybrid_override_pattern": "M-M*"}, "tensors of layer 4, but the pattern has 4 layers"),
        ({"hybrid_override_pattern": "M-M*--"}, "missing tensors: backbone.layers.5.norm.weight"),
        ({"intermediate_size": 48}, r"up_proj.weight: shape \(40, 24\) for .*, expected \(48, 24\)"),
        ({"use_conv_bias": False}, "tensors with no place in the model: backbone.layers.0.mixer.conv1d.bias"),
        ({"tie_word_embeddings": True}, "lm_head and embeddings differ"),
    ],
)
def test_tensors_that_contradict_the_config_are_refused(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    hf.save(make("hybrid"), tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ArtifactError, match=message):
        hf.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; choose llama, mamba2, "),
        ({"sliding_window": 16}, "sliding_window 16 is not supported; only None is. Load this model with transformers"),
        ({"use_bias": True}, "use_bias True is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not supported"),
        ({"n_groups": 3}, "n_groups 3 does not divide"),
        ({"hybrid_override_pattern": "M?"}, "unknown character"),
    ],
)
def test_unsupported_features_are_refused_by_name(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    hf.save(make("hybrid"), tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        hf.load(tmp_path)


def test_damaged_and_absent_files_are_named(tmp_path: Path) -> None:
    hf.save(make("llama"), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="cannot be read as safetensors"):
        hf.load(tmp_path)
    weights.unlink()
    with pytest.raises(ArtifactError, match="found neither model.safetensors nor"):
        hf.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ArtifactError, match="no such file"):
        hf.load(tmp_path)


def test_a_superfluous_tensor_is_refused(tmp_path: Path) -> None:
    hf.save(make("llama"), tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, file)
    with pytest.raises(ArtifactError, match="no place in the model: model.layers.0.self_attn.q_norm.weight"):
        hf.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pattern": "M*-", **MAMBA, "rope": RopeConfig()}, "it has no rotary positions"),
        ({"pattern": "M*-", **MAMBA, "mlp_gated": True}, "its MLPs have no gate"),
        ({"pattern": "M", **MAMBA, "time_step_limit": (0.0, 0.5)}, "it has no upper clamp of dt"),
        (LLAMA | {"pattern": "*--"}, "pattern '[*]--' is not '[*]-' repeated"),
        (LLAMA | {"rope": None}, "it always has rotary positions"),
        (LLAMA | {"sliding_window": 4}, "it has no sliding window"),
    ],
)
def test_a_model_no_class_can_hold_is_refused_with_the_reason(
    changes: dict[str, object], reason: str, tmp_path: Path
) -> None:
    decoder = Decoder(ModelConfig(**SIZES | changes))
    with pytest.raises(ConfigError, match=f"cannot hold this model: {reason}"):
        hf.save(decoder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
