"""The decoder: one residual layer per character of the pattern."""

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bloomery.model.attention import Attention
from bloomery.model.config import ModelConfig
from bloomery.model.context import Context
from bloomery.model.layers import MLP
from bloomery.model.mamba import Mamba
from bloomery.model.moe import Experts, MoE, Router
from bloomery.model.norm import RMSNorm
from bloomery.model.rope import Rope
from bloomery.model.state import Cache, DecodeState

MIXERS = {
    "M": Mamba,
    "*": Attention,
    "-": lambda config: MLP(config, config.intermediate_size),
    "E": MoE,
}
_RESIDUAL_WRITERS = ("out_proj", "o_proj", "down_proj", "fc2_latent_proj")


class Layer(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, config: ModelConfig, kind: str):
        super().__init__()
        self.kind = kind
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = MIXERS[kind](config)

    def forward(self, x: Tensor, context: Context, cache: Cache = None) -> Tensor:
        return x + self.mixer(self.norm(x), context, cache)


class Decoder(nn.Module):
    """Token ids → hidden states; `lm_head` turns those into logits. No loss inside: `train.losses` owns it."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.pattern)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rope = Rope(config.rope, config.head_dim) if config.rope else None
        if self.lm_head.weight.device.type != "meta":
            initialize(self)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embeddings.weight

    def forward(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        state: DecodeState | None = None,
        lengths: Tensor | None = None,
        checkpoint_activations: bool = False,
        only_last: bool = False,
    ) -> Tensor:
        """Hidden states (batch, seq, hidden) after the final norm.

        Args:
            input_ids: (batch, seq) int64.
            segment_ids: (batch, seq), the document of each position, non-decreasing along a row: documents do not
                see each other, in attention, convolution or state.
            position_ids: (batch, seq) for rotary positions; default: counted on from the state, or from 0.
            state: read as what came before, and moved on in place by this call (without gradients).
            lengths: (batch,) valid tokens of each right-padded row, 1 to seq; with seq 1 also 0, for a row that
                stays where it is (its Mamba memory is undefined until `clear` or `put`).
            checkpoint_activations: recompute each layer in the backward instead of keeping its activations.
            only_last: return those of each row's last valid token alone, (batch, 1, hidden), which is all that a
                prompt's reader needs; layers after the last one that looks at other tokens run on nothing else.

        Raises:
            ValueError: shapes or values that cannot be meant, with the offending value.
        """
        _check(input_ids, segment_ids, state, lengths)
        if state is None:
            context = self.context(input_ids, segment_ids, position_ids, None, lengths)
            return self._run(input_ids, context, [None] * len(self.layers), checkpoint_activations, only_last)
        with torch.no_grad():
            context = self.context(input_ids, segment_ids, position_ids, state, lengths)
            if context.total > state.max_tokens:
                raise ValueError(
                    f"state: {context.held} tokens held and {context.seq} new ones, room for {state.max_tokens}"
                )
            hidden = self._run(input_ids, context, state.layers, False, only_last)
            state.lengths += context.seq if lengths is None else lengths
        return hidden

    def context(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None,
        position_ids: Tensor | None,
        state: DecodeState | None,
        lengths: Tensor | None,
    ) -> Context:
        """What the layers of one call share. Swap point: replaced where mixers see other tokens than the embedding."""
        context = Context.build(input_ids, segment_ids, state, lengths, self.config.sliding_window)
        if self.rope is not None:
            context.rope = self._angles(context, position_ids)
        return context

    def _run(
        self, input_ids: Tensor, context: Context, caches: list[Cache], recompute: bool, only_last: bool
    ) -> Tensor:
        hidden = self.embeddings(input_ids)
        mixed = max(self.config.pattern.rfind("M"), self.config.pattern.rfind("*")) + 1
        for position, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            if only_last and position == mixed:
                hidden = context.last(hidden)
            if recompute and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, context, cache, use_reentrant=False)
            else:
                hidden = layer(hidden, context, cache)
        if only_last and mixed == len(self.layers):
            hidden = context.last(hidden)
        return self.norm(hidden)

    def _angles(self, context: Context, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        assert self.rope is not None
        if position_ids is None:
            return self.rope(context.positions, context.total)
        return self.rope(position_ids, int(position_ids.max()) + 1)


def _check(input_ids: Tensor, segment_ids: Tensor | None, state: DecodeState | None, lengths: Tensor | None) -> None:
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids: shape {tuple(input_ids.shape)}, expected (batch, seq) with at least one token")
    batch, seq = input_ids.shape
    if state is not None and state.batch != batch:
        raise ValueError(f"state: {state.batch} rows, expected {batch} as in input_ids; use state.head({batch})")
    if segment_ids is not None:
        if state is not None:
            raise ValueError(
                "segment_ids and state together: a state holds one document a row; prefill without packing"
            )
        _check_segments(input_ids, segment_ids)
    if lengths is not None and lengths.device.type == "cpu":
        lowest = 0 if seq == 1 else 1
        if lengths.shape != (batch,) or bool(((lengths < lowest) | (lengths > seq)).any()):
            raise ValueError(f"lengths: {lengths.tolist()}, expected {batch} values from {lowest} to {seq}")


def _check_segments(input_ids: Tensor, segment_ids: Tensor) -> None:
    if segment_ids.shape != input_ids.shape:
        raise ValueError(f"segment_ids: shape {tuple(segment_ids.shape)}, expected {tuple(input_ids.shape)}")
    if segment_ids.device.type != "cpu":
        return  # looking at the values would wait for the device
    falls = (segment_ids[:, 1:] < segment_ids[:, :-1]).nonzero()
    if len(falls):
        row, position = falls[0].tolist()
        before, after = segment_ids[row, position : position + 2].tolist()
        raise ValueError(
            f"segment_ids: row {row} falls from {before} to {after} at position {position + 1}; "
            "documents must be contiguous and numbered in order"
        )


@torch.no_grad()
def initialize(decoder: Decoder) -> None:
    """Linears and embeddings N(0, initializer_range²); matrices that write to the residual stream scaled by
    1/√layers; norms 1; convolutions and Mamba time scales as their modules set them (arXiv 2405.21060)."""
    std = decoder.config.initializer_range
    residual_std = std / math.sqrt(decoder.config.num_layers)
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0, residual_std if name.endswith(_RESIDUAL_WRITERS) else std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, Router):
            module.weight.normal_(0, std)
        elif isinstance(module, Experts):
            for parameter_name, parameter in module.named_parameters():
                parameter.normal_(0, residual_std if parameter_name == "down_proj" else std)
