"""Sharding over data with FSDP2, and the gradients' sums: each over exactly the axes its parameter's placement names.

All reductions are sums. A unit (the experts of a layer, a layer, what is left of the model) is sharded over the axes
that the placements of all its parameters share; what a parameter is to be summed over beyond those is summed on its
shard after the backward pass. So a norm inside a layer split over tensor is scattered over data and context with its
layer, and its shard summed over tensor. What has no one to share with stays a plain tensor, at no cost.

Weights are gathered and gradients summed in the type of the parameters: float32 masters under bf16 autocast, which
casts where it multiplies. Gathering in bf16 would halve what is sent, and would also round norms, routers and Mamba's
time scales, so that a result depended on the mapping.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from bloomery.model.moe import Experts
from bloomery.parallel.collectives import all_reduce_
from bloomery.parallel.mesh import Meshes, group_of
from bloomery.parallel.pieces import Box, Placement

WORLD = ("pipeline", "data", "context", "tensor")
_TIED = "embeddings.weight"


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a parameter or gradient; it shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_data(
    model: nn.Module,
    meshes: Meshes,
    placements: Mapping[str, Placement],
    reshard: bool,
    roots: Sequence[nn.Module] = (),
) -> "DataParallel":
    """Shards `model` in place over its data ranks.

    placements: of every parameter, by its name in the whole model, before this. reshard: weights are let go after the
    forward pass of each layer and gathered again (zero 3); else they stay gathered from the first forward pass to the
    last backward pass of a step (zero 1). roots: the modules whose forward is called, where that is not the model.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    sharded: dict[str, tuple[str, ...]] = {}
    for root in roots or [model]:
        plain: set[nn.Parameter] = set()
        mesh = None
        for unit in _units(root):
            own = [p for p in unit.parameters() if names.get(p) not in {None, *sharded} and p not in plain]
            axes = _shared([placements[names[p]].summed_over for p in own])
            found = _mesh(meshes, axes, _device(model))
            if found is None:
                plain |= set(own)
            else:
                sharded |= {names[p]: axes for p in own}
            mesh = found or mesh
            if mesh is not None and (found is not None or unit is root):
                _shard(unit, mesh, reshard and unit is not root, plain)
    return DataParallel(model, meshes, placements, sharded, reshard, list(roots or [model]))


def _units(root: nn.Module) -> Iterator[nn.Module]:
    """Modules that are gathered as one, inner ones first."""
    layers = root.layers
    assert isinstance(layers, nn.Module)
    for layer in layers.children():
        yield from (module for module in layer.modules() if isinstance(module, Experts))
        yield layer
    yield root


def _shared(axes: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The axes that all have, in order."""
    return tuple(axis for axis in axes[0] if all(axis in other for other in axes)) if axes else ()


def _mesh(meshes: Meshes, axes: tuple[str, ...], device: str) -> DeviceMesh | None:
    """The ranks along `axes`, as (copies, shards) where the mapping replicates; `None` where nothing is to be shared.

    The copies of experts are as many as divide their ranks, so that a replica's experts stay inside it.
    """
    if not axes or meshes.group(*axes) is None:
        return None
    ranks = meshes.ranks(*axes)
    copies = math.gcd(meshes.mapping.replicate, len(ranks))
    if copies == len(ranks):
        return None
    if copies == 1:
        return meshes.device_mesh(*axes, device_type=device)
    grid = torch.tensor(ranks).view(copies, -1)
    row, column = divmod(ranks.index(meshes.rank), grid.shape[1])
    name = "_".join(axes)
    groups = [
        group_of(tuple(grid[:, column].tolist()), f"{name}_copies"),
        group_of(tuple(grid[row].tolist()), f"{name}_shards"),
    ]
    return DeviceMesh.from_group([g for g in groups if g], device, mesh=grid, mesh_dim_names=("copies", "shards"))


def _device(model: nn.Module) -> str:
    return next(model.parameters()).device.type


def _shard(unit: nn.Module, mesh: DeviceMesh, reshard: bool, plain: set[nn.Parameter]) -> None:
    count = mesh.size(mesh.ndim - 1)

    def even_dim(parameter: nn.Parameter) -> Shard:
        """Experts a rank holds may be few: their width then."""
        dims = [dim for dim, size in enumerate(parameter.shape) if size % count == 0]
        return Shard(dims[0] if dims and isinstance(unit, Experts) else 0)

    fully_shard(unit, mesh=mesh, reshard_after_forward=reshard, shard_placement_fn=even_dim, ignored_params=plain)
    assert isinstance(unit, FSDPModule)
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)
    unit.set_reduce_scatter_unused_params(True, recurse=False)


@dataclass
class DataParallel:
    """A rank's sharded model.

    whole: placements before. sharded: the axes that FSDP sums a parameter over; absent: none.
    """

    model: nn.Module
    meshes: Meshes
    whole: Mapping[str, Placement]
    sharded: Mapping[str, tuple[str, ...]]
    reshard: bool
    roots: list[nn.Module]

    def __post_init__(self) -> None:
        self.parameters: dict[str, nn.Parameter] = dict(self.model.named_parameters())
        """What this rank holds, by name, whatever FSDP has registered in the model for the moment."""
        self.placements = {name: _kept(self.whole[name], p) for name, p in self.parameters.items()}
        """Of what this rank keeps."""
        self._copies = {name: self._ranks(name) for name in self.parameters}
        stages, config = self.meshes.mapping.pipeline, getattr(self.model, "config", None)
        tied = stages > 1 and getattr(config, "tie_word_embeddings", False) and _TIED in self.parameters
        self._twin = self._other_end() if tied else None

    def accumulate(self, last: bool) -> None:
        """Before the backward pass of a micro-batch, `last` of its step: under zero 1 gradients are summed over the
        ranks once a step; under zero 3 each time, for no rank has room for them."""
        for root in self.roots:
            if isinstance(root, FSDPModule) and not self.reshard:
                root.set_requires_gradient_sync(last)
                root.set_reshard_after_backward(last)

    def finish(self) -> None:
        """After the last backward pass of a step: gradients are whole sums then, and none is missing."""
        for parameter in self._trained().values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        left: dict[tuple[str, ...], list[Tensor]] = {}
        for name, gradient in self.gradients().items():
            axes = tuple(a for a in self.whole[name].summed_over if a not in self.sharded.get(name, ()))
            if axes and self.meshes.group(*axes) is not None:
                left.setdefault(axes, []).append(gradient)
        for axes in sorted(left):
            _sum_together(left[axes], self.meshes, axes)
        if self._twin is not None:
            self._add_twin(self.gradients()[_TIED], self._twin)

    def gradients(self) -> dict[str, Tensor]:
        """This rank's parts of the gradients, to be changed in place."""
        return {name: local(p.grad) for name, p in self._trained().items() if p.grad is not None}

    def grad_norm(self) -> float:
        """Of the gradients of the whole model, each number counted once however many ranks hold it."""
        gradients = self.gradients()
        if self._twin is not None and self.meshes.place("pipeline"):
            del gradients[_TIED]  # the first stage counts it
        total = torch.zeros((), dtype=torch.float64, device=_device(self.model))
        if gradients:
            copies = torch.tensor([self.copies(name) for name in gradients], device=total.device)
            norms = torch.stack([norm.double() for norm in torch._foreach_norm(list(gradients.values()))])
            total = (norms.square() / copies).sum()
        return math.sqrt(float(all_reduce_(total, self.meshes.group(*WORLD))))

    def copies(self, name: str) -> int:
        """How many ranks of this stage hold the same part of a parameter."""
        return self._copies[name]

    def _ranks(self, name: str) -> int:
        whole, parameter = self.whole[name], self.parameters[name]
        ranks = self.meshes.size(*whole.summed_over) * whole.copies
        return ranks // parameter.device_mesh.size(-1) if isinstance(parameter, DTensor) else ranks

    def release(self) -> None:
        """Lets go of weights that stayed gathered, as after an evaluation."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        for root in self.roots:
            if isinstance(root, FSDPModule):
                root.reshard()

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}

    def _other_end(self) -> int:
        """The rank of the first stage for the last, and the other way round; only they hold a tied embedding."""
        ends = self.meshes.ranks("pipeline")
        return ends[-1] if self.meshes.place("pipeline") == 0 else ends[0]

    def _add_twin(self, gradient: Tensor, twin: int) -> None:
        theirs, mine = torch.empty_like(gradient), gradient.contiguous()
        group, first = self.meshes.group("pipeline"), self.meshes.place("pipeline") == 0
        for sends in (first, not first):  # one after the other: on NCCL two sends would wait for each other
            if sends:
                dist.send(mine, twin, group)
            else:
                dist.recv(theirs, twin, group)
        gradient += theirs


def _kept(placement: Placement, parameter: nn.Parameter) -> Placement:
    """Of what FSDP leaves on this rank: ceil(size / ranks) of a dimension, and the last ranks what is then left."""
    if not isinstance(parameter, DTensor):
        return placement
    last = parameter.device_mesh.ndim - 1
    shard = parameter.placements[last]
    assert isinstance(shard, Shard)
    size = placement.piece.local[shard.dim]
    most = -(-size // parameter.device_mesh.size(last))
    start = min(parameter.device_mesh.get_local_rank(last) * most, size)
    offset = [start if dim == shard.dim else 0 for dim in range(parameter.ndim)]
    kept = Box(tuple(offset), tuple(parameter.to_local().shape))
    return replace(placement, piece=placement.piece.part(kept))


def _sum_together(gradients: list[Tensor], meshes: Meshes, axes: tuple[str, ...]) -> None:
    """One all-reduce for all of them."""
    whole = all_reduce_(torch.cat([g.reshape(-1) for g in gradients]), meshes.group(*axes))
    for gradient, part in zip(gradients, whole.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
