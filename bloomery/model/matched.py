"""The Transformer that a hybrid is compared with: as many parameters, the same width, heads and vocabulary."""

from dataclasses import dataclass
from typing import Literal

from bloomery.errors import ConfigError
from bloomery.model.config import ModelConfig, RopeConfig

TOLERANCE = 0.01  # of all parameters; the Transformer has fewer, never more
_OF_OTHER_MIXERS = {
    "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel", "use_conv_bias", "chunk_size",
    "time_step_limit", "time_step_min", "time_step_max", "time_step_floor", "n_routed_experts", "num_experts_per_tok",
    "moe_intermediate_size", "n_shared_experts", "moe_shared_expert_intermediate_size", "norm_topk_prob",
    "router_activation", "routed_scaling_factor", "shared_expert_gate", "moe_latent_size", "n_group", "topk_group",
}  # fmt: skip


def matched_transformer(
    hybrid: ModelConfig,
    blocks: int | None = None,
    rope: RopeConfig | None = None,
    family: Literal["nemotron_h", "llama"] = "nemotron_h",
) -> ModelConfig:
    """The dense Transformer `*-*-…` with the parameters of `hybrid`, experts all counted, or up to 1 % fewer.

    The MLP's width is the roundest number (the largest power of two divides it) that fits. For the 8B of arXiv
    2504.03624 this is the paper's own pair, Nemotron-T-8B: 32 blocks of width 21,504.

    Args:
        hybrid: any pattern; its attention sizes must be set, with or without a `*` layer.
        blocks: pairs of attention and MLP. Default: as many as leave the MLP no narrower than the hybrid's feed-forward
            layers are on average; fewer, with less cache each, where no width fits.
        rope: rotary positions. Default: those of `hybrid`, mostly none, which is fastest; a Transformer that shall
            learn needs them.
        family: `nemotron_h` keeps the hybrid's MLP, and can be exported as long as there is no `rope` and no gate;
            `llama` has a gated SiLU MLP, always rotates, and can be exported. Squared ReLU with rotary positions, the
            paper's choice, runs here and has no Hugging Face class.

    Raises:
        ConfigError: no such Transformer exists.
    """
    if not (hybrid.num_attention_heads and hybrid.num_key_value_heads and hybrid.head_dim):
        raise ConfigError(
            f"num_attention_heads, num_key_value_heads and head_dim: a pattern like {hybrid.pattern!r} says nothing "
            "about its Transformer's attention; set all three on the hybrid"
        )
    if blocks is not None and blocks < 1:
        raise ConfigError(f"blocks: {blocks}; expected at least 1")
    frame = _Frame(hybrid, rope or hybrid.rope, family)
    counts = range(frame.most_blocks(), 0, -1) if blocks is None else [blocks]
    for count in counts:
        width = frame.roundest(count)
        if width is not None:
            return frame.build(count, width)
    raise ConfigError(
        f"blocks: with {counts[0]}{' or fewer' * (blocks is None)}, no MLP width gives between 99 and 100 % of the "
        f"hybrid's {hybrid.count_parameters():,} parameters; try another number"
    )


@dataclass(frozen=True)
class _Frame:
    """All of the Transformer but its depth and the width of its MLP."""

    hybrid: ModelConfig
    rope: RopeConfig | None
    family: Literal["nemotron_h", "llama"]

    def build(self, blocks: int, intermediate_size: int) -> ModelConfig:
        kept = self.hybrid.model_dump(exclude=_OF_OTHER_MIXERS, exclude_unset=True)
        llama = {"mlp_gated": True, "mlp_hidden_act": "silu", "rope": self.rope or {}}
        changed: dict[str, object] = llama if self.family == "llama" else {"rope": self.rope}
        changed |= {"family": self.family, "pattern": "*-" * blocks, "intermediate_size": intermediate_size}
        return ModelConfig.model_validate(kept | changed)

    def widest(self, blocks: int) -> int:
        """The largest width of the MLP with no more parameters than the hybrid; 0 or less where there is none."""
        smallest, step = (self.build(blocks, width).count_parameters() for width in (1, 2))
        return 1 + (self.hybrid.count_parameters() - smallest) // (step - smallest)

    def most_blocks(self) -> int:
        wanted, blocks = _mean_width(self.hybrid), 1
        if self.family == "llama" and not self.hybrid.mlp_gated:
            wanted = wanted * 2 // 3  # three matrices in place of two
        while self.widest(blocks + 1) >= max(wanted, 1):
            blocks += 1
        return blocks

    def roundest(self, blocks: int) -> int | None:
        """The width divided by the largest power of two that still leaves the parameters within the tolerance."""
        widest, target = self.widest(blocks), self.hybrid.count_parameters()
        for power in reversed(range(max(widest, 0).bit_length())):
            width = widest >> power << power
            if self.build(blocks, width).count_parameters() >= (1 - TOLERANCE) * target:
                return width
        return None


def _mean_width(config: ModelConfig) -> int:
    """Mean inner width of the feed-forward layers, all experts of a layer together; without any, 4 × hidden_size."""
    experts = config.n_routed_experts * config.moe_intermediate_size + config.moe_shared_expert_intermediate_size
    widths = [config.intermediate_size if kind == "-" else experts for kind in config.pattern if kind in "-E"]
    return sum(widths) // len(widths) if widths else 4 * config.hidden_size
