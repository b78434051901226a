"""Which part of a whole tensor a rank holds. Pure bookkeeping: nothing here communicates.

A part need not be one block: a rank's rows of Mamba's `in_proj` are five blocks of the whole, one of each section.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A block of a tensor: where it begins and how far it goes, by dimension."""

    offset: Shape
    shape: Shape

    @property
    def slices(self) -> tuple[slice, ...]:
        """What to index the tensor with."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.shape, strict=True))

    @property
    def numel(self) -> int:
        """Elements inside."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    def intersect(self, other: "Box") -> "Box | None":
        """What both cover; `None` for nothing."""
        starts = tuple(map(max, self.offset, other.offset))
        ends = tuple(min(a + n, b + m) for a, n, b, m in self._along(other))
        sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return Box(starts, sizes) if all(size > 0 for size in sizes) else None

    def moved(self, by: Sequence[int]) -> "Box":
        """The same block `by` further along each dimension."""
        return Box(tuple(start + step for start, step in zip(self.offset, by, strict=True)), self.shape)

    def _along(self, other: "Box") -> "zip[tuple[int, int, int, int]]":
        return zip(self.offset, self.shape, other.offset, other.shape, strict=True)


@dataclass(frozen=True)
class Piece:
    """The part of a tensor of `shape` that a tensor of shape `local` holds: blocks as (in the whole, in the local)."""

    shape: Shape
    local: Shape
    boxes: tuple[tuple[Box, Box], ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Self:
        """All of it."""
        size = tuple(shape)
        everything = Box((0,) * len(size), size)
        return cls(size, size, ((everything, everything),) if everything.numel else ())

    def shard(self, dim: int, index: int, count: int) -> Self:
        """Part `index` of `count` equal parts along `dim` of what is held."""
        return self.shard_sections(dim, (self.local[dim],), index, count)

    def shard_sections(self, dim: int, sizes: Sequence[int], index: int, count: int) -> Self:
        """Part `index` of `count` of each of the sections that `dim` of what is held consists of, one after another."""
        assert sum(sizes) == self.local[dim], f"sections {tuple(sizes)} of {self.local[dim]}"
        boxes: list[tuple[Box, Box]] = []
        start = width = 0
        for size in sizes:
            assert size % count == 0, f"{count} equal parts of {size}"
            part = self.part(_narrow(self.local, dim, start + index * (size // count), size // count))
            step = [width if place == dim else 0 for place in range(len(self.local))]
            boxes += [(inside, held.moved(step)) for inside, held in part.boxes]
            start, width = start + size, width + size // count
        local = tuple(width if place == dim else size for place, size in enumerate(self.local))
        return type(self)(self.shape, local, tuple(boxes))

    def part(self, kept: Box) -> Self:
        """What is left when only this block of the local tensor is kept."""
        boxes = []
        for inside, held in self.boxes:
            both = held.intersect(kept)
            if both is not None:
                into = [a - b for a, b in zip(both.offset, held.offset, strict=True)]
                place = [a - b for a, b in zip(both.offset, kept.offset, strict=True)]
                boxes.append((Box(inside.moved(into).offset, both.shape), Box(tuple(place), both.shape)))
        return type(self)(self.shape, kept.shape, tuple(boxes))

    def take(self, full: Tensor) -> Tensor:
        """The local tensor out of the whole one, as a copy."""
        assert tuple(full.shape) == self.shape, f"{tuple(full.shape)} is not {self.shape}"
        local = full.new_empty(self.local)
        for inside, held in self.boxes:
            local[held.slices].copy_(full[inside.slices])
        return local

    def put(self, local: Tensor, full: Tensor) -> None:
        """Writes the local tensor to its place in the whole one."""
        assert tuple(full.shape) == self.shape, f"{tuple(full.shape)} is not {self.shape}"
        assert tuple(local.shape) == self.local, f"{tuple(local.shape)} is not {self.local}"
        for inside, held in self.boxes:
            full[inside.slices].copy_(local[held.slices])


@dataclass(frozen=True)
class Placement:
    """Where a parameter of one rank belongs, and over which axes of the mapping its gradient is summed.

    copies: ranks that hold the same piece and do not lie along those axes, with the same gradient before that sum; key
    heads fewer than ranks along tensor.
    """

    piece: Piece
    summed_over: tuple[str, ...]
    copies: int = 1


def _narrow(shape: Shape, dim: int, start: int, size: int) -> Box:
    offset = tuple(start if place == dim else 0 for place in range(len(shape)))
    return Box(offset, tuple(size if place == dim else whole for place, whole in enumerate(shape)))
