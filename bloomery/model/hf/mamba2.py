"""Mamba-2 (arXiv 2405.21060): Mamba layers alone."""

from collections.abc import Mapping
from typing import Any

from bloomery.model.config import ModelConfig
from bloomery.model.hf.family import TOKENS, present, reasons
from bloomery.model.hf.hybrid import TIME_STEPS, Hybrid, read_limit, read_norm_eps, write_limit

_SAME = (
    "vocab_size", "hidden_size", "n_groups", "conv_kernel", "use_conv_bias", "chunk_size", "tie_word_embeddings",
    "max_position_embeddings", "initializer_range", *TIME_STEPS, *TOKENS,
)  # fmt: skip
_RENAMED = {"mamba_num_heads": "num_heads", "mamba_head_dim": "head_dim", "ssm_state_size": "state_size"}


class Mamba2(Hybrid):
    """`time_step_limit` means here what it says, in one forward; the class does not clamp when it decodes."""

    def refusals(self, config: ModelConfig) -> list[str]:
        found = {
            f"pattern {config.pattern!r} is not M alone": set(config.pattern) != {"M"},
            f"mamba_num_heads × mamba_head_dim {config.mamba_inner_size} is not a whole multiple of hidden_size "
            f"{config.hidden_size}": config.mamba_inner_size % config.hidden_size,
        }
        return reasons(found)

    def read_config(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        fields = present(raw, _SAME) | {ours: raw[theirs] for ours, theirs in _RENAMED.items()}
        if "time_step_limit" in fields:
            fields["time_step_limit"] = read_limit(fields["time_step_limit"])
        return fields | {
            "family": self.model_type,
            "pattern": "M" * raw["num_hidden_layers"],
            "norm_eps": read_norm_eps(raw),
        }

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        raw = {key: getattr(config, key) for key in _SAME}
        return raw | {theirs: getattr(config, ours) for ours, theirs in _RENAMED.items()} | {
            "num_hidden_layers": config.num_layers,
            "expand": config.mamba_inner_size // config.hidden_size,
            "layer_norm_epsilon": config.norm_eps,
            "time_step_limit": write_limit(config.time_step_limit),
            "residual_in_fp32": False,
        }  # fmt: skip


FAMILY = Mamba2(
    model_type="mamba2",
    architecture="Mamba2ForCausalLM",
    fixed={"use_bias": False, "hidden_act": "silu", "rms_norm": True},
)
