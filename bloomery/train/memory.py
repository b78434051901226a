"""Bytes that training will need, estimated from the sizes alone."""

from bloomery.model.config import ModelConfig
from bloomery.parallel.mapping import Mapping
from bloomery.parallel.work import ModelWork

_STATE_BYTES = 16  # per fp32 parameter: weight, gradient and the two moments of AdamW
_SHARDED_BYTES = 12  # of those, weight and moments, which both ways of sharding over data share out
_FLOAT32_BYTES = 4
_LONGEST_CHUNK = 64  # of the scan on a CPU; a GPU keeps less


def state_bytes(parameters: int) -> int:
    """Weights, gradients and AdamW's moments."""
    return _STATE_BYTES * parameters


def activation_bytes(config: ModelConfig, micro_batch_size: int, seq_len: int, recompute: bool = False) -> int:
    """What one fp32 forward pass keeps for its backward, to within about a quarter.

    The output head is left out: its logits exist in small chunks only. recompute: activation checkpointing, which keeps
    the residual stream before each layer, and one layer's activations while that layer is recomputed.
    """
    layers = [_floats_per_token(config, kind) for kind in config.pattern]
    kept = config.hidden_size * len(layers) + max(layers) if recompute else sum(layers)
    return _FLOAT32_BYTES * micro_batch_size * seq_len * (kept + config.hidden_size)


def rank_state_bytes(config: ModelConfig, mapping: Mapping, seq_len: int) -> int:
    """As `state_bytes`, on the rank of a mapping that holds most; under zero 1 with the weights and gradients gathered
    for the length of a step."""
    work = ModelWork(config, seq_len)
    held = work.held(mapping, work.stages(mapping.pipeline))
    most = []
    for stage in held:
        whole = stage.dense + stage.expert
        shard = stage.dense / (mapping.data * mapping.context) + stage.expert / mapping.expert_data
        gathered = 2 * _FLOAT32_BYTES * whole if shard < whole else _FLOAT32_BYTES * whole
        most.append(_STATE_BYTES * shard if mapping.zero == 3 else _SHARDED_BYTES * shard + gathered)
    return round(max(most))


def _floats_per_token(config: ModelConfig, kind: str) -> int:
    """Numbers kept per token by one layer: its input, the normed input, and what its mixer holds on to."""
    d, per_inner = config.hidden_size, 4 if config.mlp_gated else 2
    if kind == "-":
        return 2 * d + per_inner * config.intermediate_size
    if kind == "*":
        return 2 * d + 2 * config.query_size + 2 * config.key_value_size
    if kind == "E":
        routed = config.num_experts_per_tok * (per_inner * config.moe_intermediate_size + 3 * d)
        return 2 * d + routed + per_inner * config.moe_shared_expert_intermediate_size
    inner = config.mamba_inner_size
    states = inner * config.ssm_state_size // min(config.chunk_size, _LONGEST_CHUNK)
    return 2 * d + sum(config.mamba_in_proj_sizes) + 2 * config.mamba_conv_size + 4 * inner + states
