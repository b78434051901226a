"""What was really read, by source: the check that a blend was what its plan says."""

import base64
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bloomery.data.plan import Plan
from bloomery.errors import DivergenceError

TRACKED_ROWS = 2**20
"""At most so many rows are counted one by one; of a larger blend every k-th row of every source."""


class Ledger:
    """Counts what is read: sequences and tokens by source, and how often each row.

    Ledgers of several ranks, or of parts of a run, add up. `reads`: per source, reads of the rows 0, k, 2k, …
    """

    def __init__(self, sources: Sequence[str], rows: Sequence[int]):
        self.sources, self.rows = tuple(sources), tuple(rows)
        self.every = 1 << (max(1, -(-sum(self.rows) // TRACKED_ROWS)) - 1).bit_length()
        self.sequences = np.zeros(len(self.sources), dtype=np.int64)
        self.tokens = np.zeros(len(self.sources), dtype=np.int64)
        sizes = [-(-count // self.every) for count in self.rows]
        self._starts = np.cumsum([0, *sizes])
        self._reads = np.zeros(self._starts[-1], dtype=np.int32)

    @property
    def reads(self) -> list[np.ndarray]:
        """Per source, how often each tracked row was read."""
        return np.split(self._reads, self._starts[1:-1])

    def add(self, source: np.ndarray, row: np.ndarray, tokens: np.ndarray) -> None:
        """Some sequences were read: (n,) their source indices, rows and token counts."""
        np.add.at(self.sequences, source, 1)
        np.add.at(self.tokens, source, tokens)
        tracked = row % self.every == 0
        np.add.at(self._reads, self._starts[source[tracked]] + row[tracked] // self.every, 1)

    def __add__(self, other: "Ledger") -> "Ledger":
        result = Ledger(self.sources, self.rows)
        result.sequences, result.tokens = self.sequences + other.sequences, self.tokens + other.tokens
        result._reads = self._reads + other._reads
        return result

    def summary(self, row_tokens: Sequence[np.ndarray] | None = None) -> dict[str, dict[str, Any]]:
        """Source → sequences, tokens, epochs, most reads of one row; with the tokens of each row, unique tokens too."""
        found = {}
        for index, (name, rows, reads) in enumerate(zip(self.sources, self.rows, self.reads, strict=True)):
            sequences, tokens = int(self.sequences[index]), int(self.tokens[index])
            found[name] = {"sequences": sequences, "tokens": tokens, "epochs": round(sequences / max(1, rows), 4)}
            if row_tokens is not None:
                found[name]["unique_tokens"] = int(row_tokens[index][:: self.every][reads > 0].sum()) * self.every
            found[name]["most_reads"] = int(reads.max(initial=0))
        return found

    def verify(self, plan: Plan, start: int, stop: int) -> None:
        """Raises `DivergenceError` naming the first source not read as often as the plan says for [start, stop).

        From the start of the plan, every row is checked too: two rows of a source differ by at most one read, or some
        were read again before others were read at all, as when a phase starts its sources anew.
        """
        planned = plan.counts_at(stop) - plan.counts_at(start)
        for name, expected, found in zip(self.sources, planned.tolist(), self.sequences.tolist(), strict=True):
            if expected != found:
                raise DivergenceError(
                    f"source {name}: {found} sequences were read in [{start}, {stop}), the plan says {expected}; "
                    "the data of this run is not its blend"
                )
        if start == 0:
            self._verify_rows(planned)

    def _verify_rows(self, planned: np.ndarray) -> None:
        for name, rows, drawn, reads in zip(self.sources, self.rows, planned.tolist(), self.reads, strict=True):
            least, most = drawn // max(1, rows), -(-drawn // max(1, rows))
            wrong = np.flatnonzero((reads < least) | (reads > most))
            if len(wrong):
                expected = f"{least}" if least == most else f"{least} or {most}"
                raise DivergenceError(
                    f"source {name}: row {wrong[0] * self.every} was read {reads[wrong[0]]} times after {drawn} "
                    f"sequences of {rows} rows, the plan says {expected}; rows were replayed or left out"
                )

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads back, small enough for a checkpoint."""
        packed = base64.b64encode(zlib.compress(self._reads.tobytes(), 6)).decode("ascii")
        counts = {"sequences": self.sequences.tolist(), "tokens": self.tokens.tolist()}
        return {"sources": list(self.sources), "rows": list(self.rows), "every": self.every, **counts, "reads": packed}

    def add_json(self, data: Mapping[str, Any]) -> None:
        """Add what `to_json` said: of a ledger over these sources, or over fewer of them."""
        part = Ledger(data["sources"], data["rows"])
        part.sequences, part.tokens = np.array(data["sequences"]), np.array(data["tokens"])
        part._reads = np.frombuffer(zlib.decompress(base64.b64decode(data["reads"])), dtype=np.int32)
        for index, name in enumerate(part.sources):
            place = self.sources.index(name)
            self.sequences[place] += part.sequences[index]
            self.tokens[place] += part.tokens[index]
            mine = slice(self._starts[place], self._starts[place + 1])
            self._reads[mine] += part.reads[index][:: self.every // data["every"]]
