"""Context parallelism: the tokens of a sequence shared among ranks, and what layers that look across tokens then do.

Norms, MLPs, experts and the loss work token by token and know nothing of it. Attention and Mamba-2 are given another
`attention.core`, `mamba.convolve` and `mamba.scan`; every form is exact, in values and gradients, for packed documents
and sliding windows alike. Weights are whole on every rank of the axis and their gradients sums over it.

| | what travels, per rank and layer | limits |
|---|---|---|
| attention `allgather` | keys and values of all, held while a layer works | none |
| attention `ring` | the same, one rank's at a time, while the last ones are worked on | none |
| attention `heads` | queries, keys, values and outputs, once: less the more ranks there are | heads % ranks |
| Mamba-2 `state` | one state of each chunk, whatever the length | none |
| Mamba-2 `heads` | x, dt, B, C and outputs, once | heads % ranks |
"""

from typing import Literal

from torch import Tensor, nn

from bloomery.config import Config, Field
from bloomery.errors import ConfigError
from bloomery.model.attention import Attention
from bloomery.model.config import ModelConfig
from bloomery.model.context import Context
from bloomery.model.mamba import Mamba
from bloomery.parallel.context_mamba import ContextConvolution, HeadScan, StateScan
from bloomery.parallel.heads import enough, refusal, to_heads, to_tokens
from bloomery.parallel.mesh import Meshes
from bloomery.parallel.ring import gathered_attention, ring_attention
from bloomery.parallel.sequence import ContextAxis, zigzag

__all__ = ["ContextModes", "apply_context", "zigzag"]


class ContextModes(Config):
    """How layers that look across tokens do so when a sequence is shared among ranks."""

    attention: Literal["allgather", "ring", "heads"] = Field(
        default="allgather",
        description="keys and values gathered, passed around a ring, or every rank its heads of all tokens",
    )
    mamba: Literal["state", "heads"] = Field(
        default="state", description="states passed from chunk to chunk, or every rank its heads of all tokens"
    )
    layout: Literal["zigzag", "contiguous"] = Field(
        default="zigzag",
        description="tokens of a rank: two chunks that balance causal attention, or one contiguous chunk",
    )


def apply_context(model: nn.Module, meshes: Meshes, modes: ContextModes | None = None) -> None:
    """Replaces the swap points of all `*` and `M` layers in place, after `apply_tensor`.

    Raises `ConfigError` where a mode cannot share the model's heads.
    """
    modes, group = modes or ContextModes(), meshes.group("context")
    if group is None:
        return
    config = model.config
    assert isinstance(config, ModelConfig)
    check_modes(config, modes, meshes.size("context"), meshes.size("tensor"))
    scan = StateScan if modes.mamba == "state" else HeadScan
    axis = ContextAxis(group, modes.layout, config.sliding_window)
    for layer in model.modules():
        if isinstance(layer, Attention):
            layer.core = ContextAttention(layer.core, axis, modes.attention)  # type: ignore[assignment]
        elif isinstance(layer, Mamba):
            layer.convolve = ContextConvolution(layer.convolve, axis)
            layer.scan = scan(layer.scan, axis)  # type: ignore[assignment]


def check_modes(config: ModelConfig, modes: ContextModes, context: int, tensor: int = 1, where: str = "") -> None:
    """Raises `ConfigError` where the heads that a tensor rank has do not spread over the context ranks."""
    found = None
    if "*" in config.pattern and modes.attention == "heads":
        held = config.num_attention_heads // tensor, max(1, config.num_key_value_heads // tensor)
        found = "attention", refusal(*held, context), "allgather or ring"
    if "M" in config.pattern and modes.mamba == "heads" and (found is None or found[1] is None):
        held = config.mamba_num_heads // tensor, config.n_groups // tensor
        found = "mamba", refusal(*held, context), "state"
    if found is not None and found[1] is not None:
        place = f"{where}.{found[0]}" if where else found[0]
        raise ConfigError(f"{place}: heads: {found[1]}; choose {found[2]}")


class ContextAttention(nn.Module):
    """As `AttentionCore`, over the whole sequence; `inner` serves the `heads` form."""

    def __init__(self, inner: nn.Module, axis: ContextAxis, mode: Literal["allgather", "ring", "heads"]):
        super().__init__()
        self.inner, self.axis, self.mode = inner, axis, mode

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        """query (batch, heads, seq / ranks, head_dim), key and value (batch, key_value_heads, …) → like query."""
        assert context.starts is None, "decoding over the context axis"
        if self.mode == "heads":
            return self._by_heads(query, key, value, context)
        view = self.axis.view(query, 2, context.segment_ids)
        form = ring_attention if self.mode == "ring" else gathered_attention
        return form(query, key, value, self.axis, view)

    def _by_heads(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        view = self.axis.view(query, 2, context.segment_ids)
        parts = [query.transpose(1, 2), *(enough(t.transpose(1, 2), self.axis) for t in (key, value))]
        of_all = [to_heads(t, self.axis, view.layout).transpose(1, 2) for t in parts]
        output = self.inner(*of_all, view.whole)
        return to_tokens(output.transpose(1, 2), self.axis, view.layout).transpose(1, 2)
