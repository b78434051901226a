"""Pipeline parallelism: a decoder cut into pieces of equal work, micro-batches sent through them by torch's schedules.

A piece keeps the names that its parameters have in the whole decoder. Every rank of a pipeline has the same
micro-batches, so only hidden states travel, padded to the largest micro-batch of the step for the way alone: no layer
sees padding. Objectives stay as they are: on the last stage they get the end of the model instead of the model.
1F1B: arXiv 2006.09503; interleaved: arXiv 2104.04473 §2.2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
)
from torch.utils.checkpoint import checkpoint

from bloomery.errors import BloomeryError
from bloomery.model import balance
from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder
from bloomery.parallel.mesh import Meshes
from bloomery.parallel.work import ModelWork

Batch = dict[str, Tensor]
Schedule = Schedule1F1B | ScheduleGPipe | ScheduleInterleaved1F1B | ScheduleLoopedBFS
IGNORE = -100  # `data.pack.IGNORE`: this package knows no data
_SEQ_LEN = 4096  # at which the work of layers is compared, unless the model ends before


class Loss(Protocol):
    """What an objective returns: a sum with gradient, its weight, metrics as name → (sum, weight)."""

    sum: Tensor
    weight: Tensor | float
    metrics: dict[str, tuple[Tensor | float, Tensor | float]]


@dataclass
class Share:
    """A `Loss` without gradient: what a stage adds to that of a micro-batch."""

    sum: Tensor
    weight: Tensor | float
    metrics: dict[str, tuple[Tensor | float, Tensor | float]]


Objective = Callable[[Any, Batch], Any]


def bounds(config: ModelConfig, pieces: int) -> list[int]:
    """Piece i has the layers from bounds[i] up to bounds[i + 1]; the last has the head as well."""
    work = ModelWork(config, min(config.max_position_embeddings, _SEQ_LEN))
    return [0, *work.cuts(pieces), config.num_layers]


def cut(model: Decoder, meshes: Meshes) -> "Pipeline":
    """Takes from `model`, in place, all that this rank's stage does not hold: pieces stage, stage + stages, …

    A head tied to the embedding stays so on the last stage, under the embedding's name; the gradients of both ends are
    to be added (`data.DataParallel.finish`).
    """
    mapping, layers = meshes.mapping, list(model.layers)
    count = mapping.pipeline * mapping.interleave
    edges = bounds(model.config, count)
    own = range(meshes.place("pipeline"), count, mapping.pipeline)
    chunks = []
    for piece in own:
        names = [str(number) for number in range(edges[piece], edges[piece + 1])]
        chunks.append(Chunk(model, {name: layers[int(name)] for name in names}, piece == 0, piece == count - 1))
    model.layers = _named({name: layer for chunk in chunks for name, layer in chunk.layers.named_children()})
    for name in ("embeddings", "norm", "lm_head"):
        if not any(hasattr(chunk, name) for chunk in chunks):
            delattr(model, name)
    return Pipeline(chunks, list(own), meshes)


class Chunk(nn.Module):
    """Consecutive layers of a decoder, with its embedding before or its norm and head after them."""

    def __init__(self, model: Decoder, layers: dict[str, nn.Module], first: bool, last: bool):
        super().__init__()
        self.first, self.last, self.layers = first, last, _named(layers)
        if first or (last and model.config.tie_word_embeddings):
            self.embeddings = model.embeddings
        if last:
            self.norm, self.lm_head = model.norm, model.lm_head
        self._model = (model,)  # not a child: it shares what it is made of
        self.dtype = next(model.parameters()).dtype

    def begin(self, batches: Sequence[Batch], shape: tuple[int, int]) -> None:
        """The micro-batches that the next calls are for, one after another, and the shape that hidden states travel in.

        `shares` collects what balancing terms of these layers add to each loss."""
        self._waiting, self._shape = iter(batches), shape
        self.shares: list[Share] = []

    def forward(self, x: Tensor, checkpoint_activations: bool = False) -> Tensor:
        """Hidden states (rows, seq, hidden) of the next micro-batch; x: those of the piece before, else ignored."""
        batch = next(self._waiting)
        ids = batch["input_ids"]
        if torch.is_grad_enabled():
            balance.weigh(self, batch["labels"] != IGNORE, batch.get("counted"), batch.get("label_weight"))
        context = self._model[0].context(ids, batch.get("segment_ids"), batch.get("position_ids"), None, None)
        hidden = self.embeddings(ids) if self.first else x[: ids.shape[0], : ids.shape[1]]
        for layer in self.layers:
            if checkpoint_activations and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, context, None, use_reentrant=False)
            else:
                hidden = layer(hidden, context, None)
        if terms := balance.terms(self) if torch.is_grad_enabled() else None:
            self.shares.append(Share(terms[0].detach(), 0.0, terms[1]))
        if self.last:
            return self.norm(hidden)
        rows, seq = self._shape
        return F.pad(hidden, (0, 0, 0, seq - ids.shape[1], 0, rows - ids.shape[0]))


class Ending(nn.Module):
    """What an objective takes for the model on the last stage: called on a batch, it returns the hidden states that the
    pipeline brought; beside that it has the head."""

    def __init__(self, chunk: Chunk, hidden: Tensor, config: ModelConfig):
        super().__init__()
        self.lm_head, self.hidden, self.config = chunk.lm_head, hidden, config

    def forward(self, *_: object, **__: object) -> Tensor:
        return self.hidden


class Pipeline:
    """The pieces of this rank, and how micro-batches go through them. All ranks of a pipeline call the same method with
    the same micro-batches."""

    def __init__(self, chunks: list[Chunk], numbers: list[int], meshes: Meshes):
        self.chunks, self._numbers = chunks, numbers
        self._mapping, self._group = meshes.mapping, meshes.group("pipeline")
        self._config = chunks[0]._model[0].config
        self._schedule: tuple[object, Schedule] | None = None
        self._losses: list[Any] = []

    def forward_backward(self, batches: Sequence[Batch], objective: Objective) -> list[Any]:
        """Gradients of the sum of all losses. Returns, without gradients, the losses on the last stage, and on every
        stage what its balancing terms add."""
        return self._run(batches, objective, train=True)

    @torch.no_grad()
    def forward(self, batches: Sequence[Batch], objective: Objective) -> list[Any]:
        """The losses on the last stage; nothing on the others."""
        return self._run(batches, objective, train=False)

    def _run(self, batches: Sequence[Batch], objective: Objective, train: bool) -> list[Any]:
        rows, seq = (max(batch["input_ids"].shape[dim] for batch in batches) for dim in (0, 1))
        for chunk in self.chunks:
            chunk.begin(batches, (rows, seq))
        self._batches, self._objective = batches, objective
        losses = self._losses = []
        schedule = self._scheduled(len(batches), (rows, seq), train)
        device = batches[0]["input_ids"].device
        begin = [torch.zeros(len(batches), 1, device=device)] if self.chunks[0].first else []
        step = schedule.step if train else schedule.eval
        try:
            step(*begin, target=torch.arange(len(batches)), return_outputs=False)
        except RuntimeError as error:
            if isinstance(error.__cause__, BloomeryError):  # raised by a layer, wrapped by torch
                raise error.__cause__ from None
            raise
        return losses + [share for chunk in self.chunks for share in chunk.shares]

    def _measure(self, hidden: Tensor, number: Tensor) -> Tensor:
        loss = self._objective(Ending(self.chunks[-1], hidden, self._config), self._batches[int(number)])
        self._losses.append(replace(loss, sum=loss.sum.detach()))
        return loss.sum

    def _scheduled(self, count: int, shape: tuple[int, int], train: bool) -> Schedule:
        """The schedule for so many micro-batches of such a shape; the last one is kept, with its buffers."""
        key = (count, shape, train)
        if self._schedule is None or self._schedule[0] != key:
            stages = [
                self._stage(chunk, number, shape) for chunk, number in zip(self.chunks, self._numbers, strict=True)
            ]
            self._schedule = key, _schedule(stages, count, self._mapping.pipeline, self._measure)
        return self._schedule[1]

    def _stage(self, chunk: Chunk, number: int, shape: tuple[int, int]) -> PipelineStage:
        hidden = torch.empty(*shape, self._config.hidden_size, dtype=chunk.dtype, device="meta", requires_grad=True)
        begin = torch.empty(1, 1, device="meta") if chunk.first else hidden
        device = next(chunk.parameters()).device
        total = self._mapping.pipeline * self._mapping.interleave
        return PipelineStage(chunk, number, total, device, begin, hidden, group=self._group)


def _schedule(
    stages: list[PipelineStage], count: int, ranks: int, measure: Callable[[Tensor, Tensor], Tensor]
) -> Schedule:
    """1F1B, interleaved where there are several pieces; with micro-batches too few or too odd for it, all forward
    passes before all backward passes."""
    settings: dict[str, Any] = {"n_microbatches": count, "loss_fn": measure, "scale_grads": False}
    if len(stages) == 1:
        return Schedule1F1B(stages[0], **settings) if count >= ranks else ScheduleGPipe(stages[0], **settings)
    even = count % max(1, count // ranks) == 0
    several: list[Any] = [*stages]
    return ScheduleInterleaved1F1B(several, **settings) if even else ScheduleLoopedBFS(several, **settings)


def _named(layers: dict[str, nn.Module]) -> nn.ModuleList:
    """In order, under these names instead of 0, 1, 2, …"""
    found = nn.ModuleList()
    for name, layer in layers.items():
        found.add_module(name, layer)
    return found
