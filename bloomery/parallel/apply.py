"""All axes of a mapping applied to a decoder, in one order: tensor, context, experts, pipeline, data."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bloomery.config import Config
from bloomery.errors import ConfigError
from bloomery.model.decoder import Decoder
from bloomery.parallel import mapping as grids
from bloomery.parallel.collectives import all_reduce_, traffic
from bloomery.parallel.context import ContextModes, apply_context
from bloomery.parallel.data import WORLD, DataParallel, local, shard_data
from bloomery.parallel.expert import Way, apply_experts
from bloomery.parallel.mesh import Meshes
from bloomery.parallel.pieces import Piece, Placement
from bloomery.parallel.pipeline import Pipeline, cut
from bloomery.parallel.tensor import apply_tensor
from bloomery.parallel.tokens import Batch, Shared, split
from bloomery.parallel.whole import Directory

Objective = Callable[[Any, Batch], Any]


@dataclass
class Parallel:
    """What one rank trains, and what it does together with the others. Every method is collective."""

    meshes: Meshes
    model: nn.Module
    """This rank's part of the decoder; its parameters keep the names they have there."""
    data: DataParallel
    pipeline: Pipeline | None
    modes: ContextModes

    @property
    def mapping(self) -> grids.Mapping:
        """The degrees."""
        return self.meshes.mapping

    @property
    def placements(self) -> Mapping[str, Placement]:
        """Where what this rank keeps of each parameter belongs in the whole."""
        return self.data.placements

    def split(self, batch: Batch) -> Batch:
        """This rank's tokens of a micro-batch whose rows are those of its data rank."""
        return split(batch, self.meshes, self.modes.layout)

    def forward_backward(self, micro_batches: Sequence[Batch], objective: Objective) -> list[Any]:
        """Gradients of the sum of the losses over all ranks; micro-batches are as `split` returns them.

        Returns this rank's losses without gradient: their sums and weights add up over micro-batches and ranks. The
        last one's metrics also say what the rank sent, `sent/{group}` in bytes, as `collectives.traffic` counts it.
        """
        with traffic() as sent:
            if self.pipeline is not None:
                self.data.accumulate(last=True)
                losses = self.pipeline.forward_backward(micro_batches, objective)
            else:
                losses = [
                    self._one(batch, objective, last=number == len(micro_batches))
                    for number, batch in enumerate(micro_batches, 1)
                ]
        self.data.finish()
        for (group, _), count in sent.items() if losses else ():
            before, _ = losses[-1].metrics.get(f"sent/{group}", (0, 1))
            losses[-1].metrics[f"sent/{group}"] = (before + count, 1)
        return losses

    def _one(self, batch: Batch, objective: Objective, last: bool) -> Any:
        self.data.accumulate(last)
        loss = objective(self.model, batch)
        loss.sum.backward()
        return replace(loss, sum=loss.sum.detach())

    @torch.no_grad()
    def forward(self, micro_batches: Sequence[Batch], objective: Objective) -> list[Any]:
        """Losses as of `forward_backward`, without gradients: for validation."""
        if self.pipeline is not None:
            losses = self.pipeline.forward(micro_batches, objective)
        else:
            losses = [objective(self.model, batch) for batch in micro_batches]
        self.data.release()
        return losses

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over all ranks, in place."""
        return all_reduce_(values, self.meshes.group(*WORLD))

    def grad_norm(self) -> float:
        """Of all gradients of the whole model, after `forward_backward`."""
        return self.data.grad_norm()

    def full(self, name: str) -> Tensor:
        """A whole parameter or buffer, on every rank."""
        return next(self._directory.gathered(self._held, self._pieces, self.device, [name]))[1]

    def full_state(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of every parameter and buffer, one after another, on every rank; all ranks take all."""
        return self._directory.gathered(self._held, self._pieces, self.device)

    def full_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """As `full_state`, of the gradients of trained parameters."""
        gradients = self.data.gradients()
        held = {name: (self._pieces[name], gradient.dtype) for name, gradient in gradients.items()}
        return Directory.of(held).gathered(gradients, self._pieces, self.device)

    @torch.no_grad()
    def load(self, name: str, full: Tensor) -> None:
        """Takes this rank's part of a whole parameter or buffer; on ranks that have none of it nothing happens."""
        if name in self._pieces:
            self._held[name].copy_(self._pieces[name].take(full))

    @property
    def device(self) -> torch.device:
        """Where this rank's parameters are."""
        return next(iter(self.data.parameters.values())).device

    @property
    def _held(self) -> dict[str, Tensor]:
        return {name: local(p.detach()) for name, p in self.data.parameters.items()} | dict(self.model.named_buffers())

    @cached_property
    def _pieces(self) -> dict[str, Piece]:
        buffers = {name: Piece.whole(buffer.shape) for name, buffer in self.model.named_buffers()}
        return {name: placement.piece for name, placement in self.placements.items()} | buffers

    @cached_property
    def _directory(self) -> Directory:
        return Directory.of({name: (self._pieces[name], tensor.dtype) for name, tensor in self._held.items()})


def parallelize(
    model: Decoder, mapping: grids.Mapping, context: ContextModes | None = None, dispatcher: Way = "auto"
) -> Parallel:
    """Makes this rank's part of `model` in place; all ranks call it with the same weights.

    context: how attention and Mamba-2 look across a sequence whose tokens several ranks hold. dispatcher: how tokens
    reach the experts of other ranks; `auto`: the way that sends fewer bytes.

    Raises `ConfigError` for degrees that do not fill the ranks or divide the model, and where ranks disagree.
    """
    mapping.check_model(model.config)
    meshes = Meshes.create(mapping)
    modes = context or ContextModes()
    _check_agreement({"mapping": mapping, "model": model.config, "context": modes})
    placements = apply_tensor(model, meshes)
    apply_context(model, meshes, modes)
    placements |= apply_experts(model, meshes, dispatcher, modes.layout)
    if meshes.size("context", "tensor") > 1:
        model.context = Shared(model, meshes)  # type: ignore[method-assign]
    pipeline = cut(model, meshes) if mapping.pipeline > 1 else None
    kept = {name: placements[name] for name, _ in model.named_parameters()}
    data = shard_data(model, meshes, kept, mapping.zero == 3, pipeline.chunks if pipeline else ())
    return Parallel(meshes, model, data, pipeline, modes)


def _check_agreement(settings: dict[str, Config]) -> None:
    """Raises `ConfigError`, on every rank, naming a setting in which one differs from rank 0."""
    if not dist.is_initialized():
        return
    everyone: list[dict[str, dict[str, Any]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, {name: config.model_dump() for name, config in settings.items()})
    for rank, theirs in enumerate(everyone):
        for part, values in theirs.items():
            for name, value in values.items():
                first = everyone[0][part][name]
                if value != first:
                    raise ConfigError(
                        f"{part}.{name}: {value} on rank {rank}, but {first} on rank 0; start all ranks with the same "
                        "recipe"
                    )
