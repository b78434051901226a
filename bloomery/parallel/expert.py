"""Experts shared among ranks: which rank holds what of them, and how their tokens travel (arXiv 2504.14960).

Expert j of E is on place j ÷ (E / expert) of the expert axis, its inner width cut over expert_tensor. A rank's gradient
is already the sum over the tokens of all ranks that share the experts with it; over `expert_data` it is not.
"""

from functools import partial
from typing import Literal

import torch
from torch import nn

from bloomery.errors import ConfigError
from bloomery.model.balance import BalanceConfig
from bloomery.model.decoder import Decoder
from bloomery.model.moe import Experts, MoE
from bloomery.parallel.capacity import Capacity, Sequence
from bloomery.parallel.collectives import all_reduce_
from bloomery.parallel.dispatch import AllGather, AllToAll, Dispatcher, Grid
from bloomery.parallel.mesh import Meshes
from bloomery.parallel.pieces import Piece, Placement
from bloomery.parallel.room import Room
from bloomery.parallel.sequence import Kind, Layout

Way = Literal["auto", "all_to_all", "all_gather"]
SUMMED_OVER = ("expert_data",)
_WIDTHS = {"gate_proj": 1, "up_proj": 1, "down_proj": 2}  # the dimension of the inner width


def apply_experts(
    model: Decoder, meshes: Meshes, dispatcher: Way = "auto", layout: Kind = "zigzag"
) -> dict[str, Placement]:
    """Shares the experts of the `E` layers in place, and makes their balancing count the tokens of all ranks.

    dispatcher: `auto` takes the one that sends fewer bytes. layout: how context ranks hold their tokens. Capacities are
    those of `model.balance.install`, before; they also limit the experts of a single process.

    Returns where the experts' parameters belong, by their names in the model. Raises `ConfigError` for a padded
    capacity with a dispatcher that has none.
    """
    placements: dict[str, Placement] = {}
    for number, layer in enumerate(model.layers.children()):
        moe = layer.mixer
        if not isinstance(moe, MoE):
            continue
        found = share(moe.experts, meshes)
        placements |= {f"layers.{number}.mixer.experts.{name}": placement for name, placement in found.items()}
        if (ours := _dispatcher(moe, meshes, dispatcher, layout)) is not None:
            moe.dispatch, moe.balancing.more = ours, partial(getattr, ours, "metrics")
        moe.balancing.total = lambda x: all_reduce_(x, meshes.group("context", "tensor"))
        moe.balancing.total_step = lambda x: all_reduce_(x, meshes.group("data", "context", "tensor"))
    return placements


def share(experts: Experts, meshes: Meshes) -> dict[str, Placement]:
    """Leaves of a layer's experts those, and of their width the part, that this rank holds."""
    placements = {}
    for name, parameter in list(experts.named_parameters()):
        piece = Piece.whole(parameter.shape).shard(0, meshes.place("expert"), meshes.size("expert"))
        piece = piece.shard(_WIDTHS[name], meshes.place("expert_tensor"), meshes.size("expert_tensor"))
        placements[name] = Placement(piece, SUMMED_OVER)
        if piece.local != piece.shape:
            local = nn.Parameter(piece.take(parameter.detach()), parameter.requires_grad)
            setattr(experts, name, local)
    return placements


def sends_fewer(choices: int, expert: int, expert_tensor: int) -> Literal["all_to_all", "all_gather"]:
    """By the rows that leave a rank for each of its tokens: k·(e − 1)/e to the experts' ranks and k·(t − 1) along their
    width, or e·t − 1 to everyone; as many come back."""
    to_experts = choices * ((expert - 1) / expert + expert_tensor - 1)
    return "all_to_all" if to_experts <= expert * expert_tensor - 1 else "all_gather"


def _dispatcher(moe: MoE, meshes: Meshes, way: Way, layout: Kind) -> Dispatcher | None:
    """`None` where a rank has all it needs: the model's own dispatch does."""
    degrees, capacity = (meshes.size("expert"), meshes.size("expert_tensor")), _capacity(moe.balancing.config)
    if degrees == (1, 1) and capacity is None:
        return None
    padded = capacity is not None and capacity.pad
    if padded and way == "all_gather":
        raise ConfigError("balance.pad: only the dispatcher all_to_all pads; choose that one or auto, or leave pad out")
    config = moe.gate.config
    if way == "auto":
        way = "all_to_all" if padded else sends_fewer(config.num_experts_per_tok, *degrees)
    grid = Grid(
        config.n_routed_experts, degrees, (meshes.place("expert"), meshes.place("expert_tensor")),
        meshes.group("expert", "expert_tensor"), meshes.group("expert"), meshes.group("expert_tensor"),
    )  # fmt: skip
    kind = AllToAll if way == "all_to_all" else AllGather
    return kind(grid, _sequence(meshes, layout), capacity, Room(moe.experts, grid.group))


def _sequence(meshes: Meshes, layout: Kind) -> Sequence:
    def places(seq: int) -> torch.Tensor:
        held = Layout(seq, meshes.size("context"), layout).index(meshes.place("context"))
        return held.chunk(meshes.size("tensor"))[meshes.place("tensor")]

    return Sequence(meshes.group("context", "tensor"), meshes.size("context", "tensor"), places)


def _capacity(config: BalanceConfig) -> Capacity | None:
    if config.capacity_factor is None:
        return None
    return Capacity(config.capacity_factor, config.drop, config.drop_policy, config.pad)
