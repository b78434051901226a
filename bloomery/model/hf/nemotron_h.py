"""Nemotron-H (`model_type: nemotron_h`): any pattern, ungated MLPs, no positions (arXiv 2504.03624)."""

import math
from typing import Any

from bloomery.model.config import ModelConfig

ARCHITECTURE = "NemotronHForCausalLM"
TIES_HEAD = False
"""Its class reads `lm_head` from the file even when `tie_word_embeddings` is set, so the head is always written."""

FIXED = {
    "use_bias": False, "mamba_proj_bias": False, "attention_bias": False, "mamba_hidden_act": "silu",
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "sliding_window": None, "moe_latent_size": None,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
"""Keys of `config.json` that this family can only have at these values."""

BLOCK_TYPES = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
_OLD_BLOCK_TYPES = {"mamba": "M", "attention": "*"}
_ALIASES = {
    "n_groups": "mamba_n_groups", "conv_kernel": "mamba_d_conv", "time_step_min": "mamba_dt_min",
    "time_step_max": "mamba_dt_max", "time_step_limit": "mamba_dt_limit", "time_step_floor": "mamba_dt_init_floor",
    "use_conv_bias": "mamba_conv_bias", "chunk_size": "mamba_chunk_size", "head_dim": "attention_head_dim",
}  # fmt: skip
_COMMON = (
    "vocab_size", "hidden_size", "mlp_hidden_act", "tie_word_embeddings", "max_position_embeddings",
    "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
_BY_LAYER = {
    "M": (
        "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel", "use_conv_bias", "chunk_size",
        "time_step_limit", "time_step_min", "time_step_max", "time_step_floor",
    ),
    "*": ("num_attention_heads", "num_key_value_heads", "head_dim"),
    "-": ("intermediate_size", "mlp_bias"),
    "E": (
        "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "mlp_bias",
        "moe_shared_expert_intermediate_size", "norm_topk_prob", "routed_scaling_factor",
    ),
}  # fmt: skip
_INITIAL_MIN = "time_step_init_min"
_NO_CLAMP = 1e-9
_MARKS = {"in_proj": "M", "q_proj": "*", "gate": "E", "up_proj": "-"}


def refusals(config: ModelConfig) -> list[str]:
    """Why the Hugging Face class cannot hold this model; empty when it can."""
    found = {
        "its MLPs have no gate": config.mlp_gated,
        "it has no rotary positions": config.rope is not None,
        "it has no query/key norm": config.qk_norm,
        "it has no attention biases": config.attention_bias,
        "it has no sliding window": config.sliding_window is not None,
        "it has no upper clamp of dt": "M" in config.pattern and config.time_step_limit[1] != math.inf,
        "its experts' router is sigmoid": "E" in config.pattern and config.router_activation != "sigmoid",
        "its E layers always have shared experts": "E" in config.pattern and not config.n_shared_experts,
    }
    return [reason for reason, applies in found.items() if applies]


def read_config(raw: dict[str, Any]) -> dict[str, Any]:
    """`config.json` → the fields of `ModelConfig`."""
    pattern = _read_pattern(raw)
    keys = [*_COMMON, *(key for kind in dict.fromkeys(pattern) for key in _BY_LAYER.get(kind, ()))]
    found = {key: raw.get(key, raw.get(_ALIASES.get(key, ""))) for key in keys}
    fields: dict[str, Any] = {key: value for key, value in found.items() if value is not None}
    if "time_step_limit" in fields:
        fields["time_step_limit"] = tuple(_number(bound) for bound in fields["time_step_limit"])
    if _INITIAL_MIN in raw:
        fields["time_step_min"] = raw[_INITIAL_MIN]
    eps = next((raw[key] for key in ("layer_norm_epsilon", "rms_norm_eps", "norm_eps") if key in raw), 1e-5)
    return fields | {"family": "nemotron_h", "pattern": pattern, "mlp_gated": False, "norm_eps": eps}


def _read_pattern(raw: dict[str, Any]) -> str:
    if "hybrid_override_pattern" in raw:
        return raw["hybrid_override_pattern"]
    kinds = {block: kind for kind, block in BLOCK_TYPES.items()} | _OLD_BLOCK_TYPES
    return "".join(kinds.get(block, "?") for block in raw["layers_block_type"])


def _number(value: Any) -> float:
    """A number as transformers writes it: infinity is `{"__float__": "Infinity"}`."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of `ModelConfig` → `config.json`, with the spellings that old and new readers look for."""
    keys = [*_COMMON, *(key for kind in BLOCK_TYPES if kind in config.pattern for key in _BY_LAYER[kind])]
    raw = {key: getattr(config, key) for key in dict.fromkeys(keys)}
    raw |= {
        "hybrid_override_pattern": config.pattern,
        "layers_block_type": [BLOCK_TYPES[kind] for kind in config.pattern],
        "num_hidden_layers": config.num_layers,
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": False,
        "use_cache": "*" in config.pattern,  # transformers 5 cannot size a cache without an attention layer
    }
    if "*" in config.pattern:
        raw["attention_head_dim"] = config.head_dim
    if "M" in config.pattern:
        raw |= _write_time_steps(config)
    return raw


def _write_time_steps(config: ModelConfig) -> dict[str, Any]:
    """transformers 5 clamps dt at `time_step_min`, which by its name only shapes the initialisation, and ignores
    `time_step_limit`. So the true lower clamp goes there, and the initial minimum under a name of its own."""
    low = config.time_step_limit[0]
    return {
        "time_step_limit": [low, {"__float__": "Infinity"}],
        "time_step_min": low or _NO_CLAMP,
        _INITIAL_MIN: config.time_step_min,
    }


def file_name(config: ModelConfig, name: str) -> str:
    """The parameter's name in the file, without expert numbers."""
    if name.startswith("lm_head."):
        return name
    return "backbone." + ("norm_f.weight" if name == "norm.weight" else name)


def canonical(name: str) -> str | None:
    """The present-day form of a name found in a file; `None` for tensors that are no part of the model."""
    if name.startswith("mtp."):
        return None
    return "backbone." + name.removeprefix("model.") if name.startswith("model.") else name


def found_pattern(names: set[str]) -> dict[int, str]:
    """What the tensor names say each layer is."""
    found = {}
    for name in names:
        parts = name.split(".")
        if name.startswith("backbone.layers.") and parts[3] == "mixer" and parts[4] in _MARKS:
            found[int(parts[2])] = _MARKS[parts[4]]
    return found
