"""Decoding as a flat list of steps: one token a row, no modules, weights prepared once."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from bloomery.model import native
from bloomery.model.attention import Attention, AttentionCore
from bloomery.model.context import Context
from bloomery.model.decode import AttentionStep, MambaStep, MLPStep, MoEStep
from bloomery.model.decoder import Decoder, Layer
from bloomery.model.folded import NormedLinear
from bloomery.model.layers import MLP
from bloomery.model.mamba import Mamba
from bloomery.model.moe import Dispatch, Experts, MoE, Router
from bloomery.model.norm import GatedRMSNorm, RMSNorm
from bloomery.model.scan import ChunkedScan
from bloomery.model.state import Cache, DecodeState

LayerStep = Callable[..., Tensor]  # (hidden, context, cache) → hidden
_ORIGINAL = {
    Decoder, Layer, Attention, Mamba, MLP, AttentionCore, ChunkedScan, RMSNorm, GatedRMSNorm,
    MoE, Router, Experts, Dispatch, nn.Embedding, nn.Linear, nn.Conv1d, nn.ModuleList,
}  # fmt: skip


_STEPS: dict[type[nn.Module], Callable[..., LayerStep]] = {Attention: AttentionStep, Mamba: MambaStep, MLP: MLPStep}


class Step:
    """Logits of the next token, from a copy of the weights as they are now.

    A layer with anything replaced or hooked is called as it is: nothing of it may be bypassed. So is, on a GPU or if
    `deterministic`, one with experts; elsewhere the experts' weights are not copied.

    `deterministic`: on a CPU, a row's logits are bitwise the same whatever other rows there are. The kernels look at
    each row by itself, and products are made of a fixed number of rows; where there are no kernels, or a layer is
    called as it is, one row at a time is decoded. What a row holds must have been read the same way: alone, in pieces
    whose sizes follow from its own length.
    """

    @torch.no_grad()
    def __init__(self, model: Decoder, deterministic: bool = False):
        self._model, self._deterministic = model, deterministic
        layers = set(model.layers.modules()) if isinstance(model, Decoder) else set()
        self._flat = all(_is_original(module) for module in model.modules() if module not in layers)
        if self._flat:
            self._layers = [_layer_step(cast(Layer, layer), deterministic) for layer in model.layers]
            self._head = NormedLinear(model.norm, [model.lm_head], deterministic)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, state: DecodeState) -> Tensor:
        """tokens (batch, 1) int64 → (batch, vocab); `state` moves on by one token."""
        if self._deterministic and not self._rows_are_apart:
            each = [self._logits(tokens[row : row + 1], state.only(row)) for row in range(state.batch)]
            return torch.cat(each)
        return self._logits(tokens, state)

    @property
    def obstacle(self) -> str | None:
        """What is called as it is; `None` when every part of a step is flat."""
        if not self._flat:
            return "something outside the layers is replaced or hooked"
        layers = zip(self._model.config.pattern, self._layers, strict=True)
        whole = next((f"layer {place} ({kind})" for place, (kind, step) in enumerate(layers) if _is_whole(step)), None)
        return whole and f"{whole} is called as it is"

    @property
    def _rows_are_apart(self) -> bool:
        """Whether a row's logits cannot depend on the other rows."""
        return self._flat and native.serves(self._model.embeddings.weight) and not any(map(_is_whole, self._layers))

    def _logits(self, tokens: Tensor, state: DecodeState) -> Tensor:
        if not self._flat:
            return self._model.lm_head(self._model(tokens, state=state)[:, 0])
        context = Context.build(tokens, None, state, None, self._model.config.sliding_window)
        logits = self._run(tokens, state, context)
        state.lengths += 1
        return logits

    def _run(self, tokens: Tensor, state: DecodeState, context: Context) -> Tensor:
        model = self._model
        if model.rope is not None:
            context.rope = model.rope(context.positions, context.total)
        hidden = model.embeddings.weight.index_select(0, tokens[:, 0])
        for step, cache in zip(self._layers, state.layers, strict=True):
            hidden = step(hidden, context, cache)
        return self._head(hidden)


class WholeLayer:
    """A layer called as it is."""

    def __init__(self, layer: Layer):
        self._layer = layer

    def __call__(self, x: Tensor, context: Context, cache: Cache) -> Tensor:
        """x (batch, hidden) → the same shape."""
        return self._layer(x.unsqueeze(1), context, cache)[:, 0]


def _is_whole(step: LayerStep) -> bool:
    return isinstance(step, WholeLayer)


def _layer_step(layer: Layer, deterministic: bool) -> LayerStep:
    if not all(_is_original(module) for module in layer.modules()):
        return WholeLayer(layer)
    if not isinstance(layer.mixer, MoE):
        return _STEPS[type(layer.mixer)](layer.mixer, layer.norm, deterministic)
    on_cpu = layer.norm.weight.device.type == "cpu"
    return MoEStep(layer.mixer, layer.norm) if on_cpu and not deterministic else WholeLayer(layer)


def _is_original(module: nn.Module) -> bool:
    return type(module) in _ORIGINAL and not (module._forward_hooks or module._forward_pre_hooks)
