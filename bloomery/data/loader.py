"""Batches whose position is one number: how many sequences have been trained on. Nothing else is stored.

Sequence k is the same whatever the number of ranks; a step at `position` trains on [position, position + batch_size),
and rank r of w takes the r-th of w equal slices of that window.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from bloomery.data.chat import Examples
from bloomery.data.pack import Batch, best_fit, to_batch
from bloomery.data.permutation import key, permute
from bloomery.errors import ConfigError


class Sequences(Protocol):
    """A stream of training sequences with random access."""

    @property
    def num_sequences(self) -> int | None:
        """How many there are; `None` where epochs follow one another without end."""

    def batch(self, start: int, stop: int) -> Batch:
        """The micro-batch of the sequences [start, stop)."""


def batches(
    sequences: Sequences, position: int, batch_size: int, micro_batch_size: int, rank: int = 0, world: int = 1
) -> Iterator[list[Batch]]:
    """The micro-batches of one step after another, from `position` on. A last step that would be cut is not begun.

    batch_size: sequences of a step over all ranks; micro_batch_size: of one forward pass on one rank.
    """
    check_batch_sizes(batch_size, micro_batch_size, world)
    return _steps(sequences, position, batch_size, micro_batch_size, rank, world)


def check_batch_sizes(batch_size: int, micro_batch_size: int, world: int) -> None:
    """Raises `ConfigError` when a step does not divide into equal micro-batches on every rank."""
    if batch_size < 1 or micro_batch_size < 1 or batch_size % (micro_batch_size * world):
        raise ConfigError(
            f"batch_size: {batch_size} is not a multiple of micro_batch_size {micro_batch_size} × {world} "
            f"data-parallel ranks; choose a multiple of {max(1, micro_batch_size) * world}"
        )


def _steps(
    sequences: Sequences, position: int, batch_size: int, micro_batch_size: int, rank: int, world: int
) -> Iterator[list[Batch]]:
    share = batch_size // world
    while sequences.num_sequences is None or position + batch_size <= sequences.num_sequences:
        first = position + rank * share
        yield [sequences.batch(s, s + micro_batch_size) for s in range(first, first + share, micro_batch_size)]
        position += batch_size


class ExampleRows:
    """Chat examples as sequences: packed into rows of `seq_len` positions, in a new order each epoch.

    The order of an epoch is a keyed permutation of (seed, epoch). Whole examples are best-fitted into rows;
    with `packing` off, each row holds one. `names` are the sources that `source_ids` count.
    """

    num_sequences = None

    def __init__(self, examples: Examples, seq_len: int, seed: int, pad_id: int, packing: bool = True):
        longest = int(examples.lengths.max())
        if longest > seq_len + 1:
            raise ConfigError(
                f"seq_len: {seq_len} does not hold an example of {longest} tokens; encode with max_tokens={seq_len + 1}"
            )
        self.examples, self.seq_len, self.seed, self.pad_id, self.names = (
            examples,
            seq_len,
            seed,
            pad_id,
            examples.names,
        )
        self.rows = best_fit(examples.lengths, seq_len + 1) if packing else [[item] for item in range(len(examples))]

    def __len__(self) -> int:
        """Rows of one epoch."""
        return len(self.rows)

    def epoch(self, position: int) -> float:
        """Epochs behind `position`."""
        return position / len(self.rows)

    def batch(self, start: int, stop: int) -> Batch:
        """The micro-batch of the sequences [start, stop)."""
        epochs, slots = np.divmod(np.arange(start, stop), len(self.rows))
        chosen = permute(slots, len(self.rows), key(self.seed, "examples", epochs))
        return self._gather([self.rows[row] for row in chosen.tolist()])

    def _gather(self, rows: list[list[int]]) -> Batch:
        shape, data = (len(rows), self.seq_len + 1), self.examples
        ids, learnt = np.full(shape, self.pad_id, dtype=np.int32), np.zeros(shape, dtype=bool)
        sources, lengths = np.zeros(shape, dtype=np.int16), []
        for row, members in enumerate(rows):
            place = 0
            for member in members:
                begin, end = data.offsets[member], data.offsets[member + 1]
                target = slice(place, place + end - begin)
                ids[row, target], learnt[row, target] = data.ids[begin:end], data.learnt[begin:end]
                sources[row, target] = data.sources[member]
                place = target.stop
            lengths.append(data.lengths[members])
        return to_batch(ids, lengths, learnt, sources)
