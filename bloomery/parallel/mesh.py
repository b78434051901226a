"""The process groups of a mapping: one for every set of axes that something is summed, gathered or sent over."""

from datetime import timedelta
from functools import cache
from typing import Self

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from bloomery.errors import ConfigError
from bloomery.parallel.mapping import AXES, Mapping

_SETS: tuple[tuple[str, ...], ...] = (
    ("tensor",),
    ("context",),
    ("data",),
    ("pipeline",),
    ("context", "tensor"),
    ("data", "context"),
    ("data", "tensor"),
    ("data", "context", "tensor"),
    ("pipeline", "data", "context", "tensor"),
    ("expert_tensor",),
    ("expert",),
    ("expert_data",),
    ("expert", "expert_tensor"),
    ("expert_data", "expert"),
)
"""All that exist, in the one order in which every rank creates those it belongs to; otherwise ranks would wait for each
other for good. The expert axes together are ("data", "context", "tensor"), the stage."""


class Meshes:
    """One rank's place in a mapping and the groups it belongs to. Made by `create`, by all ranks at the same time."""

    def __init__(self, mapping: Mapping, rank: int, groups: dict[tuple[str, ...], ProcessGroup | None]):
        self.mapping, self.rank = mapping, rank
        self._groups = groups
        self._places = mapping.coordinates(rank)

    @classmethod
    def create(cls, mapping: Mapping) -> Self:
        """Collective over all ranks. Groups of the same axes and ranks are made once in a process.

        Raises `ConfigError` when the degrees do not fill the ranks, or when no process group was joined.
        """
        if mapping.world_size == 1 and not dist.is_initialized():
            return cls(mapping, 0, dict.fromkeys(_SETS))
        if not dist.is_initialized():
            raise ConfigError(
                f"mapping of {mapping.world_size} ranks, but this is one process; start it with "
                f"`torchrun --nproc-per-node {mapping.world_size} …`"
            )
        mapping.check_world(dist.get_world_size())
        rank = dist.get_rank()
        return cls(mapping, rank, {axes: group_of(mapping.group(rank, *axes), "_".join(axes)) for axes in _SETS})

    def group(self, *axes: str) -> ProcessGroup | None:
        """The ranks that agree with this one on all axes of the family but these, in the order of `AXES`; `None` where
        that is this rank alone: nothing is to be sent."""
        return self._groups[_ordered(axes)]

    def size(self, *axes: str) -> int:
        """Ranks along these axes."""
        size = 1
        for axis in axes:
            size *= int(getattr(self.mapping, axis))
        return size

    def place(self, axis: str) -> int:
        """This rank's place along an axis of either family, from 0."""
        return self._places[axis]

    def ranks(self, *axes: str) -> tuple[int, ...]:
        """The global ranks of `group(*axes)`, this one among them."""
        return self.mapping.group(self.rank, *axes)

    def device_mesh(self, *axes: str, device_type: str = "cpu") -> DeviceMesh:
        """The same ranks as a mesh of one dimension, for FSDP2 and DTensor; also where that is this rank alone."""
        ordered = _ordered(axes)
        name = "_".join(ordered)
        group = self._groups[ordered] or _group_of(dist.group.WORLD, (self.rank,), name)
        return DeviceMesh.from_group(group, device_type, mesh_dim_names=(name,))


def group_of(ranks: tuple[int, ...], name: str) -> ProcessGroup | None:
    """The group of these ranks, ascending, for its members, who must all ask for it; `None` for one rank. What is sent
    over it is counted under `name`."""
    return None if len(ranks) == 1 else _group_of(dist.group.WORLD, ranks, name)


@cache
def _group_of(world: ProcessGroup, ranks: tuple[int, ...], name: str) -> ProcessGroup:
    return dist.new_group(list(ranks), timeout=_timeout(world), use_local_synchronization=True, group_desc=name)


def _timeout(world: ProcessGroup) -> timedelta:
    """That of the whole world; torch would give a new group its own default of many minutes."""
    device = torch.device("cuda" if dist.get_backend(world) == "nccl" else "cpu")
    timeout = world._get_backend(device).options._timeout
    assert isinstance(timeout, timedelta)
    return timeout


def _ordered(axes: tuple[str, ...]) -> tuple[str, ...]:
    family = "dense" if set(axes) <= set(AXES["dense"]) else "expert"
    ordered = tuple(axis for axis in AXES[family] if axis in axes)
    assert len(ordered) == len(axes), f"{axes} are not axes of one family"
    stage = ("data", "context", "tensor")
    return stage if ordered == ("expert_data", "expert", "expert_tensor") else ordered
