"""G-Vendi: how many gradient directions a dataset effectively has (arXiv 2505.20161; Vendi score arXiv 2210.02410).

exp of the entropy of the eigenvalues of C = Σ w·u·uᵀ / Σ w over unit rows u. C is a sum, so states of different shards
merge, in any order, and samples can be taken out again.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

_CHUNK = 65_536
_BLOCKS = 4  # of columns: only products on and above the diagonal are made
_SMALLEST = 1e-12
_SHRINK = 1e-3  # towards the isotropic matrix, where C has no full rank and its logarithm does not exist
_Z95 = 1.959964


@dataclass
class Moments:
    """What is kept of a dataset. count: samples; weight: Σ w; second: Σ w·u·uᵀ (dim, dim); first: Σ w·u (dim,);
    float64."""

    count: int
    weight: float
    second: np.ndarray
    first: np.ndarray

    @classmethod
    def empty(cls, dim: int) -> Self:
        """Of no sample."""
        return cls(0, 0.0, np.zeros((dim, dim)), np.zeros(dim))

    @classmethod
    def of(cls, rows: np.ndarray, weights: np.ndarray | None = None) -> Self:
        """Of rows (n, dim) of any length."""
        return cls.empty(rows.shape[1]).add(rows, weights)

    def add(self, rows: np.ndarray, weights: np.ndarray | None = None) -> Self:
        """More samples: rows (n, dim) of any dtype and length, which are scaled to unit length here. In place."""
        return self._move(rows, weights, 1)

    def remove(self, rows: np.ndarray, weights: np.ndarray | None = None) -> Self:
        """Takes out samples that were added with the same weights. In place."""
        return self._move(rows, weights, -1)

    def _move(self, rows: np.ndarray, weights: np.ndarray | None, sign: int) -> Self:
        for start in range(0, len(rows), _CHUNK):
            at = slice(start, start + _CHUNK)
            chunk = unit(rows[at])
            share = None if weights is None else np.asarray(weights[at], dtype=chunk.dtype)
            self.count += sign * len(chunk)
            self.weight += sign * (len(chunk) if share is None else float(share.sum(dtype=np.float64)))
            weighed = chunk if share is None else chunk * share[:, None]
            self.first += sign * weighed.sum(0, dtype=np.float64)
            self._add_products(weighed, chunk, sign)
        return self

    def _add_products(self, left: np.ndarray, right: np.ndarray, sign: int) -> None:
        """leftᵀ·right, symmetric, by blocks of columns; the lower half is the mirror of the upper."""
        step = -(-right.shape[1] // _BLOCKS)
        for start in range(0, right.shape[1], step):
            rows, cols = slice(start, start + step), slice(start + step, None)
            self.second[rows, rows] += sign * (left[:, rows].T @ right[:, rows])
            above = sign * (left[:, rows].T @ right[:, cols])
            self.second[rows, cols] += above
            self.second[cols, rows] += above.T

    def merge(self, other: "Moments") -> Self:
        """Both together. In place."""
        self.count, self.weight = self.count + other.count, self.weight + other.weight
        self.second += other.second
        self.first += other.first
        return self

    @property
    def density(self) -> np.ndarray:
        """C, symmetric with trace 1."""
        matrix = self.second / self.weight
        return (matrix + matrix.T) / (2 * np.trace(matrix))

    @property
    def centred(self) -> np.ndarray:
        """C without what all samples share, C − ū·ūᵀ, with trace 1; zeros where nothing is left."""
        mean = self.first / self.weight
        matrix = self.second / self.weight - np.outer(mean, mean)
        matrix, trace = (matrix + matrix.T) / 2, np.trace(matrix)
        return matrix / trace if trace > _SMALLEST else np.zeros_like(matrix)


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1, in float32 or better. Raises `ValueError` naming a row that has no direction."""
    rows = np.asarray(rows)
    rows = rows.astype(np.promote_types(rows.dtype, np.float32), copy=False)
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if bad.size:
        raise ValueError(f"row {bad[0]} has length {norms[bad[0]]}: it has no direction; leave it out")
    return rows / norms[:, None]


def spectrum(density: np.ndarray) -> np.ndarray:
    """Eigenvalues of a density matrix, largest first, summing to 1; noise below 1e-12 left out."""
    values = np.linalg.eigvalsh(density)[::-1].clip(min=0)
    values = values / values.sum() if values.sum() > 0 else values
    return values[values >= _SMALLEST]


def spectrum_of(rows: np.ndarray) -> np.ndarray:
    """Eigenvalues of C for rows (n, dim), by the smaller of the two matrices that have them."""
    rows = unit(rows).astype(np.float64)
    return spectrum((rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows) / len(rows))


def entropy(values: np.ndarray) -> float:
    """−Σ λ ln λ in nats."""
    return float(-(values * np.log(values)).sum())


def score(values: np.ndarray) -> float:
    """exp(entropy) of a spectrum: the Vendi score of order 1, between 1 and the number of eigenvalues."""
    found = math.exp(entropy(values))
    assert 1 - 1e-6 <= found <= len(values) + 1e-6, f"{found} directions of {len(values)}"
    return found


def order_two(values: np.ndarray) -> float:
    """1 / Σ λ², the Vendi score of order 2 (arXiv 2310.12952)."""
    return float(1 / np.square(values).sum())


def ceiling(count: int, dim: int) -> float:
    """The expected score of `count` isotropic random rows: a·exp(−a / 2b) with a the smaller of the two numbers (mean
    entropy of a random state, Page 1993)."""
    small, large = sorted((count, dim))
    return small * math.exp(-small / (2 * large))


def rarefied(rows: np.ndarray, size: int, draws: int = 8, seed: int = 0) -> tuple[float, float]:
    """Mean score of random subsets of `size` rows, and its standard deviation over draws. The score grows with size, so
    only scores of one size can be compared."""
    if not 1 <= size <= len(rows):
        raise ValueError(f"subsets of {size} of {len(rows)} rows")
    generator = np.random.default_rng(seed)
    found = [
        score(spectrum_of(rows[np.sort(generator.choice(len(rows), size, replace=False))]))
        for _ in range(1 if size == len(rows) else draws)
    ]
    return float(np.mean(found)), float(np.std(found))


def extrapolated(half: float, whole: float) -> float:
    """The score of endless data from those of n and 2n samples, if the entropy lacks a term in 1 / n (Richardson)."""
    return math.exp(2 * math.log(whole) - math.log(half))


@dataclass(frozen=True)
class Influence:
    """How the entropy reacts to samples: −uᵀ(ln C)u, and its mean over the data, which is the entropy."""

    logarithm: np.ndarray
    entropy: float

    @classmethod
    def of(cls, density: np.ndarray) -> Self:
        """Of a density matrix, shrunk by 1e-3 towards the isotropic one."""
        dim = len(density)
        values, vectors = np.linalg.eigh((1 - _SHRINK) * density + _SHRINK / dim * np.eye(dim))
        logs = np.log(values.clip(min=_SMALLEST))
        return cls((vectors * logs) @ vectors.T, float(-(values * logs).sum()))

    def gains(self, rows: np.ndarray) -> np.ndarray:
        """(n,) −uᵀ(ln C)u in nats: first-order gain in entropy by adding a sample, up to the entropy itself; high for
        directions that are rare."""
        rows = unit(rows)
        return -np.einsum("nd,nd->n", rows @ self.logarithm.astype(rows.dtype), rows, dtype=np.float64)


def interval(density: np.ndarray, batches: Iterable[np.ndarray]) -> tuple[float, float]:
    """95 % interval of the score by the delta method: the standard error of the entropy is sd(gains) / √n. Naive
    bootstraps are biased downwards here, because duplicates lower the score.

    batches: the rows that C was made of, once more.
    """
    influence = Influence.of(density)
    gains = np.concatenate([influence.gains(rows) for rows in batches])
    error = float(gains.std()) / math.sqrt(len(gains))
    middle = entropy(spectrum(density))
    return math.exp(middle - _Z95 * error), math.exp(middle + _Z95 * error)


def decomposition(rows: np.ndarray, tags: Sequence[str]) -> tuple[float, dict[str, float], float]:
    """H(C) = Σ p·H(C of a tag) + χ: the whole entropy, that of each tag, and χ between 0 and the entropy of the tags
    (Holevo): what the tags add to each other. In nats."""
    names = np.asarray(tags)
    parts = {name: rows[names == name] for name in sorted(set(tags))}
    own = {name: entropy(spectrum_of(part)) for name, part in parts.items()}
    whole = entropy(spectrum_of(rows))
    return whole, own, whole - sum(len(parts[name]) / len(rows) * own[name] for name in parts)
