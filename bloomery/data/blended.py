"""What stage `blend` leaves, served to training: a plan's sequences with random access, and held-out rows."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bloomery import artifact
from bloomery.data import loader
from bloomery.data.ledger import Ledger
from bloomery.data.pack import Batch, to_batch
from bloomery.data.plan import Plan
from bloomery.data.tokens import RowFile, shard
from bloomery.errors import ArtifactError

PLAN, VALIDATION, TOKENIZER = "plan.json", "validation", "tokenizer"
_WINDOW = 1024  # sequences drawn at once: batches are smaller, and finding the way costs the same for few and many


class BlendedRows:
    """The product of the stage: a plan's sequences with random access, and the validation rows.

    `names` are the sources, in the order that `source_ids` count. `ledger` counts what this process really read.
    `phase_ends`: where the phases of the settings end, in sequences. Raises `ArtifactError` where a file is missing or
    does not hold the rows that the plan counts on: a rank that went on without them would read another blend.
    """

    def __init__(self, path: Path):
        artifact.resolve(Path(path), "dataset")
        artifact.require_kind(Path(path), "tokens")
        stored = artifact.read_json(Path(path) / PLAN)
        self.plan, self.seq_len, self.vocab_size = Plan.from_json(stored), stored["seq_len"], stored["vocab_size"]
        self.names, self.phase_ends = self.plan.sources, stored.get("phase_ends", self.plan.ends)
        self._files: dict[str, str] = stored.get("files", {})
        self._rows = [RowFile(shard(Path(path) / artifact.DATA, name)) for name in self.names]
        for name, planned, rows in zip(self.names, self.plan.rows, self._rows, strict=True):
            if len(rows) != planned:
                raise ArtifactError(
                    f"{shard(Path(path) / artifact.DATA, name)}: holds {len(rows)} rows, the plan counts on {planned}; "
                    "copy the whole folder, or run the stage `blend` again"
                )
        held_out = {name: shard(Path(path) / VALIDATION, name) for name in self.names}
        self._validation = {name: RowFile(file) for name, file in held_out.items() if file.exists()}
        self.ledger = Ledger(self.names, self.plan.rows)
        self._window, self._drawn = range(0), (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))

    @property
    def num_sequences(self) -> int:
        """Length of the plan."""
        return self.plan.num_sequences

    def identity(self, position: int) -> str:
        """What the first `position` sequences are: equal for two blends that agree on them and differ afterwards."""
        begun = self.plan.until(position)
        used = [
            (name, rows, self._files.get(name), [phase[index] for phase in begun.counts])
            for index, (name, rows) in enumerate(zip(begun.sources, begun.rows, strict=True))
            if any(phase[index] for phase in begun.counts)
        ]
        text = json.dumps([begun.seed, begun.lengths, self.seq_len, used])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def batch(self, start: int, stop: int) -> Batch:
        """The micro-batch of the sequences [start, stop)."""
        source, row = self._draw(start, stop)
        taken = [self._rows[s].take(r) for s, r in zip(source.tolist(), row.tolist(), strict=True)]
        lengths = [item[1] for item in taken]
        self.ledger.add(source, row, np.array([item.sum() for item in lengths]))
        return to_batch(np.stack([item[0] for item in taken]), lengths, sources=source)

    def _draw(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and row of [start, stop), out of a window that the next batches share."""
        if start not in self._window or stop > self._window.stop:
            self._window = range(start, max(stop, min(start + _WINDOW, self.num_sequences)))
            self._drawn = self.plan.draw(self._window.start, self._window.stop)[:2]
        part = slice(start - self._window.start, stop - self._window.start)
        return self._drawn[0][part], self._drawn[1][part]

    def batches(
        self, position: int, batch_size: int, micro_batch_size: int, rank: int = 0, world: int = 1
    ) -> Iterator[list[Batch]]:
        """The micro-batches of one step after another, from `position` to the end of the plan."""
        return loader.batches(self, position, batch_size, micro_batch_size, rank, world)

    def ledger_summary(self, ledger: Ledger) -> dict[str, dict[str, Any]]:
        """What a ledger counted, with the tokens that were read at least once."""
        return ledger.summary([rows.tokens for rows in self._rows])

    def validation(self, micro_batch_size: int, max_rows: int | None = None) -> Iterator[Batch]:
        """Held-out rows, source after source, at most `max_rows` of each; `source_ids` tell them apart."""
        for name, rows in self._validation.items():
            source, last = self.names.index(name), min(len(rows), max_rows or len(rows))
            for start in range(0, last, micro_batch_size):
                taken = [rows.take(row) for row in range(start, min(start + micro_batch_size, last))]
                sources = np.full(len(taken), source)
                yield to_batch(np.stack([item[0] for item in taken]), [item[1] for item in taken], sources=sources)
