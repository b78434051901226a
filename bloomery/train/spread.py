"""A stage's model spread over the ranks of a run: what each trains, which rows it reads, and the whole gathered again.

In a single process everything here is the plain thing: the model itself, all rows, no copy.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bloomery.data import loader
from bloomery.data.ledger import Ledger
from bloomery.data.loader import Sequences
from bloomery.data.pack import IGNORE, Batch
from bloomery.errors import ConfigError
from bloomery.model import balance, hf
from bloomery.model.config import ModelConfig
from bloomery.model.decoder import Decoder
from bloomery.parallel.apply import Parallel, parallelize
from bloomery.parallel.context import check_modes
from bloomery.parallel.expert import apply_experts
from bloomery.parallel.mapping import Mapping
from bloomery.parallel.mesh import Meshes
from bloomery.parallel.plan import describe
from bloomery.parallel.settings import ParallelConfig
from bloomery.parallel.world import world
from bloomery.progress import say
from bloomery.train.loop import LoopConfig, TrainState
from bloomery.train.memory import activation_bytes, rank_state_bytes
from bloomery.train.model_folder import placed
from bloomery.train.optim import adamw


def spread(model: Decoder, settings: ParallelConfig, loop: LoopConfig, seq_len: int | None) -> TrainState:
    """What this rank trains, with a fresh optimizer. All ranks call it with the same weights.

    seq_len: of every row; `None` where rows differ and are padded to what the degrees need.
    Raises `ConfigError` naming the degree that fits neither the ranks nor the model nor the batch.
    """
    balance.install(model, loop.balance)
    if world().size == 1:
        if settings.smallest > 1:
            say(f"parallel: not used in one process; these degrees are for {settings.smallest} ranks or a multiple")
        model = placed(model)
        if loop.balance.capacity_factor is not None:
            apply_experts(model, Meshes.create(Mapping()))
        return TrainState(model, adamw(model, loop))
    rows_of_a_rank(loop, settings.mapping().data)
    parallel = shared(model, settings, seq_len)
    say(f"parallel: {describe(parallel.mapping)} over {world().size} ranks")
    return TrainState(parallel.model, adamw(parallel.model, loop), parallel=parallel)


def shared(model: Decoder, settings: ParallelConfig, seq_len: int | None = None) -> Parallel:
    """A model shared by all ranks of the run, to be trained or only to be asked. Raises as `spread` does."""
    mapping = settings.mapping()
    mapping.check_model(model.config, seq_len, "parallel")
    check_modes(model.config, settings.across, mapping.context, mapping.tensor, "parallel.across")
    return parallelize(placed(model), mapping, settings.across, settings.dispatcher)


def rank_sizes(
    model: ModelConfig | None, settings: ParallelConfig, loop: LoopConfig, seq_len: int | None = None
) -> dict[str, Any]:
    """For `bloomery check`: the mapping and, of a model that is known, the memory of a rank, activations where
    `seq_len` is known; raises what `spread` would. Empty for one process.

    Outside of torchrun, of the fewest ranks that the degrees fill.
    """
    ranks = world().size if world().size > 1 else settings.smallest
    if ranks == 1:
        return {}
    mapping = settings.mapping(ranks)
    _, micro = rows_of_a_rank(loop, mapping.data)
    found: dict[str, Any] = {"mapping": f"{describe(mapping)}: {ranks} ranks"}
    if model is None:
        return found
    mapping.check_model(model, seq_len, "parallel")
    check_modes(model, settings.across, mapping.context, mapping.tensor, "parallel.across")
    found["rank_state_bytes"] = rank_state_bytes(model, mapping, seq_len or model.max_position_embeddings)
    if seq_len is not None:
        shared = mapping.context * mapping.tensor * mapping.pipeline
        recompute = loop.activation_checkpointing or mapping.recompute
        found["rank_activation_bytes"] = activation_bytes(model, micro, seq_len, recompute) // shared
    return found


def rows_of_a_rank(loop: LoopConfig, data: int) -> tuple[int, int]:
    """(rows of a step, rows of a forward pass) of one of `data` ranks. Raises `ConfigError` where a step does not
    divide."""
    share, rest = divmod(loop.batch_size, data)
    if rest:
        raise ConfigError(
            f"loop.batch_size: {loop.batch_size} does not divide into {data} data ranks; choose a multiple of {data}"
        )
    return share, min(loop.micro_batch_size, share)


def row_batches(
    sequences: Sequences, position: int, loop: LoopConfig, parallel: Parallel | None
) -> Iterator[list[Batch]]:
    """The micro-batches of one step after another, from `position` on: this data rank's rows of each."""
    place, data = _data(parallel)
    return loader.batches(sequences, position, loop.batch_size, rows_of_a_rank(loop, data)[1], place, data)


def own_rows(batch: Batch, parallel: Parallel | None) -> Batch:
    """This data rank's rows of a batch that all have read; where they do not divide, rows without labels are added."""
    place, data = _data(parallel)
    if data == 1:
        return batch
    rows = len(batch["input_ids"])
    share = -(-rows // data)
    chosen = torch.arange(place * share, (place + 1) * share)
    own = {name: value[chosen.clamp(max=rows - 1)] for name, value in batch.items()}
    own["labels"] = own["labels"].masked_fill((chosen >= rows)[:, None], IGNORE)
    return own


def whole_ledger(ledger: Ledger, parallel: Parallel | None) -> Ledger:
    """What all data ranks have read together."""
    if parallel is None:
        return ledger
    first = all(parallel.meshes.place(axis) == 0 for axis in ("pipeline", "context", "tensor"))
    everyone: list[Ledger | None] = [None] * world().size
    dist.all_gather_object(everyone, ledger if first else None)
    return sum((found for found in everyone if found is not None), Ledger(ledger.sources, ledger.rows))


def save_model(state: TrainState, config: ModelConfig, path: Path) -> None:
    """The whole model as a Hugging Face folder, written by rank 0; gathered one tensor at a time."""
    if state.parallel is None:
        hf.save(state.model, path)  # type: ignore[arg-type]
        return
    with torch.device("meta"):
        whole = Decoder(config)
    if world().is_main:
        whole = whole.to_empty(device="cpu")
    target = dict(whole.named_parameters()) | dict(whole.named_buffers())
    with torch.no_grad():
        for name, tensor in state.parallel.full_state():
            if world().is_main:
                target[name].copy_(tensor)
    if world().is_main:
        hf.save(whole, path)


def _data(parallel: Parallel | None) -> tuple[int, int]:
    """This rank's place along the data axis, and its length."""
    return (0, 1) if parallel is None else (parallel.meshes.place("data"), parallel.meshes.size("data"))
