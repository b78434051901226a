"""Which sequence comes from which source: exact counts, an even order, and random access without stored state."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from bloomery.data.interleave import Interleave
from bloomery.data.permutation import base, keys, permute
from bloomery.errors import ConfigError

MAX_SOURCES = 32_766  # source ids are int16 in a batch
RAMP_STAIRS = 16
"""A ramp is climbed in this many stairs of equal length, each with weights and exact counts of its own."""


class Phase(NamedTuple):
    """One of the phases that follow one another.

    share: of the run's sequences, relative to the other phases; weights: by source, relative;
    ramp: the part of the phase, at its start, over which the weights move linearly from those of the phase before.
    """

    share: float
    weights: Mapping[str, float]
    ramp: float = 0.0


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


def largest_remainder(shares: Sequence[float] | np.ndarray, total: int) -> np.ndarray:
    """Whole numbers proportional to `shares` that sum to `total` exactly (Hamilton's method); ties go to the first.

    Shares count as the decimals they are written as, in integers of any size: no rounding enters.
    """
    decimals = [Decimal(repr(float(share))) for share in shares]
    places = min(0, *(int(decimal.as_tuple().exponent) for decimal in decimals))
    scaled = [int(decimal.scaleb(-places)) for decimal in decimals]
    whole = sum(scaled)
    counts, rests = zip(*(divmod(share * total, whole) for share in scaled), strict=True)
    found = np.array(counts, dtype=np.int64)
    first = sorted(range(len(rests)), key=lambda index: -rests[index])[: total - sum(counts)]
    found[first] += 1
    return found


@dataclass(frozen=True)
class Plan:
    """A blend: how many sequences of each source, in which order, in phases that follow one another.

    sources: names; rows: distinct sequences each source holds; counts: per phase, sequences drawn from each source;
    lengths: per phase, how many of its sequences are read, where a phase ends before its time; all where not given.
    """

    sources: tuple[str, ...]
    rows: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    seed: int
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.lengths:
            object.__setattr__(self, "lengths", tuple(map(sum, self.counts)))

    @property
    def num_sequences(self) -> int:
        """Sequences of all phases."""
        return sum(self.lengths)

    @cached_property
    def ends(self) -> list[int]:
        """Where each phase ends, in sequences from the start of the run."""
        return [*accumulate(self.lengths)]

    @cached_property
    def _orders(self) -> dict[int, Interleave]:
        return {}

    def _order(self, phase: int) -> Interleave:
        return self._orders.setdefault(phase, Interleave(self.counts[phase]))

    @property
    def drawn(self) -> np.ndarray:
        """(sources,) sequences drawn from each over all phases."""
        return self.counts_at(self.num_sequences)

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
        return cls(tuple(data["sources"]), tuple(data["rows"]), counts, data["seed"], tuple(data.get("lengths", ())))

    def counts_at(self, position: int) -> np.ndarray:
        """(sources,) int64: how often each source has been drawn when `position` sequences have been."""
        found = np.zeros(len(self.sources), dtype=np.int64)
        for phase, (end, length) in enumerate(zip(self.ends, self.lengths, strict=True)):
            inside = min(length, position - (end - length))
            if inside > 0:
                whole = inside == sum(self.counts[phase])
                found += np.array(self.counts[phase]) if whole else self._order(phase).counts_at(inside)
        return found

    def until(self, position: int) -> "Plan":
        """The plan of the first `position` sequences: the same draws, and then it ends."""
        starts = [end - length for end, length in zip(self.ends, self.lengths, strict=True)]
        kept = [n for n, start in enumerate(starts) if start < position]
        lengths = tuple(min(self.lengths[n], position - starts[n]) for n in kept)
        return replace(self, counts=tuple(self.counts[n] for n in kept), lengths=lengths)

    def then(self, other: "Plan") -> "Plan":
        """This plan and after it the other, over the other's sources: a source that both have goes on where it was.

        Raises `ConfigError` where a source of this plan is not among the other's, or has other rows there.
        """
        place = {name: index for index, name in enumerate(other.sources)}
        for name, rows in zip(self.sources, self.rows, strict=True):
            if name not in place or other.rows[place[name]] != rows:
                found = f"{other.rows[place[name]]} rows" if name in place else "no such source"
                raise ConfigError(f"source {name}: {rows} rows in the plan to go on from, here {found}; blend the same")
        counts = []
        for phase in self.counts:
            own = dict(zip(self.sources, phase, strict=True))
            counts.append(tuple(own.get(name, 0) for name in other.sources))
        return replace(other, counts=(*counts, *other.counts), lengths=(*self.lengths, *other.lengths), seed=self.seed)

    def random_order(self) -> "Plan":
        """The same sequences of each source as one phase: the control that differs in order alone."""
        return replace(self, counts=(tuple(self.drawn.tolist()),), lengths=())

    def reversed(self) -> "Plan":
        """The phases in the opposite order."""
        return replace(self, counts=self.counts[::-1], lengths=self.lengths[::-1])

    def order(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Source index, and number within that source's stream, of the sequences [start, stop).

        A source's numbers go on from one phase to the next: a new phase never restarts its stream.
        Returns two (n,) int64 arrays. O(n log sources), whatever `start` is.
        """
        if not 0 <= start <= stop <= self.num_sequences:
            raise ConfigError(f"sequences {start} to {stop}: the plan holds {self.num_sequences}")
        parts = [(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))]
        for phase, (end, length) in enumerate(zip(self.ends, self.lengths, strict=True)):
            begin = end - length
            if start < end and stop > begin:
                source, number = self._order(phase).draw(max(start, begin) - begin, min(stop, end) - begin)
                parts.append((source, number + self.counts_at(begin)[source]))
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def draw(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source index, row within the source, and epoch, of the sequences [start, stop).

        Each epoch of a source is a keyed permutation of its rows, by (seed, source name, epoch).
        """
        source, number = self.order(start, stop)
        rows = np.array(self.rows, dtype=np.int64)[source]
        epoch, slot = np.divmod(number, rows)
        return source, permute(slot, rows, keys(self._bases[source], epoch)), epoch

    @cached_property
    def _bases(self) -> np.ndarray:
        return np.array([base(self.seed, name) for name in self.sources], dtype=np.uint64)


def make_plan(
    names: Sequence[str],
    rows: Sequence[int],
    row_units: Sequence[float],
    phases: Sequence[tuple[float, Mapping[str, float]] | Phase],
    num_sequences: int,
    seed: int,
) -> Plan:
    """Exact counts for weights that are shares of tokens, sequences or documents.

    row_units: how many of those units a row of each source holds on average: for shares of tokens, a source whose rows
    have padding gives fewer a row, so its share of rows is weight / tokens per row.
    Raises `ConfigError` when a source with a positive weight has no rows, or would get no sequence at all.
    """
    given = [Phase(*phase) for phase in phases]
    for name, held in zip(names, rows, strict=True):
        weight = max(phase.weights.get(name, 0) for phase in given)
        if weight > 0 and not held:
            raise ConfigError(
                f"source {name}: has weight {weight} but no rows to sample; set its weight to 0 or feed it"
            )
    shares = [_row_shares(phase.weights, names, row_units) for phase in given]
    counts: list[tuple[int, ...]] = []
    for number, length in enumerate(largest_remainder([phase.share for phase in given], num_sequences).tolist()):
        counts += _stairs(shares[number - 1] if number else shares[0], shares[number], given[number].ramp, length)
    _refuse_rounded_away(names, given, counts)
    return Plan(tuple(names), tuple(rows), tuple(counts), seed)


def _row_shares(weights: Mapping[str, float], names: Sequence[str], row_units: Sequence[float]) -> np.ndarray:
    same = len(set(row_units)) == 1  # then weights stay the decimals that they were written as
    pairs = zip(names, row_units, strict=True)
    return np.array([weights.get(name, 0) / (1 if same else max(units, 1e-9)) for name, units in pairs])


def _stairs(before: np.ndarray, after: np.ndarray, ramp: float, length: int) -> list[tuple[int, ...]]:
    """Counts of a phase: of the stairs of its ramp, and of what follows it."""
    if not ramp:
        return [tuple(largest_remainder(after, length).tolist())]
    before, after = before / before.sum(), after / after.sum()
    *stairs, rest = largest_remainder([ramp / RAMP_STAIRS] * RAMP_STAIRS + [1 - ramp], length).tolist()
    found, wanted, given = [], np.zeros(len(after)), np.zeros(len(after), dtype=np.int64)
    for number, size in enumerate([*stairs, rest]):
        climbed = min(1.0, (number + 0.5) / RAMP_STAIRS)
        wanted += size * (before + (after - before) * climbed)
        counts = _nearest(wanted - given, size)
        given += counts
        found.append(tuple(counts.tolist()))
    return [counts for counts in found if sum(counts)]


def _nearest(wanted: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers of at least 0 near `wanted` that sum to `total`: what earlier stairs rounded away is made up."""
    counts = np.floor(np.maximum(wanted, 0)).astype(np.int64)
    while (missing := total - int(counts.sum())) != 0:
        order = np.argsort(-np.sign(missing) * (wanted - counts), kind="stable")
        chosen = [index for index in order.tolist() if missing > 0 or counts[index]][: abs(missing)]
        counts[chosen] += np.sign(missing)
    return counts


def _refuse_rounded_away(names: Sequence[str], phases: Sequence[Phase], counts: Sequence[Sequence[int]]) -> None:
    drawn = np.sum(counts, axis=0)
    for name, found in zip(names, drawn.tolist(), strict=True):
        if not found and any(phase.weights.get(name, 0) > 0 for phase in phases):
            raise ConfigError(
                f"source {name}: its weight is less than half a sequence of this plan of {int(drawn.sum())}, so it "
                "would never be read; raise it, plan more sequences, or set it to 0"
            )
