"""Which tokens of its data rank's sequences a rank holds, and what is shared by the layers that see more of them.

A sequence is cut over context first, then a context rank's tokens, in the order in which it holds them, over tensor.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from bloomery.model.context import Context
from bloomery.model.decoder import Decoder
from bloomery.model.state import DecodeState
from bloomery.parallel.collectives import gather_whole
from bloomery.parallel.mesh import Meshes
from bloomery.parallel.sequence import Kind, Layout

Batch = dict[str, Tensor]
_MASKED = -100  # a label that no loss counts


def split(batch: Batch, meshes: Meshes, kind: Kind = "zigzag") -> Batch:
    """This rank's tokens of every (batch, seq, …) entry; (batch,) entries stay whole.

    `position_ids` are counted here where they are absent, for a rank's tokens no longer tell. A seq that cannot be cut
    evenly is padded at its end, with masked labels, as a document of its own; `counted` (batch, seq) bool then marks
    the tokens that are no padding, for the router's statistics; a batch's own has none of them either.
    """
    ids = batch["input_ids"]
    rows, seq = ids.shape
    if "position_ids" not in batch:
        batch = {**batch, "position_ids": torch.arange(seq, device=ids.device).expand(rows, seq)}
    whole = -(-seq // meshes.mapping.token_unit) * meshes.mapping.token_unit
    if whole > seq:
        batch = _padded(batch, whole)
    own = _places(whole, meshes, kind).to(ids.device)
    return {name: x.index_select(1, own) if _has_tokens(x, whole) else x for name, x in batch.items()}


def join(parts: list[Tensor], meshes: Meshes, kind: Kind = "zigzag") -> Tensor:
    """(batch, seq, …) of one data rank, from those of its ranks along (context, tensor), in that order."""
    whole, ranks = torch.cat(parts, 1), meshes.size("context")
    return whole if ranks == 1 else Layout(whole.shape[1], ranks, kind).in_order(whole, 1)


def _places(seq: int, meshes: Meshes, kind: Kind) -> Tensor:
    ranks = meshes.size("context")
    held = torch.arange(seq) if ranks == 1 else Layout(seq, ranks, kind).index(meshes.place("context"))
    return held.chunk(meshes.size("tensor"))[meshes.place("tensor")]


def _padded(batch: Batch, whole: int) -> Batch:
    rows, seq = batch["input_ids"].shape
    fill = {"labels": _MASKED}
    found = {}
    for name, x in batch.items():
        missing = [0, 0] * (x.dim() - 2) + [0, whole - seq]
        found[name] = F.pad(x, missing, value=fill.get(name, 0)) if _has_tokens(x, seq) else x
    if "segment_ids" in batch:
        found["segment_ids"][:, seq:] = batch["segment_ids"][:, -1:] + 1
    if "counted" not in batch:
        found["counted"] = (torch.arange(whole, device=batch["input_ids"].device) < seq).expand(rows, whole)
    return found


def _has_tokens(x: Tensor, seq: int) -> bool:
    return x.dim() > 1 and x.shape[1] == seq


class Shared:
    """What stands at the swap point `decoder.context`: the layers' view is of all tokens along tensor."""

    def __init__(self, model: Decoder, meshes: Meshes):
        self.rope, self.sliding_window, self.group = model.rope, model.config.sliding_window, meshes.group("tensor")

    def __call__(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None,
        position_ids: Tensor | None,
        state: DecodeState | None,
        lengths: Tensor | None,
    ) -> Context:
        """Collective over tensor. Raises `ValueError` for what only a whole model can do."""
        if state is not None or lengths is not None:
            raise ValueError("state and lengths: a model shared among ranks does not decode; gather its weights first")
        if position_ids is None:
            raise ValueError(
                "position_ids: needed, for this rank's tokens lie anywhere in their sequence; split() adds them"
            )
        segment_ids = None if segment_ids is None else gather_whole(segment_ids, 1, self.group)
        position_ids = gather_whole(position_ids, 1, self.group)
        batch, seq = position_ids.shape
        context = Context(batch, seq, input_ids.device, segment_ids, None, self.sliding_window)
        if self.rope is not None:
            context.rope = self.rope(position_ids, int(position_ids.max()) + 1)
        return context
