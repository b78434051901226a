"""What was really read, by source: the check that a blend was what its plan says."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bloomery.data.plan import Plan
from bloomery.errors import DivergenceError


class Ledger:
    """Counts sequences and tokens as they are read. Ledgers of several ranks, or of parts of a run, add up."""

    def __init__(self, sources: Sequence[str], rows: Sequence[int]):
        self.sources, self.rows = tuple(sources), tuple(rows)
        self.sequences = np.zeros(len(self.sources), dtype=np.int64)
        self.tokens = np.zeros(len(self.sources), dtype=np.int64)

    def add(self, source: np.ndarray, tokens: np.ndarray) -> None:
        """Some sequences were read: (n,) their source indices and token counts."""
        np.add.at(self.sequences, source, 1)
        np.add.at(self.tokens, source, tokens)

    def __add__(self, other: "Ledger") -> "Ledger":
        result = Ledger(self.sources, self.rows)
        result.sequences, result.tokens = self.sequences + other.sequences, self.tokens + other.tokens
        return result

    def summary(self) -> dict[str, dict[str, Any]]:
        """Source → sequences, tokens, epochs."""
        columns = zip(self.sources, self.rows, self.sequences.tolist(), self.tokens.tolist(), strict=True)
        return {
            name: {"sequences": sequences, "tokens": tokens, "epochs": round(sequences / max(1, rows), 4)}
            for name, rows, sequences, tokens in columns
        }

    def verify(self, plan: Plan, start: int, stop: int) -> None:
        """Raises `DivergenceError` naming the first source not read as often as the plan says for [start, stop)."""
        planned = np.bincount(plan.order(start, stop)[0], minlength=len(self.sources))
        for name, expected, found in zip(self.sources, planned.tolist(), self.sequences.tolist(), strict=True):
            if expected != found:
                raise DivergenceError(
                    f"source {name}: {found} sequences were read in [{start}, {stop}), the plan says {expected}; "
                    "the data of this run is not its blend"
                )
