"""What a model will cost, from its `config.json` alone: parameters, bytes, operations. Reads no weights."""

from collections import Counter
from typing import Any

import torch

from bloomery.model import hf, roofline
from bloomery.model.config import MIXERS, ModelConfig

CONTEXTS = (2_048, 8_192, 65_536, 131_072, 1_048_576)
"""Lengths in tokens for which the cache is given."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_COMMON = ("vocab_size", "hidden_size", "tie_word_embeddings", "max_position_embeddings")
_BY_LAYER = {
    "M": ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel", "time_step_limit"),
    "*": ("num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window", "qk_norm", "rope"),
    "-": ("intermediate_size", "mlp_hidden_act", "mlp_gated"),
    "E": (
        "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size",
        "moe_latent_size", "router_activation", "mlp_hidden_act", "mlp_gated",
    ),
}  # fmt: skip


def summarize(config: ModelConfig) -> dict[str, Any]:
    """Everything that follows from the sizes.

    `cache_bytes` is per sequence, keys and values in bfloat16, Mamba-2 states in float32; `forward_flops_per_token` is
    the mean over a prompt of that many tokens. Both map a context length to a number. `against_transformer`, of a
    hybrid, is what bytes alone say of decoding next to the Transformer of its size.
    """
    names = dict.fromkeys([*_COMMON, *(name for kind in config.pattern for name in _BY_LAYER[kind])])
    sizes = config.model_dump(mode="json", include=set(names))
    parameters = config.count_parameters()
    hybrid = {"M", "*"} <= set(config.pattern)
    return {
        "family": config.family,
        "architecture": hf.FAMILIES[config.family].architecture,
        "pattern": config.pattern,
        "layers": {MIXERS[kind]: count for kind, count in Counter(config.pattern).items()},
        "sizes": {name: sizes[name] for name in names},
        "parameters": parameters,
        "active_parameters": config.count_parameters(active=True),
        "weight_bytes": {hf.dtype_name(dtype): parameters * dtype.itemsize for dtype in _DTYPES},
        "cache_bytes": {context: config.cache_bytes(1, context, torch.bfloat16) for context in CONTEXTS},
        "forward_flops_per_token": {context: config.flops_per_token(context) // 3 for context in CONTEXTS},
        **({"against_transformer": roofline.against_transformer(config)} if hybrid else {}),
    }
