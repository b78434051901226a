"""Whole tensors out of what the ranks hold, and back. One at a time: nothing needs room for two models."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bloomery.parallel.collectives import all_reduce_
from bloomery.parallel.pieces import Piece


@dataclass(frozen=True)
class Directory:
    """Shape and type of every tensor of the model, whichever rank holds it, and what this rank is to write of each.

    Of ranks with the same piece the lowest writes. names: in the order of the pipeline's stages.
    """

    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    written: frozenset[str]

    @classmethod
    def of(cls, held: Mapping[str, tuple[Piece, torch.dtype]]) -> "Directory":
        """held: this rank's pieces by name. Collective over all ranks."""
        mine = {name: (piece.shape, dtype, hash_of(piece)) for name, (piece, dtype) in held.items()}
        everyone: list[dict] = [mine]
        rank = 0
        if dist.is_initialized():
            rank, everyone = dist.get_rank(), [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(everyone, mine)
        tensors = {name: entry[:2] for one in everyone for name, entry in one.items()}
        taken = {(name, entry[2]) for one in everyone[:rank] for name, entry in one.items()}
        written = frozenset(name for name, entry in mine.items() if (name, entry[2]) not in taken)
        return cls(tensors, written)

    def gathered(
        self, local: Mapping[str, Tensor], pieces: Mapping[str, Piece], device: torch.device, names: Iterable[str] = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) one after another, on every rank; all tensors unless `names` are given. Collective: all
        ranks take the same ones, to the end."""
        group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
        for name in names or self.tensors:
            shape, dtype = self.tensors[name]
            full = torch.zeros(shape, dtype=dtype, device=device)
            if name in self.written:
                pieces[name].put(local[name], full)
            yield name, all_reduce_(full, group)


def hash_of(piece: Piece) -> int:
    """The same on all ranks for the same blocks of the whole: numbers hash alike in every process."""
    return hash(tuple(inside for inside, _ in piece.boxes))
