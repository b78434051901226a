"""Which sequence comes from which source: exact counts, an even order, and random access without stored state."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from bloomery.data.permutation import key, permute
from bloomery.errors import ConfigError

MAX_SOURCES = 32_766  # source ids are int16 in a batch


def check_weights(weights: Mapping[str, float], where: str = "weights") -> None:
    """Raises `ConfigError` naming the first weight that is negative or not a number, or when all are zero.

    Zero is legal: it leaves the source out. Weights need not sum to 1.
    """
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise ConfigError(f"{where}.{name}: found {weight}, expected a number of at least 0")
    if not any(weights.values()):
        raise ConfigError(
            f"{where}: all are 0 or there are none, so there is nothing to sample; give one source a positive weight"
        )
    if len(weights) > MAX_SOURCES:
        raise ConfigError(f"{where}: {len(weights)} sources; expected at most {MAX_SOURCES}")


def largest_remainder(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers proportional to `shares` that sum to `total` exactly (Hamilton's method); ties go to the first."""
    quotas = shares / shares.sum() * total
    counts = np.floor(quotas).astype(np.int64)
    order = np.argsort(-(quotas - counts), kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return counts


@dataclass(frozen=True)
class Plan:
    """A blend: how many sequences of each source, in which order, in phases that follow one another.

    sources: names; rows: distinct sequences each source holds; counts: per phase, sequences drawn from each source.
    """

    sources: tuple[str, ...]
    rows: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    seed: int

    @property
    def num_sequences(self) -> int:
        """Sequences of all phases."""
        return sum(map(sum, self.counts))

    @cached_property
    def _ends(self) -> list[int]:
        return np.cumsum([sum(phase) for phase in self.counts]).tolist()

    @property
    def drawn(self) -> np.ndarray:
        """(sources,) sequences drawn from each over all phases."""
        return np.sum(self.counts, axis=0)

    @property
    def epochs(self) -> np.ndarray:
        """(sources,) how often each source is gone through."""
        return self.drawn / np.maximum(1, self.rows)

    @property
    def digest(self) -> str:
        """Identity of the plan; a position means the same only under the same plan."""
        return hashlib.blake2b(json.dumps(self.to_json(), sort_keys=True).encode(), digest_size=16).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Plan":
        """The plan of `to_json`."""
        counts = tuple(tuple(phase) for phase in data["counts"])
        return cls(tuple(data["sources"]), tuple(data["rows"]), counts, data["seed"])

    def order(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Source index, and number within that source's stream, of the sequences [start, stop).

        A source's numbers go on from one phase to the next: a new phase never restarts its stream.
        Returns two (n,) int64 arrays. O(sources + n), whatever `start` is.
        """
        if not 0 <= start <= stop <= self.num_sequences:
            raise ConfigError(f"sequences {start} to {stop}: the plan holds {self.num_sequences}")
        parts, begin, before = [], 0, np.zeros(len(self.sources), dtype=np.int64)
        for phase, end in zip(self.counts, self._ends, strict=True):
            counts = np.array(phase, dtype=np.int64)
            if start < end and stop > begin:
                source, number = _virtual_time_merge(counts, max(start, begin) - begin, min(stop, end) - begin)
                parts.append((source, number + before[source]))
            begin, before = end, before + counts
        if not parts:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def draw(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source index, row within the source, and epoch, of the sequences [start, stop).

        Each epoch of a source is a keyed permutation of its rows, by (seed, source name, epoch).
        """
        source, number = self.order(start, stop)
        row, epoch = np.zeros_like(number), np.zeros_like(number)
        for index in np.unique(source):
            mine, size = source == index, self.rows[index]
            epoch[mine], slot = np.divmod(number[mine], size)
            row[mine] = permute(slot, size, key(self.seed, self.sources[index], epoch[mine]))
        return source, row, epoch


def _virtual_time_merge(counts: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Places [start, stop) of the merge in which item k of source i stands at time (k + ½) / counts[i].

    After any prefix of t items a source has given its share of t to within ½ + share · sources / 2. Only the items
    near the window are made: no item's place differs from time · total by more than the number of sources.
    """
    total, margin = int(counts.sum()), len(counts) + 1
    first = np.clip(np.ceil(counts * ((start - margin) / total) - 0.5), 0, counts).astype(np.int64)
    last = np.clip(np.ceil(counts * ((stop + margin) / total) - 0.5), 0, counts).astype(np.int64)
    sizes = last - first
    source = np.repeat(np.arange(len(counts)), sizes)
    number = np.arange(len(source)) - np.repeat(np.cumsum(sizes) - sizes, sizes) + first[source]
    order = np.argsort((number + 0.5) / counts[source], kind="stable")  # sources ascend, so ties go to the lower one
    window = order[start - int(first.sum()) :][: stop - start]
    return source[window], number[window]


def make_plan(
    names: Sequence[str],
    rows: Sequence[int],
    row_tokens: Sequence[float],
    phases: Sequence[tuple[float, Mapping[str, float]]],
    num_sequences: int,
    seed: int,
) -> Plan:
    """Exact counts for weights that are shares of *tokens*.

    A source with padding gives fewer tokens a row, so its share of rows is weight / tokens per row.
    row_tokens: mean tokens of a source's row; phases: (share of the sequences, weights by name).
    Raises `ConfigError` when a source with a positive weight has no rows.
    """
    for _, weights in phases:
        for name, count in zip(names, rows, strict=True):
            if weights.get(name, 0) > 0 and not count:
                raise ConfigError(
                    f"source {name}: has weight {weights[name]} but no rows to sample; set its weight to 0 or feed it"
                )
    lengths = largest_remainder(np.array([share for share, _ in phases], dtype=float), num_sequences)
    counts = []
    for (_, weights), length in zip(phases, lengths, strict=True):
        shares = np.array(
            [weights.get(name, 0) / max(tokens, 1) for name, tokens in zip(names, row_tokens, strict=True)]
        )
        counts.append(tuple(largest_remainder(shares, int(length)).tolist()))
    return Plan(tuple(names), tuple(rows), tuple(counts), seed)
