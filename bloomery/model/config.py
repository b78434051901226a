"""Sizes of a decoder in Hugging Face names, and what follows from them: parameters, FLOPs, cache bytes.

Formulas: arXiv 2504.03624 (Nemotron-H) with the layer arithmetic of Mamba-2 (arXiv 2405.21060).
"""

import warnings
from collections import Counter
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from bloomery.config import Config

if TYPE_CHECKING:
    import torch

MIXERS = {"M": "Mamba-2", "*": "attention", "-": "MLP", "E": "experts"}
FLOAT32_BYTES = 4


class RopeConfig(Config):
    """Rotary position embedding (arXiv 2104.09864), the keys of `rope_parameters` in `config.json`."""

    rope_theta: float = Field(10000.0, gt=0, description="Base of the rotation wavelengths (dimensionless)")
    rope_type: Literal["default", "linear", "llama3", "yarn"] = Field("default", description="How frequencies change")
    factor: float = Field(1.0, ge=1, description="Context extension factor of all but `default` (dimensionless)")
    original_max_position_embeddings: int = Field(
        8192, ge=1, description="`llama3`, `yarn`: context before extension, tokens"
    )
    low_freq_factor: float = Field(1.0, gt=0, description="`llama3`: below this many turns in the old context, rescale")
    high_freq_factor: float = Field(4.0, gt=0, description="`llama3`: above this many turns in the old context, keep")
    beta_fast: float = Field(32.0, gt=0, description="`yarn`: above this many turns in the old context, keep")
    beta_slow: float = Field(1.0, gt=0, description="`yarn`: below this many turns in the old context, rescale")
    truncate: bool = Field(True, description="`yarn`: the bounds of the blend are rounded outwards to whole pairs")
    attention_factor: float | None = Field(
        None, ge=0, description="`yarn`: multiplies queries and keys; none means 0.1·ln(factor) + 1 (dimensionless)"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} must be above low_freq_factor {self.low_freq_factor}"
            )
        if self.rope_type == "yarn" and self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast {self.beta_fast} must not be below beta_slow {self.beta_slow}")
        return self


class ModelConfig(Config):
    """A decoder: one character of `pattern` per residual layer, and the sizes of each kind of layer."""

    family: Literal[
        "nemotron_h", "llama", "mamba2", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"
    ] = Field("nemotron_h", description="Hugging Face model type of the export")
    pattern: str = Field(description="One character a layer: M Mamba-2, * attention, - MLP, E experts")
    vocab_size: int = Field(ge=1, description="Rows of the embedding table (tokens)")
    hidden_size: int = Field(ge=1, description="Width of the residual stream (channels)")
    intermediate_size: int = Field(0, ge=0, description="Inner width of an MLP layer (channels)")
    mlp_hidden_act: Literal["silu", "relu2"] = Field("relu2", description="Activation of MLPs and experts")
    mlp_gated: bool = Field(False, description="down(act(gate(x))·up(x)) instead of down(act(up(x)))")
    mlp_bias: bool = Field(False, description="Biases in the MLP projections")

    num_attention_heads: int = Field(0, ge=0, description="Query heads (count)")
    num_key_value_heads: int = Field(0, ge=0, description="Key and value heads (count)")
    head_dim: int = Field(0, ge=0, description="Width of one attention head (channels)")
    attention_bias: bool = Field(False, description="Biases in q, k, v and o projections")
    qkv_bias: bool = Field(False, description="Biases in q, k and v projections, whatever attention_bias says")
    qk_norm: bool = Field(False, description="RMSNorm over each query and key head, before the rotation")
    sliding_window: int | None = Field(None, ge=1, description="Attend to this many last tokens only (tokens)")
    rope: RopeConfig | None = Field(None, description="Rotary position embedding; none means no position signal")

    mamba_num_heads: int = Field(0, ge=0, description="Mamba-2 heads (count)")
    mamba_head_dim: int = Field(64, ge=1, description="Width of one Mamba-2 head (channels)")
    ssm_state_size: int = Field(128, ge=1, description="State columns of one Mamba-2 head (count)")
    n_groups: int = Field(1, ge=1, description="Groups of Mamba-2 heads that share B and C (count)")
    conv_kernel: int = Field(4, ge=1, description="Width of the causal convolution (tokens)")
    use_conv_bias: bool = Field(True, description="Bias in the causal convolution")
    chunk_size: int = Field(64, ge=1, description="Chunk of the scan; changes speed, not results (tokens)")
    time_step_limit: tuple[float, float] = Field((0.0, float("inf")), description="Clamp of dt at run time")
    time_step_min: float = Field(1e-3, gt=0, description="Smallest initial dt")
    time_step_max: float = Field(0.1, gt=0, description="Largest initial dt")
    time_step_floor: float = Field(1e-4, gt=0, description="Initial dt is never below this")

    n_routed_experts: int = Field(0, ge=0, description="Experts a token may be sent to (count)")
    num_experts_per_tok: int = Field(2, ge=1, description="Experts a token is sent to (count)")
    moe_intermediate_size: int = Field(0, ge=0, description="Inner width of one expert (channels)")
    n_shared_experts: int = Field(0, ge=0, description="Experts every token passes (count); stored as one MLP")
    moe_shared_expert_intermediate_size: int = Field(0, ge=0, description="Inner width of that MLP (channels)")
    shared_expert_gate: bool = Field(False, description="The shared MLP's output times sigmoid of one router more")
    moe_latent_size: int | None = Field(None, ge=1, description="Routed experts work at this width (channels)")
    n_group: int = Field(1, ge=1, description="Groups of routed experts (count)")
    topk_group: int = Field(1, ge=1, description="Groups a token's experts are chosen from (count)")
    norm_topk_prob: bool = Field(True, description="Chosen experts' weights are rescaled to sum to one")
    router_activation: Literal["softmax", "sigmoid"] = Field("sigmoid", description="Turns router logits into weights")
    routed_scaling_factor: float = Field(1.0, gt=0, description="Multiplies the routed experts' output")

    norm_eps: float = Field(1e-5, gt=0, description="Added to the mean square in every RMSNorm")
    tie_word_embeddings: bool = Field(False, description="The output head is the embedding table")
    max_position_embeddings: int = Field(4096, ge=1, description="Longest context the model is meant for (tokens)")
    initializer_range: float = Field(0.02, gt=0, description="Standard deviation of initial linear weights")
    pad_token_id: int | None = Field(None, description="Padding token")
    bos_token_id: int | None = Field(None, description="Token that starts a document")
    eos_token_id: int | list[int] | None = Field(None, description="Token or tokens that end a document or a turn")

    @model_validator(mode="after")
    def _usable(self) -> Self:
        self._check_pattern()
        for kind, check in {
            "M": self._check_mamba,
            "*": self._check_attention,
            "-": self._check_mlp,
            "E": self._check_experts,
        }.items():
            if kind in self.pattern:
                check()
        self._check_tokens()
        return self

    def _check_pattern(self) -> None:
        if not self.pattern:
            raise ValueError("pattern is empty; give one character a layer, for example 'M-M*-'")
        for position, kind in enumerate(self.pattern):
            if kind not in MIXERS:
                raise ValueError(f"pattern: unknown character {kind!r} at layer {position}; use {MIXERS}")
        if not {"M", "*"} & set(self.pattern):
            warnings.warn(f"pattern {self.pattern!r} has no layer that sees other tokens", stacklevel=2)

    def _check_mamba(self) -> None:
        if self.mamba_num_heads < 1:
            raise ValueError("pattern has M layers: mamba_num_heads must be at least 1")
        if self.mamba_num_heads % self.n_groups:
            raise ValueError(f"n_groups {self.n_groups} does not divide mamba_num_heads {self.mamba_num_heads}")
        low, high = self.time_step_limit
        if not 0 <= low < high:
            raise ValueError(f"time_step_limit {self.time_step_limit}: expected 0 ≤ low < high")
        if self.time_step_min > self.time_step_max:
            raise ValueError(f"time_step_min {self.time_step_min} is above time_step_max {self.time_step_max}")

    def _check_attention(self) -> None:
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"pattern has * layers: {name} must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.rope and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, and rotary positions turn pairs of channels")

    def _check_mlp(self) -> None:
        if self.intermediate_size < 1:
            raise ValueError("pattern has - layers: intermediate_size must be at least 1")

    def _check_experts(self) -> None:
        if not 1 <= self.num_experts_per_tok <= self.n_routed_experts:
            raise ValueError(
                f"pattern has E layers: num_experts_per_tok {self.num_experts_per_tok} must lie between 1 and "
                f"n_routed_experts {self.n_routed_experts}"
            )
        if self.moe_intermediate_size < 1:
            raise ValueError("pattern has E layers: moe_intermediate_size must be at least 1")
        if (self.n_shared_experts > 0) != (self.moe_shared_expert_intermediate_size > 0):
            raise ValueError(
                f"n_shared_experts {self.n_shared_experts} and moe_shared_expert_intermediate_size "
                f"{self.moe_shared_expert_intermediate_size} must both be zero or both be positive"
            )
        if self.shared_expert_gate and not self.n_shared_experts:
            raise ValueError("shared_expert_gate is set, but n_shared_experts is 0: there is nothing to gate")
        self._check_groups()

    def _check_groups(self) -> None:
        size, rest = divmod(self.n_routed_experts, self.n_group)
        if rest or (self.n_group > 1 and size < 2):
            raise ValueError(
                f"n_group {self.n_group} must divide n_routed_experts {self.n_routed_experts} "
                "into groups of two or more"
            )
        if self.topk_group > self.n_group or self.topk_group * size < self.num_experts_per_tok:
            raise ValueError(
                f"topk_group {self.topk_group} must be at most n_group {self.n_group}, and its groups of {size} "
                f"experts must hold num_experts_per_tok {self.num_experts_per_tok}"
            )

    def _check_tokens(self) -> None:
        for name, token in [
            ("pad", self.pad_token_id),
            ("bos", self.bos_token_id),
            *(("eos", t) for t in self.eos_token_ids),
        ]:
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(f"{name}_token_id {token} is outside the vocabulary of {self.vocab_size}")

    @property
    def eos_token_ids(self) -> list[int]:
        """Every token that ends a sequence."""
        eos = self.eos_token_id
        return eos if isinstance(eos, list) else [] if eos is None else [eos]

    @property
    def num_layers(self) -> int:
        """Residual layers: the characters of the pattern."""
        return len(self.pattern)

    @property
    def mamba_inner_size(self) -> int:
        """Channels inside a Mamba-2 layer: heads × head width."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def mamba_conv_size(self) -> int:
        """Channels of the convolution: x, B and C together."""
        return self.mamba_inner_size + 2 * self.n_groups * self.ssm_state_size

    @property
    def mamba_in_proj_sizes(self) -> tuple[int, int, int]:
        """Row blocks of `in_proj`: gate z, convolution input xBC, time step dt."""
        return self.mamba_inner_size, self.mamba_conv_size, self.mamba_num_heads

    @property
    def query_size(self) -> int:
        """Query heads × head width (channels)."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Key heads × head width (channels)."""
        return self.num_key_value_heads * self.head_dim

    def count_parameters(self, active: bool = False) -> int:
        """Parameters of the whole model; `active`: only those one token passes through."""
        layers = sum(count * self._layer_parameters(kind, active) for kind, count in Counter(self.pattern).items())
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return layers + tables + self.hidden_size

    def _layer_parameters(self, kind: str, active: bool) -> int:
        vectors = {
            "M": self._mamba_vectors(),
            "*": self._attention_vectors(),
            "-": self._mlp_biases(self.intermediate_size),
            "E": self._expert_biases(),
        }
        return self._matrix_parameters(kind, active) + vectors[kind] + self.hidden_size

    def _matrix_parameters(self, kind: str, active: bool) -> int:
        """Weights that take part in a matrix product, of one layer."""
        d = self.hidden_size
        if kind == "M":
            return d * sum(self.mamba_in_proj_sizes) + self.mamba_inner_size * d
        if kind == "*":
            return d * (self.query_size + 2 * self.key_value_size) + self.query_size * d
        matrices = 3 if self.mlp_gated else 2
        if kind == "-":
            return matrices * d * self.intermediate_size
        experts = self.num_experts_per_tok if active else self.n_routed_experts
        latent = self.moe_latent_size or 0
        routed = matrices * (latent or d) * experts * self.moe_intermediate_size + 2 * d * latent
        shared = matrices * d * self.moe_shared_expert_intermediate_size + d * self.shared_expert_gate
        return routed + shared + d * self.n_routed_experts

    def _mamba_vectors(self) -> int:
        conv = self.mamba_conv_size * (self.conv_kernel + self.use_conv_bias)
        return conv + 3 * self.mamba_num_heads + self.mamba_inner_size

    def _attention_vectors(self) -> int:
        into = (self.attention_bias or self.qkv_bias) * (self.query_size + 2 * self.key_value_size)
        return into + self.attention_bias * self.hidden_size + self.qk_norm * 2 * self.head_dim

    def _mlp_biases(self, intermediate_size: int) -> int:
        return self.mlp_bias * (intermediate_size * (2 if self.mlp_gated else 1) + self.hidden_size)

    def _expert_biases(self) -> int:
        """Of the shared MLP and the two latent projections; routed experts have none."""
        shared = self.moe_shared_expert_intermediate_size
        latent = self.mlp_bias * (self.moe_latent_size + self.hidden_size) if self.moe_latent_size else 0
        return latent + (self._mlp_biases(shared) if shared else 0)

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of one training step per token: forward and backward, mean over `seq_len` tokens.

        Matrix products, attention (causal, so half the square), the chunked scan and the convolution are counted,
        a multiply-add as two; norms, activations and the softmax are not. Backward counts twice the forward.
        """
        counts = Counter(self.pattern)
        matrices = sum(count * self._matrix_parameters(kind, active=True) for kind, count in counts.items())
        forward = 2 * (matrices + self.vocab_size * self.hidden_size)
        forward += counts["*"] * round(4 * self.query_size * self._mean_context(seq_len))
        forward += counts["M"] * self._scan_flops()
        return 3 * forward

    def _mean_context(self, seq_len: int) -> float:
        """Mean number of tokens a query attends to."""
        window = min(self.sliding_window or seq_len, seq_len)
        return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len

    def _scan_flops(self) -> int:
        inside = 2 * self.chunk_size * (self.n_groups * self.ssm_state_size + self.mamba_inner_size)
        states = 4 * self.mamba_inner_size * self.ssm_state_size
        return inside + states + 2 * self.conv_kernel * self.mamba_conv_size

    def cache_bytes(self, batch: int, tokens: int, dtype: "torch.dtype") -> int:
        """Bytes of a `DecodeState` for `batch` sequences of `tokens` tokens: keys, values and convolution in `dtype`,
        the Mamba-2 state in float32."""
        counts = Counter(self.pattern)
        key_value = counts["*"] * 2 * self.key_value_size * tokens * dtype.itemsize
        conv = counts["M"] * self.mamba_conv_size * (self.conv_kernel - 1) * dtype.itemsize
        ssm = counts["M"] * self.mamba_inner_size * self.ssm_state_size * FLOAT32_BYTES
        return batch * (key_value + conv + ssm)
