"""Named tensors of which every rank holds a part, to disk and back by torch.distributed.checkpoint.

On disk a tensor is a set of boxes of the whole, whoever wrote them; a reader copies what its own boxes overlap. So any
mapping and number of ranks reads what any other wrote, bit for bit, and a single process is nothing special.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Size, Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from bloomery.errors import ArtifactError
from bloomery.parallel.pieces import Box, Piece


@dataclass(frozen=True)
class Shard:
    """What this rank holds of one tensor."""

    local: Tensor
    piece: Piece

    @classmethod
    def whole(cls, tensor: Tensor) -> "Shard":
        """A tensor that this rank holds all of."""
        return cls(tensor, Piece.whole(tensor.shape))


Shards = Mapping[str, Shard]


def save(shards: Shards, folder: Path, group: ProcessGroup | None) -> None:
    """Write all ranks' shards into `folder`; of equal boxes, one is written. Collective over `group`.

    Raises `OSError` or `ArtifactError` with the cause, and the rank it struck, on every rank.
    """
    try:
        dcp.save(dict(shards), checkpoint_id=folder, planner=_SavePlanner(), process_group=group, no_dist=group is None)
    except dcp.CheckpointException as error:  # derives from BaseException and hides the reason inside
        raise _cause(error, group) from error


def load(shards: Shards, folder: Path) -> None:
    """Fill this rank's shards in place; every rank reads for itself. Raises as `save` does."""
    try:
        dcp.load(dict(shards), checkpoint_id=folder, planner=_LoadPlanner(), no_dist=True)
    except dcp.CheckpointException as error:
        raise _cause(error, None) from error


def contents(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Name → shape, type and boxes of every tensor in `folder`."""
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: found for name, found in stored.items() if isinstance(found, TensorStorageMetadata)}


def misfit(shards: Shards, stored: Mapping[str, TensorStorageMetadata]) -> str | None:
    """The first shard that `stored` cannot fill, in words; `None` when it can fill all."""
    for name, shard in shards.items():
        if name not in stored:
            return f"it holds no {name}"
        if tuple(stored[name].size) != shard.piece.shape:
            return f"{name} is {tuple(stored[name].size)}, here {shard.piece.shape}"
    return None


class _SavePlanner(DefaultSavePlanner):
    """torch's plan (equal boxes once, spread evenly over ranks) over shards in place of torch's own tensor types."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.is_coordinator = state_dict, is_coordinator

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([item for name, shard in self.state_dict.items() for item in _items(name, shard)])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return _part(self.state_dict[index.fqn], index)


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        stored = self.metadata.state_dict_metadata
        chunks = {name: [_chunk(box) for box, _ in shard.piece.boxes] for name, shard in self.state_dict.items()}
        reads = (create_read_items_for_chunk_list(name, stored[name], boxes) for name, boxes in chunks.items())
        return LoadPlan([read for some in reads for read in some])

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return _part(self.state_dict[index.fqn], index)


def _items(name: str, shard: Shard) -> Iterator[WriteItem]:
    properties = TensorProperties.create_from_tensor(shard.local)
    for inside, _ in shard.piece.boxes:
        data = TensorWriteData(chunk=_chunk(inside), properties=properties, size=Size(shard.piece.shape))
        yield WriteItem(MetadataIndex(name, Size(inside.offset)), WriteItemType.SHARD, tensor_data=data)


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(Size(box.offset), Size(box.shape))


def _part(shard: Shard, index: MetadataIndex) -> Tensor:
    """The view of the local tensor that lies at this offset of the whole."""
    held = next(held for inside, held in shard.piece.boxes if Size(inside.offset) == index.offset)
    return shard.local.detach()[held.slices]


def _cause(error: dcp.CheckpointException, group: ProcessGroup | None) -> Exception:
    """The reason inside: what the system refused before what only followed from it."""
    reasons = sorted(error.failures.items(), key=lambda item: not isinstance(item[1][0], OSError))
    rank, (reason, _) = reasons[0]
    if isinstance(reason, OSError):
        where = f"rank {rank}: " if group is not None else ""
        return OSError(reason.errno, f"{where}{reason.strerror or reason}")
    return ArtifactError(f"cannot write or read a checkpoint: {reason}")
