"""Sketches of the gradient of each sample's mean loss, by four paths that agree.

`loop`: one sample after another, whole gradients; the reference. `vmap`: whole gradients of all samples of a batch at
once (`torch.func`). `hooks`: no gradient of a weight is ever made; the one to use. `by_ranks`: the loop for a model
that ranks share, each projecting what it holds.

The loss of a sample is the mean of −log p over its labels, in nats; the model runs without dropout (arXiv 2505.20161).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F

from bloomery.data.pack import IGNORE, Batch
from bloomery.errors import ConfigError
from bloomery.model.decoder import Decoder
from bloomery.parallel.apply import Parallel
from bloomery.parallel.pieces import Box
from bloomery.synthesize.hooks import GradientHooks
from bloomery.synthesize.plain import plain
from bloomery.synthesize.sketch import Sketcher
from bloomery.train.losses import Loss, hidden_states
from bloomery.train.spread import own_rows

Path = Literal["hooks", "loop", "vmap"]
Sketches = tuple[Tensor, Tensor]
"""z (batch, dim) in float32 or better, and the mean loss (batch,) of each sample in nats."""


def sketch(model: Decoder, batch: Batch, sketcher: Sketcher, path: Path = "hooks") -> Sketches:
    """Of every row of `batch`: `input_ids` and `labels` (batch, seq), each row one sample, padded at its right end.

    Raises `ConfigError` where a row has no label, because a mean over nothing has no gradient.
    """
    _check(batch["labels"])
    return _PATHS[path](model.eval(), batch, sketcher)


def by_hooks(model: Decoder, batch: Batch, sketcher: Sketcher) -> Sketches:
    """For many batches open `GradientHooks` once."""
    with GradientHooks(model, sketcher) as hooks:
        return hooks(batch)


def by_loop(model: Decoder, batch: Batch, sketcher: Sketcher) -> Sketches:
    """One backward pass a sample."""
    parameters = dict(model.named_parameters())
    rows, losses = [], []
    for number in range(len(batch["labels"])):
        sample = _trimmed(batch, number)
        loss = _mean_loss(model(sample["input_ids"]), model.lm_head.weight, sample["labels"])
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        found = {name: g.unsqueeze(0) for name, g in zip(parameters, gradients, strict=True)}
        rows.append(_projected(found, sketcher)[0])
        losses.append(loss.detach())
    return torch.stack(rows), torch.stack(losses)


def by_vmap(model: Decoder, batch: Batch, sketcher: Sketcher) -> Sketches:
    """Needs room for the gradients of the whole batch."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(values: dict[str, Tensor], ids: Tensor, labels: Tensor) -> Tensor:
        hidden = functional_call(model, values, (ids.unsqueeze(0),))
        head = values.get("lm_head.weight", values["embeddings.weight"])
        return _mean_loss(hidden, head, labels)

    with plain(model):
        gradients, losses = vmap(grad_and_value(loss), in_dims=(None, 0, 0))(
            parameters, batch["input_ids"], batch["labels"]
        )
    return _projected(gradients, sketcher), losses


def by_ranks(parallel: Parallel, batch: Batch, sketcher: Sketcher) -> Sketches:
    """Of a model that ranks share under any mapping; collective, all ranks give the same batch and get all of it.

    Each rank projects its own part of each gradient by its place in the whole, and the sketches are summed.
    """
    _check(batch["labels"])
    parallel.model.eval()
    rows, losses = [], []
    for number in range(len(batch["labels"])):
        sample = parallel.split(own_rows(_trimmed(batch, number), parallel))
        parallel.model.zero_grad(set_to_none=True)
        found = parallel.forward_backward([sample], _summed_loss)  # on stages before the last nothing
        share = [sum(float(loss.sum) for loss in found), sum(float(loss.weight) for loss in found)]
        total = parallel.sum(torch.tensor(share, dtype=torch.float64))
        rows.append(_projected_parts(parallel, sketcher) / float(total[1]))
        losses.append(total[0] / total[1])
    parallel.model.zero_grad(set_to_none=True)
    z = torch.stack(rows)
    return parallel.sum(z), torch.stack(losses)


_PATHS: dict[str, Callable[[Decoder, Batch, Sketcher], Sketches]] = {
    "hooks": by_hooks,
    "loop": by_loop,
    "vmap": by_vmap,
}


def _check(labels: Tensor) -> None:
    empty = ((labels != IGNORE).sum(1) == 0).nonzero().flatten().tolist()
    if empty:
        raise ConfigError(f"row {empty[0]}: no label, so its mean loss does not exist; leave such samples out")


def _trimmed(batch: Batch, number: int) -> Batch:
    """One row without the padding after its last label."""
    length = int((batch["labels"][number] != IGNORE).nonzero().max()) + 1
    return {name: batch[name][number : number + 1, :length] for name in ("input_ids", "labels")}


def _mean_loss(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head).flatten(0, -2), labels.flatten(), ignore_index=IGNORE)


def _summed_loss(model: nn.Module, batch: Batch) -> Loss:
    logits = F.linear(hidden_states(model, batch), model.lm_head.weight).flatten(0, 1)  # type: ignore[union-attr]
    labels = batch["labels"].flatten()
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return Loss(total, (labels != IGNORE).sum())


def _projected(gradients: dict[str, Tensor], sketcher: Sketcher) -> Tensor:
    """gradients: name → (batch, *shape)."""
    first = next(iter(gradients.values()))
    z = torch.zeros(
        len(first), sketcher.config.dim, device=first.device, dtype=torch.promote_types(first.dtype, torch.float32)
    )
    for name, gradient in gradients.items():
        projection = sketcher.of(name, gradient.shape[1:])
        projection.add(z, gradient.reshape(len(z), projection.num_rows, projection.num_cols).to(z.dtype))
    return z


def _projected_parts(parallel: Parallel, sketcher: Sketcher) -> Tensor:
    """This rank's share of the sketch, (dim,): what several ranks hold is shared among them."""
    gradients = parallel.data.gradients()
    if parallel.meshes.place("pipeline"):
        gradients = {name: g for name, g in gradients.items() if name != "embeddings.weight"}  # the first stage has it
    z = torch.zeros(1, sketcher.config.dim, device=parallel.device)
    for name, gradient in gradients.items():
        piece = parallel.placements[name].piece
        projection, part = sketcher.of(name, piece.shape), torch.zeros_like(z, dtype=gradient.dtype)
        for inside, held in piece.boxes:
            block = gradient[held.slices].reshape(1, -1, inside.shape[-1])
            projection.add(part, block, _rows(inside, piece.shape), _columns(inside))
        z = z + part / parallel.data.copies(name)
    return z[0]


def _rows(box: Box, shape: tuple[int, ...]) -> Tensor:
    """Rows of the parameter, seen as a matrix, that a block of it covers."""
    rows = torch.zeros(1, dtype=torch.long)
    for start, size, whole in zip(box.offset[:-1], box.shape[:-1], shape[:-1], strict=True):
        rows = (rows[:, None] * whole + torch.arange(start, start + size)).flatten()
    return rows


def _columns(box: Box) -> Tensor:
    return torch.arange(box.offset[-1], box.offset[-1] + box.shape[-1])
