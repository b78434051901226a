"""Nemotron-H (arXiv 2504.03624) and its successors: any pattern, ungated MLPs, no positions."""

import math
from collections.abc import Mapping
from typing import Any

from bloomery.model.config import ModelConfig
from bloomery.model.hf.family import TOKENS, reasons
from bloomery.model.hf.hybrid import TIME_STEPS, Hybrid, read_limit, read_norm_eps, write_limit

BLOCK_TYPES = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
_OLD_BLOCK_TYPES = {"mamba": "M", "attention": "*"}
_ALIASES = {
    "n_groups": "mamba_n_groups", "conv_kernel": "mamba_d_conv", "time_step_min": "mamba_dt_min",
    "time_step_max": "mamba_dt_max", "time_step_limit": "mamba_dt_limit", "time_step_floor": "mamba_dt_init_floor",
    "use_conv_bias": "mamba_conv_bias", "chunk_size": "mamba_chunk_size", "head_dim": "attention_head_dim",
}  # fmt: skip
_COMMON = (
    "vocab_size", "hidden_size", "mlp_hidden_act", "tie_word_embeddings", "max_position_embeddings",
    "initializer_range", *TOKENS,
)  # fmt: skip
_BY_LAYER = {
    "M": (
        "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel", "use_conv_bias", "chunk_size",
        *TIME_STEPS,
    ),
    "*": ("num_attention_heads", "num_key_value_heads", "head_dim"),
    "-": ("intermediate_size", "mlp_bias"),
    "E": (
        "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "mlp_bias",
        "moe_shared_expert_intermediate_size", "moe_latent_size", "n_group", "topk_group", "norm_topk_prob",
        "routed_scaling_factor",
    ),
}  # fmt: skip
_INITIAL_MIN = "time_step_init_min"
_NO_CLAMP = 1e-9


class NemotronH(Hybrid):
    """transformers 5 clamps dt at `time_step_min`, which by its name only shapes the initialisation, and ignores
    `time_step_limit`. So the true lower clamp is written there, and the initial minimum under a name of its own."""

    def refusals(self, config: ModelConfig) -> list[str]:
        experts = "E" in config.pattern
        found = {
            "its MLPs have no gate": config.mlp_gated,
            "it has no rotary positions": config.rope is not None,
            "it has no query/key norm": config.qk_norm,
            "it has no attention biases": config.attention_bias or config.qkv_bias,
            "it has no sliding window": config.sliding_window is not None,
            "it has no upper clamp of dt": "M" in config.pattern and config.time_step_limit[1] != math.inf,
            "its experts' router is sigmoid": experts and config.router_activation != "sigmoid",
            "its E layers always have shared experts": experts and not config.n_shared_experts,
            "its shared experts have no gate": experts and config.shared_expert_gate,
            "its router compares the two best experts of a group": experts and config.n_routed_experts < 2,
        }
        return reasons(found)

    def read_config(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        pattern = _read_pattern(raw)
        keys = [*_COMMON, *(key for kind in dict.fromkeys(pattern) for key in _BY_LAYER.get(kind, ()))]
        found = {key: raw.get(key, raw.get(_ALIASES.get(key, ""))) for key in keys}
        fields: dict[str, Any] = {key: value for key, value in found.items() if value is not None}
        if "time_step_limit" in fields:
            fields["time_step_limit"] = read_limit(fields["time_step_limit"])
        if _INITIAL_MIN in raw:
            fields["time_step_min"] = raw[_INITIAL_MIN]
        return fields | {
            "family": self.model_type, "pattern": pattern, "mlp_gated": False, "norm_eps": read_norm_eps(raw),
        }  # fmt: skip

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
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
            low = config.time_step_limit[0]
            raw |= {
                "time_step_limit": write_limit(config.time_step_limit),
                "time_step_min": low or _NO_CLAMP,
                _INITIAL_MIN: config.time_step_min,
            }
        return raw


def _read_pattern(raw: Mapping[str, Any]) -> str:
    if "hybrid_override_pattern" in raw:
        return raw["hybrid_override_pattern"]
    kinds = {block: kind for kind, block in BLOCK_TYPES.items()} | _OLD_BLOCK_TYPES
    return "".join(kinds.get(block, "?") for block in raw["layers_block_type"])


FAMILY = NemotronH(
    model_type="nemotron_h",
    architecture="NemotronHForCausalLM",
    ties_head=False,
    fixed={
        "use_bias": False, "mamba_proj_bias": False, "attention_bias": False, "mamba_hidden_act": "silu",
        "attention_dropout": 0.0, "hidden_dropout": 0.0, "sliding_window": None,
    },
)  # fmt: skip
