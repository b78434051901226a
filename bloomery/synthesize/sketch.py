"""Linear maps from a gradient to a few numbers that keep inner products: one map a parameter, drawn by its name.

The map depends on seed, name and place in the whole parameter alone. It is linear, so the sketch of a model is the sum
of the sketches of its parameters, of the parts of a parameter that ranks hold, and of the tokens of a sample.

A parameter is seen as a matrix: its last dimension are the columns, all others together the rows; a vector is one row.
`rademacher`: dense random signs over √dim, as TRAK's (arXiv 2303.14186). `countsketch`: every element goes, with a
random sign, to one of `dim` places (Charikar et al. 2002); the hash is made in two steps, rows and columns by
themselves to a grid of cells and cells to places, so that a product of two matrices is sketched through its factors.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bloomery.config import Config, Field

_CELLS_PER_PLACE = 16  # more: less noise and more work. Two factors of 128 for a sketch of 1,024
_BLOCK_ELEMENTS = 2**23  # of random signs at once: 32 MiB


class SketchConfig(Config):
    """Which map. Sketches of different maps cannot be compared."""

    kind: Literal["countsketch", "rademacher"] = Field(
        default="countsketch", description="countsketch: fast, through factors; rademacher: dense signs, the reference"
    )
    dim: int = Field(default=1024, ge=2, description="numbers in a sketch; the noise of a cosine is about 1/√dim")
    seed: int = Field(default=0, description="seed of the map; one for all data that is ever compared")


class Projection(ABC):
    """The map of one parameter. Every method adds to `z` (batch, dim)."""

    def __init__(self, name: str, shape: torch.Size | tuple[int, ...], config: SketchConfig):
        self.name, self.config = name, config
        self.num_rows, self.num_cols = math.prod(shape[:-1]), shape[-1]

    @abstractmethod
    def add(self, z: Tensor, block: Tensor, rows: Tensor | None = None, cols: Tensor | None = None) -> None:
        """A block (batch, n, m) of the gradients: what lies at these rows (n,) and columns (m,); default: all. Rows may
        repeat; they add up."""

    def add_product(self, z: Tensor, left: Tensor, right: Tensor, first_row: int = 0) -> None:
        """Σ_t left_t ⊗ right_t: left (batch, tokens, n) belongs to n rows from `first_row` on, right (batch, tokens,
        columns)."""
        step = max(1, _BLOCK_ELEMENTS // (self.num_cols * self.config.dim))
        for start in range(0, left.shape[2], step):
            part = left[:, :, start : start + step]
            rows = torch.arange(start, start + part.shape[2], device=z.device) + first_row
            self.add(z, part.transpose(1, 2) @ right, rows)

    def add_lookup(self, z: Tensor, ids: Tensor, right: Tensor) -> None:
        """Row ids[b, t] of the gradient gets right[b, t]: ids (batch, tokens), right (batch, tokens, columns)."""
        for sample in range(len(z)):
            self.add(z[sample : sample + 1], right[sample : sample + 1], ids[sample])

    def add_stacked(self, z: Tensor, left: Tensor, right: Tensor, counts: list[int], samples: Tensor) -> None:
        """Stacked matrices: left (n, rows of one) and right (n, columns) lie by matrix, `counts` of each, and belong to
        `samples` (n,)."""
        matrix = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        for number in range(len(counts)):
            for sample in samples[(matrix == number).to(samples.device)].unique().tolist():
                chosen = (matrix == number).to(samples.device) & (samples == sample)
                factors = left[chosen].unsqueeze(0), right[chosen].unsqueeze(0)
                self.add_product(z[sample : sample + 1], *factors, first_row=number * left.shape[1])


class Rademacher(Projection):
    """Signs made anew from a counter each time: no matrix of (parameters, dim) ever exists."""

    def add(self, z: Tensor, block: Tensor, rows: Tensor | None = None, cols: Tensor | None = None) -> None:
        rows = torch.arange(self.num_rows) if rows is None else rows.cpu()
        cols = torch.arange(self.num_cols) if cols is None else cols.cpu()
        places, flat = (rows[:, None] * self.num_cols + cols).flatten().numpy(), block.flatten(1)
        step = max(1, _BLOCK_ELEMENTS // self.config.dim)
        for start in range(0, len(places), step):
            z += flat[:, start : start + step] @ self._signs(places[start : start + step]).to(z)

    def _signs(self, places: np.ndarray) -> Tensor:
        """(n, dim) of ±1/√dim for flat places in the parameter."""
        words = -(-self.config.dim // 64)
        counters = places.astype(np.uint64)[:, None] * np.uint64(words) + np.arange(words, dtype=np.uint64)
        bits = np.unpackbits(_random(self.config.seed, self.name, counters).view(np.uint8), axis=1)
        return torch.from_numpy(bits[:, : self.config.dim]).float().mul_(2).sub_(1).div_(math.sqrt(self.config.dim))


class CountSketch(Projection):
    """Rows and columns hashed to a grid, its cells to the places of the sketch."""

    def __init__(self, name: str, shape: torch.Size | tuple[int, ...], config: SketchConfig):
        super().__init__(name, shape, config)
        cells = _CELLS_PER_PLACE * config.dim
        side = math.isqrt(cells)
        high = min(self.num_rows, max(side, cells // self.num_cols))
        self._rows = _Axis(self.num_rows, high, config.seed, f"{name}/rows")
        self._cols = _Axis(self.num_cols, cells // high, config.seed, f"{name}/columns")
        drawn = _random(config.seed, f"{name}/cells", np.arange(self._rows.side * self._cols.side, dtype=np.uint64))
        self._places = torch.from_numpy((drawn >> np.uint64(1)) % np.uint64(config.dim)).long()
        self._signs = _sign(drawn)

    def add(self, z: Tensor, block: Tensor, rows: Tensor | None = None, cols: Tensor | None = None) -> None:
        narrow = self._cols.gather(block, cols)
        self._fold(z, self._rows.gather(narrow.transpose(1, 2), rows).transpose(1, 2))

    def add_product(self, z: Tensor, left: Tensor, right: Tensor, first_row: int = 0) -> None:
        self._add_factors(z, self._gather_rows(left, first_row), self._cols.gather(right))

    def add_lookup(self, z: Tensor, ids: Tensor, right: Tensor) -> None:
        places, signs = self._rows.of(ids)
        left = torch.zeros(*ids.shape, self._rows.side, dtype=right.dtype, device=right.device)
        left.scatter_(2, places.unsqueeze(2), signs.to(right).unsqueeze(2))
        self._add_factors(z, left, self._cols.gather(right))

    def add_stacked(self, z: Tensor, left: Tensor, right: Tensor, counts: list[int], samples: Tensor) -> None:
        parts = enumerate(left.split(counts))
        narrow = torch.cat([self._gather_rows(part, number * left.shape[1]) for number, part in parts])
        by_sample = samples.argsort(stable=True)
        tokens = torch.bincount(samples, minlength=len(z)).tolist()
        factors = (t[by_sample].split(tokens) for t in (narrow, self._cols.gather(right)))
        for sample, (a, b) in enumerate(zip(*factors, strict=True)):
            self._add_factors(z[sample : sample + 1], a.unsqueeze(0), b.unsqueeze(0))

    def _gather_rows(self, left: Tensor, first: int) -> Tensor:
        return self._rows.gather(left, slice(first, first + left.shape[-1]))

    def _add_factors(self, z: Tensor, left: Tensor, right: Tensor) -> None:
        self._fold(z, left.transpose(1, 2) @ right)

    def _fold(self, z: Tensor, cells: Tensor) -> None:
        """cells (batch, grid rows, grid columns)."""
        if self._places.device != z.device:
            self._places, self._signs = self._places.to(z.device), self._signs.to(z.device)
        z.scatter_add_(1, self._places.expand(len(z), -1), cells.reshape(len(z), -1).to(z.dtype) * self._signs.to(z))


class _Axis:
    """Indices below `count` to places below `side` with signs; each to itself where there is room."""

    def __init__(self, count: int, most: int, seed: int, name: str):
        self.side, self._identity = min(count, most), count <= most
        drawn = _random(seed, name, np.arange(0 if self._identity else count, dtype=np.uint64))
        self._places = torch.from_numpy((drawn >> np.uint64(1)) % np.uint64(self.side)).long()
        self._signs = _sign(drawn)
        self._matrix: Tensor | None = None

    def of(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Places and signs of these indices, in their shape."""
        if self._identity:
            return index, torch.ones_like(index, dtype=torch.float32)
        near = index.to(self._places.device)
        return self._places[near].to(index.device), self._signs[near].to(index.device)

    def gather(self, x: Tensor, index: Tensor | slice | None = None) -> Tensor:
        """x (…, n) of these indices, by default all, to (…, side)."""
        if self._identity and (index is None or (isinstance(index, slice) and x.shape[-1] == self.side)):
            return x
        matrix = self._dense(x)
        return x @ (matrix if index is None else matrix[index])

    def _dense(self, like: Tensor) -> Tensor:
        """(count, side), one sign a row; kept, for it is small beside the parameter."""
        if self._matrix is None or self._matrix.dtype != like.dtype or self._matrix.device != like.device:
            if self._identity:
                return torch.eye(self.side, dtype=like.dtype, device=like.device)
            matrix = torch.zeros(len(self._places), self.side)
            self._matrix = matrix.scatter_(1, self._places[:, None], self._signs[:, None]).to(like)
        return self._matrix


class Sketcher:
    """The maps of all parameters of a model, made when first asked for."""

    def __init__(self, config: SketchConfig):
        self.config = config
        self._maps: dict[str, Projection] = {}

    def of(self, name: str, shape: torch.Size | tuple[int, ...]) -> Projection:
        """The map of a parameter: its name and shape in the whole model."""
        if name not in self._maps:
            kind = CountSketch if self.config.kind == "countsketch" else Rademacher
            self._maps[name] = kind(name, shape, self.config)
        return self._maps[name]


def _random(seed: int, name: str, counters: np.ndarray) -> np.ndarray:
    """64 random bits for each counter of (seed, name): the finaliser of splitmix64 (Steele et al. 2014)."""
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    x = counters * np.uint64(0x9E3779B97F4A7C15) + np.frombuffer(key, dtype=np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _sign(drawn: np.ndarray) -> Tensor:
    return torch.from_numpy((drawn & np.uint64(1)).astype(np.float32) * 2 - 1)
